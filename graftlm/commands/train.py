"""`graft train`: from its config to a finished run folder.

    load the base -> make what is trained -> read the data -> [evaluate, step, log, save] ... -> adapter/ or model/

This is where the parts meet; each part is a call. `training/run.py` reads the data and is what is trained with its folder,
`training/memory.py` estimates what it will take, `training/trainer.py` trains, `training/view.py` shows it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from graftlm import __version__
from graftlm.adapters.attach import coverage, detach, notes_for_peft
from graftlm.base.chat import Encoder
from graftlm.base.loading import Base, default_device, load_base
from graftlm.base.shared_base import borrowed
from graftlm.config import TrainConfig
from graftlm.data.sources import Source, named_source, share
from graftlm.distributed.group import ALONE, Ranks
from graftlm.errors import Diverged, ScoreError, Stopped
from graftlm.files import remove_leftovers
from graftlm.heap import mmap_allocations, release_memory
from graftlm.planning.peak_memory import PeakMemory
from graftlm.progress import working
from graftlm.scores import Score, ScoreFunction
from graftlm.training import checkpoint
from graftlm.training.callbacks import Callback, Callbacks, EarlyStopping
from graftlm.training.checkpoint import Newest, compute_dtype_of
from graftlm.training.determinism import deterministic_algorithms
from graftlm.training.layout import check_alone, choose_layout
from graftlm.training.logging import Follower, check_trackers, signals
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


def train(
    config: TrainConfig, view: View | None = None, given: Given = NOTHING, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Train as the config says; returns the summary that `--json` prints. `given` is what a Python caller hands over.

    Over several `ranks`, each calls this; the first writes the run folder and has the summary, the others return an empty
    one. Raises GraftError, and Stopped on a signal.
    """
    assert config.ranks == ranks.size, "train_over_ranks starts the ranks that a config asks for"
    view = view or View()
    started = time.perf_counter()
    with ExitStack() as held:
        with ranks.agreeing():  # whatever is wrong is found, on every rank, before the first step
            inputs = _check_inputs(config, given, ranks, held)
        config, ranks = choose_layout(config, stored_precision(config), inputs.device, ranks, view.note)
        ranks.check_shared(config.out)
        if config.resume:  # each rank reads a share of its files
            inputs = replace(inputs, newest=checkpoint.newest(config.out, ranks))
        with ranks.failing_alike() if config.splits_model else ranks.agreeing():
            run = _set_up(config, view, given, inputs, ranks, held)
        session = run.session
        ranks.check_alike({"graftlm": __version__, "step": session.trial.step, **session.identity.values})
        if ranks.first:
            session.open_run_folder(run.plan, ranks)
        if not ranks.first:
            _follow(run, ranks)
            return {}
        result, trained = _trained(run, given.save_when_stopped, ranks)
    summary = {
        **result,
        "peak_memory_bytes": run.memory.bytes,
        "idle_memory_bytes": run.memory.start,
        "seconds_loading": run.loaded - started,
        "seconds_training": trained - run.loaded,
    }
    session.write_measured(summary)
    view.done(summary)
    session.recorder.callbacks.end(summary)
    return summary


@dataclass(frozen=True, kw_only=True)
class _SetUp:
    """A run before its first step."""

    session: Session
    memory: PeakMemory
    loaded: float
    """When the base was there."""
    plan: dict[str, Any]
    """What `open_run_folder` writes of it."""
    micro_batch_tokens: int


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What a run is made of, checked as far as it can be without the base."""

    sources: Sequence[Source]
    eval_source: Source | None
    callbacks: Sequence[Callback]
    score: Score | None
    device: torch.device
    newest: Newest | None = None
    """The checkpoint to go on from, where the run does."""


def _check_inputs(config: TrainConfig, given: Given, ranks: Ranks, held: ExitStack) -> _Inputs:
    """Look at all that a run needs before the base is loaded, and lock its folder; `held` frees it. Raises GraftError."""
    check_alone(config)
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
    if ranks.first:
        held.enter_context(locked(config.out))
        remove_leftovers(config.out)
        check_free(config.out, config.resume)
    return _Inputs(sources=sources, eval_source=eval_source, callbacks=callbacks, score=score, device=device)


def _set_up(config: TrainConfig, view: View, given: Given, inputs: _Inputs, ranks: Ranks, held: ExitStack) -> _SetUp:
    """Load, read and make all that a run needs; `held` gives back at its end what must be given back. Raises GraftError."""
    sources, eval_source, device = inputs.sources, inputs.eval_source, inputs.device
    held.enter_context(
        mmap_allocations(device.type == "cpu" and (config.activation_checkpointing or config.optimizer_in_backward))
    )
    if config.deterministic:
        held.enter_context(deterministic_algorithms(device, loaded=given.base is not None))
    memory = held.enter_context(PeakMemory(device))
    base = held.enter_context(_base(config, given.base, ranks, inputs.newest))
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
        session = Session(config, base, adapter, data, view, slot=slot, callbacks=inputs.callbacks)
        if inputs.score is not None:
            session.trial.scorer = _make_scorer(config, inputs.score, sources, eval_source, data, base)
    except BaseException:
        if adapter is not None:
            detach(base, 1)
        raise
    held.enter_context(closing(session))
    _show_what_is_trained(session)
    plan, tokens = _planned(session, memory, ranks, held, inputs.newest)
    return _SetUp(session=session, memory=memory, loaded=loaded, plan=plan, micro_batch_tokens=tokens)


def _planned(
    session: Session, memory: PeakMemory, ranks: Ranks, held: ExitStack, newest: Newest | None
) -> tuple[dict[str, Any], int]:
    """Plan the run's memory, go on from a checkpoint where asked, and try the heaviest micro-batch.

    Returns the plan as the run folder keeps it, and the most tokens of a micro-batch.
    """
    config, base, trial, adapter = session.config, session.base, session.trial, session.adapter
    found = estimate(config, base, [trial], [] if adapter is None else [adapter], ranks=ranks.on_machine)
    held.enter_context(mmap_allocations(base.device.type == "cpu" and found.load.mmap_allocations))
    session.resume_from_checkpoint(found.micro_batch_tokens, newest)
    dry_run_bytes = None if trial.done else dry_run(base, [trial], found) - memory.start
    session.view.memory(found, dry_run_bytes)
    return {**found.to_json(), "dry_run_bytes": dry_run_bytes}, found.micro_batch_tokens


@contextmanager
def _base(config: TrainConfig, loaded: Base | None, ranks: Ranks, newest: Newest | None) -> Iterator[Base]:
    """The base that the config names, or the one that is loaded already; with --layout shard or hybrid the ranks share its
    weights."""
    if loaded is not None:
        with borrowed(loaded, compute_dtype_of(config, newest), adds_tokens=bool(config.trainable_tokens)) as base:
            yield base
        return
    yield load_base(
        config.model, precision=stored_precision(config), compute_dtype=compute_dtype_of(config, newest), device=config.device,
        init=config.init, seed=config.seed, trust_remote_code=config.trust_remote_code, training=True,
        ranks=ranks if config.splits_model else ALONE, trains_base=config.method == "full", host_layers=config.host_layers,
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


def _trained(run: _SetUp, save_when_stopped: bool, ranks: Ranks) -> tuple[dict[str, Any], float]:
    """Take the steps and save; returns what the run was and did, and when the last step was done. Raises as `train`."""
    session = run.session
    config, base, trial, view, recorder = session.config, session.base, session.trial, session.view, session.recorder
    with signals(recorder, view.note):
        try:
            with view.training(trial):
                train_trials(base, [trial], run.micro_batch_tokens, recorder, ranks)
        except (Diverged, ScoreError) as error:
            raise type(error)(f"{error}; {checkpoint.describe_newest(config.out)}") from error.__cause__
        if recorder.stopped is not None and not trial.done:
            recorder.save()
            step = trial.step
            if save_when_stopped:
                session.save_so_far()
            ranks.wait_for_all()
            raise Stopped(
                recorder.stopped,
                f"stopped after step {step} of {trial.sampler.steps}; {checkpoint.describe_newest(config.out)}. "
                "Go on with the same command and --resume",
            )
        trained = time.perf_counter()
        with working("saving"):
            return session.finish(ranks), trained


def _follow(run: _SetUp, ranks: Ranks) -> None:
    """Take the steps on a rank that writes nothing. Raises Stopped when all ranks stop."""
    session = run.session
    follower = Follower(session.config, session.trial, ranks)
    with signals(follower, session.view.note):
        train_trials(session.base, [session.trial], run.micro_batch_tokens, follower, ranks)
    if follower.stopped is not None and not session.trial.done:
        follower.save()
        ranks.wait_for_all()  # once one has ended, torchrun gives the others 30 seconds: the first may save for longer
        raise Stopped(follower.stopped, "stopped with the first rank")
    session.finish_with_the_first(ranks)
