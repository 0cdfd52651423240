"""The operations between a network's matmuls in readable PyTorch, on any device: the reference for the fused kernels.

Every function computes in float32 and rounds its result once to the dtype of its input. Backward functions need the inputs of
forward and little else, so that autograd saves little.

Letters: x (rows, n), w (n,), r (rows,) = 1 / rms(x), g gate, u up, c cosine, s sine, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Gate = Literal["silu", "gelu_tanh"]
GATES: tuple[Gate, ...] = ("silu", "gelu_tanh")


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """y = x r (w + offset) with r = 1 / sqrt(mean(x^2) + epsilon) (Zhang and Sennrich 2019); returns y (rows, n), r (rows,)."""
    wide = x.float()
    r = torch.rsqrt(wide.square().mean(-1) + epsilon)  # (rows,)
    return (wide * r[:, None] * (weight.float() + offset)).to(x.dtype), r


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, offset: float, wants_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """dx = r g - x r^3 mean(g x) with g = dy (w + offset), in x's type; and dw = sum over rows of dy x r, float32."""
    wide = x.float()
    g = dy.float() * (weight.float() + offset)  # (rows, n)
    dx = r[:, None] * (g - wide * (r.square() * (g * wide).mean(-1))[:, None])
    return dx.to(x.dtype), (dy.float() * wide * r[:, None]).sum(0) if wants_weight else None


def gated(gate: Tensor, up: Tensor, kind: Gate = "silu") -> Tensor:
    """act(g) u: SwiGLU or, with GELU's tanh form, GeGLU (Shazeer 2020); all (rows, n)."""
    wide = gate.float()
    activated = F.silu(wide) if kind == "silu" else F.gelu(wide, approximate="tanh")
    return (activated * up.float()).to(gate.dtype)


def gated_backward(dy: Tensor, gate: Tensor, up: Tensor, kind: Gate = "silu") -> tuple[Tensor, Tensor]:
    """The gradients to gate and up. With s the logistic function, silu(g) = g s(g) and gelu(g) = g s(a(g))."""
    g, d = gate.float(), dy.float()
    k = math.sqrt(8 / math.pi)
    a, slope = (g, 1.0) if kind == "silu" else (k * (g + 0.044715 * g**3), k * (1 + 3 * 0.044715 * g**2))
    s = torch.sigmoid(a)
    return (d * up.float() * (s + g * s * torch.sigmoid(-a) * slope)).to(gate.dtype), (d * g * s).to(up.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first values of every head by its token's angles (Su et al. 2021): (a, b) -> (a c - b s, b c + a s).

    x (tokens, heads, D); cos and sin (period, rotary_dim) with rotary_dim <= D, token t using row t % period; a and b
    are the halves of the rotated values, the rest stays.
    """
    rotary_dim, times = cos.shape[-1], len(x) // max(len(cos), 1)
    c, s = (t.float().repeat(times, 1)[:, None] for t in (cos, sin))  # (tokens, 1, turned)
    front = x[..., :rotary_dim].float()
    a, b = front.chunk(2, dim=-1)
    front = front * c + torch.cat((-b, a), dim=-1) * s
    return torch.cat((front.to(x.dtype), x[..., rotary_dim:]), dim=-1)


def rotary_backward(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of `rotary` to x: (da, db) = (dy_a c_a + dy_b s_b, dy_b c_b - dy_a s_a)."""
    rotary_dim, times = cos.shape[-1], len(dy) // max(len(cos), 1)
    c, s = (t.float().repeat(times, 1)[:, None] for t in (cos, sin))
    front = dy[..., :rotary_dim].float()
    a, b = (front * s).chunk(2, dim=-1)
    front = front * c + torch.cat((b, -a), dim=-1)
    return torch.cat((front.to(dy.dtype), dy[..., rotary_dim:]), dim=-1)


def cross_entropy_in_place(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Each row's -log softmax(logits)[label], (rows,) float32; with `weights` (rows,), logits (rows, V) become its gradient.

    That is weight * (softmax - onehot), rounded to the logits' type. Raises IndexError for a label outside of 0 .. V - 1, but
    not on a GPU, which it would wait for.
    """
    if labels.device.type == "cpu" and len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= logits.shape[-1]):
        raise IndexError(f"a label is not in 0 .. {logits.shape[-1] - 1}")
    log_softmax = torch.log_softmax(logits.float(), dim=-1)  # (rows, V)
    losses = -log_softmax.gather(1, labels[:, None])[:, 0]
    if weights is not None:
        gradient = log_softmax.exp_()
        gradient.scatter_add_(1, labels[:, None], gradient.new_full((len(labels), 1), -1.0))
        logits.copy_(gradient.mul_(weights[:, None]))
    return losses
