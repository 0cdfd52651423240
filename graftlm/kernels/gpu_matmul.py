"""A matmul of 16-bit inputs with a float32 result on a GPU: what tensor cores sum in is what they give.

Full training of float32 weights computes in bfloat16; its gradients need not be rounded to that, nor made in panels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graftlm.kernels.self_check import SelfCheck, close, sample


def usable(dy: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether `weight_gradient` takes dy and gives `dtype`: 16 bits on a GPU, float32 asked for."""
    return (
        dy.device.type == "cuda"
        and dy.dtype in (torch.bfloat16, torch.float16)
        and dtype == torch.float32
        and self_check.allows("weight_gradient", dy.device)
    )


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy (rows, out), x (rows, in), both in 16 bits -> dy^T x (out, in) float32."""
    return torch.mm(dy.T, x, out_dtype=torch.float32)


# ---- the check before first use -----------------------------------------------------------------------------------


def check(device: torch.device) -> bool:
    dy, x = sample(33, 24, device=device).bfloat16(), sample(33, 40, step=0.3, device=device).bfloat16()
    return close(weight_gradient(dy, x), (dy.double().T @ x.double()).float())


self_check = SelfCheck("float32 results of 16-bit matmuls", lambda: "", {"weight_gradient": check})
