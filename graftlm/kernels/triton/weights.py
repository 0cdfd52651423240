"""Stored weights on a GPU: dequantize, and matmul with few rows without a dense copy."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from graftlm.kernels import reference
from graftlm.kernels.self_check import close, sample
from graftlm.kernels.stored import GgufBlocks, Int8, Nf4, Quantized
from graftlm.kernels.triton import blocks
from graftlm.kernels.triton.device import FLOATS, STAGES, agree, ceil, launch, needs_upcast

FEW_ROWS = (
    16  # up to so many rows a matmul decodes the weight itself; for more it is dequantized for the vendor's matmul
)
# (columns of the result, values summed at a time) of a program. The codes of one row of W lie beside each other: for x W^T
# few columns and long runs, which also makes programs for every core of a large GPU; for dy W the row is what is made.
TILES = {"x W^T": (16, 128), "dy W": (64, 32)}


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    return reference.NF4_CODE.to(device), reference.DYNAMIC_CODE.to(device)


def nf4_dequantize(weight: Nf4, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if out.numel():
        launch(
            "weights", "nf4_dequantize", (ceil(out.numel(), 1024),), out,
            *weight.tensors().values(), *_tables(weight.device), out, weight.start, out.numel(), TILE=1024,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def int8_dequantize(weight: Int8, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if out.numel():
        values, scale = weight.values.contiguous(), weight.scale.contiguous()
        launch(
            "weights", "int8_dequantize", (ceil(out.numel(), 1024),), out,
            values, scale, out, weight.shape[-1], out.numel(),
            TILE=1024,
        )  # fmt: skip
    return out


def dequantize(weight: Quantized, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, GgufBlocks):
        return blocks.blocks_dequantize(weight, dtype)
    return nf4_dequantize(weight, dtype) if isinstance(weight, Nf4) else int8_dequantize(weight, dtype)


def _few_rows(x: Tensor, weight: Nf4 | GgufBlocks, transposed: bool) -> Tensor:
    """x (rows, summed) -> y (rows, made), rows at most FEW_ROWS."""
    if isinstance(weight, GgufBlocks):
        return blocks.few_rows(x, weight, transposed, FEW_ROWS, TILES["dy W" if transposed else "x W^T"])
    outer, inner = weight.shape
    summed, made = (outer, inner) if transposed else (inner, outer)
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(len(x), made, dtype=x.dtype, device=x.device)
    columns, values = TILES["dy W" if transposed else "x W^T"]
    launch(
        "weights", "nf4_matmul", (ceil(made, columns),), x,
        x, *weight.tensors().values(), *_tables(x.device), y, weight.start, len(x), summed, made, inner, x.stride(0),
        TRANSPOSED=transposed, ROWS=FEW_ROWS, MADE=columns, SUMMED=values, UPCAST=needs_upcast(x),
        num_stages=STAGES, enable_fp_fusion=False,
    )  # fmt: skip
    return y


def matmul(x: Tensor, weight: Quantized) -> Tensor:
    """x (..., in) -> x @ W.T (..., out)."""
    outer, inner = weight.shape
    rows = x.reshape(-1, inner)
    if not isinstance(weight, Int8) and weight.numel and 0 < len(rows) <= FEW_ROWS:
        return _few_rows(rows, weight, False).view(*x.shape[:-1], outer)
    return x @ dequantize(weight, x.dtype).T


def matmul_t(dy: Tensor, weight: Quantized) -> Tensor:
    """dy (..., out) -> dy @ W (..., in)."""
    outer, inner = weight.shape
    rows = dy.reshape(-1, outer)
    if not isinstance(weight, Int8) and weight.numel and 0 < len(rows) <= FEW_ROWS:
        return _few_rows(rows, weight, True).view(*dy.shape[:-1], inner)
    return dy @ dequantize(weight, dy.dtype)


# ---- the checks before first use ----------------------------------------------------------------------------------


def check_nf4_dequantize(device: torch.device) -> bool:
    weight = reference.nf4_quantize(sample(37, 201, device=device))
    parts = (weight, weight.narrow(3, 7))
    return all(agree(nf4_dequantize(w, t), reference.nf4_dequantize(w, t)) for w in parts for t in FLOATS)


def check_int8_dequantize(device: torch.device) -> bool:
    weight = reference.int8_quantize(sample(13, 77, device=device))
    return all(agree(int8_dequantize(weight, t), reference.int8_dequantize(weight, t)) for t in FLOATS)


def check_matmul(device: torch.device) -> bool:
    weight = reference.nf4_quantize(sample(45, 201, device=device)).narrow(3, 40)
    x = sample(5, 201, device=device)
    return blocks.check_few_rows(device, False, FEW_ROWS, TILES["x W^T"]) and close(
        matmul(x, weight), (x.double() @ reference.dequantize(weight).double().T).float()
    )


def check_matmul_t(device: torch.device) -> bool:
    weight = reference.nf4_quantize(sample(45, 201, device=device)).narrow(3, 40)
    dy = sample(5, 40, device=device)
    return blocks.check_few_rows(device, True, FEW_ROWS, TILES["dy W"]) and close(
        matmul_t(dy, weight), (dy.double() @ reference.dequantize(weight).double()).float()
    )
