"""The C kernels for the reference's functions, and when they are used.

    library.py        the shared library: finding and loading it, types of its functions, choice of instruction set
    weights.py        quantize and dequantize
    stored_matmul.py  matmul with a stored weight: codes decoded in registers for few rows, dense panels for more
    gemm.py           our own matmul, where it is faster than PyTorch's, and its uses in training
    rows.py           decoding: matmul of few rows, routed adapters, attention of single tokens
    attention.py      attention within segments, forward and backward
    fused.py          norms, gated activations, rotary positions, cross entropy
    adamw.py          the optimizer step

Each file ends with its own check: its operations are compared with the reference on a small odd shape before their first use
(`self_check.py`). `usable` is false, with one warning for the process, if the library is missing, does not load, or gives
another result. They run on `torch.get_num_threads()` threads.

Letters: x (rows, in), W (out, in), y (rows, out), dy (rows, out), dx (rows, in).
"""

from __future__ import annotations

import torch
from torch import Tensor

from graftlm.kernels import reference
from graftlm.kernels.native import adamw, fused, gemm, library, rows, stored_matmul, weights
from graftlm.kernels.native import attention as segments
from graftlm.kernels.native.adamw import step as adamw_step
from graftlm.kernels.native.adamw import sum_of_squares
from graftlm.kernels.native.attention import attention, attention_backward
from graftlm.kernels.native.gemm import lora_linear, lora_linear_backward, low_rank, low_rank_backward, weight_gradient
from graftlm.kernels.native.library import TYPES, choose, instruction_sets
from graftlm.kernels.native.stored_matmul import FEW_ROWS, PANEL_BYTES_FOR_MANY
from graftlm.kernels.native.weights import blocks_dequantize, int8_dequantize, nf4_dequantize, nf4_quantize
from graftlm.kernels.self_check import SelfCheck
from graftlm.kernels.stored import Weight

__all__ = [
    "FEW_ROWS",
    "PANEL_BYTES_FOR_MANY",
    "TYPES",
    "adamw",
    "adamw_step",
    "add_routed",
    "attention",
    "attention_backward",
    "blocks_dequantize",
    "choose",
    "has_bf16_matmul",
    "has_fast_matmul",
    "has_segment_attention",
    "instruction_sets",
    "int8_dequantize",
    "is_few_rows",
    "lora_linear",
    "lora_linear_backward",
    "low_rank",
    "low_rank_backward",
    "matmul",
    "matmul_t",
    "new_self_check",
    "nf4_dequantize",
    "nf4_quantize",
    "self_check",
    "status",
    "sum_of_squares",
    "usable",
    "weight_gradient",
]  # fmt: skip


def new_self_check() -> SelfCheck:
    """A SelfCheck in which no check has run yet."""
    checks = {
        "nf4_quantize": weights.check_nf4_quantize,
        "nf4_dequantize": weights.check_nf4_dequantize,
        "int8_dequantize": weights.check_int8_dequantize,
        "blocks_dequantize": weights.check_blocks_dequantize,
        "matmul": stored_matmul.check_matmul,
        "matmul_t": stored_matmul.check_matmul_t,
        "gemm": gemm.check,
        "attention": segments.check,
        "fused": fused.check,
        "adamw_step": adamw.check_step,
        "sum_of_squares": adamw.check_sum_of_squares,
        "rows": rows.check,
    }
    return SelfCheck(
        "C kernels",
        lambda: library.get().reason,
        {name: lambda _, check=check: check() for name, check in checks.items()},
    )


self_check = new_self_check()


# ---- what is used -------------------------------------------------------------------------------------------------


def status() -> str:
    """Which instruction set is used, or why none is."""
    loaded = library.get()
    reason = loaded.reason or self_check.reason
    return f"PyTorch without C kernels: {reason}" if reason else f"C kernels ({loaded.instructions})"


def usable(operation: str, tensor: Tensor) -> bool:
    """Whether `operation` can run here on `tensor`: on a CPU, with a supported dtype, compiled, and checked."""
    if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype not in TYPES):
        return False
    return self_check.allows(operation, tensor.device)


def has_fast_matmul(x: Tensor, bf16_matmul: bool = False) -> bool:
    """Whether the matmul of x (rows, in) uses our own `gemm.c` rather than PyTorch's.

    In float32 if that is faster; with `bf16_matmul` if the processor supports it, also for few rows, since a token's result
    must not depend on the number of rows.
    """
    return (len(x) > FEW_ROWS or (bf16_matmul and library.get().has_bf16_matmul)) and takes(x, bf16_matmul)


def takes(x: Tensor, bf16_matmul: bool = False) -> bool:
    """The same for any number of rows."""
    if x.dtype != torch.float32 or x.ndim != 2 or x.device.type != "cpu":
        return False
    loaded = library.get()
    return (loaded.has_fast_matmul or (bf16_matmul and loaded.has_bf16_matmul)) and self_check.allows("gemm", x.device)


def has_bf16_matmul() -> bool:
    """Whether this processor has bfloat16 matmul with float32 accumulation, about twice as fast as float32."""
    return library.get().has_bf16_matmul and self_check.allows("gemm", torch.device("cpu"))


def has_segment_attention(q: Tensor) -> bool:
    """Whether attention over these heads, q (T, H, D), runs in C."""
    return segments.fits(q) and self_check.allows("attention", q.device)


def is_few_rows(x: Tensor) -> bool:
    """Whether x (rows, in) has so few rows that `rows.c` is fastest for a dense weight."""
    return (
        len(x) <= rows.MOST_ROWS
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and self_check.allows("rows", x.device)
    )


# ---- the fastest matmul here -------------------------------------------------------------------------------------


def matmul(x: Tensor, weight: Weight, bf16_matmul: bool = False) -> Tensor:
    """x (..., in) -> x @ W.T (..., out)."""
    outer, inner = weight.shape
    flat = x.reshape(-1, inner)  # (rows, in)
    if not flat.numel() or not outer:
        return x.new_zeros(*x.shape[:-1], outer)
    if has_fast_matmul(flat, bf16_matmul):
        y = gemm.multiply([(flat, weight, True)], bf16_matmul=bf16_matmul)  # (rows, out)
    elif not isinstance(weight, Tensor):
        y = stored_matmul.matmul(flat, weight)
    elif is_few_rows(flat) and rows.fits(flat, weight):
        y = rows.dense(flat, weight)
    else:
        y = reference.matmul(flat, weight)
    # A view made inside an autograd function must not be modified in place, which some models do.
    return y if x.ndim == 2 else y.view(*x.shape[:-1], outer)


def matmul_t(dy: Tensor, weight: Weight, bf16_matmul: bool = False) -> Tensor:
    """dy (..., out) -> dy @ W (..., in)."""
    outer, inner = weight.shape
    flat = dy.reshape(-1, outer)  # (rows, out)
    if not flat.numel() or not inner:
        return dy.new_zeros(*dy.shape[:-1], inner)
    # PyTorch would upcast a full 16-bit weight, such as a head, even for few rows.
    upcast = isinstance(weight, Tensor) and weight.dtype != flat.dtype
    if has_fast_matmul(flat, bf16_matmul) or (upcast and takes(flat, bf16_matmul)):
        dx = gemm.multiply([(flat, weight, False)], bf16_matmul=bf16_matmul)  # (rows, in)
    elif not isinstance(weight, Tensor):
        dx = stored_matmul.matmul_t(flat, weight)
    else:
        dx = reference.matmul_t(flat, weight)
    return dx if dy.ndim == 2 else dx.view(*dy.shape[:-1], inner)


def add_routed(y: Tensor, x: Tensor, routes: rows.DecodeRouting) -> bool:
    """y (rows, out) += each range's low-rank term, if C supports them; returns whether it did."""
    if x.dtype != torch.float32 or x.stride(1) != 1 or not usable("rows", x):
        return False
    routes.add(y, x)
    return True
