"""The GPU kernels for the reference's functions, and when they are used.

    programs/      the Triton programs
    device.py      what every launch needs
    weights.py     NF4 and int8 weights, dequantized
    blocks.py      weights in the blocks of GGUF files, dequantized
    product.py     the matmul of any of them
    routed.py      low-rank terms routed by token
    paged.py       attention of single tokens over a paged KV cache
    adamw.py       the optimizer's step
    dropout.py     LoRA's dropout
    fused.py       norms, gated activations, rotary positions
    cross_entropy.py  losses, and logits that become their gradient

Each file of launches ends with its own check against the reference, which runs before its first use (`self_check.py`).
"""

from __future__ import annotations

import importlib.util

from torch import Tensor

from graftlm.kernels.self_check import SelfCheck
from graftlm.kernels.triton import adamw, blocks, cross_entropy, dropout, fused, paged, product, routed, weights
from graftlm.kernels.triton.adamw import step as adamw_step
from graftlm.kernels.triton.adamw import steps as adamw_steps
from graftlm.kernels.triton.blocks import blocks_dequantize
from graftlm.kernels.triton.cross_entropy import cross_entropy_in_place
from graftlm.kernels.triton.device import FLOATS
from graftlm.kernels.triton.dropout import dropped
from graftlm.kernels.triton.product import matmul, matmul_t
from graftlm.kernels.triton.routed import add_by_table, fits, low_rank_routed, low_rank_routed_backward
from graftlm.kernels.triton.weights import int8_dequantize, nf4_dequantize

__all__ = [
    "FLOATS",
    "adamw",
    "adamw_step",
    "adamw_steps",
    "add_by_table",
    "blocks_dequantize",
    "cross_entropy_in_place",
    "dropout",
    "dropped",
    "fits",
    "fused",
    "int8_dequantize",
    "low_rank_routed",
    "low_rank_routed_backward",
    "matmul",
    "matmul_t",
    "nf4_dequantize",
    "paged",
    "self_check",
    "status",
    "usable",
]  # fmt: skip


def _ready() -> str:
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


self_check = SelfCheck(
    "Triton kernels",
    _ready,
    {
        "nf4_dequantize": weights.check_nf4_dequantize,
        "int8_dequantize": weights.check_int8_dequantize,
        "blocks_dequantize": blocks.check_dequantize,
        "matmul": lambda device: product.check(device, False),
        "matmul_t": lambda device: product.check(device, True),
        "low_rank_routed": routed.check,
        "adamw_step": adamw.check,
        "adamw_steps": adamw.check_steps,
        "dropped": dropout.check,
        "dropped_products": dropout.check_products,
        "cross_entropy": cross_entropy.check,
        "fused": fused.check,
        "attend_rows": paged.check,
    },
)


def usable(operation: str, tensor: Tensor) -> bool:
    """Whether `operation` can run here on `tensor`: on a CUDA or ROCm device, with a supported dtype, and checked."""
    if tensor.device.type != "cuda" or (tensor.is_floating_point() and tensor.dtype not in FLOATS):
        return False
    return self_check.allows(operation, tensor.device)


def status() -> str:
    """Whether Triton's kernels are used, or why not."""
    reason = _ready() or self_check.reason
    return f"PyTorch without Triton kernels: {reason}" if reason else "Triton kernels"
