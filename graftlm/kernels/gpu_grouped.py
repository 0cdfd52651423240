"""The matmuls of all experts of a mixture in one launch, on a GPU: PyTorch's grouped matmul, whose bounds stay on the GPU.

That is so for compute capabilities 9.x and 10.x (H100, B200) alone. For other cards, the later 11.x and 12.x too, PyTorch has a
loop that reads the bounds (`_grouped_mm_cuda`; its pull request 194227): there `usable` says no, and experts are taken one by
one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm.kernels.self_check import SelfCheck, close, sample

CAPABILITIES = (9, 10)
"""Major compute capabilities of the cards that have it in one launch."""
MULTIPLE = 8  # of every width: rows begin at multiples of 16 bytes


def usable(x: Tensor) -> bool:
    """Whether `grouped_matmul` takes x: bfloat16, on a GPU that has it in one launch."""
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x.device)[0] in CAPABILITIES
        and self_check.allows("grouped_matmul", x.device)
    )


def grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (S, in) with W (E, out, in) -> (S, out): rows up to ends[0] times W[0]^T, those up to ends[1] times W[1]^T, and so on.

    `ends` (E,) int32, the last one S. All of one dtype and end to end; `in` and `out` are multiples of MULTIPLE.
    """
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


def grouped_matmul_t(dy: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """dy (S, out) with W (E, out, in) -> (S, in): the gradient to x."""
    return F.grouped_mm(dy, weight, offs=ends)


def grouped_weight_gradient(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """dy (S, out), x (S, in) -> (E, out, in): the gradient to W, 0 for an expert without a row."""
    return F.grouped_mm(dy.T, x, offs=ends)


# ---- the check before first use -----------------------------------------------------------------------------------


def check(device: torch.device) -> bool:
    """Forward and both gradients, with an expert that gets no row."""
    x, dy = sample(37, 24, device=device).bfloat16(), sample(37, 40, step=0.2, device=device).bfloat16()
    weight, ends = sample(3, 40, 24, step=0.3, device=device).bfloat16(), [20, 20, 37]
    there = torch.tensor(ends, dtype=torch.int32, device=device)
    found = grouped_matmul(x, weight, there), grouped_matmul_t(dy, weight, there), grouped_weight_gradient(dy, x, there)
    wanted = [torch.zeros_like(t, dtype=torch.float64) for t in found]
    for expert, (first, last) in enumerate(zip([0, *ends], ends)):
        rows, w = slice(first, last), weight[expert].double()
        wanted[0][rows], wanted[1][rows] = x[rows].double() @ w.T, dy[rows].double() @ w
        wanted[2][expert] = dy[rows].double().T @ x[rows].double()
    return all(close(a, b.float(), 1e-2) for a, b in zip(found, wanted))


self_check = SelfCheck("grouped matmul", lambda: "", {"grouped_matmul": check})
