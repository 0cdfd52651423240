"""The fused elementwise operations vs PyTorch's separate ones: forward and backward, float32.

`bench/operations.py` runs these rows; shapes are those of a step of the 30M Llama in `bench/train.py`, and a large vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from graftlm import kernels
from graftlm.base.fused_autograd import Rotary, gated, rms_norm

TOKENS, WIDTH, INNER, HEADS, HEAD = 960, 512, 1408, 8, 64
TRAINED, VOCABULARIES = 600, (8192, 49152)

Pair = tuple[Callable[[], Any], Callable[[], Any]]


def there_and_back(
    call: Callable[[], Any], inputs: tuple[Tensor, ...], directions: tuple[Tensor, ...]
) -> Callable[[], Any]:
    """The operation and its gradients to `inputs` for gradients `directions` of its results."""

    def run() -> Any:
        y = call()
        return torch.autograd.grad(y if isinstance(y, tuple) else (y,), inputs, directions)

    return run


def rows() -> list[tuple[str, Pair]]:
    """Name of the operation, ours and PyTorch's."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def leaf(*shape: int) -> Tensor:
        return randn(*shape).requires_grad_()

    found: list[tuple[str, Pair]] = []

    def add(name: str, ours: Callable[[], Any], theirs: Callable[[], Any], inputs: tuple[Tensor, ...]) -> None:
        y = ours()
        directions = tuple(torch.randn_like(t) for t in (y if isinstance(y, tuple) else (y,)))
        found.append((name, (there_and_back(ours, inputs, directions), there_and_back(theirs, inputs, directions))))

    x, norm = leaf(TOKENS, WIDTH), LlamaRMSNorm(WIDTH)
    add(
        f"RMSNorm, {TOKENS}x{WIDTH}, its weight trained",
        lambda: rms_norm(x, norm.weight, 1e-6),
        lambda: norm(x),
        (x, norm.weight),
    )
    frozen = norm.weight.detach()
    add(
        f"RMSNorm, {TOKENS}x{WIDTH}, its weight frozen", lambda: rms_norm(x, frozen, 1e-6),
        lambda: frozen * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), (x,),
    )  # fmt: skip
    gate, up = leaf(TOKENS, INNER), leaf(TOKENS, INNER)
    add(f"SwiGLU, {TOKENS}x{INNER}", lambda: gated(gate, up), lambda: F.silu(gate) * up, (gate, up))
    add(
        f"GeGLU (tanh), {TOKENS}x{INNER}", lambda: gated(gate, up, "gelu_tanh"),
        lambda: F.gelu(gate, approximate="tanh") * up, (gate, up),
    )  # fmt: skip
    q, k = (leaf(1, TOKENS, HEADS, HEAD) for _ in range(2))
    angles = randn(1, TOKENS, HEAD // 2).repeat(1, 1, 2)
    cos, sin, ours = angles.cos(), angles.sin(), Rotary(apply_rotary_pos_emb, some=False)
    add(
        f"rotary, {TOKENS} tokens, q and k of {HEADS}x{HEAD}", lambda: ours(q.transpose(1, 2), k.transpose(1, 2), cos, sin),
        lambda: apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin), (q, k),
    )  # fmt: skip
    for vocabulary in VOCABULARIES:
        logits, labels = randn(TRAINED, vocabulary), torch.randint(0, vocabulary, (TRAINED,), generator=generator)
        weights = torch.rand(TRAINED, generator=generator)
        mine, its = logits.clone(), logits.clone().requires_grad_()

        def cross(mine: Tensor = mine, labels: Tensor = labels, weights: Tensor = weights) -> Any:
            return kernels.cross_entropy_in_place(mine, labels, weights)

        def composed(its: Tensor = its, labels: Tensor = labels, weights: Tensor = weights) -> Any:
            losses = F.cross_entropy(its, labels, reduction="none")
            return torch.autograd.grad((losses * weights).sum(), its)

        found.append((f"cross entropy and its gradient, {TRAINED}x{vocabulary}", (cross, composed)))
    return found
