# pyright: basic, reportOperatorIssue=false
# (What `triton.jit` compiles looks like Python and is not: its values have no Python types.)
"""Attention of single tokens over a paged KV cache, read from its blocks.

A program takes all query heads that share one key-value head of one token, so that keys and values are read once, and one of
SPLITS parts of what the token sees: a long text would else be one program's work. `combine` weighs the parts by their sums of
exponentials (flash decoding, Dao et al. 2023). How much a token sees is read on the GPU: a launch depends on the number of
tokens alone.

Letters: q (T, H, D), keys (positions, K, D), values (positions, K, V), out (T, H, V), G = H / K.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graftlm.kernels.triton.programs.dot import dot


@triton.jit
def attend(
    q, q_row, q_head, keys, values, rows, visible, table, table_stride, out, sums, heads, width, value_width, scale, softcap,
    window,
    GROUP: tl.constexpr, GROUP_TILE: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr, SPLITS: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Where SPLITS is 1: out[rows[i]] = the attention of token i. Else `out` (n, H, SPLITS, V) and `sums` (n, H, SPLITS) are
    each part's attention and the logarithm of its sum of exponentials, float32; -infinity for a part that sees nothing."""
    i, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows + i).to(tl.int64)
    seen = tl.load(visible + i).to(tl.int32)
    first = tl.maximum(seen - window, 0) if WINDOWED else 0
    tile = first // POSITIONS
    per_split = (tl.cdiv(seen, POSITIONS) - tile + SPLITS - 1) // SPLITS
    begin = (tile + split * per_split) * POSITIONS
    end = tl.minimum(begin + per_split * POSITIONS, seen)
    g, d, e = tl.arange(0, GROUP_TILE), tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    own = head * GROUP + g  # query heads
    place = row * q_row + own[:, None] * q_head + d[None, :]
    query = tl.load(q + place, mask=(g[:, None] < GROUP) & (d[None, :] < width), other=0.0)  # (GROUP_TILE, WIDTH)
    most = tl.full((GROUP_TILE,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((GROUP_TILE,), dtype=tl.float32)
    summed = tl.zeros((GROUP_TILE, VALUE_WIDTH), dtype=tl.float32)
    key_heads = heads // GROUP
    for at in range(begin, end, POSITIONS):
        p = at + tl.arange(0, POSITIONS)
        there = (p >= first) & (p < end)
        block = tl.load(table + i * table_stride + p // BLOCK, mask=there, other=0).to(tl.int64)
        stored = (block * BLOCK + p % BLOCK) * key_heads + head  # (POSITIONS,)
        inside = there[:, None] & (d[None, :] < width)
        k = tl.load(keys + stored[:, None] * width + d[None, :], mask=inside, other=0.0)  # (POSITIONS, WIDTH)
        scores = dot(query, tl.trans(k), tl.zeros((GROUP_TILE, POSITIONS), dtype=tl.float32), UPCAST) * scale
        if CAPPED:
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))  # softcap * tanh(scores / softcap)
        scores = tl.where(there[None, :], scores, float("-inf"))
        new = tl.maximum(most, tl.max(scores, 1))  # finite: every tile has a position that is seen
        share, kept = tl.exp(scores - new[:, None]), tl.exp(most - new)
        total = total * kept + tl.sum(share, 1)
        inside = there[:, None] & (e[None, :] < value_width)
        v = tl.load(values + stored[:, None] * value_width + e[None, :], mask=inside, other=0.0)
        summed = dot(share.to(v.dtype), v, summed * kept[:, None], UPCAST)
        most = new
    divisor = tl.where(total == 0.0, 1.0, total)
    answer = summed / divisor[:, None]
    wanted = (g[:, None] < GROUP) & (e[None, :] < value_width)
    if SPLITS == 1:
        target = out + (row * heads + own[:, None]) * value_width + e[None, :]
        tl.store(target, answer.to(out.dtype.element_ty), mask=wanted)
    else:
        part = (i.to(tl.int64) * heads + own) * SPLITS + split  # (GROUP_TILE,)
        tl.store(out + part[:, None] * value_width + e[None, :], answer, mask=wanted)
        tl.store(sums + part, most + tl.log(divisor), mask=g < GROUP)


@triton.jit
def combine(parts, sums, rows, out, heads, value_width, VALUE_WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """out[rows[i]] (T, H, V) = the parts (n, H, SPLITS, V) of one head weighed by exp of their `sums` (n, H, SPLITS)."""
    i, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + i).to(tl.int64)
    s, e = tl.arange(0, SPLITS), tl.arange(0, VALUE_WIDTH)
    part = (i.to(tl.int64) * heads + head) * SPLITS + s
    logs = tl.load(sums + part)
    weight = tl.exp(logs - tl.max(logs, 0))
    inside = e[None, :] < value_width
    given = tl.load(parts + part[:, None] * value_width + e[None, :], mask=inside, other=0.0)  # (SPLITS, VALUE_WIDTH)
    answer = tl.sum(given * weight[:, None], 0) / tl.sum(weight, 0)
    target = out + (row * heads + head) * value_width + e
    tl.store(target, answer.to(out.dtype.element_ty), mask=e < value_width)
