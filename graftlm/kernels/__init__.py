"""One function for each operation, with the best backend for the device. No other package has hardware-specific code.

    nf4_quantize  nf4_dequantize                                a weight in 4 bits
    int8_quantize int8_dequantize                               a weight in 8 bits
    blocks_dequantize  embedding_rows                           a weight in a GGUF file's blocks, some of its rows
    dequantize                                                  any of them
    matmul        matmul_t        weight_gradient               matmuls with a weight, dense or stored
    grouped_matmul  grouped_matmul_t  grouped_weight_gradient   those of all experts of a mixture
    low_rank      low_rank_backward                             one adapter: y += s (x A^T) B^T
    low_rank_routed  low_rank_routed_backward                   each range of tokens with its own adapter
    lora_linear   lora_linear_backward                          x W^T and the adapters' low-rank terms together
    lora_group    lora_group_backward                           the same for layers with the same input
    dropped       drops_in_products                             LoRA's dropout
    is_few_rows   add_routed      attend_rows                   the operations of decoding, one by one
    add_by_table  reads_blocks    Graphs                        those whose launches do not depend on lengths and adapters
    has_decoder_stack  DecoderStack                             all layers of a model in one call: `native/layers.py`
    rms_norm      gated           rotary                        fused elementwise operations and their backwards: `fused.py`
    cross_entropy_in_place                                      losses, and logits overwritten by their gradient
    adamw_step    sum_of_squares                                the optimizer step of one parameter, a gradient's norm
    adamw_steps   sums_of_squares                               the same for many
    copy_together                                               many small tensors, into those of another dtype
    to_device                                                   small tensors of the host, without waiting for a GPU
    expand_segments                                             how PyTorch takes a GPU's memory

`reference.py` defines the results; `native/` (C, for CPUs) and `triton/` (GPUs) are compared with it once, at first use, and
not used, with one warning, if they are missing or differ. `backend(device)` says which one is used and why. These functions
record no gradients: callers wrap them in autograd functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from graftlm.kernels import (
    counter_rng,
    gpu_attention,
    gpu_grouped,
    gpu_low_rank,
    gpu_matmul,
    multi_tensor,
    native,
    reference,
    reference_adamw,
    triton,
)
from graftlm.kernels.fused import (
    cross_entropy_in_place,
    gated,
    gated_backward,
    has_fused_ops,
    rms_norm,
    rms_norm_backward,
    rotary,
    rotary_backward,
)  # fmt: skip
from graftlm.kernels.gpu_allocator import expand_segments
from graftlm.kernels.gpu_graph import Graphs
from graftlm.kernels.moments import Moments, zero_moments
from graftlm.kernels.multi_tensor import copy_together
from graftlm.kernels.native.layers import MOST_RANK, DecoderLayer, DecoderStack, adapter_table
from graftlm.kernels.native.rows import DecodeAttention, DecodeRouting, Factors
from graftlm.kernels.reference_adamw import Update, moments_in, stochastic_round, update_of
from graftlm.kernels.routing import TABLE_TOKENS, Dropout, FactorTable, Routing, tiles_of
from graftlm.kernels.stored import BLOCK, BLOCK_SIZES, GROUP, GgufBlocks, Int8, Nf4, Quantized, Weight, row_bytes
from graftlm.kernels.transfer import to_device

__all__ = [
    "BLOCK",
    "BLOCK_SIZES",
    "GROUP",
    "MOST_RANK",
    "MOST_TABLE_RANK",
    "TABLE_TOKENS",
    "DecodeAttention",
    "DecodeRouting",
    "DecoderLayer",
    "DecoderStack",
    "Dropout",
    "FactorTable",
    "Factors",
    "GgufBlocks",
    "Graphs",
    "Int8",
    "Moments",
    "Nf4",
    "Quantized",
    "Routing",
    "Update",
    "Weight",
    "adamw_step",
    "adamw_steps",
    "adapter_table",
    "add_by_table",
    "add_routed",
    "attend_rows",
    "attention",
    "attention_backward",
    "backend",
    "blocks_dequantize",
    "causal_attention",
    "copy_together",
    "cross_entropy_in_place",
    "dequantize",
    "dropped",
    "drops_in_products",
    "embedding_rows",
    "expand_segments",
    "gated",
    "gated_backward",
    "grouped_matmul",
    "grouped_matmul_t",
    "grouped_weight_gradient",
    "groups_lora",
    "has_bf16_matmul",
    "has_decoder_stack",
    "has_fast_matmul",
    "has_fused_ops",
    "has_grouped_matmul",
    "has_segment_attention",
    "int8_dequantize",
    "int8_quantize",
    "is_few_rows",
    "lora_group",
    "lora_group_backward",
    "lora_linear",
    "lora_linear_backward",
    "low_rank",
    "low_rank_backward",
    "low_rank_routed",
    "low_rank_routed_backward",
    "matmul",
    "matmul_t",
    "moments_in",
    "nf4_dequantize",
    "nf4_quantize",
    "reads_blocks",
    "rms_norm",
    "rms_norm_backward",
    "rotary",
    "rotary_backward",
    "row_bytes",
    "stochastic_round",
    "sum_of_squares",
    "sums_of_squares",
    "tiles_of",
    "to_device",
    "update_of",
    "weight_gradient",
    "zero_moments",
]  # fmt: skip


FLOATS = tuple(native.TYPES)  # dtypes of the faster backends
MOST_TABLE_RANK = triton.routed.LARGEST_RANK
"""The largest rank of a `FactorTable`."""

_PANEL_BYTES, _PANEL_ROWS = 1 << 18, 64
"""Size of a weight gradient's panel in the compute dtype if the gradient has another dtype; and its fewest rows."""


def backend(device: torch.device | str = "cpu") -> str:
    """One line: which backend runs on `device`, and why."""
    kind = torch.device(device).type
    if kind == "cpu":
        return native.status()
    return triton.status() if kind == "cuda" else f"PyTorch (no kernels of our own for {kind})"


def nf4_quantize(weight: Tensor) -> Nf4:
    """Quantize a float tensor of any shape to NF4 with double quantization, bit-identical to bitsandbytes."""
    if native.usable("nf4_quantize", weight):
        return native.nf4_quantize(weight)
    return reference.nf4_quantize(weight)


def nf4_dequantize(weight: Nf4, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """The weight as a dense tensor: each value computed in float32, then rounded once to `dtype`.

    `out`, contiguous and of the weight's shape, takes the result in its own dtype; `dtype` is then ignored.
    """
    return _dequantize("nf4_dequantize", weight, weight.packed, dtype, out)


def int8_quantize(weight: Tensor) -> Int8:
    """Round each row (last dimension) of a float tensor to 255 equal steps of its own largest magnitude."""
    return reference.int8_quantize(weight)


def int8_dequantize(weight: Int8, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """The weight as a dense tensor, as `nf4_dequantize` makes one."""
    return _dequantize("int8_dequantize", weight, weight.values, dtype, out)


def blocks_dequantize(weight: GgufBlocks, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """The weight as a dense tensor, as `nf4_dequantize` makes one; its values are those of the package gguf, bit for bit."""
    return _dequantize("blocks_dequantize", weight, weight.data, dtype, out)


def _dequantize(name: str, weight: Weight, stored: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    dtype = dtype if out is None else out.dtype
    if dtype in FLOATS and native.usable(name, stored):
        return getattr(native, name)(weight, dtype, out)
    fast = triton if dtype in FLOATS and triton.usable(name, stored) else reference
    dense = getattr(fast, name)(weight, dtype)
    return dense if out is None else out.copy_(dense)


def embedding_rows(weight: GgufBlocks, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows `ids` (...) of an embedding (vocabulary, width) -> (..., width) in `dtype`; no other row is made dense.

    Raises IndexError for an id outside the vocabulary.
    """
    found = GgufBlocks(weight.data.index_select(0, ids.reshape(-1)), weight.kind)
    return blocks_dequantize(found, dtype).view(*ids.shape, weight.shape[1])


def dequantize(weight: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """Any stored form as a dense tensor of `dtype`."""
    if isinstance(weight, GgufBlocks):
        return blocks_dequantize(weight, dtype)
    return nf4_dequantize(weight, dtype) if isinstance(weight, Nf4) else int8_dequantize(weight, dtype)


def has_fast_matmul(x: Tensor, bf16_matmul: bool = False) -> bool:
    """Whether our own matmul (with `bf16_matmul`: in bfloat16) is faster than PyTorch's for x (rows, in) on this processor."""
    return native.has_fast_matmul(x, bf16_matmul)


def has_bf16_matmul() -> bool:
    """Whether this CPU supports `bf16_matmul`: float32 inputs rounded to bfloat16, accumulation in float32."""
    return native.has_bf16_matmul()


def matmul(x: Tensor, weight: Weight, bf16_matmul: bool = False) -> Tensor:
    """x (..., in) with W (out, in) dense or stored -> x @ W.T (..., out), in x's type.

    `bf16_matmul`, here and below: see `has_bf16_matmul`. If false, the matmul has x's dtype.
    """
    for fast in (native,) if isinstance(weight, Tensor) else (native, triton):
        if fast.usable("matmul", x):
            return native.matmul(x, weight, bf16_matmul) if fast is native else fast.matmul(x, weight)
    return reference.matmul(x, weight)


def matmul_t(dy: Tensor, weight: Weight, bf16_matmul: bool = False) -> Tensor:
    """dy (..., out) with W (out, in) dense or stored -> dy @ W (..., in), in dy's type: the gradient of `matmul` to x."""
    for fast in (native,) if isinstance(weight, Tensor) else (native, triton):
        if fast.usable("matmul_t", dy):
            return native.matmul_t(dy, weight, bf16_matmul) if fast is native else fast.matmul_t(dy, weight)
    return reference.matmul_t(dy, weight)


def weight_gradient(dy: Tensor, x: Tensor, bf16_matmul: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """dy (rows, out), x (rows, in) -> dy^T x (out, in): the gradient of `matmul` to a dense W.

    In `dtype`, default dy's; if it is another one, only one panel at a time exists in dy's dtype, and none where a GPU gives
    float32 at once.
    """
    if gpu_matmul.usable(dy, dtype):
        return gpu_matmul.weight_gradient(dy, x)
    if dtype in (None, dy.dtype):
        own = native.has_fast_matmul(dy, bf16_matmul)
        return native.weight_gradient(dy, x, bf16_matmul) if own else reference.weight_gradient(dy, x)
    result = torch.empty(dy.shape[1], x.shape[1], dtype=dtype, device=dy.device)
    step = max(_PANEL_ROWS, _PANEL_BYTES // (x.shape[1] * dy.element_size() or 1))
    for first in range(0, len(result), step):
        result[first : first + step] = weight_gradient(dy[:, first : first + step], x, bf16_matmul)
    return result


def dropped(x: Tensor, token_keys: Tensor, module_key: int, dropout: float) -> Tensor:
    """x (tokens, in) -> drop(x) (tokens, in): each feature kept with probability 1 - dropout and scaled, or 0.

    `token_keys` (tokens,) int32 identify the tokens, `module_key` the layer: `counter_rng.py`.
    """
    fast = triton if triton.usable("dropped", x) else counter_rng
    return fast.dropped(x, token_keys, module_key, dropout)


def has_segment_attention(q: Tensor) -> bool:
    """Whether our own attention over segments is faster than PyTorch's for these heads, q (T, H, D)."""
    return native.has_segment_attention(q)


def attention(
    q: Tensor, k: Tensor, v: Tensor, ends: Sequence[int], scale: float, window: int = 0
) -> tuple[Tensor, Tensor]:
    """Causal attention within each segment: q (T, H, D), k and v (T, K, D) -> (T, H, D), and the log-sums for backward.

    `ends` (n + 1) are the segments' first tokens and T; `window` is the number of keys for each query, 0 for all before it.
    """
    return (native if has_segment_attention(q) else reference).attention(q, k, v, ends, scale, window)


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, ends: Sequence[int], scale: float,
    window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of `attention` to q (T, H, D), k and v (T, K, D)."""
    return (native if has_segment_attention(q) else reference).attention_backward(
        dout, q, k, v, out, sums, ends, scale, window
    )


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, softcap: float | None
) -> Tensor | None:
    """q (n, H, L, D), k and v (n, K, M, D) -> (n, H, L, V) in bounded memory, queries the last L of M; None off a GPU.

    Differentiable, unlike the other functions: it is made of PyTorch's operations.
    """
    return gpu_attention.causal(q, k, v, scale, window, softcap) if q.is_cuda else None


def has_grouped_matmul(x: Tensor, *widths: int) -> bool:
    """Whether `grouped_matmul` takes rows of x's dtype and device, and these numbers of columns."""
    return not any(width % gpu_grouped.MULTIPLE for width in widths) and gpu_grouped.usable(x)


def grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (S, in), W (E, out, in) -> (S, out): each expert's rows, which end at `ends` (E,) int32, times its W^T.

    Only where `has_grouped_matmul`, as its two gradients.
    """
    return gpu_grouped.grouped_matmul(x, weight, ends)


def grouped_matmul_t(dy: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """dy (S, out), W (E, out, in) -> the gradient to x (S, in)."""
    return gpu_grouped.grouped_matmul_t(dy, weight, ends)


def grouped_weight_gradient(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """dy (S, out), x (S, in) -> the gradient to W (E, out, in)."""
    return gpu_grouped.grouped_weight_gradient(dy, x, ends)


def low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y (tokens, out) += scale * (x A^T) B^T in place; returns h (tokens, r) for `low_rank_backward`."""
    if x.is_cuda:
        return gpu_low_rank.low_rank(y, x, A, B, scale)
    return (native if native.takes(x) else reference).low_rank(y, x, A, B, scale)


def low_rank_backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    dx: Tensor | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gradients of `low_rank` to A (r, in) and B (out, r), in `dtype` or their own; the one to x is added to `dx`, or
    written there (`overwrite`)."""
    if x.is_cuda:
        return gpu_low_rank.low_rank_backward(dy, x, h, A, B, scale, dx, dtype, overwrite=overwrite)
    if overwrite and dx is not None:
        dx.zero_()
    dA, dB = (native if native.takes(x) else reference).low_rank_backward(dy, x, h, A, B, scale, dx)
    return dA.to(dtype or dA.dtype), dB.to(dtype or dB.dtype)


def lora_linear(
    x: Tensor, weight: Weight, routing: Routing, bf16_matmul: bool = False
) -> tuple[Tensor, list[Tensor | None]]:
    """x (tokens, in) -> x W^T plus, on each range of tokens, its pair's low-rank term (tokens, out); also h of each range."""
    one = routing.only(len(x))
    if one is not None and native.has_fast_matmul(x, bf16_matmul):
        y, h = native.lora_linear(x, weight, *one, bf16_matmul)
        return y, [h]
    y = matmul(x, weight, bf16_matmul)
    return y, low_rank_routed(y, x, routing)


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Weight,
    hidden: Sequence[Tensor | None],
    routing: Routing,
    wants_dx: bool,
    bf16_matmul: bool = False,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """The gradients of `lora_linear`: to x (tokens, in) where wanted, and to each factor pair's A and B as
    `low_rank_routed_backward`."""
    one = routing.only(len(x))
    if one is not None and native.has_fast_matmul(x, bf16_matmul):
        h, factor_index = hidden[0], routing.ranges[0][0]
        assert h is not None
        dA: list[Tensor | None] = [None] * len(routing.A)
        dB: list[Tensor | None] = [None] * len(routing.B)
        dx, dA[factor_index], dB[factor_index] = native.lora_linear_backward(
            dy, x, weight, h, *one, wants_dx, bf16_matmul
        )
        return dx, dA, dB
    dx = matmul_t(dy, weight, bf16_matmul) if wants_dx else None
    return dx, *low_rank_routed_backward(dy, x, hidden, routing, dx)


def groups_lora(device: torch.device) -> bool:
    """Whether layers with the same input, each with the one adapter, are faster together: `lora_group`."""
    return device.type == "cuda"


def drops_in_products(x: Tensor, A: Tensor, ranks: Sequence[int]) -> bool:
    """Whether `lora_group` takes dropout with x (tokens, in) and A (sum of r, in) of these ranks."""
    return triton.usable("dropped_products", x) and triton.dropout.fits(x, A, ranks)


def lora_group(
    x: Tensor, weights: Sequence[Weight], A: Tensor, B: Sequence[Tensor], scale: float, drops: Dropout | None = None
) -> tuple[list[Tensor], Tensor]:
    """x (tokens, in) -> x W^T + scale * (x A^T) B^T of each layer (tokens, out); and h (tokens, sum of r) for the backward.

    A (sum of r, in) has the layers' A below each other, in x's dtype as their B (out, r). With `drops` it is drop(x) A^T, each
    layer with its own mask; only where `drops_in_products`. For a GPU.
    """
    ranks = [b.shape[1] for b in B]
    h = gpu_low_rank.shrink(x, A.T, scale) if drops is None else triton.dropout.shrink(x, A, ranks, scale, drops)
    parts = h.split(ranks, dim=1)
    return [matmul(x, weight).addmm_(part, b.T) for weight, part, b in zip(weights, parts, B)], h


def lora_group_backward(
    dys: Sequence[Tensor | None],
    x: Tensor,
    weights: Sequence[Weight],
    h: Tensor,
    A: Tensor,
    B: Sequence[Tensor],
    scale: float,
    wants_dx: bool,
    dtype: torch.dtype,
    drops: Dropout | None = None,
) -> tuple[Tensor | None, Tensor, list[Tensor | None]]:
    """The gradients of `lora_group`: to x where wanted, and in `dtype` to A and to each B; dy None: the output is not used."""
    dh, dx = torch.empty_like(h), None
    dB: list[Tensor | None] = []
    ranks = [b.shape[1] for b in B]
    for dy, weight, b, own, part in zip(dys, weights, B, dh.split(ranks, dim=1), h.split(ranks, dim=1)):
        if dy is None:
            own.zero_()
            dB.append(None)
            continue
        gpu_low_rank.shrink(dy, b, scale, out=own)
        dB.append(gpu_low_rank.factor_gradient(dy, part, dtype))
        if wants_dx and dx is None:
            dx = matmul_t(dy, weight)
        elif dx is not None:
            dx.addmm_(dy, weight.to(dy.dtype) if isinstance(weight, Tensor) else dequantize(weight, dy.dtype))
    if drops is not None:
        if dx is not None:
            triton.dropout.expand(dx, dh, A, ranks, drops)
        return dx, triton.dropout.factor_gradient(dh, x, ranks, drops, dtype), dB
    if dx is not None:
        dx.addmm_(dh, A)
    return dx, gpu_low_rank.factor_gradient(dh, x, dtype), dB


def low_rank_routed(y: Tensor, x: Tensor, routing: Routing) -> list[Tensor | None]:
    """y (tokens, out) += s (x A^T) B^T in place, each range of tokens with its factor pair; returns h of each range.

    Tokens in no range, or in one whose pair is None, stay as they are.
    """
    if triton.usable("low_rank_routed", x) and triton.fits(x, y, routing):
        return triton.low_rank_routed(y, x, routing)
    return reference.low_rank_routed(y, x, routing, one=low_rank)


def low_rank_routed_backward(
    dy: Tensor, x: Tensor, hidden: Sequence[Tensor | None], routing: Routing, dx: Tensor | None = None
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients to each factor pair's A and B, summed over its ranges (None for a pair no range uses); dx is added to."""
    if triton.usable("low_rank_routed", dy) and triton.fits(dy, dy if dx is None else dx, routing):
        return triton.low_rank_routed_backward(dy, x, hidden, routing, dx)
    one = partial(low_rank_backward, dtype=routing.gradient_dtype)
    return reference.low_rank_routed_backward(dy, x, hidden, routing, dx, one=one)


def adamw_step(parameter: Tensor, gradient: Tensor, moments: Moments, update: Update) -> None:
    """One step of AdamW, in place: `parameter` (float32 or bfloat16, any shape), `gradient` of its shape, its moments.

    Moments may be on another device than the parameter; they stay there. `reference_adamw.py` has the formula.
    """
    if native.adamw.fits(parameter, gradient, moments) and native.usable("adamw_step", parameter):
        return native.adamw_step(parameter, gradient, moments, update)
    if triton.adamw.fits(parameter, gradient, moments) and triton.usable("adamw_step", parameter):
        return triton.adamw_step(parameter, gradient, moments, update)
    return reference_adamw.adamw(parameter, gradient, moments, update)


def adamw_steps(steps: Sequence[multi_tensor.Step]) -> None:
    """`adamw_step` of many parameters of one optimizer, whose updates have beta1, beta2, epsilon and step in common."""
    together = [step for step in steps if multi_tensor.fits(step)]
    if together and triton.usable("adamw_steps", together[0][0]):
        triton.adamw_steps(together)
    elif together and multi_tensor.self_check.allows("adamw_steps", together[0][0].device):
        multi_tensor.adamw_steps(together)
    else:
        together = []
    taken = {id(step[0]) for step in together}
    for step in steps:
        if id(step[0]) not in taken:
            adamw_step(*step)


def sums_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """`sum_of_squares` of each tensor, (n,)."""
    found = multi_tensor.sums_of_squares(tensors)
    if found is not None or not tensors:
        return torch.zeros(0, dtype=torch.float64) if found is None else found
    return torch.stack([sum_of_squares(tensor) for tensor in tensors])


def sum_of_squares(tensor: Tensor) -> Tensor:
    """The sum of the squares of all values, in float64: () on the tensor's device, the same for any number of threads."""
    if tensor.dtype in (torch.float32, torch.bfloat16) and native.usable("sum_of_squares", tensor):
        return native.sum_of_squares(tensor)
    return reference_adamw.sum_of_squares(tensor)


def is_few_rows(x: Tensor) -> bool:
    """Whether `matmul` with a dense weight is faster than PyTorch's for x (rows, in): few rows, as in decoding."""
    return native.is_few_rows(x)


def has_decoder_stack(device: torch.device) -> bool:
    """Whether a `DecoderStack`, all layers of a model in one call, can run on this device."""
    return device.type == "cpu" and native.usable("rows", torch.empty(0)) and native.usable("fused", torch.empty(0))


def add_routed(y: Tensor, x: Tensor, routes: DecodeRouting) -> None:
    """y (tokens, out) += s (x A^T) B^T in place, each range of tokens with its own; `routes` is reused for many steps.

    This is `low_rank_routed` for decoding: nothing is saved or returned for a backward pass.
    """
    if not native.add_routed(y, x, routes):
        low_rank_routed(y, x, routes.routing)


def add_by_table(y: Tensor, x: Tensor, table: FactorTable, tiles: Tensor, largest: int) -> None:
    """y (tokens, out) += s (x A^T) B^T in place: `tiles` (3, n) int64 are entries of the table, first tokens and last tokens.

    A tile has at most TABLE_TOKENS tokens, an entry a rank of at most `largest`. Only where `reads_blocks` or on a CPU.
    """
    if x.is_cuda:
        triton.add_by_table(y, x, table, tiles, largest)
    else:
        reference.add_by_table(y, x, table, tiles)


def reads_blocks(keys: Tensor, values: Tensor) -> bool:
    """Whether `attend_rows` needs no length on the host, for keys (positions, K, D) and values (positions, K, V) on a GPU;
    and `add_by_table` runs there."""
    return gpu_attention.reads_blocks(keys, values) and triton.usable("low_rank_routed", keys)


def attend_rows(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    of: DecodeAttention,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> None:
    """out[rows] (T, H, V) = attention of the single tokens q[rows] (T, H, D), each over its own sequence's past and itself.

    keys (positions, K, D) and values (positions, K, V) are in blocks; `of` has the rows, their lengths and their blocks.
    """
    same = q.dtype == keys.dtype == values.dtype == torch.float32 and q.stride(2) == 1 and out.is_contiguous()
    if same and native.usable("rows", q):
        of.answer(q, keys, values, out, scale, window, softcap)
        return
    if q.is_cuda:
        gpu_attention.attend_rows(q, keys, values, out, of, scale=scale, window=window, softcap=softcap)
        return
    reference.attend_rows(
        q, keys, values, out, rows=of.rows, visible=of.visible, table=of.table, block=of.block, scale=scale, window=window,
        softcap=softcap,
    )  # fmt: skip
