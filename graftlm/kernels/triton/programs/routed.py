# pyright: basic
# (What `triton.jit` compiles looks like Python and is not: its values have no Python types.)
"""Low-rank terms routed by token: one launch handles any mixture of adapters and ranks.

Each program takes one tile of tokens with the same factor pair, finds its matrix by its address, and accumulates in float32.
A tile whose factor pair has rank 0, or without tokens, does nothing: a table of tiles may have room for more than there are.

Letters: x (tokens, in), y (tokens, out); a factor pair's A (r, in) and B (out, r), h (tokens, R) with R >= every r.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graftlm.kernels.triton.programs.dot import dot


@triton.jit
def tile_of(tiles, pointers, ranks, like, TOKENS: tl.constexpr):
    """This program's factor index, its rank and matrix, the tile's tokens (TOKENS,), and which of them there are."""
    tile, count = tl.program_id(0), tl.num_programs(0)
    factor_index, first, last = tl.load(tiles + tile), tl.load(tiles + count + tile), tl.load(tiles + 2 * count + tile)
    matrix = tl.load(pointers + factor_index).to(tl.pointer_type(like.dtype.element_ty))
    token = first + tl.arange(0, TOKENS)
    return factor_index, tl.load(ranks + factor_index), matrix, token, token < last


@triton.jit
def shrink(
    x, x_stride, tiles, pointers, ranks, scales, h, h_stride, wide,
    RANK_FIRST: tl.constexpr, SCALED: tl.constexpr, TOKENS: tl.constexpr, R: tl.constexpr, SUMMED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """h[t, :r] = x[t] @ M.T for each tile of tokens, M (r, wide) its factor pair's A, or B transposed when not RANK_FIRST."""
    factor_index, rank, matrix, token, there = tile_of(tiles, pointers, ranks, x, TOKENS)
    r = tl.arange(0, R)
    total = tl.zeros((TOKENS, R), dtype=tl.float32)
    for begin in range(0, tl.where(rank > 0, wide, 0), SUMMED):
        w = begin + tl.arange(0, SUMMED)
        x_inside = there[:, None] & (w[None, :] < wide)
        part = tl.load(x + token[:, None].to(tl.int64) * x_stride + w[None, :], mask=x_inside, other=0.0)
        place = r[None, :] * wide + w[:, None] if RANK_FIRST else w[:, None] * rank + r[None, :]  # (SUMMED, R)
        columns = tl.load(matrix + place, mask=(w[:, None] < wide) & (r[None, :] < rank), other=0.0)
        total = dot(part, columns, total, UPCAST)
    if SCALED:
        total = total * tl.load(scales + factor_index)
    inside = there[:, None] & (r[None, :] < h_stride)
    tl.store(h + token[:, None].to(tl.int64) * h_stride + r[None, :], total.to(h.dtype.element_ty), mask=inside)


@triton.jit
def expand(
    h, h_stride, tiles, pointers, ranks, scales, y, y_stride, wide,
    RANK_FIRST: tl.constexpr, SCALED: tl.constexpr, TOKENS: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr,
    SUMMED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y[t] += h[t, :r] @ M for each tile of tokens, M (r, wide) its factor pair's A, or B transposed when not RANK_FIRST.

    SUMMED of the R columns of h at a time: what a program holds of a large rank would not fit its registers.
    """
    factor_index, rank, matrix, token, there = tile_of(tiles, pointers, ranks, h, TOKENS)
    w = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    total = tl.zeros((TOKENS, WIDE), dtype=tl.float32)
    for begin in range(0, R, SUMMED):
        r = begin + tl.arange(0, SUMMED)
        h_inside = there[:, None] & (r[None, :] < rank)
        part = tl.load(h + token[:, None].to(tl.int64) * h_stride + r[None, :], mask=h_inside, other=0.0)
        place = r[:, None] * wide + w[None, :] if RANK_FIRST else w[None, :] * rank + r[:, None]  # (SUMMED, WIDE)
        rows = tl.load(matrix + place, mask=(w[None, :] < wide) & (r[:, None] < rank), other=0.0)
        total = dot(part, rows, total, UPCAST)
    if SCALED:
        total = total * tl.load(scales + factor_index)
    inside = there[:, None] & (w[None, :] < wide)
    target = y + token[:, None].to(tl.int64) * y_stride + w[None, :]
    total = total + tl.load(target, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, total.to(y.dtype.element_ty), mask=inside)
