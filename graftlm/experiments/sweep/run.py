"""The parts of a sweep: what its trials share, and the session of each.

    read_datasets(...)  the data, once for each choice of them         content(...)  base and data by digest
    SessionStarter      a claimed trial -> its session in a slot       train_trials(...)  the loop over all of them

`commands/sweep.py` puts them together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from graftlm.adapters.attach import detach
from graftlm.adapters.bank import EmbeddingBank, LayerBank
from graftlm.adapters.store import Store
from graftlm.base.chat import Encoder
from graftlm.base.loading import Base
from graftlm.config import SweepConfig, TrainConfig
from graftlm.config.sweep import Choice
from graftlm.data.sources import named_source
from graftlm.experiments.sweep.concurrency import Concurrency
from graftlm.experiments.sweep.results import SweepResult
from graftlm.experiments.sweep.study import ClaimedTrial, Study
from graftlm.experiments.sweep.trial_scheduler import TrialScheduler
from graftlm.experiments.sweep.view import SweepView, TrialView
from graftlm.files import remove_leftovers
from graftlm.heap import mmap_allocations
from graftlm.planning.peak_memory import PeakMemory
from graftlm.training.logging import signals
from graftlm.training.memory import dry_run, estimate
from graftlm.training.run import Session, TrainingData, check_readable, make_adapter, read_data
from graftlm.training.trainer import example_losses, train
from graftlm.training.trial import Evaluation

Data = tuple[str, ...]
"""The names of a choice of training data."""


# ---- what trials share -----------------------------------------------------------------------------------------------


def settings_by_data(config: SweepConfig) -> dict[Data, TrainConfig]:
    """A training config for each choice of data: what reading the data needs; the rest of it does not matter."""
    space = config.space
    params = {n: s.values[0] if isinstance(s, Choice) else s.ends[0] for n, s in space.items()}
    data = space.get("data")
    choices = [{**params, "data": value} for value in data.values] if isinstance(data, Choice) else [params]
    found = [config.training(choice, out=config.out) for choice in choices]
    return {training.data: training for training in found}


def check_files(config: SweepConfig, settings: Mapping[Data, TrainConfig]) -> None:
    """Raise DataError for a data file that is missing or empty, before the base is loaded."""
    for training in settings.values():
        check_readable([named_source(text, "train") for text in training.data])
    if "%" not in config.eval_data:
        check_readable([named_source(config.eval_data, "valid")])


def read_datasets(settings: Mapping[Data, TrainConfig], base: Base, view: SweepView) -> dict[Data, TrainingData]:
    """Tokenize every choice of data, once. Raises DataError."""
    found: dict[Data, TrainingData] = {}
    for data, training in settings.items():
        encoder = Encoder(base.tokenizer, train_on=training.train_on, date=training.template_date)
        sources = [named_source(text, "train") for text in data]
        found[data] = TrainingData(encoder, *read_data(training, sources, encoder, base))
        view.data(found[data].dataset, found[data].eval_dataset, encoder.notes)
    return found


def content(base: Base, datasets: Mapping[Data, TrainingData]) -> dict[str, Any]:
    """Base and data by digest: another content is another sweep."""
    return {
        "model": base.fingerprint,
        "compute_dtype": base.compute_dtype,
        "data": sorted(training_data.dataset.digest for training_data in datasets.values()),
        "eval_data": sorted({m.eval_dataset.digest for m in datasets.values() if m.eval_dataset is not None}),
    }


def most_examples(config: SweepConfig, training: TrainConfig, datasets: Mapping[Data, TrainingData]) -> int:
    """The most examples that a trial is shown."""
    rows = max(training_data.dataset.rows for training_data in datasets.values())
    most = {n: max(map(float, s.ends)) for n, s in config.space.items() if not isinstance(s, Choice)}
    batch, steps = most.get("batch_size", training.batch_size), most.get("steps", training.steps)
    epochs = most.get("epochs", training.epochs or 1.0)
    return max(1, int(steps * batch if steps is not None else rows * epochs))


def free_slots(base: Base, count: int) -> list[int]:
    """The lowest slot numbers that no adapter on the base has: on a base that is lent, its owner's may be attached."""
    used: set[int] = set()
    for bank in [*(module.bank for module in base.stored().values()), base.structure.embedding.bank]:
        if isinstance(bank, LayerBank | EmbeddingBank):
            used |= set(bank.adapters)
    return list(islice((slot for slot in itertools.count(1) if slot not in used), count))


# ---- training ---------------------------------------------------------------------------------------------------------


class SessionStarter:
    """Makes the session of a claimed trial."""

    def __init__(
        self,
        config: SweepConfig,
        base: Base,
        datasets: Mapping[Data, TrainingData],
        concurrency: Concurrency,
        view: SweepView,
    ) -> None:
        self.config, self.base, self.datasets, self.concurrency, self.view = config, base, datasets, concurrency, view
        self._before: dict[Data, Evaluation] = {}

    def __call__(self, claim: ClaimedTrial, slot: int) -> Session:
        """Its session in a slot with the adapter attached, resumed from its checkpoint where it left one."""
        again = (claim.folder / "config.json").is_file()
        training = self.config.training(claim.params, out=claim.folder, resume=again)
        remove_leftovers(claim.folder)
        adapter = make_adapter(self.base, training, slot)
        try:
            training_data, beside = self.datasets[training.data], TrialView(self.view, claim.number)
            session = Session(training, self.base, adapter, training_data, beside, slot=slot)
            session.resume_from_checkpoint(self.concurrency.micro_batch_tokens)
            together = {"trials_at_once": self.concurrency.count, "predicted": {"peak_bytes": self.concurrency.bytes}}
            session.open_run_folder({"micro_batch_tokens": self.concurrency.micro_batch_tokens, **together})
            self._measure_base(session)
        except BaseException:
            detach(self.base, slot)
            raise
        return session

    def _measure_base(self, session: Session) -> None:
        """Give the trial the base's eval loss, measured once for all: an untrained adapter changes nothing.

        DoRA's magnitudes come from a norm that is computed twice, so there each trial measures its own.
        """
        trial = session.trial
        if not trial.evaluation_due or trial.first_evaluation is not None or session.config.dora:
            return
        key = session.config.data
        if key not in self._before:
            rows = tuple(example_losses(self.base, trial.eval_examples, 0, self.concurrency.micro_batch_tokens))
            self._before[key] = Evaluation(0, rows)
        if math.isfinite(self._before[key].loss):
            session.recorder.on_evaluate(trial, self._before[key], trial.record(self._before[key]))


def train_trials(
    base: Base,
    study: Study,
    trial_scheduler: TrialScheduler,
    concurrency: Concurrency,
    memory: PeakMemory,
    view: SweepView,
) -> None:
    """Train whatever the search gives, until it gives no more or the sweep is stopped."""
    with signals(trial_scheduler, view.note):
        first = trial_scheduler.new_trials()
        if not first:
            view.note("every trial has been begun already")
            return
        sessions = [one.session for one in trial_scheduler.running_trials]
        adapters = [session.adapter for session in sessions if session.adapter is not None]
        training = sessions[0].config.model_copy(update={"micro_batch_tokens": concurrency.micro_batch_tokens})
        spare = concurrency.count * concurrency.largest_adapter - sum(adapter.count for adapter in adapters)
        ahead = estimate(training, base, first, adapters, spare=spare, ranks=study.config.workers)
        use_mmap = base.device.type == "cpu" and ahead.load.mmap_allocations
        with mmap_allocations(use_mmap), view.sweeping(study.wanted, study.ended()):
            view.planned(concurrency, dry_run(base, first, ahead) - memory.start)
            train(base, first, concurrency.micro_batch_tokens, trial_scheduler)


def publish_best(config: SweepConfig, found: SweepResult, view: SweepView) -> None:
    """Publish the best adapter where that is asked for and the sweep is done."""
    if config.publish is None:
        return
    best = found.best
    running = sum(tried.state == "running" for tried in found.tried)
    if running:
        view.note(
            f"{running} trials are still being trained by other workers; the last one publishes '{config.publish}'"
        )
    elif best is None or best.folder is None or not (Path(best.folder) / "adapter").is_dir():
        view.note(
            f"nothing was published: {'no trial has ended well' if best is None else 'the best lies on another machine'}"
        )
    else:
        version, _ = Store(config.store).publish(
            Path(best.folder), config.publish, note=f"trial {best.number} of {found.name}"
        )
        view.note(f"published {version.label}: trial {best.number}, eval loss {best.loss:.4f}")
