"""The trials of a sweep and their results, read from its storage and its run folders."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from graftlm import terminal
from graftlm.config.aliases import renamed
from graftlm.config.sweep import Value
from graftlm.errors import RunError
from graftlm.experiments.sweep.storage import (
    IDENTITY,
    JOURNAL,
    MARK,
    SURPLUS,
    WANTED,
    ended_early,
    import_optuna,
    open_storage,
    redacted,
    storage_errors,
    trial_folder,
)
from graftlm.jsonfile import read_json
from graftlm.training.run_files import METRICS, read_metrics

Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One trial."""

    number: int
    state: str
    """running, complete, pruned, diverged or failed."""
    params: Mapping[str, Value]
    """Its values of the options that were searched."""
    loss: float | None
    """Eval loss of its best step, in nats a target token; of a pruned trial, of its last evaluation."""
    loss_before: float | None
    steps: int | None
    seconds: float | None
    """Time of its optimizer steps, including those that it shared with other trials."""
    folder: str | None
    digest: str | None
    """Of its adapter, by content."""
    why: str | None
    """Why it has no result."""
    eval_losses: Points
    """(step, eval loss)."""


@dataclass(frozen=True, kw_only=True, repr=False)
class SweepResult:
    """A sweep: its options, its search space and its trials."""

    name: str
    model: str
    """The base, as the user named it."""
    folder: str
    storage: str
    options: Mapping[str, Any]
    """The sweep's options, its base and data by digest."""
    space: Mapping[str, str]
    """The search space, by option, as it was written."""
    tried: tuple[TrialResult, ...]
    wanted: int | None = None
    """Trials that it has in the end, as it was started last; None for a sweep written before this was kept."""

    def __repr__(self) -> str:
        return terminal.as_text(self._draw)

    def _repr_html_(self) -> str:
        return terminal.as_html(self._draw)

    def _draw(self, where: Console) -> None:
        from graftlm.experiments.sweep.view import print_table

        print_table(where, self, 20)

    @property
    def ranked(self) -> list[TrialResult]:
        """All trials, complete ones first, by loss."""
        order = {"complete": 0, "running": 1, "pruned": 2}
        return sorted(
            self.tried, key=lambda t: (order.get(t.state, 3), math.inf if t.loss is None else t.loss, t.number)
        )

    @property
    def best(self) -> TrialResult | None:
        """The complete trial with the lowest loss; None while there is none."""
        first = next(iter(self.ranked), None)
        return first if first is not None and first.state == "complete" else None

    def counted(self) -> str:
        """How many trials are in each state, as words."""
        kinds = Counter(t.state for t in self.tried)
        return ", ".join(f"{kinds[s]} {s}" for s in ("complete", "running", "pruned", "diverged", "failed") if kinds[s])

    def to_json(self) -> dict[str, Any]:
        """Every figure as plain JSON values."""
        best = self.best
        return {
            "name": self.name, "model": self.model, "folder": self.folder, "storage": self.storage, "asked": dict(self.options),
            "space": dict(self.space), "wanted": self.wanted, "best": None if best is None else best.number,
            "trials": [asdict(t) for t in self.tried],
        }  # fmt: skip


def eval_losses(run: Path) -> Points:
    """(step, eval loss) of a trial, from its run folder; none where it has no metrics."""
    metrics = run / METRICS
    lines = read_metrics(metrics) if metrics.is_file() else []
    return tuple((int(m["step"]), float(m["eval_loss"])) for m in lines if m["kind"] == "eval")


def read(
    folder: Path, storage: str | None = None, *, read_only: bool = False, losses: Callable[[Path], Points] = eval_losses
) -> SweepResult:
    """Read a sweep from its folder; `storage` where its address was not kept there. Raises RunError, ConfigError without
    Optuna.

    `losses` gives a trial's eval losses by its folder. `read_only` is for journals (`open_storage`).
    """
    if not (folder / MARK).is_file():
        raise RunError(f"{folder} is not the folder of a sweep (it has no {MARK}); name the --out of one")
    mark = read_json(folder / MARK, RunError)
    where = storage or mark.get("storage")
    shown_storage = redacted(where or str(folder / JOURNAL))
    optuna = import_optuna()
    with storage_errors(shown_storage):
        try:
            study = optuna.load_study(study_name=mark["name"], storage=open_storage(where, folder, read_only=read_only))
        except KeyError:
            hint = "" if where else "; if it lies on a server, name it with --storage"
            raise RunError(f"{shown_storage} holds no sweep '{mark['name']}'{hint}") from None
        trials = study.get_trials(deepcopy=False)
        attributes = study.user_attrs
        options, wanted = renamed(attributes.get(IDENTITY, {})), attributes.get(WANTED)
    space = renamed({name.replace("-", "_"): text for name, text in dict(options.get("search", {})).items()})
    tried = tuple(_tried(t, space, folder, losses) for t in trials if not t.user_attrs.get(SURPLUS))
    return SweepResult(
        name=mark["name"], model=str(mark.get("model")), folder=str(folder), storage=shown_storage, options=options,
        space=space, tried=tried, wanted=wanted if isinstance(wanted, int) else None,
    )  # fmt: skip


def _tried(found: Any, space: Mapping[str, str], folder: Path, losses: Callable[[Path], Points]) -> TrialResult:
    facts: dict[str, Any] = found.user_attrs
    params = renamed(found.params)
    why = facts.get("why")
    state = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}.get(found.state.name, "running")
    if state == "pruned":
        state = ended_early(why)
    home = trial_folder(folder, found.number)
    last = max(found.intermediate_values, default=None)
    loss = found.value if state == "complete" else None if last is None else found.intermediate_values[last]
    return TrialResult(
        number=found.number,
        state=state,
        params={n: params[n] for n in space if n in params},
        loss=loss,
        loss_before=facts.get("loss_before"),
        steps=facts.get("steps"),
        seconds=facts.get("seconds"),
        folder=str(home) if home.is_dir() else facts.get("folder"),
        digest=facts.get("digest"),
        why=why,
        eval_losses=losses(home),
    )
