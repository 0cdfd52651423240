# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# (What `triton.jit` compiles looks like Python and is not: its values have no Python types.)
"""LoRA's dropout; `counter_rng.py` has the hash that decides what is kept.

    dropped                                  drop(x) in one pass over memory
    shrink   expand   factor_gradient        the products of LoRA that have a drop(x) in them, which is never in memory

The products are those of several layers with the same input, whose masks differ: A (sum of r, in) has the layers' A below each
other, layer m has rows offsets[m] .. offsets[m + 1] of it and the same columns of h (tokens, sum of r).
"""

from __future__ import annotations

import triton
import triton.language as tl

from graftlm.kernels.triton.programs.adamw import mix
from graftlm.kernels.triton.programs.dot import dot


@triton.jit
def kept(key, column, module_key, threshold):
    """Which columns (C,) of the tokens with hashed keys (T,) are kept, (T, C)."""
    columns = mix(column.to(tl.uint32)) ^ module_key.to(tl.uint32)
    return mix(key[:, None] ^ mix(columns)[None, :]).to(tl.int32, bitcast=True) >= threshold


@triton.jit
def dropped_tile(x, x_stride, token, there, keys, column, inside, module_key, threshold, factor):
    """drop(x)[token, column] (T, C), rounded to x's dtype."""
    key = mix(tl.load(keys + token, mask=there, other=0).to(tl.uint32, bitcast=True))
    place = x + token[:, None].to(tl.int64) * x_stride + column[None, :]
    value = tl.load(place, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
    value = tl.where(kept(key, column, module_key, threshold), value * factor, 0.0)
    return value.to(x.dtype.element_ty)


@triton.jit(do_not_specialize=["module_key", "threshold"])
def dropped(x, row_stride, keys, out, features, module_key, threshold, scale, TILE: tl.constexpr):
    """out (rows, features) = x (rows, features) times `scale` where it is kept, times 0 elsewhere; keys (rows,) int32."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < features
    key = mix(tl.load(keys + row).to(tl.uint32, bitcast=True))
    columns = mix(column.to(tl.uint32)) ^ module_key.to(tl.uint32)
    words = mix(key ^ mix(columns))
    factor = tl.where(words.to(tl.int32, bitcast=True) >= threshold, scale, 0.0)
    value = tl.load(x + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * features + column, value * factor, mask=inside)


@triton.jit(do_not_specialize=["threshold"])
def shrink(
    x, x_stride, keys, module_keys, offsets, A, h, h_stride, tokens, wide, scale, threshold, factor,
    TOKENS: tl.constexpr, R: tl.constexpr, SUMMED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """h (tokens, sum of r) = scale * drop(x) A^T, each layer with its own mask; x (tokens, wide)."""
    token, module = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1)
    there = token < tokens
    first, module_key = tl.load(offsets + module), tl.load(module_keys + module)
    r = first + tl.arange(0, R)
    own = r < tl.load(offsets + module + 1)
    total = tl.zeros((TOKENS, R), dtype=tl.float32)
    for begin in range(0, wide, SUMMED):
        w = begin + tl.arange(0, SUMMED)
        part = dropped_tile(x, x_stride, token, there, keys, w, w < wide, module_key, threshold, factor)
        columns = tl.load(A + r[None, :] * wide + w[:, None], mask=(w[:, None] < wide) & own[None, :], other=0.0)
        total = dot(part, columns, total, UPCAST)
    place = token[:, None].to(tl.int64) * h_stride + r[None, :]
    tl.store(h + place, (total * scale).to(h.dtype.element_ty), mask=there[:, None] & own[None, :])


@triton.jit(do_not_specialize=["threshold"])
def factor_gradient(
    dh, dh_stride, x, x_stride, keys, module_keys, offsets, dA, tokens, wide, threshold, factor,
    R: tl.constexpr, WIDE: tl.constexpr, SUMMED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dA (sum of r, wide) = dh^T drop(x), dh (tokens, sum of r)."""
    w, module = tl.program_id(0) * WIDE + tl.arange(0, WIDE), tl.program_id(1)
    first, module_key = tl.load(offsets + module), tl.load(module_keys + module)
    r = first + tl.arange(0, R)
    own = r < tl.load(offsets + module + 1)
    total = tl.zeros((R, WIDE), dtype=tl.float32)
    for begin in range(0, tokens, SUMMED):
        token = begin + tl.arange(0, SUMMED)
        there = token < tokens
        right = dropped_tile(x, x_stride, token, there, keys, w, w < wide, module_key, threshold, factor)
        place = token[None, :].to(tl.int64) * dh_stride + r[:, None]
        left = tl.load(dh + place, mask=own[:, None] & there[None, :], other=0.0)  # (R, SUMMED)
        total = dot(left, right, total, UPCAST)
    inside = own[:, None] & (w[None, :] < wide)
    tl.store(dA + r[:, None] * wide + w[None, :], total.to(dA.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["threshold"])
def expand(
    dh, dh_stride, keys, module_keys, offsets, A, dx, dx_stride, tokens, wide, modules, threshold, factor,
    TOKENS: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr, SUMMED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dx (tokens, wide) += the sum over layers of drop(dh A), each with its own mask: the gradient of `shrink` to x."""
    token, w = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    there, inside = token < tokens, w < wide
    key = mix(tl.load(keys + token, mask=there, other=0).to(tl.uint32, bitcast=True))
    total = tl.zeros((TOKENS, WIDE), dtype=tl.float32)
    for module in range(modules):
        first, last = tl.load(offsets + module), tl.load(offsets + module + 1)
        product = tl.zeros((TOKENS, WIDE), dtype=tl.float32)
        for begin in range(0, R, SUMMED):
            r = first + begin + tl.arange(0, SUMMED)
            place = token[:, None].to(tl.int64) * dh_stride + r[None, :]
            part = tl.load(dh + place, mask=there[:, None] & (r[None, :] < last), other=0.0)
            rows = tl.load(A + r[:, None] * wide + w[None, :], mask=(r[:, None] < last) & inside[None, :], other=0.0)
            product = dot(part, rows, product, UPCAST)
        total += tl.where(kept(key, w, tl.load(module_keys + module), threshold), product * factor, 0.0)
    target = dx + token[:, None].to(tl.int64) * dx_stride + w[None, :]
    mask = there[:, None] & inside[None, :]
    tl.store(target, (tl.load(target, mask=mask, other=0.0).to(tl.float32) + total).to(dx.dtype.element_ty), mask=mask)
