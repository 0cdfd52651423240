# pyright: basic
# (What `triton.jit` compiles looks like Python and is not: its values have no Python types.)
"""Decoding NF4 and int8 weights.

NF4 is decoded a block of 64 values at a time: its scale once, and its codes from words of eight, which come in wide loads. The
code's 16 values are looked up in shared memory (`tl.gather`), which takes no 64-bit address for each. Every operation rounds by
itself (launch with `fuse=False`), which makes values bit-identical to the reference.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nf4_blocks(stored, first, block, inside, word_inside):
    """The 64 values of each block `first + block`, block (...,) int32: (..., 64) float32.

    `stored` is (packed in words of 8 codes, absmax, group scale, offset, NF4 code, dynamic code). The scale of a block that is
    not `inside` (...,) is the offset; a word that is not `word_inside` (..., 8) counts as 0.
    """
    packed, absmax, group_scale, offset, nf4_code, dynamic_code = stored
    coded = tl.load(absmax + first + block, mask=inside, other=0).to(tl.int32)
    group = tl.load(group_scale + (first + block) // 256, mask=inside, other=0.0)
    scale = tl.load(dynamic_code + coded) * group + tl.load(offset)
    at = tl.expand_dims(block, -1) * 8 + tl.arange(0, 8)  # (..., 8)
    words = tl.load(packed + first * 8 + at, mask=word_inside, other=0)
    # Within a word the bytes come from the lowest on, within a byte the high half comes first.
    pairs = tl.join(words, words >> 16)
    pairs = tl.join(pairs, pairs >> 8)
    codes = tl.join(pairs >> 4, pairs) & 15  # (..., 8, 2, 2, 2)
    table = tl.load(nf4_code + tl.arange(0, 16))
    values = tl.gather(table, tl.reshape(codes, (codes.numel,)), 0)
    return tl.reshape(values, block.shape + (64,)) * tl.expand_dims(scale, -1)  # noqa: RUF005  (Triton knows no *)


@triton.jit
def nf4_tile(stored, start, row, there, column, inner, SIDE: tl.constexpr, KIND: tl.constexpr):
    """W[row, column : column + SIDE] (ROWS, SIDE) float32 for `product.few_rows`.

    Anything finite where a row is not `there`, or from `inner` on. Value number `start` is W's first; `start`, `inner`,
    `column` and SIDE are multiples of 64.
    """
    across = column // 64 + tl.arange(0, SIDE // 64)
    block = row[:, None] * (inner // 64) + across[None, :]  # (ROWS, SIDE / 64)
    inside = there[:, None] & (across[None, :] < inner // 64)
    values = nf4_blocks(stored, start // 64, block, inside, tl.expand_dims(inside, -1))
    return tl.reshape(values, (row.shape[0], SIDE))


@triton.jit
def nf4_dequantize(stored, out, start, count, words, BLOCKS: tl.constexpr):
    """out (count,) = the values from number `start` on; `words` is the number of those that are stored."""
    first = start // 64 + tl.program_id(0).to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)
    word_inside = first * 8 + block[:, None] * 8 + tl.arange(0, 8) < words  # (BLOCKS, 8)
    inside = (first + block) * 8 < words
    values = tl.reshape(nf4_blocks(stored, first, block, inside, word_inside), (BLOCKS * 64,))
    place = first * 64 - start + tl.arange(0, BLOCKS * 64)
    tl.store(out + place, values.to(out.dtype.element_ty), mask=(place >= 0) & (place < count))


@triton.jit
def int8_dequantize(values, scale, out, inner, TILE: tl.constexpr):
    """out (rows, inner) = values (rows, inner) times each row's scale; a program takes TILE values of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < inner
    value = tl.load(values + row * inner + column, mask=inside, other=0).to(tl.float32) * tl.load(scale + row)
    tl.store(out + row * inner + column, value.to(out.dtype.element_ty), mask=inside)
