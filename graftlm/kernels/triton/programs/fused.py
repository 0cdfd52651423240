# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# (What `triton.jit` compiles looks like Python and is not: its values have no Python types.)
"""Norms, gated activations and rotary positions, each in one pass over memory; `reference_fused.py` has the formulas.

Everything is computed in float32 and rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm(x, x_stride, weight, y, r, rows, features, epsilon, offset, ROWS: tl.constexpr, TILE: tl.constexpr):
    """y (rows, features) = x r (weight + offset), r (rows,) = 1 / sqrt(mean(x^2) + epsilon); TILE holds a whole row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (at < features)[None, :]
    value = tl.load(x + row[:, None] * x_stride + at[None, :], mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value, 1) / features + epsilon)  # (ROWS,)
    w = tl.load(weight + at, mask=at < features, other=0.0).to(tl.float32) + offset
    tl.store(y + row[:, None] * features + at[None, :], value * factor[:, None] * w[None, :], mask=inside)
    tl.store(r + row, factor, mask=row < rows)


@triton.jit
def rms_norm_backward(
    dy, dy_stride, x, x_stride, weight, r, dx, dw, rows, features, offset, step,
    WEIGHT: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dx (rows, features), and of each program's rows, `step` apart, their part of dw (programs, features) where WEIGHT."""
    at = tl.arange(0, TILE)
    w = tl.load(weight + at, mask=at < features, other=0.0).to(tl.float32) + offset
    total = tl.zeros((TILE,), dtype=tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, step):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (at < features)[None, :]
        value = tl.load(x + row[:, None] * x_stride + at[None, :], mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(dy + row[:, None] * dy_stride + at[None, :], mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(r + row, mask=row < rows, other=0.0)[:, None]  # (ROWS, 1)
        g = slope * w[None, :]
        mean = (tl.sum(g * value, 1) / features)[:, None]
        tl.store(
            dx + row[:, None] * features + at[None, :], factor * (g - value * (factor * factor * mean)), mask=inside
        )
        if WEIGHT:
            total += tl.sum(slope * value * factor, 0)
    if WEIGHT:
        tl.store(dw + tl.program_id(0).to(tl.int64) * features + at, total, mask=at < features)


@triton.jit
def gated(gate, gate_stride, up, up_stride, y, features, GELU: tl.constexpr, TILE: tl.constexpr):
    """y (rows, features) = act(gate) up."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = at < features
    g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    a = g
    if GELU:
        a = 1.5957691216057308 * (g + 0.044715 * g * g * g)  # sqrt(8 / pi)
    tl.store(y + row * features + at, g * tl.sigmoid(a) * u, mask=inside)


@triton.jit
def gated_backward(
    dy, dy_stride, gate, gate_stride, up, up_stride, dgate, dup, out_stride, features, GELU: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """dgate and dup (rows, features), rows `out_stride` apart; act(g) = g s(a(g)), s the logistic function."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = at < features
    d = tl.load(dy + row * dy_stride + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    a, slope = g, tl.full((TILE,), 1.0, tl.float32)
    if GELU:
        a = 1.5957691216057308 * (g + 0.044715 * g * g * g)
        slope = 1.5957691216057308 * (1 + 0.134145 * g * g)
    s = tl.sigmoid(a)
    tl.store(dgate + row * out_stride + at, d * u * (s + g * s * tl.sigmoid(-a) * slope), mask=inside)
    tl.store(dup + row * out_stride + at, d * g * s, mask=inside)


@triton.jit
def _rotate(
    x, head_stride, y, heads, width, turned, ca, cb, sa, sb,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """y (heads, width) of one token = (a ca - b sa, b cb + a sb, rest) for the halves a and b of x's first `turned` values."""
    half = turned // 2
    at = tl.arange(0, HALF)
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)
        inside = (head < heads)[:, None] & (at < half)[None, :]
        from_ = x + head[:, None] * head_stride + at[None, :]
        to = y + head[:, None] * width + at[None, :]
        a = tl.load(from_, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(from_ + half, mask=inside, other=0.0).to(tl.float32)
        tl.store(to, a * ca[None, :] - b * sa[None, :], mask=inside)
        tl.store(to + half, b * cb[None, :] + a * sb[None, :], mask=inside)
        if REST:
            more = turned + tl.arange(0, REST)
            kept = (head < heads)[:, None] & (more < width)[None, :]
            rest = tl.load(x + head[:, None] * head_stride + more[None, :], mask=kept, other=0.0)
            tl.store(y + head[:, None] * width + more[None, :], rest, mask=kept)


@triton.jit
def rotary(
    q, q_token, q_head, k, k_token, k_head, yq, yk, q_heads, k_heads, width, cos, sin, period, turned,
    BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """yq (tokens, q_heads, width) and yk of one token; its angles are row token % period of cos and sin (period, turned)."""
    token = tl.program_id(0).to(tl.int64)
    half = turned // 2
    at = tl.arange(0, HALF)
    row = (token % period) * turned + at
    ca = tl.load(cos + row, mask=at < half, other=0.0).to(tl.float32)
    cb = tl.load(cos + row + half, mask=at < half, other=0.0).to(tl.float32)
    sa = tl.load(sin + row, mask=at < half, other=0.0).to(tl.float32)
    sb = tl.load(sin + row + half, mask=at < half, other=0.0).to(tl.float32)
    if BACK:  # the transposed rotation
        sa, sb = -sb, -sa
    _rotate(q + token * q_token, q_head, yq + token * q_heads * width, q_heads, width, turned, ca, cb, sa, sb,
            HEADS, HALF, REST)  # fmt: skip
    _rotate(k + token * k_token, k_head, yk + token * k_heads * width, k_heads, width, turned, ca, cb, sa, sb,
            HEADS, HALF, REST)  # fmt: skip
