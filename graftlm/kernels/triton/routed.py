"""Low-rank terms routed by token on a GPU.

A table of tiles (3, tiles: factor index, first token, last token of each) and the addresses of all A and B are inputs, so one
launch handles any mixture of adapters and ranks.

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
from graftlm.kernels.routing import TABLE_TOKENS, FactorList, FactorRange, FactorTable, Routing, tiles_of
from graftlm.kernels.self_check import close, sample
from graftlm.kernels.triton.device import STAGES, ceil, constants, launch, needs_upcast

LARGEST_RANK = 128  # one program holds a whole row of h; larger ranks go to the reference
WIDE = 64  # columns of y in a program that expands


def shrink_summed(dtype: torch.dtype, padded: int) -> int:
    """How much of `wide` a program sums at a time. Float32 is multiplied without tensor cores, from registers: there less."""
    return 16 if dtype == torch.float32 else 32 if padded > 64 else 64


def expand_summed(dtype: torch.dtype, padded: int) -> int:
    """How many of R ranks a program sums at a time."""
    return min(padded, 16 if dtype == torch.float32 else 64)


@functools.lru_cache(maxsize=256)
def _tiles(ranges: tuple[FactorRange, ...], ranks: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """The factor index of each tile, then the first token of each, then the last; and how many tokens a tile has at most."""
    longest = max((last - first for factor_index, first, last in ranges if ranks[factor_index]), default=0)
    tokens = 64 if longest > 32 else 32 if longest > 16 else 16
    tiles = tiles_of([part for part in ranges if ranks[part[0]]], tokens)
    return tuple(number for field in zip(*tiles) for number in field), tokens


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
        self.tiles, self.ranks = (constants(numbers, torch.int32, device) for numbers in (tiles, ranks))
        self.scale = constants(tuple(routing.scale), torch.float32, device)
        self.pointers = [
            constants(tuple(0 if m is None else m.data_ptr() for m in side), torch.int64, device)
            for side in self.matrices
        ]

    def shrink(self, x: Tensor, side: int) -> Tensor:
        """h (tokens, largest rank) = s x M^T, M = A (side 0) or B^T (side 1); rows outside all tiles are not written."""
        h = torch.empty(len(x), self.largest, dtype=x.dtype, device=x.device)
        if self.count:
            _shrink(
                x, h, self.tiles, self.count, self.pointers[side], self.ranks, self.scale, self.tokens,
                side == 0 or self.transposed,
            )  # fmt: skip
        return h

    def expand(self, h: Tensor, y: Tensor, side: int) -> None:
        """y += h M in place, M = A (side 0) or B^T (side 1)."""
        if self.count:
            _expand(
                h, y, self.tiles, self.count, self.pointers[side], self.ranks, self.scale, self.tokens,
                side == 0 or self.transposed,
            )  # fmt: skip


def _padded(rank: int) -> int:
    """The least power of two that the tensor cores take and the rank fits."""
    return max(16, 1 << (rank - 1).bit_length())


def _shrink(
    x: Tensor, h: Tensor, tiles: Tensor, count: int, pointers: Tensor, ranks: Tensor, scale: Tensor, tokens: int,
    rank_first: bool,
) -> None:  # fmt: skip
    padded = _padded(h.shape[1])
    launch(
        "routed", "shrink", (count,), x, x, x.stride(0), tiles, pointers, ranks, scale, h, h.stride(0), x.shape[1],
        RANK_FIRST=rank_first, SCALED=True, TOKENS=tokens, R=padded, SUMMED=shrink_summed(x.dtype, padded),
        UPCAST=needs_upcast(x), num_stages=STAGES, fuse=True,
    )  # fmt: skip


def _expand(
    h: Tensor, y: Tensor, tiles: Tensor, count: int, pointers: Tensor, ranks: Tensor, scale: Tensor, tokens: int,
    rank_first: bool,
) -> None:  # fmt: skip
    padded = _padded(h.shape[1])
    launch(
        "routed", "expand", (count, ceil(y.shape[1], WIDE)), y, h, h.stride(0), tiles, pointers, ranks, scale, y, y.stride(0),
        y.shape[1], RANK_FIRST=rank_first, SCALED=False, TOKENS=tokens, R=padded, WIDE=WIDE,
        SUMMED=expand_summed(h.dtype, padded), UPCAST=needs_upcast(h), num_stages=STAGES, fuse=True,
    )  # fmt: skip


def add_by_table(y: Tensor, x: Tensor, table: FactorTable, tiles: Tensor, largest: int) -> None:
    """As the reference's, for ranks up to `largest`; what is launched depends on the shapes alone."""
    h = torch.empty(len(x), largest, dtype=x.dtype, device=x.device)
    _shrink(x, h, tiles, tiles.shape[1], table.A, table.ranks, table.scale, TABLE_TOKENS, True)
    _expand(h, y, tiles, tiles.shape[1], table.B, table.ranks, table.scale, TABLE_TOKENS, True)


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
    h = routes.shrink(x, 0)  # (tokens, R)
    routes.expand(h, y, 1)
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
    dh = routes.shrink(dy, 1)  # (tokens, R)
    if dx is not None:
        routes.expand(dh, dx, 0)
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
    if not all(close(ours, wanted) for ours in found for ours, wanted in zip(ours, truth, strict=True)):
        return False
    factors = [(a.contiguous(), b.T.contiguous()) for a, b in zip(A[1:], B[1:]) if a is not None and b is not None]
    table = FactorTable(
        torch.tensor([0, *(a.data_ptr() for a, _ in factors), 0], device=device),
        torch.tensor([0, *(b.data_ptr() for _, b in factors), 0], device=device),
        torch.tensor([0, *(len(a) for a, _ in factors), 0], dtype=torch.int32, device=device),
        torch.tensor([*scale, 0.0], device=device),
    )
    tiles = torch.tensor([*tiles_of(ranges, TABLE_TOKENS), (0, 0, 0)], device=device).T.contiguous()
    y = torch.ones(43, 70, device=device)
    add_by_table(y, x, table, tiles, 17)
    return close(y, truth[0])
