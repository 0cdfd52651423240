"""Optimizer steps inside the backward pass: each tensor is updated as soon as its gradient is complete, which is then freed.

So no more than a few gradients exist at once. The price: the norm of all gradients is known only when the last one is
gone, so nothing can be clipped by it, and a step is one pass, for a second one would meet weights that have moved already.

What is promised about numbers that are not finite: the loss is looked at before the backward pass begins, and where it is not
finite nothing is updated. A gradient that is not finite stops the run with its tensor's name before that tensor is touched;
the tensors between it and the loss have had their step by then. Nothing of that step is written to disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from graftlm.base.loading import Base
from graftlm.errors import ConfigError, Diverged
from graftlm.segments import pack
from graftlm.training.sanity_checks import STEPS, UpdateCheck
from graftlm.training.trial import Trial


@contextmanager
def stepping(trials: Sequence[Trial], losses: Tensor, update_checks: Mapping[int, UpdateCheck]) -> Iterator[None]:
    """Around the backward pass that makes a step of `trials`: those that want it take theirs in it.

    `losses` are the pass's; where one is not finite no step is taken. Raises Diverged for a gradient that is not finite.
    """
    own = [trial for trial in trials if trial.optimizer.in_backward]
    with ExitStack() as open_ones:
        if own and bool(torch.isfinite(losses).all()):
            for trial in own:
                watch = update_checks.get(trial.slot)
                heard = watch.gradient if watch is not None and watch.steps < STEPS else None
                open_ones.enter_context(
                    trial.optimizer.stepping(trial.schedule(trial.step), partial(_refusal, trial), heard)
                )
        yield


def _refusal(trial: Trial, name: str) -> Diverged:
    rows = [trial.examples[i].row for _, i in trial.sampler.step(trial.step)]
    shown = ", ".join(rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
    return Diverged(
        f"{trial.name}: the gradient of '{name}' is not finite at step {trial.step + 1} on rows {shown}. "
        "Lower --learning-rate, or look at these rows; tensors behind it had their step already, so --resume goes on from the "
        "last checkpoint"
    )


def refuse_more_passes(base: Base, trials: Sequence[Trial], micro_batch_tokens: int) -> None:
    """Raise ConfigError if some step of `trials`, which share their passes, needs more than one and a trial steps in it."""
    if not any(trial.optimizer.in_backward for trial in trials):
        return
    most, worst = 0, ""
    for step in range(min(t.step for t in trials), max(t.sampler.steps for t in trials)):
        active = [t for t in trials if t.step <= step < t.sampler.steps]
        lengths = [len(t.examples[i].ids) for t in active for _, i in t.sampler.step(step)]
        if sum(lengths) <= most or len(lengths) == 1:
            continue
        groups = pack(lengths, [0] * len(lengths), micro_batch_tokens, equal_lengths=not base.packs)
        if len(groups) > 1:
            most = sum(lengths)
            worst = f"step {step + 1} needs {len(groups)}: its {len(lengths)} examples hold {most:,} tokens"
    if not worst:
        return
    batch = " + ".join(str(t.sampler.batch_size) for t in trials)
    way_out = (
        f"--micro-batch-tokens {most}, which is enough for every step, a smaller --batch-size"
        if base.packs
        else "--batch-size 1, for this model runs on examples of one length"
    )
    raise ConfigError(
        f"--optimizer-in-backward updates the weights in a step's only pass, and {worst}, with --batch-size {batch} and "
        f"--micro-batch-tokens {micro_batch_tokens}. Give {way_out}, or leave --optimizer-in-backward out"
    )
