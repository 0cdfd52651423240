"""The search: Optuna's study, and which worker owns which of its trials.

Optuna (Akiba et al. 2019) chooses the values to try next and the trials to end early, and keeps both in its storage, which
several workers share. It does not record which worker owns a running trial. Here:

    each trial has a folder, and the worker that trains it holds the folder's lock     the system frees it with the process
    a running trial whose lock is free has lost its worker                             the next one resumes its checkpoint
    options, base and data of a sweep are fixed                                        a change is refused by name

A worker on another machine has its own folder (`home`), and only workers of that folder take over its trials.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftlm.config import SweepConfig
from graftlm.config.aliases import FORMER, renamed
from graftlm.config.fields import flag_name
from graftlm.config.sweep import Choice, Range, Space, Value
from graftlm.errors import RunError
from graftlm.experiments.sweep.storage import (
    IDENTITY,
    JOURNAL,
    MARK,
    SURPLUS,
    WANTED,
    has_password,
    import_optuna,
    open_storage,
    redacted,
    storage_errors,
    trial_folder,
)
from graftlm.files import write_json
from graftlm.jsonfile import parse_json, read_json
from graftlm.kernels.counter_rng import hash_words
from graftlm.training.run_folder import locked

if TYPE_CHECKING:
    import optuna

FOLDER_LOCK = ".turn"
HOME, WORKERS = "home", "workers"
_BEGINNING = timedelta(minutes=5)
"""A trial without a folder for so long was begun by a process that died at that moment."""
_REDUCTION = 3
"""Reduction factor of successive halving: one in so many trials of a rung goes on to the next (Li et al. 2020)."""


@dataclass(eq=False)
class ClaimedTrial:
    """A trial that this process owns."""

    number: int
    params: dict[str, Value]
    """Its values of the options that are searched, by field of `TrainConfig`."""
    folder: Path
    trial: optuna.trial.Trial
    study: Study
    held: ExitStack = field(default_factory=ExitStack)
    """The lock of its folder."""

    def report(self, examples: int, loss: float) -> bool:
        """Report an eval loss, in nats a target token, after so many examples; returns whether to prune the trial."""
        with storage_errors(self.study.where):
            if examples not in self.trial.study.get_trials(deepcopy=False)[self.number].intermediate_values:
                self.trial.report(loss, examples)
            return bool(self.trial.should_prune())

    def report_result(self, state: str, loss: float | None = None, **facts: Any) -> None:
        """Report its result, `complete` with its loss, `pruned` or `failed`, and release it."""
        from optuna.trial import TrialState

        states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        with storage_errors(self.study.where):
            for name, value in facts.items():
                self.trial.set_user_attr(name, value)
            self.trial.study.tell(self.trial, loss, states[state])
        self.release()

    def release(self) -> None:
        """Release the folder's lock; without a reported result another worker may then claim the trial."""
        self.held.close()


class Study:
    """A sweep's search, as one worker sees it."""

    def __init__(self, config: SweepConfig) -> None:
        """Open the storage, or make it. Raises ConfigError without Optuna, and RunError where it cannot be reached."""
        optuna = import_optuna()
        self.config = config
        self.out = config.out
        self.where = redacted(config.storage or str(config.out / JOURNAL))
        self.name = study_name(config)
        self.home = claim_folder(config)
        with storage_errors(self.where), _exclusive(self.out):  # two workers must not make the same tables
            storage = open_storage(config.storage, config.out)
            self.study = optuna.create_study(
                storage=storage, study_name=self.name, direction="minimize", load_if_exists=True
            )
            worker = int(self.study.user_attrs.get(WORKERS, 0))
            self.study.set_user_attr(WORKERS, worker + 1)
        # Another worker, or the same one started again, must not draw the same first values.
        apart = (self.home,) if worker else ()
        self.study.sampler = _sampler(config, hash_words(config.search_seed, "sampler", worker, *apart))

    def set_pruner(self, examples: int) -> None:
        """Set the pruner, for trials that see at most so many examples."""
        self.study.pruner = _pruner(self.config, examples)

    def identify(self, content: Mapping[str, Any]) -> None:
        """Compare this sweep's options, base and data (`content`, by digest) with those in the storage.

        Raises RunError where the storage holds another sweep, or a study of another program.
        """
        now = parse_json(json.dumps({**self.config.identity, **content}))
        with storage_errors(self.where), _exclusive(self.out):
            known: dict[str, Any] | None = self.study.user_attrs.get(IDENTITY)
            if known is None:
                if self.study.get_trials(deepcopy=False):
                    raise RunError(f"'{self.name}' in {self.where} is a study of another program; give another --name")
                self.study.set_user_attr(IDENTITY, now)
                self.study.set_user_attr(WANTED, self.wanted)
                return
        searched = [name for name in dict(known.get("search") or {}) if name.replace("-", "_") in FORMER]
        if searched:
            raise RunError(
                f"'{self.name}' in {self.where} searches '{searched[0]}', which is called "
                f"'{flag_name(FORMER[searched[0].replace('-', '_')])}' now, and its storage cannot rename it: `graft "
                "sweep show` "
                "shows it; to search on take another --name and --out"
            )
        known = renamed(known)
        if known.get("compute_dtype") is None:  # written before the compute dtype was kept
            known = {**known, "compute_dtype": now.get("compute_dtype")}
        changed = [name for name in {**known, **now} if known.get(name) != now.get(name)]
        if changed:
            said = "; ".join(f"{flag_name(n)} was {known.get(n)!r}, now {now.get(n)!r}" for n in changed)
            raise RunError(
                f"'{self.name}' in {self.where} is another sweep: {said}. Take the same options, or another --name and --out"
            )
        with storage_errors(self.where):  # the last start says how many trials there are to be
            self.study.set_user_attr(WANTED, self.wanted)

    # ---- trials ----

    def next(self) -> ClaimedTrial | None:
        """Claim a trial: one that lost its worker, else a new one; None where none is left to begin."""
        with storage_errors(self.where), _exclusive(self.out):
            return self._abandoned() or self._new()

    def _abandoned(self) -> ClaimedTrial | None:
        import optuna

        running = optuna.trial.TrialState.RUNNING
        for found in self.study.get_trials(deepcopy=False, states=(running,)):
            home = found.user_attrs.get(HOME)
            if home is None and found.datetime_start and datetime.now() - found.datetime_start > _BEGINNING:
                self.study.tell(found.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
            if home != self.home:
                continue
            held = self._lock(found.number)
            if held is None:
                continue
            # Its worker may have reported a result in between.
            if self.study.get_trials(deepcopy=False)[found.number].state != running:
                held.close()
                continue
            trial = optuna.trial.Trial(self.study, found._trial_id)  # pyright: ignore[reportPrivateUsage]
            return self._claim(trial, held)
        return None

    def _new(self) -> ClaimedTrial | None:
        import optuna

        wanted = self.wanted
        if len(self._counted()) >= wanted:
            return None
        trial = self.study.ask(_distributions(self.config.space))
        if sum(number < trial.number for number in self._counted()) >= wanted:  # a worker elsewhere was quicker
            trial.set_user_attr(SURPLUS, True)
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            return None
        trial.set_user_attr(HOME, self.home)
        held = self._lock(trial.number)
        assert held is not None, f"the folder of the new trial {trial.number} is in use"
        return self._claim(trial, held)

    @property
    def wanted(self) -> int:
        """How many trials there are in the end: `--trials`, at most the points of a grid."""
        return trials_wanted(self.config)

    def _counted(self) -> list[int]:
        """Numbers of the trials that count; surplus ones do not."""
        return [t.number for t in self.study.get_trials(deepcopy=False) if not t.user_attrs.get(SURPLUS)]

    def ended(self) -> int:
        """Trials that have ended."""
        with storage_errors(self.where):
            found = self.study.get_trials(deepcopy=False)
        return sum(t.state.is_finished() and not t.user_attrs.get(SURPLUS) for t in found)

    def _claim(self, trial: optuna.trial.Trial, held: ExitStack) -> ClaimedTrial:
        params = {name: _plain(trial.params[name]) for name in self.config.space}
        return ClaimedTrial(trial.number, params, trial_folder(self.out, trial.number), trial, self, held)

    def _lock(self, number: int) -> ExitStack | None:
        """The lock of a trial's folder; None where a running process holds it."""
        held = ExitStack()
        try:
            held.enter_context(locked(trial_folder(self.out, number)))
        except RunError as error:
            if "is in use" not in str(error):
                raise
            return None
        return held


# ---- the sweep's own folder ------------------------------------------------------------------------------------------


def claim_folder(config: SweepConfig) -> str:
    """Make `--out` this sweep's folder; returns its identity for other machines. Raises RunError where it is another's."""
    _make_folder(config.out)
    with _exclusive(config.out):  # workers that begin at the same moment must agree on what the folder is
        return _claim_folder(config, study_name(config))


def study_name(config: SweepConfig) -> str:
    """The name of the study in the storage."""
    return config.name or config.out.resolve().name


@contextmanager
def _exclusive(out: Path) -> Iterator[None]:
    """Only one worker of this folder at a time."""
    descriptor = os.open(out / FOLDER_LOCK, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise RunError(f"--out {out} is a file; name a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / FOLDER_LOCK).touch()
    except OSError as error:
        raise RunError(f"--out {out} cannot be written to: {error.strerror}") from None


def _claim_folder(config: SweepConfig, name: str) -> str:
    out = config.out
    held = sorted(p.name for p in out.iterdir() if not p.name.startswith("."))
    if not held:
        home = uuid.uuid4().hex
        write_json(out / MARK, {
            "written_by": "graft sweep", "home": home, "name": name, "model": config.model, "storage": _kept(config.storage),
        })  # fmt: skip
        return home
    if MARK not in held:
        raise RunError(f"--out {out} holds '{held[0]}', which no sweep wrote; take another folder")
    mark = read_json(out / MARK, RunError)
    for key, known, now in (
        ("name", mark.get("name"), name),
        ("storage", _kept(mark.get("storage")), _kept(config.storage)),
    ):
        if known != now:
            raise RunError(f"--out {out} belongs to a sweep with {key} {known!r}, now {now!r}; take another --out")
    return str(mark["home"])


def _kept(storage: str | None) -> str | None:
    """What a sweep's folder keeps of the address of its storage: nothing where that holds a password."""
    return None if has_password(storage) else storage


# ---- Optuna ----------------------------------------------------------------------------------------------------------


def _sampler(config: SweepConfig, seed: int) -> Any:
    from optuna import samplers

    seed %= 1 << 32
    if config.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    if config.sampler == "grid":
        grid = {n: list(s.values or ()) for n, s in config.space.items()}
        sampler: Any = samplers.GridSampler(grid, seed=config.search_seed)
        # After its last point it stops Optuna's own loop, which is not running; here `grid_size` bounds the trials.
        sampler.after_trial = lambda *_, **__: None
        return sampler
    return samplers.TPESampler(seed=seed, constant_liar=True, n_startup_trials=min(10, max(4, config.trials // 3)))


def _pruner(config: SweepConfig, examples: int) -> Any:
    """Asynchronous successive halving, or Hyperband over it; the resource is examples seen."""
    from optuna import pruners

    first = max(1, examples // _REDUCTION**2)
    if config.pruner == "asha":
        return pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=_REDUCTION)
    if config.pruner == "hyperband":
        return pruners.HyperbandPruner(
            min_resource=first, max_resource=max(examples, first), reduction_factor=_REDUCTION
        )
    return pruners.NopPruner()


def _distributions(space: Space) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    def one(searched: Range | Choice) -> Any:
        if isinstance(searched, Choice):
            return CategoricalDistribution(searched.values)
        if searched.whole:
            low, high = int(searched.low), int(searched.high)
            return IntDistribution(low, high, log=searched.log, step=int(searched.step or 1))
        return FloatDistribution(searched.low, searched.high, log=searched.log, step=searched.step)

    return {name: one(searched) for name, searched in space.items()}


def trials_wanted(config: SweepConfig) -> int:
    """How many trials a sweep has in the end: `--trials`, at most the points of a grid."""
    return min(config.trials, grid_size(config.space)) if config.sampler == "grid" else config.trials


def grid_size(space: Space) -> int:
    """Points of a grid over lists."""
    size = 1
    for searched in space.values():
        size *= len(searched.values or ())
    return size


def _plain(value: Any) -> Value:
    return value.item() if hasattr(value, "item") else value
