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
from graftlm.base.load import Base, load_base
from graftlm.config import SweepConfig, TrainConfig
from graftlm.config.sweep import Choice
from graftlm.data.sources import named_source
from graftlm.errors import Stopped
from graftlm.experiments.sweep.conductor import Conductor
from graftlm.experiments.sweep.places import Places, plan_places
from graftlm.experiments.sweep.report import write_reports
from graftlm.experiments.sweep.results import Found, read
from graftlm.experiments.sweep.study import Claim, Study
from graftlm.experiments.sweep.view import Beside, SweepView
from graftlm.files import clear_left
from graftlm.planning.measured import PeakMemory
from graftlm.training.foresight import foresee, rehearse
from graftlm.training.loop import row_losses, train
from graftlm.training.pages import own_pages
from graftlm.training.prepare import make_adapter, peek, read_data, set_checkpointing, stored_precision
from graftlm.training.recorder import signals
from graftlm.training.session import Material, Session
from graftlm.training.trial import Evaluation

Data = tuple[str, ...]


def sweep(config: SweepConfig, view: SweepView) -> Found:
    """Run the sweep, or go on with it, or join it; writes its report. Raises GraftError, or Stopped on a signal."""
    settings = _settings(config)
    for training in settings.values():
        peek([named_source(text, "train") for text in training.data])
    any_setting = next(iter(settings.values()))
    if "%" not in config.eval_data:
        peek([named_source(config.eval_data, "valid")])
    study = Study(config)
    base = load_base(
        config.model, precision=stored_precision(any_setting), compute=config.compute, device=config.device,
        init="pretrained", seed=0, trust_remote_code=config.trust_remote_code, training=True,
    )  # fmt: skip
    set_checkpointing(any_setting, base)
    view.base(base)
    materials = _read(settings, base, view)
    study.identify(_content(base, materials))
    study.judge(_shown(config, any_setting, materials))
    on_cpu = base.device.type == "cpu"
    with own_pages(config.activation_checkpointing and on_cpu), PeakMemory(base.device) as memory:
        places = plan_places(config, base, materials)
        starting = _Starting(config, base, materials, places, view)
        conductor = Conductor(study, places.count, starting, memory, view)
        try:
            _train(config, base, study, conductor, places, memory, view)
        finally:
            conductor.close()
    found = read(config.out, config.storage)
    write_reports(found, config.out)
    if conductor.stopped is not None:
        raise Stopped(
            conductor.stopped,
            f"stopped; what has ended is kept in {config.out}, what was being trained left checkpoints. "
            "Go on with the same command",
        )
    _publish(config, found, study.running(), view)
    return found


def _train(
    config: SweepConfig,
    base: Base,
    study: Study,
    conductor: Conductor,
    places: Places,
    memory: PeakMemory,
    view: SweepView,
) -> None:
    with signals(conductor, view.note):
        first = conductor.joining()
        if not first:
            view.note("every trial has been begun already")
            return
        sessions = [one.session for one in conductor.seated]
        adapters = [session.adapter for session in sessions if session.adapter is not None]
        training = sessions[0].config.model_copy(update={"tokens_per_pass": places.tokens_per_pass})
        spare = places.count * places.each - sum(adapter.count for adapter in adapters)
        ahead = foresee(training, base, first, adapters, spare=spare)
        sparing = base.device.type == "cpu" and ahead.load.sparing
        with own_pages(sparing), view.sweeping(study.wanted, study.ended()):
            view.places(places.count, places.bytes, places.tokens_per_pass, rehearse(base, first, ahead) - memory.start)
            train(base, first, places.tokens_per_pass, conductor)


class _Starting:
    """Makes the sessions of claims."""

    def __init__(
        self, config: SweepConfig, base: Base, materials: Mapping[Data, Material], places: Places, view: SweepView
    ) -> None:
        self.config, self.base, self.materials, self.places, self.view = config, base, materials, places, view
        self._before: dict[Data, Evaluation] = {}

    def __call__(self, claim: Claim, slot: int) -> Session:
        """A claim's session in a slot, its adapter attached, from its checkpoint where it left one."""
        again = (claim.folder / "config.json").is_file()
        training = self.config.training(claim.own, out=claim.folder, resume=again)
        clear_left(claim.folder)
        adapter = make_adapter(self.base, training, slot)
        try:
            material, beside = self.materials[training.data], Beside(self.view, claim.number)
            session = Session(training, self.base, adapter, material, beside, slot=slot)
            session.go_on(self.places.tokens_per_pass)
            together = {"trials_at_once": self.places.count, "predicted": {"peak_bytes": self.places.bytes}}
            session.begin({"tokens_per_pass": self.places.tokens_per_pass, **together})
            self._measure_base(session)
        except BaseException:
            detach(self.base, slot)
            raise
        return session

    def _measure_base(self, session: Session) -> None:
        """An untrained adapter changes nothing, so what the base makes of the held-out rows is measured once for all.

        DoRA's magnitudes come from a norm that is computed twice, so there each trial measures its own.
        """
        trial = session.trial
        if not trial.wants_evaluation or trial.first is not None or session.config.dora:
            return
        key = session.config.data
        if key not in self._before:
            rows = tuple(row_losses(self.base, trial.held_out, 0, self.places.tokens_per_pass))
            self._before[key] = Evaluation(0, rows)
        if math.isfinite(self._before[key].loss):
            session.recorder.evaluated(trial, self._before[key], trial.record(self._before[key]))


# ---- what trials share -----------------------------------------------------------------------------------------------


def _settings(config: SweepConfig) -> dict[Data, TrainConfig]:
    """A training for each choice of data, for what reading them needs; the rest of it is of no matter."""
    space = config.space
    own = {n: s.values[0] if isinstance(s, Choice) else s.ends[0] for n, s in space.items()}
    data = space.get("data")
    choices = [{**own, "data": value} for value in data.values] if isinstance(data, Choice) else [own]
    found = [config.training(choice, out=config.out) for choice in choices]
    return {training.data: training for training in found}


def _read(settings: Mapping[Data, TrainConfig], base: Base, view: SweepView) -> dict[Data, Material]:
    found: dict[Data, Material] = {}
    for data, training in settings.items():
        encoder = Encoder(base.tokenizer, train_on=training.train_on, date=training.template_date)
        sources = [named_source(text, "train") for text in data]
        found[data] = Material(encoder, *read_data(training, sources, encoder, base))
        view.data(found[data].dataset, found[data].held_out, encoder.notes)
    return found


def _content(base: Base, materials: Mapping[Data, Material]) -> dict[str, Any]:
    """What the sweep stands on, by content."""
    return {
        "model": base.fingerprint,
        "compute": base.compute,
        "data": sorted(material.dataset.digest for material in materials.values()),
        "eval_data": sorted({m.held_out.digest for m in materials.values() if m.held_out is not None}),
    }


def _shown(config: SweepConfig, training: TrainConfig, materials: Mapping[Data, Material]) -> int:
    """Documents that a trial is shown at the most."""
    rows = max(material.dataset.rows for material in materials.values())
    most = {n: max(map(float, s.ends)) for n, s in config.space.items() if not isinstance(s, Choice)}
    batch, steps = most.get("batch_size", training.batch_size), most.get("steps", training.steps)
    epochs = most.get("epochs", training.epochs or 1.0)
    return max(1, int(steps * batch if steps is not None else rows * epochs))


def _publish(config: SweepConfig, found: Found, running: int, view: SweepView) -> None:
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
        view.note(f"published {version.label}: trial {best.number}, held-out loss {best.loss:.4f}")
