"""DoRA's factor of each output (Liu et al. 2024): m / |W + s B A|, a magnitude over the norm of a row.

    |w + s b A|^2 = |w|^2 + 2 s (w A^T) b + s^2 b (A A^T) b        for each row w of W and b of B

The base is frozen, so |w| is computed once. A step needs W A^T beside it, a matmul of r columns with the stored weight: neither
B A nor W in float32 exists. The norm is a constant to the gradient (section 4.3).

Letters: T tokens, `in`, `out` features, r rank, s scale, m magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graftlm import kernels
from graftlm.base.precision import Weight, dequantize

_PANEL = 1 << 24  # values of W that are in float32 at once


@torch.no_grad()
def row_norms(weight: Weight) -> Tensor:
    """|w| of each row of W (out, in), stored in any form -> (out,) float32."""
    out, inner = weight.shape
    step = max(1, _PANEL // max(inner, 1))
    norms: list[Tensor] = []
    for first in range(0, out, step):
        count = min(step, out - first)
        panel = weight[first : first + count] if isinstance(weight, Tensor) else weight.narrow(first, count)
        norms.append(torch.linalg.vector_norm(dequantize(panel, torch.float32), dim=1))
    return norms[0] if len(norms) == 1 else torch.cat(norms)


@torch.no_grad()
def combined_norm(
    squares: Tensor, weight: Weight, A: Tensor, B: Tensor, scale: float, used: Tensor | None = None
) -> Tensor:
    """|w + s b A| of each row (out,), of W (out, in) whose rows have `squares` |w|^2, and A (r, in), B (out, r) in float32.

    `used` is A in the dtype of its matmuls, where that is another one. For B = 0 it is |w|, to the last bit: the root of a
    rounded square is what was squared.
    """
    WA = kernels.matmul(A if used is None else used, weight).float()  # (r, out)
    mixed = torch.addmm(WA.T, B, A @ A.T, beta=2 * scale, alpha=scale**2)  # (out, r)
    return (squares + (mixed * B).sum(1)).clamp_min(0).sqrt()


class _Rescaled(torch.autograd.Function):
    """y (T, out) -> m / norm times each range of y; gradients to y and to every m."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, ranges: Sequence[tuple[int, int, int]], norms: Sequence[Tensor], *magnitudes: Tensor
    ) -> Tensor:
        ratios = [m / norm for m, norm in zip(magnitudes, norms)]
        ctx.save_for_backward(y, *ratios, *norms)
        ctx.ranges, ctx.dtypes = ranges, [m.dtype for m in magnitudes]
        return _times(y, ratios, ranges)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        dy = grads[0]  # (T, out)
        y, *saved = ctx.saved_tensors
        ratios, norms = saved[: len(ctx.dtypes)], saved[len(ctx.dtypes) :]
        totals: list[Tensor | None] = [None] * len(ratios)
        for index, first, last in ctx.ranges:
            if ctx.needs_input_grad[3 + index]:
                found = (dy[first:last] * y[first:last]).sum(0, dtype=torch.float32)  # (out,)
                before = totals[index]
                totals[index] = found if before is None else before + found
        to_magnitudes = [
            None if total is None else (total / norm).to(dtype) for total, norm, dtype in zip(totals, norms, ctx.dtypes)
        ]
        to_y = _times(dy, ratios, ctx.ranges) if ctx.needs_input_grad[0] else None
        return to_y, None, None, *to_magnitudes


def _times(y: Tensor, ratios: Sequence[Tensor], ranges: Sequence[tuple[int, int, int]]) -> Tensor:
    """y (T, out) with the rows of each range times its ratio (out,), multiplied in float32; other rows as they are."""
    out = torch.empty_like(y)
    done = 0
    for index, first, last in (*ranges, (-1, len(y), len(y))):
        if done < first:
            out[done:first] = y[done:first]
        if first < last:
            torch.mul(y[first:last], ratios[index], out=out[first:last])
        done = last
    return out


def rescaled(
    y: Tensor, ranges: Sequence[tuple[int, int, int]], norms: Sequence[Tensor], magnitudes: Sequence[Tensor]
) -> Tensor:
    """y (T, out) times m / norm, (out,), of each range (index of m and norm, first token, last), in order.

    Differentiable; y is not changed.
    """
    found = _Rescaled.apply(y, ranges, norms, *magnitudes)
    assert isinstance(found, Tensor)
    return found
