"""The two moments of AdamW for a parameter, in 32 or in 8 bits, as plain tensors.

    float32    4 bytes a value and moment
    8 bits     one code a value and moment, and one float32 scale for each block of 256: 1.016 bytes

Eight bits as Dettmers et al. 2022 ("8-bit Optimizers via Block-wise Quantization") have them: value i is
`code[codes[i]] * scale[i // 256]`, the scale is the block's largest magnitude, the code a dynamic tree: signed for the
mean, unsigned for the mean square. Neither is a tensor subclass: a checkpoint holds them as they are.

Letters: n values of the parameter, b = ceil(n / 256) blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOMENT_BLOCK = 256  # values that share one scale
SMALL = 4096  # parameters with fewer values keep float32 moments, which are small; norms and biases need them
ZERO_MEAN_CODE = 127  # the signed code that stands for 0


@dataclass(frozen=True, eq=False)
class Moments:
    """m and v of one parameter; the scales are set if they are in 8 bits."""

    mean: Tensor  # (n,) float32, or uint8: codes of the signed dynamic type
    square: Tensor  # (n,) float32, or uint8: codes of the unsigned dynamic type
    mean_scale: Tensor | None = None  # (b,) float32
    square_scale: Tensor | None = None  # (b,) float32

    @property
    def eight_bit(self) -> bool:
        return self.mean_scale is not None

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, for saving and counting."""
        named = {
            "mean": self.mean, "square": self.square, "mean_scale": self.mean_scale, "square_scale": self.square_scale,
        }  # fmt: skip
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def check(self, count: int) -> None:
        """Raise ValueError unless these are moments of `count` values, since they may come from a file."""
        blocks = -(-count // MOMENT_BLOCK)
        eight_bit = self.eight_bit
        kind, size = (torch.uint8, blocks) if eight_bit else (torch.float32, None)
        for name, tensor in self.tensors().items():
            wanted = (torch.float32, size) if name.endswith("_scale") else (kind, count)
            if (tensor.dtype, tensor.numel()) != wanted:
                raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {wanted[1]} {wanted[0]}")
        if len(self.tensors()) != (4 if eight_bit else 2):
            raise ValueError(f"found {', '.join(self.tensors())} alone")

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())


def zero_moments(count: int, *, eight_bit: bool, device: torch.device, pinned: bool = False) -> Moments:
    """Moments of a parameter of `count` values before its first step, optionally in `pinned` memory for a GPU."""

    def made(size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device, pin_memory=pinned)

    if not eight_bit:
        return Moments(made(count, torch.float32), made(count, torch.float32))
    blocks = -(-count // MOMENT_BLOCK)
    return Moments(
        made(count, torch.uint8).fill_(ZERO_MEAN_CODE),
        made(count, torch.uint8),
        made(blocks, torch.float32),
        made(blocks, torch.float32),
    )
