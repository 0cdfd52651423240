"""How a weight is stored, and what that costs.

    float32    32 bits a value
    bfloat16   16 bits
    int8        8 bits and one float32 scale a row (absmax)
    nf4         4.127 bits: 16 quantiles, blocks of 64, each block's absmax in 8 bits (Dettmers et al. 2023)

Storage is the user's choice, the compute dtype is the hardware's: a CPU without bfloat16 instructions multiplies
bfloat16 about seven times slower than float32, PyTorch on one with AVX-512's about twice slower. So there 16-bit and
4-bit weights are upcast to float32 for each product. Our own products do use AVX-512's: `bf16-mixed` rounds both sides of a
product to bfloat16 and sums in float32, 1.4 to 1.6 times as fast for a step of training, which is where it is the default.
Serving keeps float32: its products of few rows wait for the weights to be read, whatever they are multiplied in.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from graftlm import kernels
from graftlm.config import ComputeDtype, Precision
from graftlm.kernels import Weight

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bf16-mixed": torch.float32}


def quantize(weight: Tensor, precision: Precision) -> Weight:
    """Bring a float tensor, (out, in) or stacked (experts, out, in), into its stored form."""
    if precision == "nf4":
        return kernels.nf4_quantize(weight)
    if precision == "int8":
        return kernels.int8_quantize(weight)
    return weight.to(DTYPES[precision])


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The stored weight as a dense tensor of `dtype`."""
    return weight.to(dtype) if isinstance(weight, Tensor) else kernels.dequantize(weight, dtype)


def nbytes(weight: Weight) -> int:
    """Bytes that the stored form takes."""
    return weight.numel() * weight.element_size() if isinstance(weight, Tensor) else weight.nbytes


def embedding_precision(precision: Precision) -> Precision:
    """How embeddings and the output head are stored when the linear layers are stored in `precision`: never below 16 bits."""
    return "float32" if precision == "float32" else "bfloat16"


@cache
def _cpu_multiplies_bfloat16_faster() -> bool:
    if platform.machine() in ("arm64", "aarch64"):
        return False  # some do; products in float32 are right everywhere
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    # PyTorch's bfloat16 products with AVX-512 alone reach about half of float32's rate (measured); AMX's do not fall short.
    return "amx_bf16" in flags


def default_compute_dtype(device: torch.device, *, training: bool = False) -> ComputeDtype:
    """The type in which `device` multiplies fastest without losing what is needed, in training or elsewhere."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    if device.type != "cpu":
        return "float32"
    if _cpu_multiplies_bfloat16_faster():
        return "bfloat16"
    return "bf16-mixed" if training and kernels.has_bf16_matmul() else "float32"
