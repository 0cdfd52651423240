"""The training loop: evaluate, step, log, save; `optimizer_step` below is one step, top to bottom.

There is no second loop: one adapter, full training, and a sweep are the same call, with any number of trials on one base.
In a sweep trials end at different steps and others take their places. Trials are numerically independent, in bf16-mixed up to
rounding (docs/design.md). A trial whose loss, gradient norm or eval is not finite can end alone; other errors end the run.

Over several ranks each computes its share of a step's examples, and losses and gradients are added up before anything
follows from them: so every rank does the same, and has the same weights after it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftlm import kernels
from graftlm.base.loading import Base
from graftlm.distributed.group import ALONE, Ranks
from graftlm.distributed.shard import is_split
from graftlm.errors import Diverged, ScoreError, TrainingError
from graftlm.training.micro_batch import (
    BatchItem,
    MicroBatch,
    backward,
    collate,
    count_target_tokens,
    even_passes,
    example_losses,
    forward,
    micro_batches,
)
from graftlm.training.optimizer import (
    check_gradients_of_backward,
    check_one_micro_batch,
    clip_coefficient,
    in_backward_steps_of,
    squares_of_backward,
)
from graftlm.training.sanity_checks import (
    UpdateCheck,
    check_eval_is_finite,
    check_gradients_reach_every_tensor,
    check_step_is_finite,
    nonfinite_items,
)
from graftlm.training.trial import Evaluation, ExampleLoss, Trial


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
    """Wall time of the joint step up to this trial's update; includes the other trials."""


class TrainerCallback:
    """Called by the loop, which itself writes nothing: what to log, what to save, when to stop, which trials come next."""

    def on_step_end(self, trial: Trial, result: StepResult) -> None:
        """A trial took an optimizer step."""
        raise NotImplementedError

    def on_evaluate(self, trial: Trial, evaluation: Evaluation, best: bool) -> None:
        """A trial's eval rows were measured. `best`: whether this is the best evaluation so far by `trial.best_by` (loss or
        score); always False before the first step."""
        raise NotImplementedError

    def on_failure(self, trial: Trial, error: TrainingError) -> None:
        """A trial cannot go on: its loss, gradient norm or eval is not finite, or a check of its first steps failed.
        Raising ends the run; returning ends this trial alone, and a sweep does that for Diverged only."""
        raise error

    def on_iteration_end(self, trials: Sequence[Trial]) -> bool:
        """After one step of every trial and its evaluations: save what is due; returns False to end the run here."""
        raise NotImplementedError

    def new_trials(self) -> Sequence[Trial]:
        """After every iteration: trials that begin with the next one, each in a slot of its own."""
        return ()


def train(
    base: Base, trials: Sequence[Trial], micro_batch_tokens: int, callback: TrainerCallback, ranks: Ranks = ALONE
) -> None:
    """Train every trial, and those that come later, to its last step, or until the callback ends the run.

    Over several ranks the callback of each must answer `on_iteration_end` alike.

    Raises TrainingError when a loss or gradient is not finite, when a trained tensor gets no gradient, and, after three steps,
    when a trained tensor is unchanged or a frozen one changed; `callback.on_failure` may let a trial end alone instead. Errors
    inside the backward pass end the run. Raises ConfigError when a trial steps inside the backward pass and a step needs
    several micro-batches.
    """
    check_one_micro_batch(base, trials, micro_batch_tokens, ranks)
    update_checks: dict[int, UpdateCheck] = {}
    active: list[Trial] = []
    new = trials
    while new or active:
        new = [trial for trial in new if not trial.done]
        for i, trial in enumerate(new):
            # The base is the same for all that begin together: one of them checks that it does not change.
            update_checks[trial.slot] = UpdateCheck(
                base, trial.parameters, trial.optimizer.epsilon, check_frozen=i == 0
            )
            if trial.evaluation_due and trial.first_evaluation is None:
                _evaluate(base, trial, micro_batch_tokens, callback, ranks)

        active = [trial for trial in (*active, *new) if not trial.done]
        if active:
            with ranks.pulse.phase("step", f"in step {active[0].step + 1}"):
                results = optimizer_step(base, active, micro_batch_tokens, update_checks, callback.on_failure, ranks)
            for trial, result in zip(active, results):
                if result is not None:
                    callback.on_step_end(trial, result)
            for trial in active:
                if trial.evaluation_due:
                    _evaluate(base, trial, micro_batch_tokens, callback, ranks)
            if not callback.on_iteration_end(active):
                return
            active = [trial for trial in active if not trial.done]
        new = callback.new_trials()


OnFailure = Callable[[Trial, TrainingError], None]
"""What happens to a trial that cannot go on: see `TrainerCallback.on_failure`."""


NO_CHECKS: Mapping[int, UpdateCheck] = {}


def _raise(trial: Trial, error: TrainingError) -> None:
    raise error


def optimizer_step(
    base: Base,
    trials: Sequence[Trial],
    micro_batch_tokens: int,
    update_checks: Mapping[int, UpdateCheck] = NO_CHECKS,
    on_failure: OnFailure = _raise,
    ranks: Ranks = ALONE,
) -> list[StepResult | None]:
    """One step of every trial, their examples sharing the micro-batches; `update_checks`, by slot, observe each trial's first
    three steps.

    Where `on_failure` lets a trial end alone, there is None in its place. Its weights are unchanged, except when
    `UpdateCheck.after_step` fails. Errors inside the backward pass do not reach `on_failure`.
    """
    started = time.perf_counter()
    batches = [_draw(trial) for trial in trials]
    for trial in trials:
        trial.optimizer.zero_grad()

    # Forward and backward: gradients add up over the micro-batches; every token uses its own trial's adapter.
    step_items = [item for batch in batches for item in batch.items]
    losses = _forward_and_backward(base, trials, step_items, micro_batch_tokens, update_checks, ranks)
    loss_sums, nonfinite, squares = losses.read(squares_of_backward(trials), step_items, ranks)
    _add_up_gradients(trials, ranks)
    if not nonfinite:
        check_gradients_of_backward(trials, squares)

    # Clip and step: each trial by its own gradients' norm, at its own learning rate. A failed check ends one trial.
    results: list[StepResult | None] = []
    for trial, batch in zip(trials, batches):
        mean_loss = loss_sums.get(trial.slot, 0.0) / batch.target_tokens
        grad_norm = trial.optimizer.gradient_norm()
        learning_rate = trial.schedule(trial.step)
        update_check = update_checks.get(trial.slot)
        try:
            check_step_is_finite(base, trial, mean_loss, grad_norm, nonfinite)
            check_gradients_reach_every_tensor(trial)
            if not trial.optimizer.in_backward:
                _clip_and_update(trial, grad_norm, learning_rate, update_check)
            trial.step += 1
            if update_check is not None:
                trial.warnings += update_check.after_step(trial.name)
        except TrainingError as error:
            _fail(trial, error, on_failure)
            results.append(None)
            continue
        trial.tokens += batch.tokens
        trial.target_tokens += batch.target_tokens
        seconds = time.perf_counter() - started
        counts = batch.tokens, batch.target_tokens
        results.append(StepResult(trial.step, mean_loss, learning_rate, grad_norm, *counts, seconds))
    return results


def _forward_and_backward(
    base: Base, trials: Sequence[Trial], step_items: Sequence[BatchItem], micro_batch_tokens: int,
    update_checks: Mapping[int, UpdateCheck], ranks: Ranks,
) -> _StepLosses:  # fmt: skip
    """Run this rank's share of a step's examples, one micro-batch after another."""
    in_backward = any(trial.optimizer.in_backward for trial in trials)
    losses = _StepLosses()
    groups = micro_batches(base, _own_share(step_items, ranks), micro_batch_tokens)
    for i, items in enumerate(even_passes(base, groups, lambda: min(step_items, key=lambda item: item.example.tokens))):
        micro_batch = collate(base, items)
        loss, token_losses = forward(base, micro_batch, defer_tied_head_gradient=in_backward)  # (), (target tokens,)
        with in_backward_steps_of(trials, token_losses, update_checks):  # no-op unless --optimizer-in-backward
            backward(loss)
        if i < len(groups):
            losses.add(items, micro_batch, token_losses)
        ranks.pulse.beat()
    return losses


class _StepLosses:
    """The losses of a step's micro-batches; read from the device once, after the last, since every read waits for it."""

    def __init__(self) -> None:
        self._parts: list[tuple[Sequence[BatchItem], MicroBatch, Tensor]] = []
        self._sums: list[Tensor] = []  # of each range of a micro-batch

    def add(self, items: Sequence[BatchItem], micro_batch: MicroBatch, token_losses: Tensor) -> None:
        """Losses (n,) of a micro-batch's target tokens."""
        self._parts.append((items, micro_batch, token_losses))
        self._sums += [token_losses[first:last].sum() for _, first, last in micro_batch.target_ranges]

    def read(
        self, also: Sequence[Tensor], step_items: Sequence[BatchItem], ranks: Ranks
    ) -> tuple[dict[int, float], list[BatchItem], list[float]]:
        """The sum of each slot's losses and the examples whose loss is not finite, over all ranks; and the numbers () float64
        in `also`."""
        sums, nonfinite, numbers = self._read(also)
        if ranks.size > 1:
            slots = sorted({item.slot for item in step_items})
            bad = {id(item) for item in nonfinite}
            found = ranks.total(
                [*(sums.get(slot, 0.0) for slot in slots), *(float(id(item) in bad) for item in step_items)]
            )
            sums = dict(zip(slots, found))
            nonfinite = [item for item, flag in zip(step_items, found[len(slots) :]) if flag]
        return sums, nonfinite, numbers

    def _read(self, also: Sequence[Tensor]) -> tuple[dict[int, float], list[BatchItem], list[float]]:
        """The same of this rank's examples."""
        if not self._sums:  # fewer examples than ranks
            return {}, [], kernels.read_numbers(also)
        sums = torch.stack(self._sums) if len(self._sums) > 1 else self._sums[0].reshape(1)
        if any(number.device != sums.device for number in also):  # of layers on the host
            numbers = kernels.read_numbers([*sums.double().unbind(), *also])
        else:
            numbers = (torch.cat([sums.double(), torch.stack(list(also))]) if also else sums).tolist()
        values = iter(numbers[: len(self._sums)])
        by_slot: dict[int, float] = {}
        nonfinite: list[BatchItem] = []
        for items, micro_batch, token_losses in self._parts:
            found = [next(values) for _ in micro_batch.target_ranges]
            for (slot, _, _), value in zip(micro_batch.target_ranges, found):
                by_slot[slot] = by_slot.get(slot, 0.0) + value
            if not all(map(math.isfinite, found)):
                nonfinite += nonfinite_items(items, token_losses, micro_batch.target_counts)
        return by_slot, nonfinite, numbers[len(self._sums) :]


def _own_share(items: Sequence[BatchItem], ranks: Ranks) -> list[BatchItem]:
    """The examples of a step that this rank computes."""
    return ranks.own(items, [len(item.example.ids) for item in items])


def _add_up_gradients(trials: Sequence[Trial], ranks: Ranks) -> None:
    """Give every rank the sum of each gradient; those of split weights are summed in the backward pass already."""
    ranks.add_up_gradients([p for trial in trials for p in trial.parameters.values() if not is_split(p)])


def _clip_and_update(trial: Trial, grad_norm: float, learning_rate: float, update_check: UpdateCheck | None) -> None:
    coefficient = clip_coefficient(grad_norm, trial.max_grad_norm)
    if update_check is not None:
        update_check.observe_gradients(learning_rate, trial.optimizer.lr_multipliers, coefficient)
    trial.optimizer.step(learning_rate, coefficient)
    trial.optimizer.zero_grad()


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
    items = [
        BatchItem(example, trial.slot, (trial.seed, draw_index), 1.0 / target_tokens) for draw_index, example in drawn
    ]
    return _Batch(items, sum(len(example.ids) for _, example in drawn), target_tokens)


def _evaluate(
    base: Base, trial: Trial, micro_batch_tokens: int, callback: TrainerCallback, ranks: Ranks = ALONE
) -> None:
    with ranks.pulse.phase("evaluation", f"in the evaluation after step {trial.step}"):
        losses = tuple(_example_losses(base, trial, micro_batch_tokens, ranks))
    try:
        check_eval_is_finite(base, trial, losses)
        score = _score(base, trial, ranks)
    except (Diverged, ScoreError) as error:
        _fail(trial, error, callback.on_failure)
        return
    evaluation = Evaluation(trial.step, losses, score)
    callback.on_evaluate(trial, evaluation, trial.record(evaluation))


def _score(base: Base, trial: Trial, ranks: Ranks) -> float | None:
    """The score of a trial's answers, from the first rank. Ranks that share the weights generate them together, in one pass."""
    scorer = trial.scorer
    if scorer is None:
        return None
    if base.structure.weights is None:
        return ranks.from_first(lambda: scorer(base, trial.slot))
    with torch.no_grad():
        answers = base.structure.in_pass(lambda: scorer.answers(base, trial.slot))
    return ranks.from_first(lambda: scorer.of(answers))


def _example_losses(base: Base, trial: Trial, micro_batch_tokens: int, ranks: Ranks) -> list[ExampleLoss]:
    """The eval loss of every row; each rank measures its share."""
    examples = trial.eval_examples
    own = ranks.own(range(len(examples)), [len(example.ids) for example in examples])
    blank = min(examples, key=lambda example: example.tokens)
    found = example_losses(base, [examples[i] for i in own], trial.slot, micro_batch_tokens, blank)
    if ranks.size == 1:
        return found
    losses = [0.0] * len(examples)
    for i, measured in zip(own, found):
        losses[i] = measured.loss
    return [
        ExampleLoss(example.row, count_target_tokens([example]), loss)
        for example, loss in zip(examples, ranks.total(losses))
    ]


def _fail(trial: Trial, error: TrainingError, on_failure: OnFailure) -> None:
    trial.stop_reason = str(error)
    trial.optimizer.zero_grad()
    on_failure(trial, error)
