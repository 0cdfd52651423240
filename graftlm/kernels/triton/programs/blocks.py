# pyright: basic
# (What `triton.jit` compiles looks like Python and is not: its values have no Python types.)
"""Decoding the blocks of GGUF files; `reference_blocks.py` has the formulas.

Every operation rounds by itself (launch with `fuse=False`), so that values are the reference's bit for bit.
KIND is the place of a block's kind in `BLOCK_SIZES`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def byte_at(blocks, at, inside):
    return tl.load(blocks + at, mask=inside, other=0).to(tl.int32)


@triton.jit
def half_at(blocks, at, inside):
    """The float16 whose first byte is at `at`, which may be odd, as float32."""
    bits = byte_at(blocks, at, inside) | (byte_at(blocks, at + 1, inside) << 8)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def block_values(value, inside, blocks, KIND: tl.constexpr):
    """Decode the values numbered `value` (any shape, int64); 0 where not `inside`."""
    if KIND < 5:
        at = value // 32
        place = (value % 32).to(tl.int32)
        if KIND == 4:  # q8_0
            start = at * 34
            code = byte_at(blocks, start + 2 + place, inside)
            code = tl.where(code > 127, code - 256, code)
            result = half_at(blocks, start, inside) * code.to(tl.float32)
        else:
            start = at * (18 + 2 * KIND)  # q4_0, q4_1, q5_0, q5_1
            header: tl.constexpr = 2 + 2 * (KIND % 2)
            pair = byte_at(blocks, start + header + 4 * (KIND // 2) + place % 16, inside)
            code = tl.where(place < 16, pair & 15, pair >> 4)
            if KIND >= 2:
                code |= (byte_at(blocks, start + header + place // 8, inside) >> (place % 8) & 1) << 4
            if KIND % 2 == 0:
                code -= 8 * (1 + KIND // 2)
            result = half_at(blocks, start, inside) * code.to(tl.float32)
            if KIND % 2 == 1:
                result += half_at(blocks, start + 2, inside)
    else:
        at = value // 256
        place = (value % 256).to(tl.int32)
        part = place // 32
        if KIND == 7:  # q6_k
            start = at * 210
            quarter = part % 4
            pair = byte_at(blocks, start + 64 * (part // 4) + place % 64, inside)
            two = byte_at(blocks, start + 128 + 32 * (part // 4) + place % 32, inside) >> (2 * quarter) & 3
            code = (tl.where(quarter < 2, pair & 15, pair >> 4) | (two << 4)) - 32
            scale = byte_at(blocks, start + 192 + place // 16, inside)
            scale = tl.where(scale > 127, scale - 256, scale)
            result = half_at(blocks, start + 208, inside) * scale.to(tl.float32) * code.to(tl.float32)
        else:  # q4_k, q5_k
            start = at * (144 + 32 * (KIND - 5))
            low = byte_at(blocks, start + 4 + part % 4, inside)
            high = byte_at(blocks, start + 8 + part % 4, inside)
            rest = byte_at(blocks, start + 12 + part % 4, inside)
            scale = tl.where(part < 4, low & 63, (rest & 15) | (low >> 2 & 48))
            lowest = tl.where(part < 4, high & 63, (rest >> 4) | (high >> 2 & 48))
            pair = byte_at(blocks, start + 16 + 32 * (KIND - 5) + 32 * (part // 2) + place % 32, inside)
            code = tl.where(part % 2 == 0, pair & 15, pair >> 4)
            if KIND == 6:
                code |= (byte_at(blocks, start + 16 + place % 32, inside) >> part & 1) << 4
            result = half_at(blocks, start, inside) * scale.to(tl.float32) * code.to(tl.float32)
            result -= half_at(blocks, start + 2, inside) * lowest.to(tl.float32)
    return tl.where(inside, result, 0.0)


@triton.jit
def tile(blocks, start, row, there, column, inner, SIDE: tl.constexpr, KIND: tl.constexpr):
    """W[row, column : column + SIDE] (ROWS, SIDE) float32 for `product.few_rows`; `start` is 0."""
    across = column + tl.arange(0, SIDE)
    inside = there[:, None] & (across[None, :] < inner)
    return block_values(row[:, None].to(tl.int64) * inner + across[None, :], inside, blocks, KIND)


@triton.jit
def dequantize(blocks, out, count, KIND: tl.constexpr, TILE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = i < count
    tl.store(out + i, block_values(i, inside, blocks, KIND).to(out.dtype.element_ty), mask=inside)
