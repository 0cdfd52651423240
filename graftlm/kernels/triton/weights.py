"""NF4 and int8 weights on a GPU, dequantized."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm.kernels import reference
from graftlm.kernels.self_check import sample
from graftlm.kernels.stored import BLOCK, Int8, Nf4
from graftlm.kernels.triton.device import FLOATS, agree, ceil, launch

BLOCKS = 64  # of NF4 in a program: 32 values a thread
INT8_TILE = 2048  # values of a row in a program


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    return reference.NF4_CODE.to(device), reference.DYNAMIC_CODE.to(device)


def nf4_arguments(weight: Nf4) -> tuple[Tensor, ...]:
    """What `programs/weights.py` calls `stored`: codes in words of eight, scales, and the two tables."""
    packed = weight.packed
    if packed.numel() % 4 or packed.storage_offset() % 4:
        packed = F.pad(packed, (0, -packed.numel() % 4))  # only where the number of values is no multiple of 8
    return packed.view(torch.int32), weight.absmax, weight.absmax_scale, weight.offset, *_tables(weight.device)


def nf4_dequantize(weight: Nf4, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if out.numel():
        stored = nf4_arguments(weight)
        blocks = ceil(weight.start % BLOCK + out.numel(), BLOCK)
        launch(
            "weights", "nf4_dequantize", (ceil(blocks, BLOCKS),), out,
            stored, out, weight.start, out.numel(), stored[0].numel(), BLOCKS=BLOCKS, fuse=False,
        )  # fmt: skip
    return out


def int8_dequantize(weight: Int8, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if out.numel():
        inner, scale = weight.shape[-1], weight.scale.contiguous()
        launch(
            "weights", "int8_dequantize", (scale.numel(), ceil(inner, INT8_TILE)), out,
            weight.values.contiguous(), scale, out, inner, TILE=INT8_TILE, fuse=False,
        )  # fmt: skip
    return out


# ---- the checks before first use ----------------------------------------------------------------------------------


def check_nf4_dequantize(device: torch.device) -> bool:
    weight = reference.nf4_quantize(sample(37, 201, device=device))
    parts = (weight, weight.narrow(3, 7), reference.nf4_quantize(sample(3, 4096, device=device)).narrow(1, 2))
    return all(agree(nf4_dequantize(w, t), reference.nf4_dequantize(w, t)) for w in parts for t in FLOATS)


def check_int8_dequantize(device: torch.device) -> bool:
    weights = (reference.int8_quantize(sample(rows, inner, device=device)) for rows, inner in ((13, 77), (3, 2050)))
    return all(agree(int8_dequantize(w, t), reference.int8_dequantize(w, t)) for w in weights for t in FLOATS)
