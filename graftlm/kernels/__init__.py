"""The only code that knows hardware: one function for each operation, the best backend for the device behind it.

    nf4_quantize  nf4_dequantize  nf4_matmul  nf4_matmul_t      a weight in 4 bits
    int8_quantize int8_dequantize int8_matmul int8_matmul_t     a weight in 8 bits
    dequantize    matmul          matmul_t                      either of them
    low_rank      low_rank_backward                             one adapter: y += s (x A^T) B^T
    low_rank_routed  low_rank_routed_backward                   each range of tokens its adapter

`reference.py` is the truth; `native/` (C, for CPUs) and `triton/` (GPUs) are checked against it once, at first use, and
left aside with one warning when they are missing or wrong. `backend(device)` says which one is used and why. Nothing
here records gradients: callers wrap these in their own autograd functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graftlm.kernels import native, reference
from graftlm.kernels.reference import (
    Range,
    Slots,
    low_rank,
    low_rank_backward,
    low_rank_routed,
    low_rank_routed_backward,
)
from graftlm.kernels.stored import BLOCK, GROUP, Int8, Nf4, Stored

__all__ = [
    "BLOCK", "GROUP", "Int8", "Nf4", "Range", "Slots", "Stored", "backend", "dequantize", "int8_dequantize",
    "int8_matmul", "int8_matmul_t", "int8_quantize", "low_rank", "low_rank_backward", "low_rank_routed",
    "low_rank_routed_backward", "matmul", "matmul_t", "nf4_dequantize", "nf4_matmul", "nf4_matmul_t", "nf4_quantize",
]  # fmt: skip


def backend(device: torch.device | str = "cpu") -> str:
    """One line: which backend runs on `device`, and why."""
    if torch.device(device).type == "cpu":
        return native.status()
    return f"PyTorch reference on {device}"


def nf4_quantize(weight: Tensor) -> Nf4:
    """Quantize a float tensor of any shape to NF4 with double quantization, bit for bit as bitsandbytes does."""
    if native.usable("nf4_quantize", weight):
        return native.nf4_quantize(weight)
    return reference.nf4_quantize(weight)


def nf4_dequantize(weight: Nf4, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight as a dense tensor: each value computed in float32, then rounded once to `dtype`."""
    if dtype in native.TYPES and native.usable("nf4_dequantize", weight.packed):
        return native.nf4_dequantize(weight, dtype)
    return reference.nf4_dequantize(weight, dtype)


def int8_quantize(weight: Tensor) -> Int8:
    """Round each row (last dimension) of a float tensor to 255 equal steps of its own largest magnitude."""
    return reference.int8_quantize(weight)


def int8_dequantize(weight: Int8, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight as a dense tensor: each value computed in float32, then rounded once to `dtype`."""
    if dtype in native.TYPES and native.usable("int8_dequantize", weight.values):
        return native.int8_dequantize(weight, dtype)
    return reference.int8_dequantize(weight, dtype)


def dequantize(weight: Stored, dtype: torch.dtype = torch.float32) -> Tensor:
    """Either stored form as a dense tensor of `dtype`."""
    return nf4_dequantize(weight, dtype) if isinstance(weight, Nf4) else int8_dequantize(weight, dtype)


def matmul(x: Tensor, weight: Stored) -> Tensor:
    """x (..., in) with W (out, in) stored -> x @ W.T (..., out), in x's type."""
    if native.usable("matmul", x):
        return native.matmul(x, weight)
    return reference.matmul(x, weight)


def matmul_t(dy: Tensor, weight: Stored) -> Tensor:
    """dy (..., out) with W (out, in) stored -> dy @ W (..., in), in dy's type: the gradient of `matmul` to x."""
    if native.usable("matmul_t", dy):
        return native.matmul_t(dy, weight)
    return reference.matmul_t(dy, weight)


nf4_matmul = matmul
nf4_matmul_t = matmul_t
int8_matmul = matmul
int8_matmul_t = matmul_t
