"""LoRA's dropout on a GPU: drop(x) in one launch instead of the twenty of its hash and its mask, and the products that have a
drop(x) in them, each in the one launch that it is without dropout.

Letters: T tokens, `in` features, R = sum of r, the ranks of layers with the same input.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from graftlm.kernels import counter_rng as reference
from graftlm.kernels.routing import Dropout
from graftlm.kernels.self_check import close, sample
from graftlm.kernels.triton.device import FLOATS, STAGES, agree, ceil, constants, launch, needs_upcast

TILE = 1024
TOKENS = 64  # of a program
WIDE = {2: 64, 4: 32}  # columns of x in one that makes them, by bytes of a value: float32 is multiplied from registers
LARGEST_RANK = 128


def _factor(dropout: float, dtype: torch.dtype) -> float:
    """1 / (1 - dropout), rounded as the reference's mask is."""
    return float(torch.tensor(1.0 / (1.0 - dropout), dtype=dtype))


def dropped(x: Tensor, token_keys: Tensor, module_key: int, dropout: float) -> Tensor:
    """x (tokens, in), token_keys (tokens,) int32 -> drop(x) (tokens, in), as `counter_rng.dropped` makes it."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        launch(
            "dropout", "dropped", (len(x), ceil(x.shape[1], TILE)), x, x, x.stride(0), token_keys.contiguous(), out,
            x.shape[1], module_key & 0x7FFFFFFF, reference.threshold(dropout), _factor(dropout, x.dtype), TILE=TILE,
            fuse=False,
        )  # fmt: skip
    return out


def fits(x: Tensor, A: Tensor, ranks: Sequence[int]) -> bool:
    """Whether the products take x (T, in) and A (R, in): one float type, no empty side, ranks up to LARGEST_RANK."""
    return x.dtype in FLOATS and x.dtype == A.dtype and x.numel() > 0 and max(ranks) <= LARGEST_RANK


class _Layers:
    """What all products of some layers need, and how large their programs are."""

    def __init__(self, drops: Dropout, ranks: Sequence[int], like: Tensor) -> None:
        self.keys, device = drops.token_keys.contiguous(), like.device
        self.module_keys = constants(tuple(key & 0x7FFFFFFF for key in drops.module_keys), torch.int32, device)
        self.offsets = constants(tuple(accumulate(ranks, initial=0)), torch.int32, device)
        self.numbers = reference.threshold(drops.dropout), _factor(drops.dropout, like.dtype)
        self.padded = max(16, 1 << (max(ranks) - 1).bit_length())
        self.summed = 16 if like.dtype == torch.float32 else 32 if self.padded > 64 else 64
        self.wide = WIDE[like.element_size()]
        self.upcast = needs_upcast(like)


def shrink(x: Tensor, A: Tensor, ranks: Sequence[int], scale: float, drops: Dropout) -> Tensor:
    """scale * drop(x) A^T (T, R) of x (T, in) and A (R, in), whose layers have `ranks` rows and their own mask each."""
    x, of = x if x.stride(1) == 1 else x.contiguous(), _Layers(drops, ranks, x)
    h = torch.empty(len(x), len(A), dtype=x.dtype, device=x.device)
    launch(
        "dropout", "shrink", (ceil(len(x), TOKENS), len(ranks)), x, x, x.stride(0), of.keys, of.module_keys, of.offsets,
        A.contiguous(), h, h.stride(0), len(x), x.shape[1], scale, *of.numbers, TOKENS=TOKENS, R=of.padded, SUMMED=of.summed,
        UPCAST=of.upcast, num_stages=STAGES, fuse=True,
    )  # fmt: skip
    return h


def factor_gradient(dh: Tensor, x: Tensor, ranks: Sequence[int], drops: Dropout, dtype: torch.dtype) -> Tensor:
    """dh^T drop(x) (R, in) in `dtype`: the gradient of `shrink` to A, for dh (T, R) with the scale in it."""
    x, of = x if x.stride(1) == 1 else x.contiguous(), _Layers(drops, ranks, x)
    dA = torch.empty(dh.shape[1], x.shape[1], dtype=dtype, device=x.device)
    launch(
        "dropout", "factor_gradient", (ceil(x.shape[1], of.wide), len(ranks)), x, dh, dh.stride(0), x, x.stride(0), of.keys,
        of.module_keys, of.offsets, dA, len(x), x.shape[1], *of.numbers, R=of.padded, WIDE=of.wide,
        SUMMED=of.summed, UPCAST=of.upcast, num_stages=STAGES, fuse=True,
    )  # fmt: skip
    return dA


def expand(dx: Tensor, dh: Tensor, A: Tensor, ranks: Sequence[int], drops: Dropout) -> None:
    """dx (T, in) += drop(dh A), each layer's part under its own mask: the gradient of `shrink` to x."""
    of = _Layers(drops, ranks, dx)
    launch(
        "dropout", "expand", (ceil(len(dx), TOKENS), ceil(dx.shape[1], of.wide)), dx, dh, dh.stride(0), of.keys, of.module_keys,
        of.offsets, A.contiguous(), dx, dx.stride(0), len(dx), dx.shape[1], len(ranks), *of.numbers, TOKENS=TOKENS,
        R=of.padded, WIDE=of.wide, SUMMED=min(of.padded, of.summed), UPCAST=of.upcast, num_stages=STAGES, fuse=True,
    )  # fmt: skip


# ---- the checks before first use ----------------------------------------------------------------------------------


def check(device: torch.device) -> bool:
    """Whether it keeps and scales what the reference does, in every float type and for rows with gaps between them."""
    keys = torch.arange(-3, 8, dtype=torch.int32, device=device) * 0x1234567
    x = sample(11, 1501, device=device)[:, :1300]
    given = keys, 0x6789ABCD, 0.3
    return all(agree(dropped(x.to(t), *given), reference.dropped(x.to(t), *given)) for t in FLOATS)


def check_products(device: torch.device) -> bool:
    """Three layers of different ranks and masks, against products with the reference's drop(x) in float64."""
    ranks, keys = (3, 17, 5), torch.arange(-30, 41, dtype=torch.int32, device=device) * 0x1234567
    drops = Dropout(keys, (0x6789ABCD, 7, 0x12345678), 0.3)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x, dh = (sample(71, width, step=0.3, device=device).to(dtype) for width in (105, 25))
        A, dx = sample(25, 105, device=device).to(dtype), sample(71, 105, step=1.1, device=device).to(dtype)
        wanted = [torch.zeros(71, 25), torch.zeros(25, 105), dx.double()]
        wanted = [t.to(device=device, dtype=torch.float64) for t in wanted]
        for m, (first, last) in enumerate(zip((0, 3, 20), (3, 20, 25))):
            rows = slice(first, last)
            mask = reference.dropped(torch.ones_like(x), keys, drops.module_keys[m], 0.3).double()
            own = reference.dropped(x, keys, drops.module_keys[m], 0.3).double()
            wanted[0][:, rows] = 0.4 * own @ A[rows].double().T
            wanted[1][rows] = dh[:, rows].double().T @ own
            wanted[2] += mask * (dh[:, rows].double() @ A[rows].double())
        found = [shrink(x, A, ranks, 0.4, drops), factor_gradient(dh, x, ranks, drops, torch.float32), dx.clone()]
        expand(found[2], dh, A, ranks, drops)
        if not all(close(a, b.float(), tolerance) for a, b in zip(found, wanted)):
            return False
    return True
