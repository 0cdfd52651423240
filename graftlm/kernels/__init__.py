"""The only code that knows hardware: one function for each operation, the best backend for the device behind it.

    nf4_quantize  nf4_dequantize                                a weight in 4 bits
    int8_quantize int8_dequantize                               a weight in 8 bits
    dequantize                                                  either of them
    matmul        matmul_t        weight_gradient               products with a weight, dense or stored
    low_rank      low_rank_backward                             one adapter: y += s (x A^T) B^T
    low_rank_routed  low_rank_routed_backward                   each range of tokens its adapter
    adapted       adapted_backward                              both at once: x W^T and the adapters' products

`reference.py` is the truth; `native/` (C, for CPUs) and `triton/` (GPUs) are checked against it once, at first use, and
left aside with one warning when they are missing or wrong. `backend(device)` says which one is used and why. Nothing
here records gradients: callers wrap these in their own autograd functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graftlm.kernels import native, reference, triton
from graftlm.kernels.reference import Range, Slots
from graftlm.kernels.stored import BLOCK, GROUP, Int8, Nf4, Stored, Weight

__all__ = [
    "BLOCK", "GROUP", "Int8", "Nf4", "Range", "Slots", "Stored", "Weight", "adapted", "adapted_backward", "backend",
    "dequantize", "int8_dequantize", "int8_quantize", "low_rank", "low_rank_backward", "low_rank_routed",
    "low_rank_routed_backward", "matmul", "matmul_t", "multiplies", "nf4_dequantize", "nf4_quantize", "weight_gradient",
]  # fmt: skip


FLOATS = tuple(native.TYPES)  # what the faster backends know


def backend(device: torch.device | str = "cpu") -> str:
    """One line: which backend runs on `device`, and why."""
    kind = torch.device(device).type
    if kind == "cpu":
        return native.status()
    return triton.status() if kind == "cuda" else f"PyTorch (no kernels of our own for {kind})"


def nf4_quantize(weight: Tensor) -> Nf4:
    """Quantize a float tensor of any shape to NF4 with double quantization, bit for bit as bitsandbytes does."""
    if native.usable("nf4_quantize", weight):
        return native.nf4_quantize(weight)
    return reference.nf4_quantize(weight)


def nf4_dequantize(weight: Nf4, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """The weight as a dense tensor: each value computed in float32, then rounded once to `dtype`.

    `out`, contiguous and of the weight's shape, takes the result in its own type; `dtype` is then left aside.
    """
    dtype = dtype if out is None else out.dtype
    if dtype in FLOATS and native.usable("nf4_dequantize", weight.packed):
        return native.nf4_dequantize(weight, dtype, out)
    fast = triton if dtype in FLOATS and triton.usable("nf4_dequantize", weight.packed) else reference
    dense = fast.nf4_dequantize(weight, dtype)
    return dense if out is None else out.copy_(dense)


def int8_quantize(weight: Tensor) -> Int8:
    """Round each row (last dimension) of a float tensor to 255 equal steps of its own largest magnitude."""
    return reference.int8_quantize(weight)


def int8_dequantize(weight: Int8, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """The weight as a dense tensor: each value computed in float32, then rounded once to `dtype`.

    `out`, contiguous and of the weight's shape, takes the result in its own type; `dtype` is then left aside.
    """
    dtype = dtype if out is None else out.dtype
    if dtype in FLOATS and native.usable("int8_dequantize", weight.values):
        return native.int8_dequantize(weight, dtype, out)
    fast = triton if dtype in FLOATS and triton.usable("int8_dequantize", weight.values) else reference
    dense = fast.int8_dequantize(weight, dtype)
    return dense if out is None else out.copy_(dense)


def dequantize(weight: Stored, dtype: torch.dtype = torch.float32) -> Tensor:
    """Either stored form as a dense tensor of `dtype`."""
    return nf4_dequantize(weight, dtype) if isinstance(weight, Nf4) else int8_dequantize(weight, dtype)


def multiplies(x: Tensor) -> bool:
    """Whether we have a matrix product of our own for x (rows, in), faster than PyTorch's on this processor."""
    return native.multiplies(x)


def matmul(x: Tensor, weight: Weight) -> Tensor:
    """x (..., in) with W (out, in) dense or stored -> x @ W.T (..., out), in x's type."""
    for fast in (native,) if isinstance(weight, Tensor) else (native, triton):
        if fast.usable("matmul", x):
            return fast.matmul(x, weight)
    return reference.matmul(x, weight)


def matmul_t(dy: Tensor, weight: Weight) -> Tensor:
    """dy (..., out) with W (out, in) dense or stored -> dy @ W (..., in), in dy's type: the gradient of `matmul` to x."""
    for fast in (native,) if isinstance(weight, Tensor) else (native, triton):
        if fast.usable("matmul_t", dy):
            return fast.matmul_t(dy, weight)
    return reference.matmul_t(dy, weight)


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy (rows, out), x (rows, in) -> dy^T x (out, in): the gradient of `matmul` to a dense W."""
    return native.weight_gradient(dy, x) if native.multiplies(dy) else reference.weight_gradient(dy, x)


def low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y (tokens, out) += scale * (x A^T) B^T in place; returns h (tokens, r), which `low_rank_backward` wants back."""
    return (native if native.multiplies(x) else reference).low_rank(y, x, A, B, scale)


def low_rank_backward(
    dy: Tensor, x: Tensor, h: Tensor, A: Tensor, B: Tensor, scale: float, dx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of `low_rank` to A (r, in) and B (out, r); the one to x is added to `dx`."""
    return (native if native.multiplies(x) else reference).low_rank_backward(dy, x, h, A, B, scale, dx)


def adapted(
    x: Tensor, weight: Weight, ranges: Sequence[Range], A: Slots, B: Slots, scale: Sequence[float]
) -> tuple[Tensor, list[Tensor | None]]:
    """x (tokens, in) -> x W^T and, on each range of tokens, its slot's low-rank product (tokens, out); h of each range."""
    one = _only(len(x), ranges, A, B)
    if one is not None and native.multiplies(x):
        y, h = native.adapted(x, weight, one[0], one[1], scale[ranges[0][2]])
        return y, [h]
    y = matmul(x, weight)
    return y, low_rank_routed(y, x, ranges, A, B, scale)


def adapted_backward(
    dy: Tensor, x: Tensor, weight: Weight, hidden: Sequence[Tensor | None], ranges: Sequence[Range], A: Slots, B: Slots,
    scale: Sequence[float], wants_dx: bool,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:  # fmt: skip
    """The gradients of `adapted`: to x (tokens, in) where wanted, and to each slot's A and B as `low_rank_routed_backward`."""
    one = _only(len(x), ranges, A, B)
    if one is not None and native.multiplies(x):
        h, slot = hidden[0], ranges[0][2]
        assert h is not None
        dA: list[Tensor | None] = [None] * len(A)
        dB: list[Tensor | None] = [None] * len(B)
        dx, dA[slot], dB[slot] = native.adapted_backward(dy, x, weight, h, one[0], one[1], scale[slot], wants_dx)
        return dx, dA, dB
    dx = matmul_t(dy, weight) if wants_dx else None
    return dx, *low_rank_routed_backward(dy, x, hidden, ranges, A, B, scale, dx)


def _only(tokens: int, ranges: Sequence[Range], A: Slots, B: Slots) -> tuple[Tensor, Tensor] | None:
    """The one A and B that all tokens use, if there is one."""
    if len(ranges) != 1 or ranges[0][0] != 0 or ranges[0][1] != tokens:
        return None
    a, b = A[ranges[0][2]], B[ranges[0][2]]
    return None if a is None or b is None else (a, b)


def low_rank_routed(
    y: Tensor, x: Tensor, ranges: Sequence[Range], A: Slots, B: Slots, scale: Sequence[float]
) -> list[Tensor | None]:
    """y (tokens, out) += s (x A^T) B^T in place, each range of tokens with its slot; returns h of each range.

    Ranges are disjoint; tokens in no range, or in one whose slot is None, stay as they are.
    """
    if triton.usable("low_rank_routed", x) and triton.fits(x, y, A):
        return triton.low_rank_routed(y, x, ranges, A, B, scale)
    return reference.low_rank_routed(y, x, ranges, A, B, scale, one=low_rank)


def low_rank_routed_backward(
    dy: Tensor,
    x: Tensor,
    hidden: Sequence[Tensor | None],
    ranges: Sequence[Range],
    A: Slots,
    B: Slots,
    scale: Sequence[float],
    dx: Tensor | None = None,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients to each slot's A and B, summed over its ranges (None for a slot no range uses); dx is added to."""
    if triton.usable("low_rank_routed", dy) and triton.fits(dy, dy if dx is None else dx, A):
        return triton.low_rank_routed_backward(dy, x, hidden, ranges, A, B, scale, dx)
    return reference.low_rank_routed_backward(dy, x, hidden, ranges, A, B, scale, dx, one=low_rank_backward)
