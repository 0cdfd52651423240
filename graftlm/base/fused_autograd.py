"""Fused norms, gated activations and rotary positions as autograd functions over `kernels/fused.py`.

They save little for backward: a norm its input and one number a row, a gated activation its two inputs, a rotation only the
angles that all layers share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graftlm import kernels
from graftlm.kernels.reference_fused import Gate


class _Norm(torch.autograd.Function):
    """x (rows, n) -> x / rms(x) * (w + offset)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, offset: float) -> Tensor:
        y, r = kernels.rms_norm(x, weight, epsilon, offset)
        ctx.save_for_backward(x, weight, r)
        ctx.offset = offset
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, r = ctx.saved_tensors
        (dy,) = grads
        dx, dw = kernels.rms_norm_backward(dy, x, weight, r, ctx.offset, ctx.needs_input_grad[1])
        return dx, None if dw is None else dw.to(weight.dtype), None, None


class _Gated(torch.autograd.Function):
    """act(gate) * up, all (rows, n)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: Gate) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return kernels.gated(gate, up, kind)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        (dy,), (gate, up) = grads, ctx.saved_tensors
        return *kernels.gated_backward(dy, gate, up, ctx.kind), None


class _GatedHalves(torch.autograd.Function):
    """act(first half) * second half of h (rows, 2 n), whose gradient is one tensor too."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, kind: Gate) -> Tensor:
        ctx.save_for_backward(h)
        ctx.kind = kind
        gate, up = h.chunk(2, dim=1)
        return kernels.gated(gate, up, kind)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (dy,), (h,) = grads, ctx.saved_tensors
        gate, up = h.chunk(2, dim=1)
        dg, du = kernels.gated_backward(dy, gate, up, ctx.kind)
        whole = dg._base
        alike = whole is not None and whole is du._base and whole.shape == h.shape
        return whole if alike and whole is not None else torch.cat((dg, du), dim=1), None


class _Rotary(torch.autograd.Function):
    """Queries and keys (tokens, heads, D), rotated by cos and sin (period, rotary_dim)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        return tuple(kernels.rotary((q, k), cos, sin))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *kernels.rotary_backward(grads, cos, sin), None, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float = 0.0) -> Tensor:
    """x (..., n) / rms(x) * (w + offset), in x's type."""
    rows = x.reshape(-1, x.shape[-1])
    y: Any = _Norm.apply(rows, weight, epsilon, offset)
    return y.view(x.shape)


def gated(gate: Tensor, up: Tensor, kind: Gate = "silu") -> Tensor:
    """act(gate) * up, all (..., n)."""
    n = gate.shape[-1]
    y: Any = _Gated.apply(gate.reshape(-1, n), up.reshape(-1, n), kind)
    return y.view(gate.shape)


def gated_halves(h: Tensor, kind: Gate = "silu") -> Tensor:
    """act(first half) * second half of h (..., 2 n) -> (..., n)."""
    y: Any = _GatedHalves.apply(h.reshape(-1, h.shape[-1]), kind)
    return y.view(*h.shape[:-1], h.shape[-1] // 2)


class Rotary:
    """Replaces a model's `apply_rotary_pos_emb`, and calls it for arguments that were not verified."""

    def __init__(self, own: Callable[..., Any], some: bool) -> None:
        self.own = own
        self.some = some  # it also rotates a part of each head, if cos and sin are narrower than the head
        self.alike: bool | None = None  # on a GPU: whether both halves of cos and sin are the same

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """q (batch, H, T, D), k (batch, K, T, D), cos and sin (batch or 1, T, rotary_dim) -> both rotated.

        The model's own function takes any other arguments: Qwen4's indexer rotates queries alone.
        """
        if kwargs or len(args) != 4 or not self.fits(*args):
            return self.own(*args, **kwargs)
        q, k, cos, sin = args
        batch, _, tokens, width = q.shape
        rows = (x.transpose(1, 2).reshape(batch * tokens, x.shape[1], width) for x in (q, k))
        rotated: Any = _Rotary.apply(*rows, cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1]))
        return tuple(x.view(batch, tokens, x.shape[1], width).transpose(1, 2) for x in rotated)

    def fits(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
        if q.ndim != 4 or k.ndim != 4 or cos.ndim != 3 or cos.shape != sin.shape or cos.requires_grad:
            return False
        batch, _, tokens, width = q.shape
        rotary_dim = cos.shape[-1]
        good = (
            (k.shape[0], k.shape[2], k.shape[3]) == (batch, tokens, width)
            and (rotary_dim == width or (self.some and rotary_dim < width))
            and rotary_dim % 2 == 0
            and cos.shape[0] in (1, batch)
            and cos.shape[1] == tokens
            and q.dtype == k.dtype == cos.dtype == sin.dtype
        )
        return good and (q.device.type == "cpu" or self._halves_alike(cos))

    def _halves_alike(self, cos: Tensor) -> bool:
        if self.alike is None:  # computed once: it waits for the device
            first, second = cos.chunk(2, dim=-1)
            self.alike = bool(torch.equal(first, second))
        return self.alike
