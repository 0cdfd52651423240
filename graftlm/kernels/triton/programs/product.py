# pyright: basic
# (What `triton.jit` compiles looks like Python and is not: its values have no Python types.)
"""A few rows times a stored weight, which never exists in memory as a dense one: one frame for every stored form.

A program makes all rows of a few columns of y. It decodes W a tile at a time, by the function that it is given, and
accumulates in float32.

Letters: x (rows, in), W (out, in), y (rows, out).
"""

from __future__ import annotations

import triton
import triton.language as tl

from graftlm.kernels.triton.programs.dot import dot


@triton.jit
def few_rows(
    x, stored, y, start, rows, summed, made, inner, row_stride,
    DECODE: tl.constexpr, KIND: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, MADE: tl.constexpr,
    SUMMED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y (rows, made) = x (rows, summed) @ W.T, or @ W when TRANSPOSED; W (out, in) with `inner` = in.

    DECODE(stored, start, row, there, column, inner, SIDE, KIND) gives W[row, column : column + SIDE].
    """
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * MADE + tl.arange(0, MADE)
    total = tl.zeros((ROWS, MADE), dtype=tl.float32)
    for first in range(0, summed, SUMMED):
        k = first + tl.arange(0, SUMMED)
        x_inside = (row[:, None] < rows) & (k[None, :] < summed)
        part = tl.load(x + row[:, None] * row_stride + k[None, :], mask=x_inside, other=0.0)  # (ROWS, SUMMED)
        if TRANSPOSED:
            tile = DECODE(stored, start, k, k < summed, tl.program_id(0) * MADE, inner, MADE, KIND)
        else:
            tile = tl.trans(DECODE(stored, start, column, column < made, first, inner, SUMMED, KIND))
        total = dot(part, tile.to(part.dtype), total, UPCAST)  # (ROWS, MADE)
    y_inside = (row[:, None] < rows) & (column[None, :] < made)
    tl.store(y + row[:, None].to(tl.int64) * made + column[None, :], total.to(y.dtype.element_ty), mask=y_inside)
