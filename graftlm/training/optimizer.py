"""AdamW over named parameters, where its states live and when it steps; the norm for clipping; the learning rate's schedule.

What one step does to one parameter is `kernels.adamw_step`, and `kernels/reference_adamw.py` has its formula. Memory
of full training, in bytes a parameter beyond activations, comes down a ladder:

    weights float32, gradients, m and v in float32            4 + 4 + 8
    weights and gradients in bfloat16                         2 + 2 + 8
    m and v in 8 bits                                         2 + 2 + 2.03
    each parameter's step as soon as its gradient is there    2 + ~0 + 2.03
    m and v in the host's memory (GPU)                        2 + ~0 + 0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn

from graftlm import kernels
from graftlm.kernels import Moments
from graftlm.kernels.moments import SMALL

GradientHook = Callable[[str, Tensor, float], None]
"""Told of a parameter's name, its gradient and its learning rate, before its update."""


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
        eight_bit: bool = False,
        in_backward: bool = False,
        state_device: torch.device | None = None,
    ) -> None:
        """`weight_decay` applies to matrices only; `ratios` multiplies the learning rate of single parameters.

        `eight_bit` holds the moments of parameters of 4096 values and more in 8 bits. `in_backward` says that steps are
        taken by `stepping`. The moments live on `state_device`, or where their parameters are.
        """
        self.parameters = parameters
        self.beta1, self.beta2, self.epsilon, self.weight_decay = beta1, beta2, epsilon, weight_decay
        self.seed = seed
        self.ratios = ratios or {}
        self.eight_bit, self.in_backward, self.state_device = eight_bit, in_backward, state_device
        self.steps = 0
        self.moments: dict[str, Moments] = {}
        self.squares: dict[str, Tensor] = {}
        """The sum of squares of each gradient of the last step, () float64; a parameter that got none is not there."""

    # ---- a step of all parameters ----

    def gradient_norm(self) -> float:
        """The 2-norm over all gradients, summed in float64 in a fixed order; after `stepping`, over those it has used."""
        if not self.in_backward:
            gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
            self.squares = {name: kernels.sum_of_squares(gradient) for name, gradient in gradients.items()}
        if not self.squares:
            return 0.0
        ordered = [self.squares[name] for name in self.parameters if name in self.squares]
        return math.sqrt(math.fsum(torch.stack(ordered).tolist()))  # read from the device once

    def step(self, learning_rate: float, factor: float = 1.0) -> None:
        """Update every parameter that has a gradient, taken times `factor`."""
        self.steps += 1
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self._update(name, parameter.grad, learning_rate, factor)

    def rate_of(self, name: str, learning_rate: float) -> float:
        """The learning rate of one parameter."""
        return learning_rate * self.ratios.get(name, 1.0)

    def _update(self, name: str, gradient: Tensor, learning_rate: float, factor: float) -> None:
        parameter = self.parameters[name]
        if name not in self.moments:
            self.moments[name] = kernels.zero_moments(parameter.numel(), **self._kept(name))
        update = kernels.update_of(
            self.steps, self.rate_of(name, learning_rate), beta1=self.beta1, beta2=self.beta2, epsilon=self.epsilon,
            weight_decay=self.weight_decay if parameter.ndim >= 2 else 0.0, factor=factor,
            key=(self.seed, name, self.steps),
        )  # fmt: skip
        kernels.adamw_step(parameter, gradient, self.moments[name], update)

    def _kept(self, name: str) -> _Kept:
        parameter = self.parameters[name]
        device = self.state_device or parameter.device
        return {
            "eight_bit": self.eight_bit and parameter.numel() >= SMALL,
            "device": device,
            "pinned": device.type == "cpu" and parameter.device.type == "cuda",
        }

    def zero_grad(self) -> None:
        """Free every gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def forget(self) -> None:
        """Free the states: no step follows."""
        self.moments = {}

    # ---- steps inside the backward pass ----

    @contextmanager
    def stepping(
        self, learning_rate: float, refusal: Callable[[str], Exception], heard: GradientHook | None = None
    ) -> Iterator[None]:
        """While open, a backward pass updates each parameter as soon as its gradient is complete, and frees it.

        A gradient that is not finite raises `refusal(name)` before that parameter is touched; those whose gradients came
        earlier (the layers behind it) have had their step by then, from finite gradients.
        """
        self.steps += 1
        self.squares = {}

        def taker(name: str) -> Callable[[Tensor], None]:
            def take(parameter: Tensor) -> None:
                gradient = parameter.grad
                assert gradient is not None
                parameter.grad = None
                square = kernels.sum_of_squares(gradient)
                if not math.isfinite(float(square)):
                    raise refusal(name)
                assert name not in self.squares, f"'{name}' got a gradient twice in one step"
                self.squares[name] = square
                if heard is not None:
                    heard(name, gradient, self.rate_of(name, learning_rate))
                self._update(name, gradient, learning_rate, 1.0)

            return take

        handles = [p.register_post_accumulate_grad_hook(taker(name)) for name, p in self.parameters.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # ---- checkpoints ----

    def state(self) -> dict[str, Tensor]:
        """The states as plain tensors, for a checkpoint: `mean.NAME`, `square.NAME`, in 8 bits also `mean_scale.NAME`, ..."""
        if self.state_device is not None and torch.cuda.is_available():
            torch.cuda.synchronize()  # what is still on its way back to the host
        return {f"{kind}.{name}": t for name, moments in self.moments.items() for kind, t in moments.tensors().items()}

    def load(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Take back what `state` gave after `steps` steps; moments that were held in other bits are converted.

        Raises ValueError for states of other parameters than these.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            kind, _, name = key.partition(".")
            parts.setdefault(name, {})[kind] = tensor.reshape(-1)
        moments: dict[str, Moments] = {}
        for name, tensors in parts.items():
            if name not in self.parameters:
                raise ValueError(f"the states hold '{name}', which is not trained")
            count = self.parameters[name].numel()
            try:
                found = Moments(**tensors)
                found.check(count)
            except (TypeError, ValueError) as error:
                raise ValueError(f"the states of '{name}', which has {count} values, are of no use: {error}") from None
            kept = self._kept(name)
            moments[name] = kernels.zero_moments(count, **kept)
            converted = kernels.moments_in(found, kept["eight_bit"], key=(self.seed, name, "loaded"))
            for kind, tensor in moments[name].tensors().items():
                tensor.copy_(converted.tensors()[kind])
        self.moments, self.steps = moments, steps


class _Kept(TypedDict):
    eight_bit: bool
    device: torch.device
    pinned: bool


def clip_factor(norm: float, limit: float) -> float:
    """What all gradients are multiplied with so that their common norm is at most `limit`; 1 where that is 0."""
    return limit / norm if limit and norm > limit else 1.0


@dataclass(frozen=True, kw_only=True)
class LRSchedule:
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
