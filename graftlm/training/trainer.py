"""The training loop: evaluate, step, log, save.

One optimizer step, for any number of trials on one base:

    1. each trial draws its examples; all of them are packed into micro-batches of at most `micro_batch_tokens` tokens
    2. each pass runs forward and backward once; every token uses its own trial's adapter, and its loss is weighted by
       1 / (target tokens of its trial in this step), so how the examples are split does not change the gradient
    3. each trial clips its own gradients and takes its own step

There is no second loop: one adapter, full training, and a sweep are the same call. In a sweep trials end at different
steps and others join in their places; what fails in one trial ends that one alone, for no number of one depends on another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graftlm.base.context import ForwardContext
from graftlm.base.loading import Base
from graftlm.data.dataset import Example
from graftlm.errors import Diverged, ScoreError, TrainingError
from graftlm.progress import working
from graftlm.segments import Segments, pack
from graftlm.training import in_backward, notfinite
from graftlm.training.loss import weighted_loss
from graftlm.training.optimizer import clip_factor
from graftlm.training.sanity_checks import UpdateCheck
from graftlm.training.trial import Evaluation, ExampleLoss, Trial


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step of one trial did."""

    step: int
    loss: float
    """Mean loss of a target token, before the update."""
    learning_rate: float
    grad_norm: float
    tokens: int
    target_tokens: int
    seconds: float


class TrainerCallback:
    """What the outside hears of a run; the loop itself writes nothing."""

    def stepped(self, trial: Trial, result: StepResult) -> None:
        """An optimizer step was taken."""
        raise NotImplementedError

    def evaluated(self, trial: Trial, evaluation: Evaluation, best: bool) -> None:
        """The eval rows were measured; `best` says whether they were never better."""
        raise NotImplementedError

    def failed(self, trial: Trial, error: TrainingError) -> None:
        """A trial cannot go on. Raising ends the run; returning ends this trial alone."""
        raise error

    def settled(self, trials: Sequence[Trial]) -> bool:
        """After every step: save what is due; False ends the run here."""
        raise NotImplementedError

    def joining(self) -> Sequence[Trial]:
        """After every step: trials that begin with the next one, each in a slot of its own."""
        return ()


def train(base: Base, trials: Sequence[Trial], micro_batch_tokens: int, callback: TrainerCallback) -> None:
    """Train every trial, and those that join, to its last step, or until the callback ends the run.

    Raises what `callback.failed` raises of these: TrainingError when a loss or gradient is not finite, for a trained tensor
    that gets no gradient, and after three steps for one that did not change or a frozen one that did. Raises ConfigError when a
    trial steps inside the backward pass and a step needs several micro-batches.
    """
    in_backward.refuse_more_passes(base, trials, micro_batch_tokens)
    update_checks: dict[int, UpdateCheck] = {}
    active: list[Trial] = []
    joined = trials
    while joined or active:
        joined = [trial for trial in joined if not trial.done]
        _join(base, joined, update_checks, micro_batch_tokens, callback)
        active = [trial for trial in (*active, *joined) if not trial.done]
        if active:
            for trial, result in zip(
                active, optimizer_step(base, active, micro_batch_tokens, update_checks, callback.failed)
            ):
                if result is not None:
                    callback.stepped(trial, result)
            for trial in active:
                if trial.wants_evaluation:
                    _evaluate(base, trial, micro_batch_tokens, callback)
            if not callback.settled(active):
                return
            active = [trial for trial in active if not trial.done]
        joined = callback.joining()


def _join(
    base: Base,
    trials: Sequence[Trial],
    update_checks: dict[int, UpdateCheck],
    micro_batch_tokens: int,
    callback: TrainerCallback,
) -> None:
    """Before a trial's first step here: take its checksums, and measure its eval rows where they were not yet."""
    for i, trial in enumerate(trials):
        # The base is the same for all that join at once: one of them watches it.
        update_checks[trial.slot] = UpdateCheck(base, trial.parameters, trial.optimizer.epsilon, with_base=i == 0)
        if trial.wants_evaluation and trial.first is None:
            _evaluate(base, trial, micro_batch_tokens, callback)


def _evaluate(base: Base, trial: Trial, micro_batch_tokens: int, callback: TrainerCallback) -> None:
    rows = tuple(example_losses(base, trial.eval_examples, trial.slot, micro_batch_tokens))
    bad = [row.row for row in rows if not math.isfinite(row.loss)]
    if bad:
        first = [(0, i, example) for i, example in enumerate(trial.eval_examples) if example.row == bad[0]]
        where, _ = _blame(base, trial, first, back=False)
        error = Diverged(
            f"{trial.name}: the loss is not finite after step {trial.step} on eval rows {_some(bad)}{where}. "
            "Lower --learning-rate, or look at these rows"
        )
        _fail(trial, error, callback.failed)
        return
    try:
        score = None if trial.scorer is None else trial.scorer(base, trial.slot)
    except ScoreError as error:
        _fail(trial, error, callback.failed)
        return
    evaluation = Evaluation(trial.step, rows, score)
    callback.evaluated(trial, evaluation, trial.record(evaluation))


def _some(rows: Sequence[str]) -> str:
    return ", ".join(rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")


@dataclass(frozen=True)
class BatchItem:
    """One example of one trial in one pass."""

    example: Example
    slot: int
    stream: tuple[int, int]  # (trial seed, draw): what its dropout is keyed by
    weight: float  # of each target token's loss


@dataclass(frozen=True)
class MicroBatch:
    """A pass as tensors: ids (T,), and of its n target tokens where they are predicted from, their ids and weights."""

    segments: Segments
    ids: Tensor  # (T,)
    sources: Tensor  # (n,) index of the token in front of each trained one
    labels: Tensor  # (n,)
    weights: Tensor  # (n,) float32
    slots: tuple[tuple[int, int, int], ...]  # (slot, first, last) over the n
    counts: tuple[int, ...]  # target tokens of each example


def collate(base: Base, work: Sequence[BatchItem]) -> MicroBatch:
    """Lay examples end to end, in the order given."""
    segments = Segments(
        lengths=tuple(len(w.example.ids) for w in work),
        slots=tuple(w.slot for w in work),
        streams=tuple(w.stream for w in work),
        stacked=not base.packs,
    )
    trained = [np.flatnonzero(w.example.loss_mask[1:]) for w in work]  # token t is predicted from token t - 1
    sources = np.concatenate([start + t for start, t in zip(segments.starts, trained)])
    labels = np.concatenate([w.example.ids[1:][t] for w, t in zip(work, trained)])
    weights = np.concatenate([np.full(len(t), w.weight) for w, t in zip(work, trained)])
    slots: list[tuple[int, int, int]] = []
    at = 0
    for w, t in zip(work, trained):
        if slots and slots[-1][0] == w.slot:
            slots[-1] = (w.slot, slots[-1][1], at + len(t))
        else:
            slots.append((w.slot, at, at + len(t)))
        at += len(t)
    device = base.device
    return MicroBatch(
        segments=segments,
        ids=torch.from_numpy(np.concatenate([w.example.ids for w in work]).astype(np.int64)).to(device),
        sources=torch.from_numpy(sources).to(device),
        labels=torch.from_numpy(labels.astype(np.int64)).to(device),
        weights=torch.from_numpy(weights.astype(np.float32)).to(device),
        slots=tuple(slots),
        counts=tuple(len(t) for t in trained),
    )


def micro_batches(base: Base, work: Sequence[BatchItem], micro_batch_tokens: int) -> list[list[BatchItem]]:
    """Split examples into micro-batches, as the base can take them: packed, or stacks of one length."""
    groups = pack(
        [len(w.example.ids) for w in work], [w.slot for w in work], micro_batch_tokens, equal_lengths=not base.packs
    )
    return [[work[i] for i in group] for group in groups]


def forward(base: Base, micro_batch: MicroBatch, *, head_gradient_last: bool = False) -> tuple[Tensor, Tensor]:
    """One pass: the weighted loss, with gradients where they are on, and each target token's."""
    context = ForwardContext(micro_batch.segments, head_gradient_last=head_gradient_last)
    hidden = base.hidden(micro_batch.ids, context)  # (T, width)
    return weighted_loss(
        base, hidden[micro_batch.sources], micro_batch.labels, micro_batch.weights, micro_batch.slots, context
    )


Failed = Callable[[Trial, TrainingError], None]
"""What happens to a trial that cannot go on: see `TrainerCallback.failed`."""


def _fail(trial: Trial, error: TrainingError, failed: Failed) -> None:
    trial.stop_reason = str(error)
    trial.optimizer.zero_grad()
    failed(trial, error)


def _raise(trial: Trial, error: TrainingError) -> None:
    raise error


def optimizer_step(
    base: Base,
    trials: Sequence[Trial],
    micro_batch_tokens: int,
    update_checks: Mapping[int, UpdateCheck] | None = None,
    failed: Failed = _raise,
) -> list[StepResult | None]:
    """One step of every trial, their examples sharing the micro-batches; `update_checks`, by slot, see the first steps.

    Where `failed` lets a trial end alone, there is None in its place and its weights are as they were.
    """
    started = time.perf_counter()
    work: list[BatchItem] = []
    counts: list[tuple[int, int]] = []
    for trial in trials:
        drawn = [(draw, trial.examples[example]) for draw, example in trial.sampler.step(trial.step)]
        trained = sum(int(example.loss_mask[1:].sum()) for _, example in drawn)
        counts.append((sum(len(example.ids) for _, example in drawn), trained))
        work += [BatchItem(example, trial.slot, (trial.seed, draw), 1.0 / trained) for draw, example in drawn]
        trial.optimizer.zero_grad()

    sums: dict[int, float] = {trial.slot: 0.0 for trial in trials}
    bad: list[BatchItem] = []  # examples whose loss is not finite
    for group in micro_batches(base, work, micro_batch_tokens):
        micro_batch = collate(base, group)
        total, losses = forward(
            base, micro_batch, head_gradient_last=any(trial.optimizer.in_backward for trial in trials)
        )
        with in_backward.stepping(trials, losses, update_checks or {}):
            go_back(total)
        for slot, first, last in micro_batch.slots:
            sums[slot] += float(losses[first:last].sum())
        if not torch.isfinite(losses).all():
            finite = [bool(part.isfinite().all()) for part in losses.split(list(micro_batch.counts))]
            bad += [w for w, good in zip(group, finite) if not good]

    results: list[StepResult | None] = []
    for trial, (tokens, trained) in zip(trials, counts):
        loss = sums[trial.slot] / trained
        try:
            rate, norm = _update(base, trial, loss, [w for w in bad if w.slot == trial.slot], update_checks or {})
        except TrainingError as error:
            _fail(trial, error, failed)
            results.append(None)
            continue
        trial.tokens += tokens
        trial.target_tokens += trained
        results.append(StepResult(trial.step, loss, rate, norm, tokens, trained, time.perf_counter() - started))
    return results


def _update(
    base: Base, trial: Trial, loss: float, bad: Sequence[BatchItem], update_checks: Mapping[int, UpdateCheck]
) -> tuple[float, float]:
    """Move a trial's weights by its gradients; returns the learning rate and the gradient's norm.

    `bad` are its examples whose loss is not finite. Raises TrainingError.
    """
    norm = trial.optimizer.gradient_norm()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        drawn = [(trial.seed, draw, trial.examples[i]) for draw, i in trial.sampler.step(trial.step)]
        where, rows = _blame(base, trial, drawn, back=True)
        rows = [w.example.row for w in bad] or rows or [d.row for _, _, d in drawn]
        what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm}"
        raise Diverged(
            f"{trial.name}: {what} at step {trial.step + 1} on rows {_some(rows)}{where}. "
            "Lower --learning-rate, or look at these rows"
        )
    if trial.step == 0:
        _refuse_untrained(trial)
    rate = trial.schedule(trial.step)
    watch = update_checks.get(trial.slot)
    if not trial.optimizer.in_backward:
        factor = clip_factor(norm, trial.max_grad_norm)
        if watch is not None:
            watch.gradients(rate, trial.optimizer.ratios, factor)
        trial.optimizer.step(rate, factor)
        trial.optimizer.zero_grad()
    trial.step += 1
    if watch is not None:
        trial.notes += watch.stepped(trial.name, _beside)
    return rate, norm


def _blame(
    base: Base, trial: Trial, examples: Sequence[tuple[int, int, Example]], *, back: bool
) -> tuple[str, list[str]]:
    """Where the first number that is not finite comes from, as words, and on which rows; (seed, draw, example) are given."""

    def run(i: int) -> None:
        seed, draw, example = examples[i]
        micro_batch = collate(
            base, [BatchItem(example, trial.slot, (seed, draw), 1.0 / max(1, int(example.loss_mask[1:].sum())))]
        )
        with torch.set_grad_enabled(back):
            total, _ = forward(base, micro_batch)
            if back and total.requires_grad:
                total.backward()

    where, rows = notfinite.first(base.model, [d.row for _, _, d in examples], trial.parameters.items(), run)
    return (f"; first {where}" if where else ""), rows


def go_back(total: Tensor) -> None:
    """The backward pass of a loss; TrainingError where no trained tensor has a part in it."""
    if not total.requires_grad:
        raise TrainingError(
            "no trained tensor has a part in the loss: the model's own code cuts its gradient off, as reversible layers do. "
            "Nothing was changed; take another model, or report this architecture"
        )
    total.backward()


def _refuse_untrained(trial: Trial) -> None:
    """After the first pass back every trained tensor has a gradient; one that has none would stay as it is in silence.

    Experts that are modules of their own, `layers.1.experts.2.up.weight`, may wait for a token as long as another
    expert beside them got one.
    """
    got = trial.optimizer.squares
    reached = {_beside(name) for name in got} - {None}
    missing = [name for name in trial.parameters if name not in got and _beside(name) not in reached]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        way_out = (
            "leave it out with --method lora and --targets that name other layers"
            if trial.slot == 0
            else "leave its layer out: name the others with --targets, such as attention, mlp or patterns"
        )
        raise TrainingError(
            f"{trial.name}: '{missing[0]}'{more} got no gradient in the first step, so it would never be trained: "
            f"the model's code does not use it, or reads it past the layer. Nothing was changed; {way_out}"
        )


def _beside(name: str) -> str | None:
    """What a tensor has in common with its like in the modules listed beside its own within one layer, or None."""
    numbered = [i for i, part in enumerate(name.split(".")) if part.isdecimal()]
    if len(numbered) < 2:  # the layer's own number, and no list within it
        return None
    parts = name.split(".")
    return ".".join([*parts[: numbered[-1]], "*", *parts[numbered[-1] + 1 :]])


@torch.no_grad()
def example_losses(
    base: Base,
    examples: Sequence[Example],
    slot: int,
    micro_batch_tokens: int,
) -> list[ExampleLoss]:
    """Each example's summed loss through the adapter in `slot`, in the examples' order, without dropout."""
    work = [BatchItem(example, slot, (0, i), 1.0) for i, example in enumerate(examples)]
    found: dict[int, ExampleLoss] = {}
    with working("measuring eval rows", len(examples), "rows") as task:
        for group in micro_batches(base, work, micro_batch_tokens):
            micro_batch = collate(base, group)
            _, losses = forward(base, micro_batch)
            at = 0
            for w, count in zip(group, micro_batch.counts):
                index = w.stream[1]
                found[index] = ExampleLoss(examples[index].row, count, float(losses[at : at + count].double().sum()))
                at += count
            task.to(len(found))
    return [found[i] for i in range(len(examples))]
