# pyright: basic, reportArgumentType=false, reportAssignmentType=false
# (What `triton.jit` compiles looks like Python and is not: its values have no Python types.)
"""Decoding the blocks of GGUF files; `reference_blocks.py` has the formulas.

Blocks are decoded a unit at a time, whose scales are read once: 32 values of a small kind, 64 of Q4_K and Q5_K (what
the low and the high halves of 32 bytes are), 128 of Q6_K. Codes come in words: of four bytes where blocks have whole ones, else
of two. Which value of the unit a code is follows from how it was taken out of its word, and `tl.permute` puts it there.
Every operation rounds by itself (launch with `fuse=False`), so that values are the reference's bit for bit.

KIND is the place of a block's kind in `BLOCK_SIZES`. Letters: R rows and U units of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def low_half(word):
    """The float16 in the lower 16 bits of an integer, as float32."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def number_of(code, less):
    """code - less of codes below 2^23, as float32: put behind a float's leading bit they are one sum away from it."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + less)


@triton.jit
def bytes_of(words, WIDE: tl.constexpr):
    """words (R, U, n) of 4 bytes where WIDE, else of 2 -> their bytes (R, U, 4 n or 2 n), upper bits left as they are."""
    if WIDE:
        words = tl.join(words, words >> 16)
        words = tl.reshape(words, (words.shape[0], words.shape[1], 2 * words.shape[2]))
    parts = tl.join(words, words >> 8)
    return tl.reshape(parts, (parts.shape[0], parts.shape[1], 2 * parts.shape[2]))


@triton.jit
def halves_of(parts):
    """parts (R, U, n) -> the lower 4 bits of all, then the upper: (R, U, 2, n)."""
    return tl.permute(tl.join(parts & 15, (parts >> 4) & 15), (0, 1, 3, 2))


@triton.jit
def q8_units(stored, unit, inside):
    """Blocks of q8_0, 34 bytes: (R, U, 32) float32."""
    start = stored + unit * 17
    at = tl.expand_dims(start, 2) + 1 + tl.arange(0, 16)
    words = tl.load(at, mask=tl.expand_dims(inside, 2), other=0).to(tl.int32)
    codes = tl.join((words << 24) >> 24, words >> 8)  # with their signs
    values = tl.reshape(codes, (inside.shape[0], inside.shape[1], 32)).to(tl.float32)
    return tl.expand_dims(low_half(tl.load(start, mask=inside, other=0)), 2) * values


@triton.jit
def small_units(stored, unit, inside, KIND: tl.constexpr):
    """Blocks of q4_0, q4_1, q5_0 and q5_1, 18 to 24 bytes: (R, U, 32) float32."""
    wide_inside = tl.expand_dims(inside, 2)
    if KIND % 2 == 1:
        whole = stored.to(tl.pointer_type(tl.int32), bitcast=True) + unit * (5 + KIND // 2)
        head = tl.load(whole, mask=inside, other=0)
        at = tl.expand_dims(whole, 2) + 1 + KIND // 2 + tl.arange(0, 4)
        codes = halves_of(bytes_of(tl.load(at, mask=wide_inside, other=0), True))
        if KIND == 3:
            fifth = tl.load(whole + 1, mask=inside, other=0)
    else:
        start = stored + unit * (9 + KIND)
        head = tl.load(start, mask=inside, other=0).to(tl.int32)
        words = tl.load(tl.expand_dims(start, 2) + 1 + KIND + tl.arange(0, 8), mask=wide_inside, other=0)
        codes = halves_of(bytes_of(words.to(tl.int32), False))
        if KIND == 2:
            lower = tl.load(start + 1, mask=inside, other=0).to(tl.int32) & 0xFFFF
            fifth = lower | (tl.load(start + 2, mask=inside, other=0).to(tl.int32) << 16)
    codes = tl.reshape(codes, (inside.shape[0], inside.shape[1], 32))
    if KIND >= 2:
        codes |= (tl.expand_dims(fifth, 2) >> tl.arange(0, 32) & 1) << 4
    less: tl.constexpr = 0.0 if KIND % 2 == 1 else 8.0 * (1 + KIND // 2)
    values = tl.expand_dims(low_half(head), 2) * number_of(codes, less)
    if KIND % 2 == 1:
        values += tl.expand_dims(low_half(head >> 16), 2)
    return values


@triton.jit
def large_units(stored, unit, inside, KIND: tl.constexpr):
    """Quarters of q4_k and q5_k: (R, U, 64) float32."""
    whole = stored.to(tl.pointer_type(tl.int32), bitcast=True) + (unit // 4) * (36 + 8 * (KIND - 5))
    quarter = unit % 4
    wide_inside = tl.expand_dims(inside, 2)
    head = tl.load(whole, mask=inside, other=0)
    part = 2 * (tl.expand_dims(quarter, 2) % 2) + tl.arange(0, 2)  # (R, U, 2): of the first or the last four
    low = tl.expand_dims(tl.load(whole + 1, mask=inside, other=0), 2) >> (8 * part)
    high = tl.expand_dims(tl.load(whole + 2, mask=inside, other=0), 2) >> (8 * part)
    rest = tl.expand_dims(tl.load(whole + 3, mask=inside, other=0), 2) >> (8 * part)
    first = tl.expand_dims(quarter, 2) < 2
    scale = tl.where(first, low & 63, (rest & 15) | (low >> 2 & 48)).to(tl.float32)
    lowest = tl.where(first, high & 63, (rest >> 4 & 15) | (high >> 2 & 48)).to(tl.float32)
    scale = scale * tl.expand_dims(low_half(head), 2)
    lowest = lowest * tl.expand_dims(low_half(head >> 16), 2)
    at = tl.expand_dims(whole + 4 + 8 * (KIND - 5) + 8 * quarter, 2) + tl.arange(0, 8)
    codes = halves_of(bytes_of(tl.load(at, mask=wide_inside, other=0), True))  # (R, U, 2, 32)
    if KIND == 6:
        fifth = bytes_of(tl.load(tl.expand_dims(whole + 4, 2) + tl.arange(0, 8), mask=wide_inside, other=0), True)
        places = 2 * tl.expand_dims(quarter, 2) + tl.arange(0, 2)
        codes |= (tl.expand_dims(fifth, 2) >> tl.expand_dims(places, 3) & 1) << 4
    values = tl.expand_dims(scale, 3) * number_of(codes, 0.0) - tl.expand_dims(lowest, 3)
    return tl.reshape(values, (inside.shape[0], inside.shape[1], 64))


@triton.jit
def q6_units(stored, unit, inside):
    """Halves of q6_k: (R, U, 128) float32."""
    start = stored + (unit // 2) * 105
    half = unit % 2
    wide_inside = tl.expand_dims(inside, 2)
    at = tl.expand_dims(start + 32 * half, 2) + tl.arange(0, 32)
    low = bytes_of(tl.load(at, mask=wide_inside, other=0).to(tl.int32), False)  # (R, U, 64)
    at = tl.expand_dims(start + 64 + 16 * half, 2) + tl.arange(0, 16)
    high = bytes_of(tl.load(at, mask=wide_inside, other=0).to(tl.int32), False)  # (R, U, 32)
    # Value i of the half has its lower bits in byte i % 64, its upper ones in byte i % 32.
    low = tl.reshape(halves_of(low), (inside.shape[0], inside.shape[1], 4, 32))
    high = tl.expand_dims(high << 4, 2) >> tl.expand_dims(2 * tl.arange(0, 4), 1)  # (R, U, 4, 32)
    codes = number_of(low | (high & 48), 32.0)
    scales = start.to(tl.pointer_type(tl.int8), bitcast=True) + 192 + 8 * half
    scale = tl.load(tl.expand_dims(scales, 2) + tl.arange(0, 8), mask=wide_inside, other=0).to(tl.float32)
    scale = scale * tl.expand_dims(low_half(tl.load(start + 104, mask=inside, other=0)), 2)  # (R, U, 8)
    values = tl.reshape(codes, (inside.shape[0], inside.shape[1], 8, 16))
    return tl.reshape(tl.expand_dims(scale, 3) * values, (inside.shape[0], inside.shape[1], 128))


@triton.jit
def units(stored, unit, inside, KIND: tl.constexpr):
    """The values of units: (R, U, values of one) float32, finite ones where not `inside` (R, U).

    `stored` points at a row's words of two bytes, (R, 1), `unit` is the number of a unit in the row, (1, U).
    """
    if KIND == 4:
        return q8_units(stored, unit, inside)
    elif KIND < 5:
        return small_units(stored, unit, inside, KIND)
    elif KIND == 7:
        return q6_units(stored, unit, inside)
    else:
        return large_units(stored, unit, inside, KIND)


@triton.jit
def words_of_row(inner, KIND: tl.constexpr):
    """How many words of two bytes a row of `inner` values has."""
    if KIND == 4:
        return inner // 32 * 17
    elif KIND < 5:
        return inner // 32 * (9 + KIND)
    elif KIND == 7:
        return inner // 256 * 105
    else:
        return inner // 256 * (72 + 16 * (KIND - 5))


@triton.jit
def tile(stored, start, row, there, column, inner, SIDE: tl.constexpr, KIND: tl.constexpr):
    """W[row, column : column + SIDE] (R, SIDE) float32 for `product.few_rows`; `start` is 0.

    Anything finite where a row is not `there`, or from `inner` on; `column` and SIDE are multiples of a unit.
    """
    UNIT: tl.constexpr = 32 if KIND < 5 else 128 if KIND == 7 else 64
    across = column // UNIT + tl.arange(0, SIDE // UNIT)[None, :]
    rows = stored + row[:, None].to(tl.int64) * words_of_row(inner, KIND)
    inside = there[:, None] & (across < inner // UNIT)
    return tl.reshape(units(rows, across, inside, KIND), (row.shape[0], SIDE))


@triton.jit
def dequantize(stored, out, count, KIND: tl.constexpr, TILE: tl.constexpr):
    """out (count,) = all values; a program takes TILE of them."""
    UNIT: tl.constexpr = 32 if KIND < 5 else 128 if KIND == 7 else 64
    first = tl.program_id(0).to(tl.int64) * TILE
    unit = tl.arange(0, TILE // UNIT)[None, :]
    begin = stored + words_of_row(first, KIND) + tl.zeros((1, 1), dtype=tl.int32)
    values = tl.reshape(units(begin, unit, first + unit * UNIT < count, KIND), (TILE,))
    place = first + tl.arange(0, TILE)
    tl.store(out + place, values.to(out.dtype.element_ty), mask=place < count)
