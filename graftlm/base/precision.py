"""Stored precisions of weights, and the default compute dtype.

    float32    32 bits a value
    bfloat16   16 bits
    int8        8 bits and one float32 scale a row (absmax)
    nf4         4.127 bits: 16 quantiles, blocks of 64, each block's absmax in 8 bits (Dettmers et al. 2023)
    gguf        every tensor as it is in a GGUF file: 4.5 to 8.5 bits in its blocks, or its 16 or 32 bits

The user chooses the precision, the hardware the compute dtype: in bfloat16 a matmul is about seven times slower than in
float32 on a CPU without bfloat16 instructions, and about twice slower in PyTorch with AVX-512. So there 16-bit and 4-bit
weights are upcast to float32 for each matmul. Our own matmul uses AVX-512 BF16: `bf16-mixed` rounds both inputs to bfloat16
and accumulates in float32, which makes a training step 1.4 to 1.6 times as fast and is the default for training. Serving
keeps float32: a matmul of few rows is bound by reading the weights, whatever the dtype.
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
    """Convert a float tensor, (out, in) or stacked (experts, out, in), to its stored form."""
    if precision == "nf4":
        return kernels.nf4_quantize(weight)
    if precision == "int8":
        return kernels.int8_quantize(weight)
    return weight if precision == "gguf" else weight.to(DTYPES[precision])


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The stored weight as a dense tensor of `dtype`."""
    return weight.to(dtype) if isinstance(weight, Tensor) else kernels.dequantize(weight, dtype)


def nbytes(weight: Weight) -> int:
    """Bytes of the stored form."""
    return weight.numel() * weight.element_size() if isinstance(weight, Tensor) else weight.nbytes


def embedding_precision(precision: Precision) -> Precision:
    """The precision of embeddings and head if the linear layers have `precision`: at least 16 bits, or what the file has."""
    return precision if precision in ("float32", "gguf") else "bfloat16"


def embedding_dtype(precision: Precision, found: torch.dtype) -> torch.dtype:
    """The dtype of a dense embedding or head whose checkpoint has dtype `found`."""
    kept = embedding_precision(precision)
    return found if kept == "gguf" else DTYPES[kept]


@cache
def _cpu_multiplies_bfloat16_faster() -> bool:
    if platform.machine() in ("arm64", "aarch64"):
        return False  # some do; float32 is correct on all
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    # PyTorch's bfloat16 matmul reaches about half of float32's rate with AVX-512 (measured), and more with AMX.
    return "amx_bf16" in flags


def default_compute_dtype(device: torch.device, *, training: bool = False) -> ComputeDtype:
    """The fastest dtype on `device` that is precise enough, for training or otherwise."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    if device.type != "cpu":
        return "float32"
    if _cpu_multiplies_bfloat16_faster():
        return "bfloat16"
    return "bf16-mixed" if training and kernels.has_bf16_matmul() else "float32"
