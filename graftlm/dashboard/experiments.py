"""Sweeps and comparisons as plain values.

A sweep's trials are in Optuna's storage. A journal in a folder of the board is read; a database is not opened, since the board
only reads files, and neither is a journal elsewhere. Then the trials are what their run folders say: the options in which they
differ, and their eval losses.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graftlm.dashboard.folders import COMPARISON_MARK, Folders, Item, object_in
from graftlm.dashboard.run_state import in_use
from graftlm.dashboard.runs import number, text
from graftlm.errors import GraftError
from graftlm.experiments.sweep.results import Points, SweepResult, read
from graftlm.experiments.sweep.storage import JOURNAL, MARK, ended_early, trial_folder
from graftlm.training.run_files import LOCK

Line = dict[str, Any]
"""A run's line of the list (`runs.py`)."""
_WHERE = {"out", "resume", "name"}


class SweepReader:
    """One sweep, read again where its storage has changed."""

    def __init__(self, item: Item, folders: Folders) -> None:
        self.item, self.folders = item, folders
        self._journal: tuple[object, SweepResult | None, str | None] | None = None

    def value(self, lines: Sequence[Line], losses: Callable[[Path], Points]) -> dict[str, Any]:
        """The sweep and its trials; `lines` are those of its run folders, `losses` gives a folder's eval losses."""
        mark, fault = object_in(self.item.folder / MARK, self.folders)
        found, why = self._read(mark, losses) if fault is None else (None, fault)
        trials = _tried(found, lines, losses) if found is not None else _from_folders(lines, losses)
        best = min((t for t in trials if t["state"] == "complete" and t["loss"] is not None), key=_loss, default=None)
        space = dict(found.space) if found is not None else {}
        names = list(space) or list(dict.fromkeys(name for t in trials for name in t["params"]))
        wanted = found.wanted if found is not None else None
        return {
            "id": self.item.id, "name": self.item.name, "model": text(mark.get("model")),
            "state": _state(trials, wanted), "faults": [why] if why else [], "space": space, "options": names,
            "trials": trials, "best": best["number"] if best else None, "wanted": wanted,
            "report": _report(self.item, self.folders),
        }  # fmt: skip

    def _read(self, mark: Mapping[str, Any], losses: Callable[[Path], Points]) -> tuple[SweepResult | None, str | None]:
        where = mark.get("storage")
        if isinstance(where, str) and "://" in where:
            kind = where.partition("://")[0]
            return (
                None,
                f"the storage is a database ({kind}), which the board does not open; shown is what the run folders say",
            )
        path = Path(str(where)) if where else self.item.folder / JOURNAL
        try:
            status = self.folders.checked(path.absolute()).stat()
            now = (status.st_ino, status.st_size, status.st_mtime_ns)
            if self._journal is None or self._journal[0] != now:
                self._journal = (now, read(self.item.folder, read_only=True, losses=lambda run: ()), None)
        except GraftError as error:
            return None, f"{error}; shown is what the run folders say".replace(str(self.item.folder) + os.sep, "")
        except (KeyError, TypeError, AttributeError, ValueError, IndexError, AssertionError) as error:
            said = f"{path.name} is not what a sweep writes ({type(error).__name__}); shown is what the run folders say"
            return None, said
        return self._journal[1], self._journal[2]


def _state(trials: Sequence[Mapping[str, Any]], wanted: int | None) -> str | None:
    """The state of a sweep; None where none is running and it is not known how many there are to be."""
    if any(trial["state"] == "running" for trial in trials):
        return "running"
    if wanted is None:
        return None
    return "finished" if sum(trial["state"] != "lost" for trial in trials) >= wanted else "stopped"


_TAKEN_OVER = "the sweep's next worker takes it over"


def _tried(found: SweepResult, lines: Sequence[Line], losses: Callable[[Path], Points]) -> list[dict[str, Any]]:
    runs = {line["role"]: line for line in lines}
    trials: list[dict[str, Any]] = []
    for tried in found.tried:
        folder = trial_folder(Path(found.folder), tried.number)
        line = runs.get(str(folder.relative_to(found.folder)))
        state, why = tried.state, tried.why
        if state == "running" and line is not None and line["state"] in ("failed", "stopped"):
            state, why = "lost", f"{line['how']}; {_TAKEN_OVER}"
        # A trial of another machine's worker has no folder here.
        elif state == "running" and line is None and folder.is_dir() and not in_use(folder / LOCK, None, time.time()):
            state, why = "lost", f"its process has gone before it could write its options; {_TAKEN_OVER}"
        evals = losses(folder)
        loss = tried.loss if tried.loss is not None else min((loss for step, loss in evals if step > 0), default=None)
        trials.append({
            **{k: v for k, v in asdict(tried).items() if k not in ("folder", "eval_losses")},
            "state": state, "why": why, "loss": loss, "run": line["id"] if line else None, "evals": evals,
        })  # fmt: skip
    return trials


_STATES = {"finished": "complete", "running": "running", "stopped": "lost", "failed": "failed"}


def _state_in(line: Line) -> str:
    """The state of a trial that its run folder says."""
    if line["outcome"].get("state") == "pruned" and line["state"] in ("stopped", "failed"):
        return ended_early(line["outcome"].get("why"))
    return _STATES[line["state"]]


def _from_folders(lines: Sequence[Line], losses: Callable[[Path], Points]) -> list[dict[str, Any]]:
    ordered = sorted(lines, key=lambda line: line["role"])
    differing = differences([line["config"] for line in ordered])
    return [
        {
            "number": i, "state": _state_in(line), "params": {n: line["config"].get(n) for n in differing},
            "loss": line["eval_best"], "loss_before": line["eval_before"], "steps": line["step"], "seconds": None,
            "digest": line["adapter"], "why": line["how"], "run": line["id"], "evals": losses(Path(line["folder"])),
        }
        for i, line in enumerate(ordered)
    ]  # fmt: skip


def differences(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The options in which runs differ, without where they lie."""
    names = dict.fromkeys(name for config in configs for name in config)
    return [
        name for name in names if name not in _WHERE and any(c.get(name) != configs[0].get(name) for c in configs[1:])
    ]


def _loss(trial: Mapping[str, Any]) -> float:
    return trial["loss"]


def comparison(item: Item, folders: Folders, lines: Sequence[Line]) -> dict[str, Any]:
    """A comparison: its verdict and methods once it is done, the runs that it has made at any time."""
    found, fault = object_in(item.folder / COMPARISON_MARK, folders)
    asked, verdict, data, failed = (_object(found.get(key)) for key in ("asked", "verdict", "data", "failed"))
    methods = [line for line in found.get("lines") or () if isinstance(line, dict)]
    written = max((line["modified"] for line in lines if line["modified"] is not None), default=None)
    running = any(line["state"] == "running" for line in lines) or in_use(item.folder / LOCK, written, time.time())
    shown = ("name", "method", "trained", "trainable_parameters", "base_parameters", "base_precision", "peak_planned",
             "peak_measured", "idle", "saved_bytes", "learning_rate", "loss_before", "loss", "losses", "std", "share",
             "share_interval", "task_score", "task_score_before", "general_before", "general_after", "tokens_per_second",
             "seconds")  # fmt: skip
    return {
        "id": item.id, "name": item.name, "faults": [fault] if fault else [],
        "model": text(asked.get("model")) or next((line["model"] for line in lines if line["model"]), None),
        "seeds": number(asked.get("seeds")), "metric": text(asked.get("metric")),
        "reference": text(found.get("reference")), "methods": [{k: line.get(k) for k in shown} for line in methods],
        "verdict": verdict, "failed": failed, "data": data,
        "done": bool(methods), "running": running,
        "runs": [line["id"] for line in lines], "report": _report(item, folders),
    }  # fmt: skip


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


REPORT = "report.html"


def _report(item: Item, folders: Folders) -> bool:
    try:
        folders.checked(item.folder / REPORT)
    except GraftError:
        return False
    return True
