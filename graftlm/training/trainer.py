"""The training loop: evaluate, step, log, save; `optimizer_step` below is one step, top to bottom.

There is no second loop: one adapter, full training, and a sweep are the same call, with any number of trials on one base.
In a sweep trials end at different steps and others take their places; what fails in one trial ends that one alone, for no
number of one depends on another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from graftlm.base.loading import Base
from graftlm.errors import Diverged, ScoreError, TrainingError
from graftlm.training.micro_batch import (
    BatchItem,
    backward,
    collate,
    count_target_tokens,
    example_losses,
    forward,
    micro_batches,
)
from graftlm.training.optimizer import check_one_micro_batch, clip_factor, steps_in_backward
from graftlm.training.sanity_checks import (
    UpdateCheck,
    check_eval_is_finite,
    check_gradients_reach_every_tensor,
    check_step_is_finite,
    nonfinite_items,
)
from graftlm.training.trial import Evaluation, Trial


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step of one trial did."""

    step: int
    loss: float
    """Mean loss of a target token, before the update."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    target_tokens: int
    seconds: float


class TrainerCallback:
    """Called by the loop, which itself writes nothing: what to log, what to save, when to stop, which trials come next."""

    def on_step_end(self, trial: Trial, result: StepResult) -> None:
        """A trial took an optimizer step."""
        raise NotImplementedError

    def on_evaluate(self, trial: Trial, evaluation: Evaluation, best: bool) -> None:
        """A trial's eval rows were measured; `best` says whether their loss was never lower."""
        raise NotImplementedError

    def on_failure(self, trial: Trial, error: TrainingError) -> None:
        """A trial cannot go on. Raising ends the run; returning ends this trial alone."""
        raise error

    def on_iteration_end(self, trials: Sequence[Trial]) -> bool:
        """After one step of every trial and its evaluations: save what is due; returns False to end the run here."""
        raise NotImplementedError

    def new_trials(self) -> Sequence[Trial]:
        """After every iteration: trials that begin with the next one, each in a slot of its own."""
        return ()


def train(base: Base, trials: Sequence[Trial], micro_batch_tokens: int, callback: TrainerCallback) -> None:
    """Train every trial, and those that come later, to its last step, or until the callback ends the run.

    Raises what `callback.on_failure` raises of these: TrainingError when a loss or gradient is not finite, for a trained
    tensor that gets no gradient, and after three steps for one that did not change or a frozen one that did. Raises
    ConfigError when a trial steps inside the backward pass and a step needs several micro-batches.
    """
    check_one_micro_batch(base, trials, micro_batch_tokens)
    update_checks: dict[int, UpdateCheck] = {}
    active: list[Trial] = []
    new = trials
    while new or active:
        new = [trial for trial in new if not trial.done]
        for i, trial in enumerate(new):
            # The base is the same for all that begin together: one of them checks that it does not change.
            update_checks[trial.slot] = UpdateCheck(base, trial.parameters, trial.optimizer.epsilon, with_base=i == 0)
            if trial.wants_evaluation and trial.first is None:
                _evaluate(base, trial, micro_batch_tokens, callback)

        active = [trial for trial in (*active, *new) if not trial.done]
        if active:
            results = optimizer_step(base, active, micro_batch_tokens, update_checks, callback.on_failure)
            for trial, result in zip(active, results):
                if result is not None:
                    callback.on_step_end(trial, result)
            for trial in active:
                if trial.wants_evaluation:
                    _evaluate(base, trial, micro_batch_tokens, callback)
            if not callback.on_iteration_end(active):
                return
            active = [trial for trial in active if not trial.done]
        new = callback.new_trials()


OnFailure = Callable[[Trial, TrainingError], None]
"""What happens to a trial that cannot go on: see `TrainerCallback.on_failure`."""


def _raise(trial: Trial, error: TrainingError) -> None:
    raise error


def optimizer_step(
    base: Base,
    trials: Sequence[Trial],
    micro_batch_tokens: int,
    update_checks: Mapping[int, UpdateCheck] | None = None,
    on_failure: OnFailure = _raise,
) -> list[StepResult | None]:
    """One step of every trial, their examples sharing the micro-batches; `update_checks`, by slot, see the first steps.

    Where `on_failure` lets a trial end alone, there is None in its place and its weights are as they were.
    """
    started = time.perf_counter()
    update_checks = update_checks or {}
    in_backward = any(trial.optimizer.in_backward for trial in trials)
    batches = [_draw(trial) for trial in trials]
    for trial in trials:
        trial.optimizer.zero_grad()

    # Forward and backward: gradients add up over the micro-batches; every token uses its own trial's adapter.
    loss_sums = {trial.slot: 0.0 for trial in trials}
    nonfinite: list[BatchItem] = []
    for items in micro_batches(base, [item for batch in batches for item in batch.items], micro_batch_tokens):
        micro_batch = collate(base, items)
        loss, token_losses = forward(base, micro_batch, head_gradient_last=in_backward)  # (), (target tokens,)
        with steps_in_backward(trials, token_losses, update_checks):  # none but with --optimizer-in-backward
            backward(loss)
        for slot, first, last in micro_batch.slots:
            loss_sums[slot] += float(token_losses[first:last].sum())
        nonfinite += nonfinite_items(items, token_losses, micro_batch.counts)

    # Clip and step: each trial by its own gradients' norm, at its own learning rate. What fails ends one trial, not all.
    results: list[StepResult | None] = []
    for trial, batch in zip(trials, batches):
        mean_loss = loss_sums[trial.slot] / batch.target_tokens
        grad_norm = trial.optimizer.gradient_norm()
        learning_rate = trial.schedule(trial.step)
        update_check = update_checks.get(trial.slot)
        try:
            check_step_is_finite(base, trial, mean_loss, grad_norm, nonfinite)
            check_gradients_reach_every_tensor(trial)
            if not trial.optimizer.in_backward:
                factor = clip_factor(grad_norm, trial.max_grad_norm)
                if update_check is not None:
                    update_check.observe_gradients(learning_rate, trial.optimizer.ratios, factor)
                trial.optimizer.step(learning_rate, factor)
                trial.optimizer.zero_grad()
            trial.step += 1
            if update_check is not None:
                trial.notes += update_check.after_step(trial.name)
        except TrainingError as error:
            _fail(trial, error, on_failure)
            results.append(None)
            continue
        trial.tokens += batch.tokens
        trial.target_tokens += batch.target_tokens
        seconds = time.perf_counter() - started
        result = StepResult(trial.step, mean_loss, learning_rate, grad_norm, batch.tokens, batch.target_tokens, seconds)
        results.append(result)
    return results


@dataclass(frozen=True)
class _Batch:
    """A trial's examples of one optimizer step."""

    items: list[BatchItem]
    tokens: int
    target_tokens: int


def _draw(trial: Trial) -> _Batch:
    """The next batch of a trial. Its loss is the mean over its target tokens, so each has the weight 1 / their number."""
    drawn = trial.next_examples()
    target_tokens = count_target_tokens(example for _, example in drawn)
    items = [BatchItem(example, trial.slot, (trial.seed, draw), 1.0 / target_tokens) for draw, example in drawn]
    return _Batch(items, sum(len(example.ids) for _, example in drawn), target_tokens)


def _evaluate(base: Base, trial: Trial, micro_batch_tokens: int, callback: TrainerCallback) -> None:
    rows = tuple(example_losses(base, trial.eval_examples, trial.slot, micro_batch_tokens))
    try:
        check_eval_is_finite(base, trial, rows)
        score = None if trial.scorer is None else trial.scorer(base, trial.slot)
    except (Diverged, ScoreError) as error:
        _fail(trial, error, callback.on_failure)
        return
    evaluation = Evaluation(trial.step, rows, score)
    callback.on_evaluate(trial, evaluation, trial.record(evaluation))


def _fail(trial: Trial, error: TrainingError, on_failure: OnFailure) -> None:
    trial.stop_reason = str(error)
    trial.optimizer.zero_grad()
    on_failure(trial, error)
