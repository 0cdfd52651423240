"""Every kernel in readable PyTorch, on any device: the reference for the faster backends.

**NF4** (Dettmers et al. 2023, "QLoRA"). Weights of a network are close to normally distributed, so the 16 values that
a 4-bit code can stand for are 16 quantiles of a normal distribution scaled to [-1, 1]. Each block of 64 weights is
divided by its largest magnitude (absmax) and each weight replaced by the nearest of the 16. One float32 absmax for 64
weights would cost half a bit a weight, so the absmax values are quantized too: their mean is taken off, and groups of
256 get 8-bit codes (Dettmers 2016, "8-bit approximations"). That makes 4 + 8/64 + 32/(64*256) = 4.127 bits a weight.

Stored bytes and statistics equal those of bitsandbytes on a CPU bit for bit, its rounding included: multiplying by a
reciprocal in whole blocks but dividing in the last part block, which of two equally near codes wins, and the 65536 bins
through which it finds a dynamic code.

Letters: n values, b blocks of 64, g groups of 256 blocks, r rank; x (tokens, in), W (out, in), y (tokens, out),
A (r, in), B (out, r). `matmul_t` multiplies with W untransposed: the gradient of `x @ W.T` to x.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from graftlm.kernels.reference_blocks import blocks_dequantize
from graftlm.kernels.routing import FactorTable, Routing
from graftlm.kernels.stored import BLOCK, GROUP, GgufBlocks, Int8, Nf4, Quantized, Weight

SLAB = 1 << 20  # values worked on at once: bounds temporaries to a few times 4 MiB whatever the weight's size

NF4_CODE = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float32,
)
NF4_MIDPOINTS = (NF4_CODE[:-1] + NF4_CODE[1:]) / 2  # (15,)


def dynamic_code(signed: bool = True) -> Tensor:
    """The 256 values of the dynamic 8-bit type: 7 decades, each with twice the steps of the one below it.

    Without signs there are twice as many steps from 0 to 1.
    """
    values = [0.0, 1.0]
    low = torch.tensor(0.1)  # float32, as the published map was made
    for decade in range(7):
        steps = 2**decade if signed else 2 ** (decade + 1)
        step = ((1 - low) / steps).double()
        k = torch.arange(steps + 1, dtype=torch.float64)
        # From both ends towards the middle, rounded once to float32: what torch.linspace does with vector instructions,
        # written out so that every machine makes the same table.
        edges = torch.where(k < (steps + 1) // 2, low.double() + step * k, 1 - step * (steps - k)).float()
        means = (edges[:-1] + edges[1:]) / 2
        positive = (10 ** (decade - 6) * means).tolist()
        values += positive + ([-value for value in positive] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


DYNAMIC_CODE = dynamic_code()  # (256,)


def _dynamic_bins() -> Tensor:
    """The nearest dynamic code for each of 65536 equal bins of [-1, 1]: as fine as bitsandbytes looks on a CPU."""
    centres = 2 * torch.arange(65536, dtype=torch.float32) / 65535 - 1
    return torch.bucketize(centres, (DYNAMIC_CODE[:-1] + DYNAMIC_CODE[1:]) / 2).to(torch.uint8)


DYNAMIC_BINS = _dynamic_bins()  # (65536,) uint8


# ---- NF4 ----------------------------------------------------------------------------------------------------------


def nf4_quantize(weight: Tensor) -> Nf4:
    """Quantize a float tensor of any shape; temporaries stay below a few slabs plus 1/16 of the weight in float32."""
    flat = weight.detach().reshape(-1)  # (n,)
    n = flat.numel()
    blocks = -(-n // BLOCK)
    packed = torch.empty(-(-n // 2), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=flat.device)
    midpoints = NF4_MIDPOINTS.to(flat.device)
    for first in range(0, n, SLAB):
        slab = flat[first : first + SLAB].float()
        whole = slab.numel() // BLOCK * BLOCK
        values = slab[:whole].view(-1, BLOCK)  # (blocks, 64)
        largest = values.abs().amax(dim=-1)  # (blocks,)
        absmax[first // BLOCK : first // BLOCK + len(largest)] = largest
        scaled = (values * (1.0 / largest.clamp(min=1e-38))[:, None]).reshape(-1)
        if whole < slab.numel():
            rest = slab[whole:]
            largest = rest.abs().amax().clamp(min=1e-38)
            absmax[-1] = largest
            scaled = torch.cat([scaled, rest / largest])
        if scaled.numel() % 2:
            scaled = torch.cat([scaled, scaled.new_zeros(1)])
        codes = torch.bucketize(scaled, midpoints, out_int32=True).to(torch.uint8)
        packed[first // 2 : first // 2 + codes.numel() // 2] = (codes[::2] << 4) | codes[1::2]
    return Nf4(packed, *absmax_quantize(absmax), tuple(weight.shape))


def absmax_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The second quantization: absmax (b,) float32 -> codes (b,) uint8, scale (g,) float32, offset () float32."""
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    centred = absmax - offset
    groups = -(-centred.numel() // GROUP)
    padded = torch.zeros(groups * GROUP, dtype=torch.float32, device=absmax.device)
    padded[: centred.numel()] = centred
    padded = padded.view(groups, GROUP)
    scale = padded.abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(dim=-1)  # (g,)
    value = (padded * (1.0 / scale)[:, None]).clamp(-1, 1)
    # The bin is (value + 1) / 2 * 65535 + 1/2 rounded once, so the product is taken in float64.
    place = ((value + 1) * 0.5).double() * 65535 + 0.5
    bins = place.float().nan_to_num(nan=0.0).int()
    codes = DYNAMIC_BINS.to(absmax.device)[bins]
    codes[scale == 0] = 0
    return codes.view(-1)[: centred.numel()], scale, offset


def nf4_absmax(weight: Nf4, first: int, last: int) -> Tensor:
    """The float32 absmax of blocks first .. last, the second quantization undone."""
    codes = weight.absmax[first:last].int()  # (last - first,)
    group = torch.arange(first, last, device=weight.device) // GROUP
    return DYNAMIC_CODE.to(weight.device)[codes] * weight.absmax_scale[group] + weight.offset


def nf4_dequantize(weight: Nf4, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight as a dense tensor: each value computed in float32, then rounded once to `dtype`."""
    out = torch.empty(weight.numel, dtype=dtype, device=weight.device)
    code = NF4_CODE.to(weight.device)
    end = weight.start + weight.numel
    for first in range(weight.start // BLOCK * BLOCK, end, SLAB):
        last = min(first + SLAB, end)
        pairs = weight.packed[first // 2 : -(-last // 2)]
        nibbles = torch.stack([pairs >> 4, pairs & 15], dim=-1).view(-1)[: last - first]
        absmax = nf4_absmax(weight, first // BLOCK, -(-last // BLOCK)).repeat_interleave(BLOCK)[: last - first]
        values = (code[nibbles.int()] * absmax).to(dtype)
        skip = max(weight.start - first, 0)
        out[first + skip - weight.start : last - weight.start] = values[skip:]
    return out.view(weight.shape)


# ---- int8 ---------------------------------------------------------------------------------------------------------


def int8_quantize(weight: Tensor) -> Int8:
    """Round each row (last dimension) of a float tensor to 255 equal steps of its own largest magnitude."""
    weight = weight.detach()
    rows = weight.reshape(math.prod(weight.shape[:-1]), weight.shape[-1])  # (out, in)
    values = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    scale = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    step = max(SLAB // max(rows.shape[-1], 1), 1)
    for first in range(0, len(rows), step):
        slab = rows[first : first + step].float()
        absmax = slab.abs().amax(dim=-1) if slab.numel() else slab.new_zeros(len(slab))
        scale[first : first + step] = absmax / 127
        inverse = torch.where(absmax > 0, 127 / absmax, 0.0)
        values[first : first + step] = (slab * inverse[:, None]).round().clamp(-127, 127).to(torch.int8)
    return Int8(values.view(weight.shape), scale.view(weight.shape[:-1]))


def int8_dequantize(weight: Int8, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight as a dense tensor: each value computed in float32, then rounded once to `dtype`."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if weight.numel:
        rows, dense, scale = weight.values.flatten(0, -2), out.flatten(0, -2), weight.scale.flatten()
        step = max(SLAB // rows.shape[-1], 1)
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            dense[part] = rows[part].float() * scale[part, None]
    return out


# ---- matmul with a weight ----------------------------------------------------------------------------------


def dequantize(weight: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """Any stored form as a dense tensor of `dtype`."""
    if isinstance(weight, GgufBlocks):
        return blocks_dequantize(weight, dtype)
    return nf4_dequantize(weight, dtype) if isinstance(weight, Nf4) else int8_dequantize(weight, dtype)


def matmul(x: Tensor, weight: Weight) -> Tensor:
    """x (..., in) with W (out, in) dense or stored -> x @ W.T (..., out), in x's type."""
    return x @ _dense(weight, x.dtype).T


def matmul_t(dy: Tensor, weight: Weight) -> Tensor:
    """dy (..., out) with W (out, in) dense or stored -> dy @ W (..., in), in dy's type: the gradient of `matmul` to x."""
    return dy @ _dense(weight, dy.dtype)


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy (rows, out), x (rows, in) -> dy^T x (out, in): the gradient of `matmul` to a dense W."""
    return dy.T @ x


def _dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if isinstance(weight, Tensor) else dequantize(weight, dtype)


# ---- low-rank terms ------------------------------------------------------------------------------------------------


def low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y (tokens, out) += scale * (x A^T) B^T in place; returns x A^T (tokens, r) for `low_rank_backward`."""
    h = x @ A.to(x.dtype).T  # (tokens, r)
    y.addmm_(h.to(y.dtype), B.to(y.dtype).T, alpha=scale)
    return h


def low_rank_backward(
    dy: Tensor, x: Tensor, h: Tensor, A: Tensor, B: Tensor, scale: float, dx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of `low_rank` to A (r, in) and B (out, r), in their types; the one to x is added to `dx`."""
    dh = (dy @ B.to(dy.dtype)).mul_(scale)  # (tokens, r)
    if dx is not None:
        dx.addmm_(dh.to(dx.dtype), A.to(dx.dtype))
    dA = dh.T @ x.to(dh.dtype)  # (r, in)
    dB = (dy.T @ h.to(dy.dtype)).mul_(scale)  # (out, r)
    return dA.to(A.dtype), dB.to(B.dtype)


def low_rank_routed(y: Tensor, x: Tensor, routing: Routing, one: Any = low_rank) -> list[Tensor | None]:
    """`low_rank` where each range of tokens uses its own factor pair, ranks mixed; returns h of each range (None: no adapter).

    Tokens in no range, or in one whose pair is None, stay as they are. `one` does a single range.
    """
    hidden: list[Tensor | None] = []
    for factor_index, first, last in routing.ranges:
        a, b = routing.A[factor_index], routing.B[factor_index]
        if a is None or b is None or first == last:
            hidden.append(None)
        else:
            hidden.append(one(y[first:last], x[first:last], a, b, routing.scale[factor_index]))
    return hidden


def low_rank_routed_backward(
    dy: Tensor,
    x: Tensor,
    hidden: Sequence[Tensor | None],
    routing: Routing,
    dx: Tensor | None = None,
    one: Any = low_rank_backward,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients to each factor pair's A and B, summed over its ranges (None for a pair no range uses); dx is added to."""
    dA: list[Tensor | None] = [None] * len(routing.A)
    dB: list[Tensor | None] = [None] * len(routing.B)
    for (factor_index, first, last), h in zip(routing.ranges, hidden, strict=True):
        a, b = routing.A[factor_index], routing.B[factor_index]
        if h is None or a is None or b is None:
            continue
        part = dx[first:last] if dx is not None else None
        da, db = one(dy[first:last], x[first:last], h, a, b, routing.scale[factor_index], part)
        old_a, old_b = dA[factor_index], dB[factor_index]
        dA[factor_index] = da if old_a is None else old_a.add_(da)
        dB[factor_index] = db if old_b is None else old_b.add_(db)
    return dA, dB


def add_by_table(y: Tensor, x: Tensor, table: FactorTable, tiles: Tensor) -> None:
    """y (tokens, out) += s (x A^T) B^T in place, on a CPU: `tiles` (3, n) are an entry, first token, last token."""

    def matrix(address: Tensor, rows: int, columns: int) -> Tensor:
        memory: Any = (ctypes.c_char * (rows * columns * x.element_size())).from_address(int(address))
        return torch.frombuffer(memory, dtype=x.dtype).view(rows, columns)

    for entry, first, last in tiles.T.tolist():
        rank = int(table.ranks[entry])
        if rank and first < last:
            A, B = matrix(table.A[entry], rank, x.shape[1]), matrix(table.B[entry], rank, y.shape[1]).T
            low_rank(y[first:last], x[first:last], A, B, float(table.scale[entry]))


# ---- attention of single tokens over a paged KV cache --------------------------------------------------------------


def attend_rows(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    *,
    rows: Tensor,
    visible: Tensor,
    table: Tensor,
    block: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> None:
    """out[rows] (T, H, V) = attention of the single tokens q[rows] (T, H, D), each over its own sequence's past and itself.

    keys (positions, K, D) and values (positions, K, V) hold blocks of `block` positions; token i of the n in `rows` sees the
    first `visible[i]` positions of the blocks `table[i]`, or the last `window` of them where that is not 0.
    """
    most = int(visible.max())
    at = torch.arange(most, device=q.device)  # (most,)
    places = table[:, at // block] * block + at % block  # (n, most)
    seen = at[None] < visible[:, None]  # (n, most)
    if window:
        seen &= at[None] >= visible[:, None] - window
    places = torch.where(seen, places, places[:, :1])  # blocks after a sequence's end are not its own
    groups = q.shape[1] // keys.shape[1]
    k, v = (t[places].transpose(1, 2).repeat_interleave(groups, dim=1) for t in (keys, values))  # (n, H, most, D)
    scores = (q[rows][:, :, None] @ k.to(q.dtype).transpose(-1, -2)) * scale  # (n, H, 1, most)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    answer = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v.to(q.dtype)  # (n, H, 1, V)
    out[rows] = answer[:, :, 0]


# ---- attention over segments --------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, ends: Sequence[int], scale: float, window: int) -> tuple[Tensor, Tensor]:
    """Causal attention within each segment: q (T, H, D), k and v (T, K, D) with H a multiple of K -> out (T, H, D).

    `ends` (n + 1) are the segments' first tokens and T; `window` is how many keys a query sees, itself the last, 0 all.
    Also returns the logarithm of each query's sum of exponentials (T, H), for the backward.
    """
    out, sums = torch.empty_like(q), q.new_empty(q.shape[:2])
    for first, last in pairwise(ends):
        scores = _scores(q[first:last], k[first:last], scale, window)  # (H, L, L)
        sums[first:last] = torch.logsumexp(scores, -1).T
        out[first:last] = (torch.softmax(scores, -1) @ _heads(v[first:last], q)).transpose(0, 1)
    return out, sums


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    ends: Sequence[int],
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `attention` to q (T, H, D), k and v (T, K, D); Dao et al. 2022, appendix B."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = (dout * out).sum(-1)  # (T, H)
    for first, last in pairwise(ends):
        part = slice(first, last)
        kv_shape = (last - first, k.shape[1], -1, k.shape[2])  # (L, K, groups, D)
        p = torch.exp(_scores(q[part], k[part], scale, window) - sums[part].T[..., None])  # (H, L, L)
        slope = dout[part].transpose(0, 1)  # (H, L, D)
        ds = p * (slope @ _heads(v[part], q).transpose(-1, -2) - delta[part].T[..., None]) * scale
        dq[part] = (ds @ _heads(k[part], q)).transpose(0, 1)
        dk[part] = (ds.transpose(-1, -2) @ q[part].transpose(0, 1)).transpose(0, 1).reshape(kv_shape).sum(2)
        dv[part] = (p.transpose(-1, -2) @ slope).transpose(0, 1).reshape(kv_shape).sum(2)
    return dq, dk, dv


def _heads(kv: Tensor, q: Tensor) -> Tensor:
    """(L, K, D) -> (H, L, D): each key-value head as often as query heads share it."""
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], dim=1).transpose(0, 1)


def _scores(q: Tensor, k: Tensor, scale: float, window: int) -> Tensor:
    """(H, L, L), -infinity where a query may not see a key."""
    at = torch.arange(len(q), device=q.device)
    hidden = at[:, None] < at[None, :]
    if window:
        hidden |= at[:, None] - at[None, :] >= window
    return (scale * (q.transpose(0, 1) @ _heads(k, q).transpose(-1, -2))).masked_fill(hidden, -math.inf)
