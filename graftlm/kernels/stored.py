"""The three compressed forms in which a frozen weight is stored, as plain tensors.

    Nf4         4.127 bits a value: 4-bit codes in blocks of 64, each block with an 8-bit scale, 256 scales with one float32
    Int8        8 bits a value and one float32 scale for each row
    GgufBlocks  4.5 to 8.5 bits a value: the quantized blocks of a GGUF file, byte for byte

Neither is a tensor subclass: a form is a few tensors and a shape, so saving, moving and counting need only its fields. Slices
along the first dimension share those tensors (`weight[3]` of stacked experts copies nothing).

Letters: n values in a weight, b = ceil(n / 64) blocks, g = ceil(b / 256) groups of blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK = 64  # values that share one absmax
GROUP = 256  # absmax values that share one absmax of their own


@dataclass(frozen=True, eq=False)
class Nf4:
    """A weight in 4-bit NormalFloat with double quantization (Dettmers et al. 2023, section 3).

    Value i of the flattened weight is `NF4_CODE[nibble i] * absmax i // 64`, where
    `absmax j = DYNAMIC_CODE[absmax[j]] * absmax_scale[j // 256] + offset`.
    """

    packed: Tensor  # (ceil(n / 2),) uint8; value 2i is the high half of byte i
    absmax: Tensor  # (b,) uint8: index into DYNAMIC_CODE
    absmax_scale: Tensor  # (g,) float32
    offset: Tensor  # () float32: mean of the absmax values before they were quantized
    shape: tuple[int, ...]
    start: int = 0  # this weight's first value within `packed`; not 0 only in a slice of a larger weight

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, those of the whole weight when this is a slice of one."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name, for saving and for registering as buffers."""
        return {
            "packed": self.packed,
            "absmax": self.absmax,
            "absmax_scale": self.absmax_scale,
            "offset": self.offset,
        }

    def to(self, device: torch.device | str) -> Nf4:
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def view(self, *shape: int) -> Nf4:
        """The same values in the same order under another shape."""
        if math.prod(shape) != self.numel:
            raise ValueError(f"shape {shape} has {math.prod(shape)} values; this weight {self.shape} has {self.numel}")
        return replace(self, shape=tuple(shape))

    def narrow(self, first: int, count: int) -> Nf4:
        """Rows `first .. first + count` along the first dimension, sharing this weight's tensors."""
        if not 0 <= first <= first + count <= self.shape[0]:
            raise IndexError(f"rows {first}..{first + count} of a weight of shape {self.shape}")
        row = math.prod(self.shape[1:])
        return replace(self, shape=(count, *self.shape[1:]), start=self.start + first * row)

    def __getitem__(self, index: int) -> Nf4:
        """One entry of the first dimension (an expert of a stack), sharing this weight's tensors."""
        part = self.narrow(index, 1)
        return replace(part, shape=self.shape[1:])


@dataclass(frozen=True, eq=False)
class Int8:
    """A weight in 8-bit integers, one scale for each row: `value = values * scale` (scale = row absmax / 127)."""

    values: Tensor  # (..., out, in) int8
    scale: Tensor  # (..., out) float32

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def numel(self) -> int:
        return self.values.numel()

    @property
    def nbytes(self) -> int:
        return self.values.numel() + 4 * self.scale.numel()

    @property
    def device(self) -> torch.device:
        return self.values.device

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name, for saving and for registering as buffers."""
        return {"values": self.values, "scale": self.scale}

    def to(self, device: torch.device | str) -> Int8:
        return Int8(self.values.to(device), self.scale.to(device))

    def narrow(self, first: int, count: int) -> Int8:
        """Rows `first .. first + count` along the first dimension, sharing this weight's tensors."""
        return Int8(self.values.narrow(0, first, count), self.scale.narrow(0, first, count))

    def __getitem__(self, index: int) -> Int8:
        return Int8(self.values[index], self.scale[index])


BLOCK_SIZES: dict[str, tuple[int, int]] = {
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q8_0": (32, 34),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
}
"""(values, bytes) of one block of each kind of `GgufBlocks`, as ggml lays them out."""


def row_bytes(kind: str, inner: int) -> int:
    """Bytes of one row of `inner` values in blocks of `kind`.

    Raises ValueError for an unknown kind, and for a row that is not made of whole blocks.
    """
    if kind not in BLOCK_SIZES:
        raise ValueError(f"blocks of kind {kind!r}; known are {', '.join(BLOCK_SIZES)}")
    values, size = BLOCK_SIZES[kind]
    if inner % values:
        raise ValueError(f"rows of {inner} values in {kind}; a row must be made of whole blocks of {values} values")
    return inner // values * size


@dataclass(frozen=True, eq=False)
class GgufBlocks:
    """A weight in the quantized blocks of a GGUF file. `reference_blocks.py` has the formula of each kind.

    Raises ValueError for an unknown kind, for data that is not uint8, and for rows that are not made of whole blocks.
    """

    data: Tensor  # (..., out, row bytes) uint8
    kind: str  # of BLOCK_SIZES

    def __post_init__(self) -> None:
        row_bytes(self.kind, 0)
        size = BLOCK_SIZES[self.kind][1]
        if self.data.dtype != torch.uint8 or self.data.ndim == 0:
            raise ValueError(f"blocks in {self.data.dtype} of shape {tuple(self.data.shape)}; expected rows of uint8")
        if self.data.shape[-1] % size:
            raise ValueError(f"rows of {self.data.shape[-1]} bytes in {self.kind}; a block has {size} bytes")

    @property
    def shape(self) -> tuple[int, ...]:
        values, size = BLOCK_SIZES[self.kind]
        return (*self.data.shape[:-1], self.data.shape[-1] // size * values)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    @property
    def device(self) -> torch.device:
        return self.data.device

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensor by name, for saving and for registering as a buffer; `kind` is kept beside it."""
        return {"data": self.data}

    def to(self, device: torch.device | str) -> GgufBlocks:
        return GgufBlocks(self.data.to(device), self.kind)

    def contiguous(self) -> GgufBlocks:
        """The same blocks with rows that lie end to end; this weight itself where they do."""
        return self if self.data.is_contiguous() else GgufBlocks(self.data.contiguous(), self.kind)

    def narrow(self, first: int, count: int) -> GgufBlocks:
        """Rows `first .. first + count` along the first dimension, sharing this weight's tensor."""
        return GgufBlocks(self.data.narrow(0, first, count), self.kind)

    def __getitem__(self, index: int) -> GgufBlocks:
        """One entry of the first dimension (an expert of a stack), sharing this weight's tensor."""
        return GgufBlocks(self.data[index], self.kind)


Quantized = Nf4 | Int8 | GgufBlocks
Weight = Tensor | Int8 | Nf4 | GgufBlocks
"""Any weight: dense, or in a stored form."""
