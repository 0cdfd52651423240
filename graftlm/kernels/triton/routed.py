"""Low-rank terms routed by token on a GPU.

A table of tiles (factor index, first token, last token) and the addresses of all A and B are inputs, so one launch handles
any mixture of adapters and ranks.

    forward        h = s x A^T        shrink over `in`       y += h B^T        expand over `out`
    backward       dh = s dy B        shrink over `out`      dx += dh A        expand over `in`

The gradients to A and B are sums over a pair's own tokens: plain matmuls in a loop over ranges.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from graftlm.kernels import reference
from graftlm.kernels.gpu_low_rank import factor_gradient
from graftlm.kernels.routing import FactorList, FactorRange, Routing
from graftlm.kernels.self_check import close, sample
from graftlm.kernels.transfer import to_device
from graftlm.kernels.triton.device import STAGES, ceil, launch, needs_upcast

LARGEST_RANK = 128  # one program holds a whole row of h; larger ranks go to the reference
WIDE = 64  # columns of y in a program that expands


def shrink_summed(dtype: torch.dtype, padded: int) -> int:
    """How much of `wide` a program sums at a time. Float32 is multiplied without tensor cores, from registers: there less."""
    return 16 if dtype == torch.float32 else 32 if padded > 64 else 64


def expand_summed(dtype: torch.dtype, padded: int) -> int:
    """How many of R ranks a program sums at a time."""
    return min(padded, 16 if dtype == torch.float32 else 64)


@functools.lru_cache(maxsize=4096)
def _table(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on a GPU, cached: every layer of every micro-batch uses the same."""
    return to_device([torch.tensor(numbers, dtype=dtype)], device)[0]


@functools.lru_cache(maxsize=256)
def _tiles(ranges: tuple[FactorRange, ...], ranks: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """(factor index, first token, last token) of each tile, one after the other, and how many tokens a tile has at most."""
    longest = max((last - first for factor_index, first, last in ranges if ranks[factor_index]), default=0)
    tokens = 64 if longest > 32 else 32 if longest > 16 else 16
    tiles = (
        (factor_index, begin, min(begin + tokens, last))
        for factor_index, first, last in ranges
        if ranks[factor_index]
        for begin in range(first, last, tokens)
    )
    return tuple(number for tile in tiles for number in tile), tokens


class _Routes:
    """Tiles and factors of one call in the kernels' form; keeps the tensors alive that the addresses point at."""

    def __init__(self, routing: Routing, like: Tensor) -> None:
        ranges, A, B = routing.ranges, routing.A, routing.B
        # Serving keeps B transposed in memory: then it is read as it lies.
        self.transposed = all(b is None or b.T.is_contiguous() for b in B)
        sides = (A, [b if b is None or not self.transposed else b.T for b in B])
        self.matrices = [
            [None if m is None else m.detach().to(like.dtype).contiguous() for m in side] for side in sides
        ]
        ranks = tuple(0 if a is None or b is None else len(a) for a, b in zip(A, B, strict=True))
        self.largest = max((ranks[factor_index] for factor_index, first, last in ranges if first < last), default=0)
        tiles, self.tokens = _tiles(tuple(ranges), ranks)
        self.count, device = len(tiles) // 3, like.device
        self.tiles, self.ranks = (_table(numbers, torch.int32, device) for numbers in (tiles, ranks))
        self.scale = _table(tuple(routing.scale), torch.float32, device)
        self.pointers = [
            _table(tuple(0 if m is None else m.data_ptr() for m in side), torch.int64, device) for side in self.matrices
        ]

    @property
    def padded(self) -> int:
        """The least power of two that the tensor cores take and every rank fits."""
        return max(16, 1 << (self.largest - 1).bit_length())

    def shrink(self, x: Tensor, side: int, scaled: bool) -> Tensor:
        """h (tokens, largest rank) = x M^T, M = A (side 0) or B^T (side 1); rows outside all tiles are not written."""
        h = torch.empty(len(x), self.largest, dtype=x.dtype, device=x.device)
        if self.count:
            launch(
                "routed", "shrink", (self.count,), x,
                x, x.stride(0), self.tiles, self.pointers[side], self.ranks, self.scale, h, h.stride(0), x.shape[1],
                RANK_FIRST=side == 0 or self.transposed, SCALED=scaled, TOKENS=self.tokens, R=self.padded,
                SUMMED=shrink_summed(x.dtype, self.padded), UPCAST=needs_upcast(x), num_stages=STAGES, fuse=True,
            )  # fmt: skip
        return h

    def expand(self, h: Tensor, y: Tensor, side: int, scaled: bool) -> None:
        """y += h M in place, M = A (side 0) or B^T (side 1)."""
        if self.count:
            launch(
                "routed", "expand", (self.count, ceil(y.shape[1], WIDE)), y,
                h, h.stride(0), self.tiles, self.pointers[side], self.ranks, self.scale, y, y.stride(0), y.shape[1],
                RANK_FIRST=side == 0 or self.transposed, SCALED=scaled, TOKENS=self.tokens, R=self.padded, WIDE=WIDE,
                SUMMED=expand_summed(h.dtype, self.padded), UPCAST=needs_upcast(h), num_stages=STAGES, fuse=True,
            )  # fmt: skip


def fits(x: Tensor, y: Tensor, routing: Routing) -> bool:
    """Whether the routed kernels take these: one float type, rows without gaps inside, ranks up to LARGEST_RANK.

    Not for a single range: that is two plain matmuls, for the vendor's library.
    """
    ranks = [len(a) for a in routing.A if a is not None]
    return (
        len(routing.ranges) > 1
        and x.dtype == y.dtype
        and x.stride(1) == y.stride(1) == 1
        and max(ranks, default=0) <= LARGEST_RANK
    )


def low_rank_routed(y: Tensor, x: Tensor, routing: Routing) -> list[Tensor | None]:
    """As the reference's: y += s (x A^T) B^T, each range with its factor pair; returns h = s x A^T of each range."""
    routes = _Routes(routing, x)
    h = routes.shrink(x, 0, scaled=True)  # (tokens, R)
    routes.expand(h, y, 1, scaled=False)
    return [
        None if a is None or routing.B[factor_index] is None or first == last else h[first:last, : len(a)]
        for (factor_index, first, last) in routing.ranges
        for a in (routing.A[factor_index],)
    ]


def low_rank_routed_backward(
    dy: Tensor,
    x: Tensor,
    hidden: Sequence[Tensor | None],
    routing: Routing,
    dx: Tensor | None = None,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """As the reference's: gradients to each factor pair's A and B; the one to x is added to `dx`."""
    routes = _Routes(routing, dy)
    dh = routes.shrink(dy, 1, scaled=True)  # (tokens, R)
    if dx is not None:
        routes.expand(dh, dx, 0, scaled=False)
    dA: list[Tensor | None] = [None] * len(routing.A)
    dB: list[Tensor | None] = [None] * len(routing.B)
    for (factor_index, first, last), h in zip(routing.ranges, hidden, strict=True):
        a, b = routing.A[factor_index], routing.B[factor_index]
        if h is None or a is None or b is None:
            continue
        dtype = routing.gradient_dtype
        da = factor_gradient(dh[first:last, : len(a)], x[first:last], dtype or a.dtype)  # (r, in)
        db = factor_gradient(dy[first:last], h, dtype or b.dtype)  # (out, r)
        old_a, old_b = dA[factor_index], dB[factor_index]
        dA[factor_index] = da if old_a is None else old_a.add_(da)
        dB[factor_index] = db if old_b is None else old_b.add_(db)
    return dA, dB


# ---- the check before first use -----------------------------------------------------------------------------------


def check(device: torch.device) -> bool:
    """Mixed ranks, ranges without an adapter and tokens in none, B as training and as serving keep it; there and back."""
    A: FactorList = [None, sample(3, 23, device=device), sample(17, 23, device=device)]
    B: FactorList = [None, sample(70, 3, device=device), sample(70, 17, device=device)]
    ranges, scale = [(1, 0, 4), (0, 4, 5), (2, 5, 40), (1, 41, 43)], [1.0, 0.5, 2.0]
    x, dy = sample(43, 23, device=device), sample(43, 70, device=device)
    transposed: FactorList = [b if b is None else b.T.contiguous().T for b in B]
    outcomes: list[list[Tensor]] = []
    # The expected result in float64: a GPU's float32 matmul may use TF32, depending on PyTorch's settings.
    for routed, backward, dtype, own in (
        (low_rank_routed, low_rank_routed_backward, torch.float32, B),
        (low_rank_routed, low_rank_routed_backward, torch.float32, transposed),
        (reference.low_rank_routed, reference.low_rank_routed_backward, torch.float64, B),
    ):
        y, dx = torch.ones(43, 70, dtype=dtype, device=device), torch.ones(43, 23, dtype=dtype, device=device)
        routing = Routing(ranges, A, own, scale)
        hidden = routed(y, x.to(dtype), routing)
        backward(dy.to(dtype), x.to(dtype), hidden, routing, dx)
        outcomes.append([y.float(), dx.float()])
    *found, truth = outcomes
    return all(close(ours, wanted) for ours in found for ours, wanted in zip(ours, truth, strict=True))
