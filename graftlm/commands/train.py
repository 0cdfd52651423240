"""`graft train`: from its config to a finished run folder.

    load the base -> make what is trained -> read the data -> [evaluate, step, log, save] ... -> adapter/ or model/

This is where the parts meet; each part is a call. `training/run.py` reads the data and is what is trained with its folder,
`training/memory.py` estimates what it will take, `training/trainer.py` trains, `training/view.py` shows it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from graftlm.adapters.attach import coverage, detach, notes_for_peft
from graftlm.base.chat import Encoder
from graftlm.base.loading import Base, default_device, load_base
from graftlm.base.shared_base import borrowed
from graftlm.config import TrainConfig
from graftlm.data.sources import Source, named_source, share
from graftlm.errors import Diverged, ScoreError, Stopped
from graftlm.files import remove_leftovers
from graftlm.heap import mmap_allocations, release_memory
from graftlm.planning.peak_memory import PeakMemory
from graftlm.progress import working
from graftlm.scores import Score, ScoreFunction
from graftlm.training import checkpoint
from graftlm.training.callbacks import Callback, Callbacks, EarlyStopping
from graftlm.training.checkpoint import compute_dtype_of
from graftlm.training.determinism import deterministic_algorithms
from graftlm.training.logging import check_trackers, signals
from graftlm.training.memory import dry_run, estimate
from graftlm.training.run import (
    Session,
    TrainingData,
    check_readable,
    make_adapter,
    read_data,
    set_checkpointing,
    stored_precision,
)
from graftlm.training.run_folder import check_free, locked
from graftlm.training.scoring import Scorer, make_scorer, prepare_score
from graftlm.training.trainer import train as train_trials
from graftlm.training.view import View


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the caller hands to a run beside its config, instead of what the run would load or read itself."""

    base: Base | None = None
    """A loaded base; afterwards it is as it was, except for what full training does to its weights."""
    sources: Sequence[Source] | None = None
    """Rows in memory, instead of those that the config names."""
    eval_source: Source | None = None
    callbacks: Sequence[Callback] = ()
    score: ScoreFunction | None = None
    """The function that the config's `score` names, where it is in memory."""
    save_when_stopped: bool = False
    """Whether a run that a signal stops also saves its best step, as `adapter-so-far` or `model-so-far`."""


NOTHING = Given()


def train(config: TrainConfig, view: View | None = None, given: Given = NOTHING) -> dict[str, Any]:
    """Train as the config says; returns the summary that `--json` prints. `given` is what a Python caller hands over.

    Raises GraftError, and Stopped on a signal.
    """
    view = view or View()
    check_trackers(config.track)
    callbacks = list(given.callbacks)
    if config.early_stopping is not None:
        callbacks.append(EarlyStopping(config.early_stopping))
    Callbacks(callbacks)  # refuses what is no callback, before anything is loaded
    sources = given.sources or [named_source(text, "train") for text in config.data]
    eval_source = given.eval_source or (named_source(config.eval_data, "valid") if config.eval_data else None)
    check_readable([*sources, *([eval_source] if eval_source is not None else [])])
    score = prepare_score(config, sources, eval_source, given.score)
    device = given.base.device if given.base is not None else default_device(config.device)
    own_mappings = mmap_allocations(
        device.type == "cpu" and (config.activation_checkpointing or config.optimizer_in_backward)
    )
    repeats = deterministic_algorithms(device, loaded=given.base is not None) if config.deterministic else nullcontext()
    with locked(config.out), own_mappings, repeats, PeakMemory(device) as memory:
        remove_leftovers(config.out)
        check_free(config.out, config.resume)
        started = time.perf_counter()
        with _base(config, given.base) as base:
            release_memory()  # what loading used
            set_checkpointing(config, base)
            view.base(base)
            loaded = time.perf_counter()
            adapter = make_adapter(base, config)
            encoder = Encoder(base.tokenizer, train_on=config.train_on, date=config.template_date)
            try:
                data = TrainingData(encoder, *read_data(config, sources, encoder, base, given.eval_source))
                view.data(data.dataset, data.eval_dataset, encoder.notes)
                slot = 0 if adapter is None else 1
                session = Session(config, base, adapter, data, view, slot=slot, callbacks=callbacks)
                if score is not None:
                    session.trial.scorer = _make_scorer(config, score, sources, eval_source, data, base)
            except BaseException:
                if adapter is not None:
                    detach(base, 1)
                raise
            with closing(session):
                _show_what_is_trained(session)
                result, trained = _trained(session, memory, given.save_when_stopped)
    summary = {
        **result,
        "peak_memory_bytes": memory.bytes,
        "idle_memory_bytes": memory.start,
        "seconds_loading": loaded - started,
        "seconds_training": trained - loaded,
    }
    session.write_measured(summary)
    view.done(summary)
    session.recorder.callbacks.end(summary)
    return summary


@contextmanager
def _base(config: TrainConfig, loaded: Base | None) -> Iterator[Base]:
    """The base that the config names, or the one that is loaded already."""
    if loaded is not None:
        with borrowed(loaded, compute_dtype_of(config), adds_tokens=bool(config.trainable_tokens)) as base:
            yield base
        return
    yield load_base(
        config.model, precision=stored_precision(config), compute_dtype=compute_dtype_of(config), device=config.device,
        init=config.init, seed=config.seed, trust_remote_code=config.trust_remote_code, training=True,
    )  # fmt: skip


def _make_scorer(
    config: TrainConfig,
    score: Score,
    sources: Sequence[Source],
    eval_source: Source | None,
    data: TrainingData,
    base: Base,
) -> Scorer:
    """What scores answers at each evaluation. The serving engine generates them, which training cannot import."""
    from graftlm.serving.engine.generate import answer_texts  # a run without a score does not load the engine

    rows = sources if eval_source is None or share(eval_source.path) else [eval_source]
    return make_scorer(config, score, rows, data.eval_dataset, data.encoder, base, answer_texts)


def _show_what_is_trained(session: Session) -> None:
    base, adapter, view = session.base, session.adapter, session.view
    if adapter is not None:
        for note in adapter.origin.notes if adapter.origin is not None else ():
            view.note(note)
        view.coverage(coverage(base, adapter), adapter, notes_for_peft(base, adapter.layers))
        return
    view.full_training(sum(p.numel() for p in session.trial.parameters.values()))
    if base.fixed:
        view.note(f"its class never trains {len(base.fixed)} of its parameters: '{min(base.fixed)}' stays as it is")


def _trained(session: Session, memory: PeakMemory, save_when_stopped: bool) -> tuple[dict[str, Any], float]:
    """Take the steps and save; returns what the run was and did, and when the last step was done. Raises as `run`."""
    config, base, trial, view, adapter = session.config, session.base, session.trial, session.view, session.adapter
    memory_estimate = estimate(config, base, [trial], [] if adapter is None else [adapter])
    with mmap_allocations(base.device.type == "cpu" and memory_estimate.load.mmap_allocations):
        session.resume_from_checkpoint(memory_estimate.micro_batch_tokens)
        dry_run_bytes = None if trial.done else dry_run(base, [trial], memory_estimate) - memory.start
        view.memory(memory_estimate, dry_run_bytes)
        session.open_run_folder({**memory_estimate.to_json(), "dry_run_bytes": dry_run_bytes})
        recorder = session.recorder
        with signals(recorder, view.note):
            try:
                with view.training(trial):
                    train_trials(base, [trial], memory_estimate.micro_batch_tokens, recorder)
            except (Diverged, ScoreError) as error:
                raise type(error)(f"{error}; {checkpoint.describe_newest(config.out)}") from error.__cause__
            if recorder.stopped is not None and not trial.done:
                recorder.save()
                step = trial.step
                if save_when_stopped:
                    session.save_so_far()
                raise Stopped(
                    recorder.stopped,
                    f"stopped after step {step} of {trial.sampler.steps}; {checkpoint.describe_newest(config.out)}. "
                    "Go on with the same command and --resume",
                )
            trained = time.perf_counter()
            with working("saving"):
                return session.finish(), trained
