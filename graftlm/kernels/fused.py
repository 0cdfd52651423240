"""Fused elementwise operations, in C on the CPU and in Triton on GPUs.

    rms_norm   rms_norm_backward     saves 1 / rms(x) of each row
    gated      gated_backward        SwiGLU and GeGLU; saves gate and up
    rotary     rotary_backward       queries and keys together
    cross_entropy_in_place           losses, and logits overwritten by their gradient

`has_fused_ops(device, dtype)` says whether they are faster than PyTorch's separate operations; otherwise `reference_fused.py`,
which defines the results, is used. No gradients are recorded here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graftlm.kernels import native, triton
from graftlm.kernels import reference_fused as reference
from graftlm.kernels.native import fused as compiled
from graftlm.kernels.native.library import TWO_TYPES
from graftlm.kernels.reference_fused import Gate


def has_fused_ops(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether these operations are faster here than PyTorch's separate operations."""
    if device.type == "cuda":
        return triton.usable("fused", torch.empty(0, dtype=dtype, device=device))
    return dtype in TWO_TYPES and native.usable("fused", torch.empty(0, dtype=dtype, device=device))


def _in_c(x: Tensor) -> bool:
    return x.dtype in TWO_TYPES and native.usable("fused", x)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """x (rows, n) -> y = x r (w + offset) in x's type, and r (rows,) = 1 / sqrt(mean(x^2) + epsilon) for the backward."""
    if _in_c(x):
        return compiled.rms_norm(x, weight, epsilon, offset)
    if triton.usable("fused", x):
        return triton.fused.rms_norm(x, weight, epsilon, offset)
    return reference.rms_norm(x, weight, epsilon, offset)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, offset: float, wants_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of `rms_norm` to x (rows, n), in its type, and to the weight (n,), in float32, where it is wanted."""
    if _in_c(x):
        return compiled.rms_norm_backward(dy, x, weight, r, offset, wants_weight)
    if triton.usable("fused", x):
        return triton.fused.rms_norm_backward(dy, x, weight, r, offset, wants_weight)
    return reference.rms_norm_backward(dy, x, weight, r, offset, wants_weight)


def gated(gate: Tensor, up: Tensor, kind: Gate = "silu") -> Tensor:
    """act(gate) * up, all (rows, n)."""
    if _in_c(gate):
        return compiled.gated(gate, up, kind)
    if triton.usable("fused", gate):
        return triton.fused.gated(gate, up, kind)
    return reference.gated(gate, up, kind)


def gated_backward(dy: Tensor, gate: Tensor, up: Tensor, kind: Gate = "silu") -> tuple[Tensor, Tensor]:
    """The gradients of `gated` to gate and up (rows, n); halves of one tensor where gate and up are."""
    if _in_c(gate):
        return compiled.gated_backward(dy, gate, up, kind)
    if triton.usable("fused", gate):
        return triton.fused.gated_backward(dy, gate, up, kind)
    return reference.gated_backward(dy, gate, up, kind)


def rotary(parts: Sequence[Tensor], cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Each of `parts` (tokens, heads, D), queries and keys, rotated by its token's angles: cos and sin (period, rotary_dim).

    Token t uses row t % period; heads are rotated in halves, and values beyond `rotary_dim` stay.
    """
    if _in_c(parts[0]):
        return compiled.rotary(parts, cos, sin, back=False)
    if triton.usable("fused", parts[0]):
        return triton.fused.rotary(parts, cos, sin, back=False)
    return [reference.rotary(x, cos, sin) for x in parts]


def rotary_backward(parts: Sequence[Tensor], cos: Tensor, sin: Tensor) -> list[Tensor]:
    """The gradients of `rotary` to each part from those to its results."""
    if _in_c(parts[0]):
        return compiled.rotary(parts, cos, sin, back=True)
    if triton.usable("fused", parts[0]):
        return triton.fused.rotary(parts, cos, sin, back=True)
    return [reference.rotary_backward(dy, cos, sin) for dy in parts]


def cross_entropy_in_place(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """logits (rows, V), labels (rows,) -> each row's -log softmax(logits)[label], (rows,) float32.

    With `weights` (rows,) the logits are overwritten by weight * (softmax - onehot), the gradient of the weighted sum.
    Raises IndexError for a label outside of 0 .. V - 1, except on a GPU: callers check labels while they are on the host.
    """
    if _in_c(logits):
        return compiled.cross_entropy_in_place(logits, labels, weights)
    if triton.usable("cross_entropy", logits):
        return triton.cross_entropy_in_place(logits, labels, weights)
    return reference.cross_entropy_in_place(logits, labels, weights)
