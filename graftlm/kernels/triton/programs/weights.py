# pyright: basic
# (What `triton.jit` compiles looks like Python and is not: its values have no Python types.)
"""Dequantizing stored weights, and the matmul of an NF4 weight with few rows.

Each program computes one tile of the result. Codes are decoded in registers, from two tables small enough for the first-level
cache (16 and 256 floats), so a dense weight never exists in memory. Accumulation is in float32. Values are decoded with
separate rounding of multiplication and addition (launch with `enable_fp_fusion=False`), which makes them bit-identical to the
reference.

Letters: x (rows, in), W (out, in), y (rows, out).
"""

from __future__ import annotations

import triton
import triton.language as tl

from graftlm.kernels.triton.programs.dot import dot


@triton.jit
def nf4_values(value, inside, packed, absmax, group_scale, offset, nf4_code, dynamic_code):
    """Decode the values numbered `value` (any shape); 0 where not `inside`."""
    pair = tl.load(packed + value // 2, mask=inside, other=0).to(tl.int32)
    nibble = tl.where(value % 2 == 0, pair >> 4, pair & 15)
    block = value // 64
    coded = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
    product = tl.load(dynamic_code + coded) * tl.load(group_scale + block // 256, mask=inside, other=0.0)
    scale = product + tl.load(offset)
    return tl.where(inside, tl.load(nf4_code + nibble) * scale, 0.0)


@triton.jit
def nf4_dequantize(
    packed, absmax, group_scale, offset, nf4_code, dynamic_code, out, start, count, TILE: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = i < count
    values = nf4_values(start + i, inside, packed, absmax, group_scale, offset, nf4_code, dynamic_code)
    tl.store(out + i, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def int8_dequantize(values, scale, out, inner, count, TILE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = i < count
    dense = tl.load(values + i, mask=inside, other=0).to(tl.float32) * tl.load(
        scale + i // inner, mask=inside, other=0.0
    )
    tl.store(out + i, dense.to(out.dtype.element_ty), mask=inside)


@triton.jit
def nf4_matmul(
    x, packed, absmax, group_scale, offset, nf4_code, dynamic_code, y, start, rows, summed, made, inner, row_stride,
    TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, MADE: tl.constexpr, SUMMED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """y (rows, made) = x (rows, summed) @ W.T, or @ W when TRANSPOSED; W (out, in) with `inner` = in."""
    row = tl.arange(0, ROWS)
    column = tl.program_id(0).to(tl.int64) * MADE + tl.arange(0, MADE)
    total = tl.zeros((ROWS, MADE), dtype=tl.float32)
    for first in range(0, summed, SUMMED):
        k = first + tl.arange(0, SUMMED)
        x_inside = (row[:, None] < rows) & (k[None, :] < summed)
        part = tl.load(x + row[:, None] * row_stride + k[None, :], mask=x_inside, other=0.0)  # (ROWS, SUMMED)
        if TRANSPOSED:
            value = start + k[:, None].to(tl.int64) * inner + column[None, :]
        else:
            value = start + column[None, :] * inner + k[:, None]
        inside = (k[:, None] < summed) & (column[None, :] < made)
        weight = nf4_values(value, inside, packed, absmax, group_scale, offset, nf4_code, dynamic_code)
        total = dot(part, weight.to(part.dtype), total, UPCAST)  # (ROWS, MADE)
    y_inside = (row[:, None] < rows) & (column[None, :] < made)
    tl.store(y + row[:, None].to(tl.int64) * made + column[None, :], total.to(y.dtype.element_ty), mask=y_inside)
