# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# (What `triton.jit` compiles looks like Python and is not: its values have no Python types.)
"""One fused AdamW step, memory read and written once; `reference_adamw.py` has the formula and the reasons.

Every operation rounds by itself (launch with `fuse=False`), divisions and roots as IEEE 754 wants them, so the
results are the reference's bit for bit.

A program takes BLOCKS blocks of 256 values, the values that share a scale in 8-bit moments.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(word):
    """Wellons' lowbias32 of 32-bit words without signs."""
    word = word ^ (word >> 16)
    word = word * tl.full((), 0x7FEB352D, tl.uint32)
    word = word ^ (word >> 15)
    word = word * tl.full((), 0x846CA68B, tl.uint32)
    return word ^ (word >> 16)


@triton.jit
def shares_of(values, inside):
    """Each block's largest magnitude (BLOCKS,), and the values' magnitudes as shares of it (BLOCKS, 256)."""
    # As integers: they order the magnitudes of floats, and put what is not a number above all that is.
    bits = tl.where(inside, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    scale = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
    divisor = tl.where(scale == 0.0, 1.0, scale)
    sizes = bits.to(tl.float32, bitcast=True)
    return scale, tl.div_rn(sizes, tl.broadcast_to(divisor[:, None], sizes.shape))


@triton.jit
def pick(shares, bits, parts, OFFSET: tl.constexpr, LARGEST: tl.constexpr):
    """`Code.pick`: the number of one of the two magnitudes beside each share, by 15 random bits."""
    decade = tl.zeros_like(bits)
    for d in tl.static_range(1, 8):
        decade += tl.where(shares >= tl.load(parts + d), 1, 0)
    start, density = tl.load(parts + decade), tl.load(parts + 8 + decade)
    last, bend = tl.load(parts + 16 + decade), tl.load(parts + 24 + decade)
    place = (shares - start) * density
    place = tl.where(place > last, (place - last) * bend + last, place)
    place = tl.minimum(place + (bits.to(tl.float32) + 0.5) * 0.000030517578125, 256.0)  # 2^-15
    return tl.minimum(place.to(tl.int32) + last.to(tl.int32) + OFFSET, LARGEST)


@triton.jit(do_not_specialize=["start", "turn"])
def step(
    parameter, gradient, mean, square, mean_scale, square_scale, mean_code, square_code, mean_parts, square_parts, gate,
    count, factor, beta1, rest1, beta2, rest2, epsilon, decay, rate, fix, start, turn,
    GATED: tl.constexpr, ROUNDED: tl.constexpr, EIGHT: tl.constexpr, BLOCKS: tl.constexpr, ZERO: tl.constexpr,
    OTHER_BITS: tl.constexpr,
):  # fmt: skip
    """`parameter` is float32, or the 16-bit integers of a bfloat16 tensor where ROUNDED; moments are codes where EIGHT.

    `mean_parts` and `square_parts` (4, 8) are starts, density, last and bend of a code, those of no decade first. Nothing is
    stored where GATED and the number at `gate` is not finite.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    i = block[:, None] * 256 + tl.arange(0, 256)[None, :]  # (BLOCKS, 256)
    if GATED:
        count = tl.where(tl.abs(tl.load(gate)) < float("inf"), count, 0)
    inside = i < count
    whole = block * 256 < count
    g = tl.load(gradient + i, mask=inside, other=0.0).to(tl.float32) * factor
    if ROUNDED:
        held = tl.load(parameter + i, mask=inside, other=0)
        p = (held.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        p = tl.load(parameter + i, mask=inside, other=0.0)
    if EIGHT:
        m = tl.load(mean_code + tl.load(mean + i, mask=inside, other=ZERO).to(tl.int32))
        m = m * tl.load(mean_scale + block, mask=whole, other=0.0)[:, None]
        v = tl.load(square_code + tl.load(square + i, mask=inside, other=0).to(tl.int32))
        v = v * tl.load(square_scale + block, mask=whole, other=0.0)[:, None]
    else:
        m = tl.load(mean + i, mask=inside, other=0.0)
        v = tl.load(square + i, mask=inside, other=0.0)
    m = m * beta1 + g * rest1
    v = v * beta2 + g * g * rest2
    bottom = tl.sqrt_rn(v) * fix + epsilon
    p = p * decay - tl.div_rn(m, bottom) * rate
    words = mix(mix(i.to(tl.uint32) + start.to(tl.uint32)) ^ turn.to(tl.uint32))
    if ROUNDED:
        raised = p.to(tl.uint32, bitcast=True) + (words & 0xFFFF)
        tl.store(parameter + i, (raised >> 16).to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)
    else:
        tl.store(parameter + i, p, mask=inside)
    if EIGHT:
        words = mix(words ^ OTHER_BITS)
        scale, shares = shares_of(m, inside)
        tl.store(mean_scale + block, scale, mask=whole)
        size = pick(shares, (words & 0x7FFF).to(tl.int32), mean_parts, 1, 128)
        signed = tl.where(m < 0, -tl.minimum(size, ZERO), size)  # the code has 1 and no -1
        tl.store(mean + i, (signed + ZERO).to(tl.uint8), mask=inside)
        scale, shares = shares_of(v, inside)
        tl.store(square_scale + block, scale, mask=whole)
        size = pick(shares, (words >> 17).to(tl.int32), square_parts, 0, 255)
        size = tl.where((v > 0) & (size == 0), 1, size)  # never zero where there was a gradient
        tl.store(square + i, size.to(tl.uint8), mask=inside)
    else:
        tl.store(mean + i, m, mask=inside)
        tl.store(square + i, v, mask=inside)


@triton.jit
def steps(table, numbers, beta1, rest1, beta2, rest2, epsilon, fix, TILE: tl.constexpr):
    """`step` of many float32 parameters with float32 moments: program (i, j) takes values i TILE ... of parameter j.

    Row j of `table` (n, 8) has the addresses of parameter, gradient, mean and square and their number of values, and, as the
    float32 `numbers` (n, 16) from 10 on: factor, decay, rate.
    """
    row, own = table + tl.program_id(1) * 8, numbers + tl.program_id(1) * 16 + 10
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = i < tl.load(row + 4)
    parameter = tl.load(row).to(tl.pointer_type(tl.float32))
    gradient = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    mean = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    square = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    g = tl.load(gradient + i, mask=inside, other=0.0) * tl.load(own)
    m = tl.load(mean + i, mask=inside, other=0.0) * beta1 + g * rest1
    v = tl.load(square + i, mask=inside, other=0.0) * beta2 + g * g * rest2
    bottom = tl.sqrt_rn(v) * fix + epsilon
    p = tl.load(parameter + i, mask=inside, other=0.0)
    tl.store(parameter + i, p * tl.load(own + 1) - tl.div_rn(m, bottom) * tl.load(own + 2), mask=inside)
    tl.store(mean + i, m, mask=inside)
    tl.store(square + i, v, mask=inside)
