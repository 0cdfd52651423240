"""AdamW over named parameters; gradient clipping; steps inside the backward pass; the learning rate's schedule.

What one step does to one parameter is `kernels.adamw_step`, and `kernels/reference_adamw.py` has its formula. Memory
of full training, in bytes a parameter beyond activations, comes down a ladder:

    weights float32, gradients, m and v in float32            4 + 4 + 8
    weights and gradients in bfloat16                         2 + 2 + 8
    m and v in 8 bits                                         2 + 2 + 2.03
    each parameter's step as soon as its gradient is there    2 + ~0 + 2.03
    m and v in the host's memory (GPU)                        2 + ~0 + 0

**Steps inside the backward pass** (`--optimizer-in-backward`): each tensor is updated as soon as its gradient is
complete, which is then freed, so no more than a few gradients exist at once. The price: the norm of all gradients is
known only when the last one is gone, so nothing can be clipped by it, and a step is one micro-batch, for a second one
would meet weights that have moved already.

What is promised about numbers that are not finite: the loss is checked before the backward pass begins, and where it is not
finite nothing is updated. A gradient that is not finite stops the run with its tensor's name before that tensor is touched;
the tensors between it and the loss have had their step by then. On a GPU, which every look would wait for, the losses are the
gate of the steps (`kernels.Update`), and losses and gradients are looked at once, behind the backward pass, when all have had
their step. Nothing of that step is written to disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn

from graftlm import kernels
from graftlm.base.loading import Base
from graftlm.distributed.deal import deal
from graftlm.distributed.group import ALONE, Ranks
from graftlm.distributed.shard import add_up_rows, is_split, local, offset, sharing
from graftlm.errors import ConfigError, Diverged
from graftlm.kernels import Moments
from graftlm.kernels.moments import MOMENT_BLOCK, SMALL
from graftlm.segments import pack
from graftlm.training.sanity_checks import UpdateCheck
from graftlm.training.trial import Trial, name_rows

GradientHook = Callable[[str, Tensor, float], None]
"""Called with a parameter's name, its gradient and its learning rate, before its update."""


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
        lr_multipliers: dict[str, float] | None = None,
        eight_bit: bool = False,
        in_backward: bool = False,
        state_device: torch.device | None = None,
    ) -> None:
        """`weight_decay` applies to matrices only; `lr_multipliers` multiply the learning rate of single parameters.

        `eight_bit` holds the moments of parameters of 4096 values and more in 8 bits. `in_backward` says that steps are
        taken by `step_in_backward`. The moments live on `state_device`, or where their parameters are.
        """
        self.parameters = parameters
        self.beta1, self.beta2, self.epsilon, self.weight_decay = beta1, beta2, epsilon, weight_decay
        self.seed = seed
        self.lr_multipliers = lr_multipliers or {}
        self.eight_bit, self.in_backward, self.state_device = eight_bit, in_backward, state_device
        self.sharing = next((sharing(p) for p in parameters.values() if is_split(p)), ALONE)
        """The ranks that the larger ones of the parameters are split over."""
        self.steps = 0
        self.moments: dict[str, Moments] = {}
        self.squares: dict[str, Tensor] = {}
        """The sum of squares of each gradient of the last step, () float64; a parameter that got none is not there."""
        self._square_values: dict[str, float] = {}  # the same on the host

    # ---- a step of all parameters ----

    def gradient_norm(self) -> float:
        """The 2-norm over all gradients, summed in float64 in a fixed order; after `step_in_backward`, over those it used."""
        if not self.in_backward:
            gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
            self.squares = {}
            values: dict[str, float] = {}
            for names in kernels.by_device(gradients):
                squares = kernels.sums_of_squares([local(gradients[name]) for name in names])  # (n,)
                self.squares.update(zip(names, squares.unbind()))
                values.update(zip(names, squares.tolist()))
            found = add_up_rows(list(gradients.values()), [values[name] for name in gradients])
            self._square_values = dict(zip(gradients, found))
        return math.sqrt(math.fsum(self._square_values.values()))

    def step(self, learning_rate: float, clip_coefficient: float = 1.0) -> None:
        """Update every parameter that has a gradient, taken times `clip_coefficient`."""
        self.steps += 1
        steps = [
            self._step_of(name, parameter.grad, learning_rate, clip_coefficient)
            for name, parameter in self.parameters.items()
            if parameter.grad is not None
        ]
        kernels.adamw_steps([step for step in steps if step[0].numel()])  # a rank may have no rows of a tensor

    def rate_of(self, name: str, learning_rate: float) -> float:
        """The learning rate of one parameter."""
        return learning_rate * self.lr_multipliers.get(name, 1.0)

    def _step_of(
        self, name: str, gradient: Tensor, learning_rate: float, clip_coefficient: float, gate: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Moments, kernels.Update]:
        """What `kernels.adamw_step` is given for one parameter in this step; its moments are made if it has none."""
        parameter = self.parameters[name]
        own = local(parameter)
        if name not in self.moments:
            self.moments[name] = kernels.zero_moments(own.numel(), **self._kept(name))
        update = kernels.update_of(
            self.steps, self.rate_of(name, learning_rate), beta1=self.beta1, beta2=self.beta2, epsilon=self.epsilon,
            weight_decay=self.weight_decay if parameter.ndim >= 2 else 0.0, factor=clip_coefficient,
            key=(self.seed, name, self.steps), gate=gate, first=offset(parameter),
        )  # fmt: skip
        return own, local(gradient), self.moments[name], update

    def _kept(self, name: str) -> _Kept:
        parameter = self.parameters[name]
        device = self.state_device or parameter.device
        # Blocks of a whole parameter, which a rank's rows must begin and end with, whatever the number of ranks.
        in_blocks = not is_split(parameter) or math.prod(parameter.shape[1:]) % MOMENT_BLOCK == 0
        return {
            "eight_bit": self.eight_bit and parameter.numel() >= SMALL and in_blocks,
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
    def step_in_backward(
        self, learning_rate: float, refusal: Callable[[str], Exception], on_gradient: GradientHook | None = None,
        gate: Tensor | None = None,
    ) -> Iterator[None]:  # fmt: skip
        """While open, a backward pass updates each parameter as soon as its gradient is complete, and frees it.

        A gradient that is not finite raises `refusal(name)` before that parameter is touched; those whose gradients came
        earlier (the layers behind it) have had their step by then, from finite gradients. On a GPU nothing is raised: the
        caller reads `squares`, tells `take_squares` of them and asks `not_finite`. Where `gate` () is not finite, the steps
        change nothing. The same is so for parameters that ranks share, since none may stop alone; those that are not split
        have their step behind the backward pass, when their gradients are added up.
        """
        self.steps += 1
        self.squares, self._square_values = {}, {}

        def taker(name: str) -> Callable[[Tensor], None]:
            def take(parameter: Tensor) -> None:
                gradient = parameter.grad
                assert gradient is not None
                parameter.grad = None
                square = kernels.sum_of_squares(local(gradient))
                if not self.looks_later(square) and not math.isfinite(float(square)):
                    raise refusal(name)
                assert name not in self.squares, f"'{name}' got a gradient twice in one step"
                self.squares[name] = square
                if on_gradient is not None:
                    on_gradient(name, gradient, self.rate_of(name, learning_rate))
                step = self._step_of(name, gradient, learning_rate, 1.0, gate)
                if step[0].numel():
                    kernels.adamw_step(*step)

            return take

        after = {n: p for n, p in self.parameters.items() if self.sharing.size > 1 and not is_split(p)}
        handles = [p.register_post_accumulate_grad_hook(taker(n)) for n, p in self.parameters.items() if n not in after]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self.sharing.add_up_gradients(list(after.values()))
        for name, parameter in after.items():
            if parameter.grad is not None:
                taker(name)(parameter)
        if gate is None and self.sharing.size == 1:
            self.take_squares(kernels.read_numbers(list(self.squares.values())))

    def take_squares(self, values: Sequence[float]) -> None:
        """The numbers in `squares`, in their order, where somebody else has read them."""
        found = add_up_rows([self.parameters[name] for name in self.squares], values)
        self._square_values = dict(zip(self.squares, found, strict=True))

    def looks_later(self, tensor: Tensor) -> bool:
        """Whether numbers are looked at behind the backward pass: a look would wait for a GPU, or for the other ranks."""
        return tensor.is_cuda or self.sharing.size > 1

    def not_finite(self) -> str | None:
        """The first parameter of the last `step_in_backward` whose gradient was not finite."""
        return next((name for name, value in self._square_values.items() if not math.isfinite(value)), None)

    # ---- checkpoints ----

    def state(self) -> dict[str, Tensor]:
        """The states as plain tensors, for a checkpoint: `mean.NAME`, `square.NAME`, in 8 bits also `mean_scale.NAME`, ..."""
        for device in {p.device for p in self.parameters.values()} if self.state_device is not None else ():
            if device.type == "cuda":  # rows on the host are stepped there
                torch.cuda.synchronize(device)  # what is still on its way back to the host
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
            count = local(self.parameters[name]).numel()
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


def clip_coefficient(norm: float, limit: float) -> float:
    """What all gradients are multiplied with so that their common norm is at most `limit`; 1 where that is 0."""
    return limit / norm if limit and norm > limit else 1.0


@contextmanager
def in_backward_steps_of(
    trials: Sequence[Trial], token_losses: Tensor, update_checks: Mapping[int, UpdateCheck]
) -> Iterator[None]:
    """Around a backward pass: the trials with `--optimizer-in-backward` take their step in it; for others this is a no-op.

    `token_losses` are the micro-batch's; where one is not finite no step changes anything. Raises Diverged for a gradient that
    is not finite; on a GPU `check_gradients_of_backward` does.
    """
    stepping = [trial for trial in trials if trial.optimizer.in_backward]
    ranks = stepping[0].optimizer.sharing if stepping else ALONE
    gate = token_losses.detach().sum() if stepping and token_losses.is_cuda and ranks.size == 1 else None
    if gate is None and stepping and any(ranks.total([float(not bool(torch.isfinite(token_losses).all()))])):
        stepping = []
    with ExitStack() as stack:
        for trial in stepping:
            check = update_checks.get(trial.slot)
            on_gradient = check.observe_gradient if check is not None and not check.done else None
            learning_rate = trial.schedule(trial.step)
            stack.enter_context(
                trial.optimizer.step_in_backward(learning_rate, partial(_not_finite, trial), on_gradient, gate)
            )
        yield


def squares_of_backward(trials: Sequence[Trial]) -> list[Tensor]:
    """What was taken in a backward pass on a GPU, or by ranks, and is still to be read: `squares`, trial by trial."""
    stepping = [trial.optimizer for trial in trials if trial.optimizer.in_backward]
    return [square for one in stepping for square in one.squares.values() if one.looks_later(square)]


def check_gradients_of_backward(trials: Sequence[Trial], values: Sequence[float]) -> None:
    """Raise Diverged if a gradient that was used in the backward pass on a GPU is not finite; `values` are those of
    `squares_of_backward`."""
    rest = iter(values)
    for trial in trials if values else ():
        if trial.optimizer.in_backward:
            trial.optimizer.take_squares([next(rest) for _ in trial.optimizer.squares])
            bad = trial.optimizer.not_finite()
            if bad is not None:
                raise _not_finite(trial, bad)


def _not_finite(trial: Trial, name: str) -> Diverged:
    shown = name_rows([example.row for _, example in trial.next_examples()])
    return Diverged(
        f"{trial.name}: the gradient of '{name}' is not finite at step {trial.step + 1} on rows {shown}. "
        "Lower --learning-rate, or look at these rows; tensors behind it had their step already, so --resume goes on from the "
        "last checkpoint"
    )


def check_one_micro_batch(base: Base, trials: Sequence[Trial], micro_batch_tokens: int, ranks: Ranks = ALONE) -> None:
    """Raise ConfigError if a trial steps inside the backward pass and a rank's share of a step needs several micro-batches."""
    if not any(trial.optimizer.in_backward for trial in trials):
        return
    most, worst = 0, ""
    for step in range(min(t.step for t in trials), max(t.sampler.steps for t in trials)):
        active = [t for t in trials if t.step <= step < t.sampler.steps]
        lengths = [len(t.examples[i].ids) for t in active for _, i in t.sampler.step(step)]
        for share in deal(lengths, ranks.size):
            own = [lengths[i] for i in share]
            if sum(own) <= most or len(own) == 1:
                continue
            groups = pack(own, [0] * len(own), micro_batch_tokens, equal_lengths=not base.packs)
            if len(groups) > 1:
                most = sum(own)
                worst = f"step {step + 1} needs {len(groups)}: its {len(own)} examples hold {most:,} tokens"
    if not worst:
        return
    batch = " + ".join(str(t.sampler.batch_size) for t in trials)
    way_out = (
        f"--micro-batch-tokens {most}, which is enough for every step, a smaller --batch-size"
        if base.packs
        else "--batch-size 1, for this model runs on examples of one length"
    )
    raise ConfigError(
        f"--optimizer-in-backward updates the weights in a step's only micro-batch, and {worst}, with --batch-size {batch} and "
        f"--micro-batch-tokens {micro_batch_tokens}. Give {way_out}, or leave --optimizer-in-backward out"
    )


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
