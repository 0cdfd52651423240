"""One adapter's low-rank term on a GPU, in launches of one matmul each: the scale and the results' dtype are part of them.

On a GPU h is s x A^T, scale included, wherever it is made (`triton/routed.py` too): then no product needs another launch
for the scale. A and B are best given in x's dtype, for a cast is a launch.

Letters: T tokens, `in`, `out` features, r rank, s scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graftlm.kernels import gpu_matmul


def shrink(x: Tensor, M: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """scale * x M: x (T, n), M (n, r) -> (T, r), into `out` where it is given."""
    if out is None:
        out = torch.empty(len(x), M.shape[1], dtype=x.dtype, device=x.device)
    return out.addmm_(x, M.to(x.dtype), beta=0, alpha=scale)  # beta 0: what is there is not read


def factor_gradient(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a (T, n), b (T, m) of one dtype -> a^T b (n, m) in `dtype`."""
    return gpu_matmul.weight_gradient(a, b) if gpu_matmul.usable(a, dtype) else (a.T @ b).to(dtype)


def low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y (T, out) += scale * (x A^T) B^T in place; returns h = scale * x A^T (T, r) for `low_rank_backward`."""
    h = shrink(x, A.T, scale)  # (T, r)
    y.addmm_(h.to(y.dtype), B.to(y.dtype).T)
    return h


def low_rank_backward(
    dy: Tensor, x: Tensor, h: Tensor, A: Tensor, B: Tensor, scale: float, dx: Tensor | None, dtype: torch.dtype | None,
    *, overwrite: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of `low_rank` to A (r, in) and B (out, r), in `dtype` or their own; the one to x is added to `dx`, or
    written there (`overwrite`)."""
    dh = shrink(dy, B, scale)  # (T, r)
    if dx is not None:
        dx.addmm_(dh.to(dx.dtype), A.to(dx.dtype), beta=0 if overwrite else 1)
    return factor_gradient(dh, x.to(dh.dtype), dtype or A.dtype), factor_gradient(dy, h.to(dy.dtype), dtype or B.dtype)
