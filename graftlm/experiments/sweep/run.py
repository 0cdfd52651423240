"""From a config to a finished sweep: one base, the data once, and as many trials at once as memory holds.

    open the search -> load the base, read all data -> hold them against the search -> plan the places -> train -> report

Everything that can be wrong is found before a trial is asked for. The same command goes on with a sweep that was stopped or
killed, and another process with the same command joins it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftlm.adapters.attach import detach
from graftlm.adapters.store import Store
from graftlm.base.chat import Encoder
from graftlm.base.loading import Base, load_base
from graftlm.config import SweepConfig, TrainConfig
from graftlm.config.sweep import Choice
from graftlm.data.sources import named_source
from graftlm.errors import Stopped
from graftlm.experiments.reports.sweep import write_reports
from graftlm.experiments.sweep.concurrency import Concurrency, plan_concurrency
from graftlm.experiments.sweep.results import SweepResult, read
from graftlm.experiments.sweep.study import ClaimedTrial, Study
from graftlm.experiments.sweep.trial_scheduler import TrialScheduler
from graftlm.experiments.sweep.view import SweepView, TrialView
from graftlm.files import remove_leftovers
from graftlm.planning.peak_memory import PeakMemory
from graftlm.training.logging import signals
from graftlm.training.memory import dry_run, estimate, mmap_allocations
from graftlm.training.micro_batch import example_losses
from graftlm.training.run import (
    Session,
    TrainingData,
    check_readable,
    make_adapter,
    read_data,
    set_checkpointing,
    stored_precision,
)
from graftlm.training.trainer import train
from graftlm.training.trial import Evaluation

Data = tuple[str, ...]


def sweep(config: SweepConfig, view: SweepView) -> SweepResult:
    """Run the sweep, or go on with it, or join it; writes its report. Raises GraftError, or Stopped on a signal."""
    settings = _settings(config)
    for training in settings.values():
        check_readable([named_source(text, "train") for text in training.data])
    any_setting = next(iter(settings.values()))
    if "%" not in config.eval_data:
        check_readable([named_source(config.eval_data, "valid")])
    study = Study(config)
    base = load_base(
        config.model, precision=stored_precision(any_setting), compute_dtype=config.compute_dtype, device=config.device,
        init="pretrained", seed=0, trust_remote_code=config.trust_remote_code, training=True,
    )  # fmt: skip
    set_checkpointing(any_setting, base)
    view.base(base)
    datasets = _read(settings, base, view)
    study.identify(_content(base, datasets))
    study.judge(_shown(config, any_setting, datasets))
    on_cpu = base.device.type == "cpu"
    with mmap_allocations(config.activation_checkpointing and on_cpu), PeakMemory(base.device) as memory:
        places = plan_concurrency(config, base, datasets)
        starting = _Starting(config, base, datasets, places, view)
        trial_scheduler = TrialScheduler(study, places.count, starting, memory, view)
        try:
            _train(config, base, study, trial_scheduler, places, memory, view)
        finally:
            trial_scheduler.close()
    found = read(config.out, config.storage)
    write_reports(found, config.out)
    if trial_scheduler.stopped is not None:
        raise Stopped(
            trial_scheduler.stopped,
            f"stopped; what has ended is kept in {config.out}, what was being trained left checkpoints. "
            "Go on with the same command",
        )
    _publish(config, found, study.running(), view)
    return found


def _train(
    config: SweepConfig,
    base: Base,
    study: Study,
    trial_scheduler: TrialScheduler,
    places: Concurrency,
    memory: PeakMemory,
    view: SweepView,
) -> None:
    with signals(trial_scheduler, view.note):
        first = trial_scheduler.new_trials()
        if not first:
            view.note("every trial has been begun already")
            return
        sessions = [one.session for one in trial_scheduler.running_trials]
        adapters = [session.adapter for session in sessions if session.adapter is not None]
        training = sessions[0].config.model_copy(update={"micro_batch_tokens": places.micro_batch_tokens})
        spare = places.count * places.each - sum(adapter.count for adapter in adapters)
        ahead = estimate(training, base, first, adapters, spare=spare)
        sparing = base.device.type == "cpu" and ahead.load.mmap_allocations
        with mmap_allocations(sparing), view.sweeping(study.wanted, study.ended()):
            view.places(
                places.count, places.bytes, places.micro_batch_tokens, dry_run(base, first, ahead) - memory.start
            )
            train(base, first, places.micro_batch_tokens, trial_scheduler)


class _Starting:
    """Makes the sessions of claims."""

    def __init__(
        self,
        config: SweepConfig,
        base: Base,
        datasets: Mapping[Data, TrainingData],
        places: Concurrency,
        view: SweepView,
    ) -> None:
        self.config, self.base, self.datasets, self.places, self.view = config, base, datasets, places, view
        self._before: dict[Data, Evaluation] = {}

    def __call__(self, claim: ClaimedTrial, slot: int) -> Session:
        """A claim's session in a slot, its adapter attached, from its checkpoint where it left one."""
        again = (claim.folder / "config.json").is_file()
        training = self.config.training(claim.own, out=claim.folder, resume=again)
        remove_leftovers(claim.folder)
        adapter = make_adapter(self.base, training, slot)
        try:
            training_data, beside = self.datasets[training.data], TrialView(self.view, claim.number)
            session = Session(training, self.base, adapter, training_data, beside, slot=slot)
            session.resume_from_checkpoint(self.places.micro_batch_tokens)
            together = {"trials_at_once": self.places.count, "predicted": {"peak_bytes": self.places.bytes}}
            session.open_run_folder({"micro_batch_tokens": self.places.micro_batch_tokens, **together})
            self._measure_base(session)
        except BaseException:
            detach(self.base, slot)
            raise
        return session

    def _measure_base(self, session: Session) -> None:
        """An untrained adapter changes nothing, so what the base makes of the eval rows is measured once for all.

        DoRA's magnitudes come from a norm that is computed twice, so there each trial measures its own.
        """
        trial = session.trial
        if not trial.wants_evaluation or trial.first is not None or session.config.dora:
            return
        key = session.config.data
        if key not in self._before:
            rows = tuple(example_losses(self.base, trial.eval_examples, 0, self.places.micro_batch_tokens))
            self._before[key] = Evaluation(0, rows)
        if math.isfinite(self._before[key].loss):
            session.recorder.on_evaluate(trial, self._before[key], trial.record(self._before[key]))


# ---- what trials share -----------------------------------------------------------------------------------------------


def _settings(config: SweepConfig) -> dict[Data, TrainConfig]:
    """A training for each choice of data, for what reading them needs; the rest of it is of no matter."""
    space = config.space
    own = {n: s.values[0] if isinstance(s, Choice) else s.ends[0] for n, s in space.items()}
    data = space.get("data")
    choices = [{**own, "data": value} for value in data.values] if isinstance(data, Choice) else [own]
    found = [config.training(choice, out=config.out) for choice in choices]
    return {training.data: training for training in found}


def _read(settings: Mapping[Data, TrainConfig], base: Base, view: SweepView) -> dict[Data, TrainingData]:
    found: dict[Data, TrainingData] = {}
    for data, training in settings.items():
        encoder = Encoder(base.tokenizer, train_on=training.train_on, date=training.template_date)
        sources = [named_source(text, "train") for text in data]
        found[data] = TrainingData(encoder, *read_data(training, sources, encoder, base))
        view.data(found[data].dataset, found[data].eval_dataset, encoder.notes)
    return found


def _content(base: Base, datasets: Mapping[Data, TrainingData]) -> dict[str, Any]:
    """What the sweep stands on, by content."""
    return {
        "model": base.fingerprint,
        "compute_dtype": base.compute_dtype,
        "data": sorted(training_data.dataset.digest for training_data in datasets.values()),
        "eval_data": sorted({m.eval_dataset.digest for m in datasets.values() if m.eval_dataset is not None}),
    }


def _shown(config: SweepConfig, training: TrainConfig, datasets: Mapping[Data, TrainingData]) -> int:
    """Examples that a trial is shown at the most."""
    rows = max(training_data.dataset.rows for training_data in datasets.values())
    most = {n: max(map(float, s.ends)) for n, s in config.space.items() if not isinstance(s, Choice)}
    batch, steps = most.get("batch_size", training.batch_size), most.get("steps", training.steps)
    epochs = most.get("epochs", training.epochs or 1.0)
    return max(1, int(steps * batch if steps is not None else rows * epochs))


def _publish(config: SweepConfig, found: SweepResult, running: int, view: SweepView) -> None:
    """Publish the best adapter where that is asked for and the sweep is done."""
    if config.publish is None:
        return
    best = found.best
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
