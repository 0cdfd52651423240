"""AdamW, the schedule of its learning rate, and clipping.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2                               (Kingma and Ba 2015)
    p = p (1 - lr wd) - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)        (Loshchilov and Hutter 2019)

Equal to `torch.optim.AdamW`, tensor by tensor, so that the only temporary is one tensor's. A weight in bfloat16 is
updated in float32 and rounded to one of its two neighbours at random, in proportion to how near each is (stochastic
rounding): plain rounding would lose every update smaller than 1/512 of the weight. The random bits come from a counter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.kernels.counter import uniform_words


def stochastic_round(value: Tensor, words: Tensor) -> Tensor:
    """Round float32 to bfloat16 up or down in proportion to the distance; `words` (numel,) int32 are the random bits.

    A bfloat16 is the upper half of a float32: adding 16 random bits to the lower half and cutting it off carries into
    the upper half with exactly that probability.
    """
    bits = value.contiguous().view(torch.int32)
    raised = (bits + (words.view(value.shape) & 0xFFFF)) & -65536
    return raised.view(torch.float32).to(torch.bfloat16)


class AdamW:
    """One trial's optimizer over named parameters."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        *,
        beta1: float,
        beta2: float,
        epsilon: float,
        weight_decay: float,
        seed: int = 0,
        ratios: dict[str, float] | None = None,
    ) -> None:
        """`weight_decay` applies to matrices only; `ratios` multiplies the learning rate of single parameters."""
        self.parameters = parameters
        self.beta1, self.beta2, self.epsilon, self.weight_decay = beta1, beta2, epsilon, weight_decay
        self.seed = seed
        self.ratios = ratios or {}
        self.steps = 0
        self.mean: dict[str, Tensor] = {}  # m, float32, of the parameter's shape
        self.square: dict[str, Tensor] = {}  # v

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every parameter that has a gradient."""
        self.steps += 1
        fix1, fix2 = 1 - self.beta1**self.steps, 1 - self.beta2**self.steps
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            if name not in self.mean:
                self.mean[name] = torch.zeros_like(gradient)
                self.square[name] = torch.zeros_like(gradient)
            rate = learning_rate * self.ratios.get(name, 1.0)
            m, v = self.mean[name], self.square[name]
            m.lerp_(gradient, 1 - self.beta1)
            v.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
            bottom = v.sqrt().div_(math.sqrt(fix2)).add_(self.epsilon)
            exact = parameter.dtype == torch.float32
            value = parameter if exact else parameter.float()
            if self.weight_decay and parameter.ndim >= 2:
                value.mul_(1 - rate * self.weight_decay)
            value.addcdiv_(m, bottom, value=-rate / fix1)
            if not exact:
                words = uniform_words(value.numel(), self.seed, name, self.steps, device=value.device)
                parameter.copy_(stochastic_round(value, words))

    def zero_grad(self) -> None:
        """Free every gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """The states as plain tensors, for a checkpoint."""
        found = {f"mean.{name}": tensor for name, tensor in self.mean.items()}
        found.update({f"square.{name}": tensor for name, tensor in self.square.items()})
        return found

    def load(self, state: dict[str, Tensor], steps: int) -> None:
        """Take back what `state` gave after `steps` steps."""
        self.steps = steps
        for key, tensor in state.items():
            kind, _, name = key.partition(".")
            target = self.mean if kind == "mean" else self.square
            target[name] = tensor.to(self.parameters[name].device)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """The 2-norm over all gradients; the squares of the tensors' norms are summed in float64, in a fixed order."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters if p.grad is not None]
    if not norms:
        return 0.0
    return math.sqrt(float(torch.stack(norms).double().square().sum()))  # read from the device once


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], norm: float, limit: float) -> None:
    """Scale all gradients so that their common norm is at most `limit`; 0 leaves them."""
    if limit and norm > limit:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(limit / norm)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate of each step: up in a line over the warm-up, then down to zero or level."""

    peak: float
    kind: Literal["cosine", "linear", "constant"]
    warmup_steps: int
    steps: int

    def __call__(self, step: int) -> float:
        """The rate of optimizer step `step`, counted from 0; never zero within the run."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if self.kind == "constant":
            return self.peak
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)  # 0 .. below 1
        return self.peak * (1 - done if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
