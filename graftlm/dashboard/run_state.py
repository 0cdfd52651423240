"""Whether a run is running, finished, stopped or failed, from the files of its folder alone, and how that is known.

A running process holds the lock of its folder. The board takes no lock, not even for a moment: a run that begins in that
moment would be refused. It looks whether the process whose number is in the lock file has that file open. Of a run on another
machine, in another container, or of another user, this cannot be seen: there the age of the last line decides.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graftlm.dashboard.metrics_log import MetricsLog
from graftlm.experiments.sweep.storage import ended_early
from graftlm.formatting import duration
from graftlm.training.run_files import LOCK, SO_FAR

State = Literal["running", "finished", "stopped", "failed"]
_FRESH_SECONDS, _FRESH_STEPS = 300.0, 20.0
"""A run that nothing was written of for so long, and for so many of its steps, has ended."""


@dataclass(frozen=True)
class RunState:
    """A state, and the sentence that says how it is known."""

    state: State
    how: str


@dataclass(frozen=True)
class Holder:
    """The process whose number is in a lock file."""

    process: int
    certain: bool
    """Whether it is seen to have the file open; False of another user's process, whose files only that user may see."""


def holder(lock: Path) -> Holder | None:
    """The process of this machine that holds a lock file, or may hold it; None where none can be seen."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        status, text = os.fstat(descriptor), os.read(descriptor, 20).strip()
    except OSError:
        return None
    finally:
        os.close(descriptor)
    if not text.isdigit() or len(text) > 10:
        return None
    process = int(text)
    place = Path("/proc") / str(process) / "fd"
    if not Path("/proc/self/fd").is_dir():  # not Linux: whether it lives is all that can be known
        with contextlib.suppress(OSError, OverflowError):
            os.kill(process, 0)
            return Holder(process, True)
        return None
    try:
        held = list(place.iterdir())
    except PermissionError:  # another user's process, perhaps one that was given the number of a killed run
        return Holder(process, False)
    except OSError:
        return None
    for entry in held:
        with contextlib.suppress(OSError):
            found = entry.stat()
            if (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino):
                return Holder(process, True)
    return None


def in_use(lock: Path, written: float | None, now: float) -> bool:
    """Whether a process works in the folder of a lock file that has no steps to judge by, as one that begins.

    `written` is when anything was written there last, in seconds since 1970; it decides where the process cannot be seen.
    """
    found = holder(lock)
    if found is not None and found.certain:
        return True
    try:
        begun = lock.lstat().st_mtime
    except OSError:
        return False
    return now - max(begun, written or 0.0) < _FRESH_SECONDS


def run_state(
    folder: Path, log: MetricsLog, summary: Mapping[str, Any], outcome: Mapping[str, Any], now: float
) -> RunState:
    """The state of a run; `outcome` is the result.json that a comparison or sweep leaves, `now` in seconds since 1970."""
    found = holder(folder / LOCK)
    if found is not None and found.certain:
        return RunState("running", f"process {found.process} holds its lock")
    ended = _ended(folder, summary, outcome)
    if ended is not None:
        return ended
    step = log.last.get("step", log.evals[-1]["step"] if log.evals else 0)
    if os.path.lexists(folder / LOCK):  # before what an earlier part of the run left, which this one went on from
        return _left_locked(log, step, found, now)
    last = log.events[-1] if log.events else {}
    if last.get("event") == "stopped" and last["step"] >= step:
        return RunState("stopped", f"stopped by signal {last.get('signal')} after step {step}; --resume goes on")
    if any((folder / SO_FAR.format(kind)).is_dir() for kind in ("adapter", "model")):
        return RunState("stopped", f"stopped after step {step}, its best so far is saved; --resume goes on")
    return RunState("failed", f"ended by an error after step {step}: it has no result, and its process has gone")


def _ended(folder: Path, summary: Mapping[str, Any], outcome: Mapping[str, Any]) -> RunState | None:
    """The state of a run that has ended by itself."""
    if any((folder / kind).is_dir() for kind in ("adapter", "model")):
        reason = summary.get("stop_reason")
        return RunState("finished", f"ended early: {reason}" if reason else "its result is saved")
    if outcome.get("diverged"):
        return RunState("failed", str(outcome["diverged"]))
    if outcome.get("summary"):  # of the search for a learning rate, which keeps no result
        return RunState("finished", "its summary is saved")
    if outcome.get("state") == "pruned":  # a sweep's trial
        why = outcome.get("why")
        return RunState("stopped" if ended_early(why) == "pruned" else "failed", str(why))
    return None


def _left_locked(log: MetricsLog, step: int, found: Holder | None, now: float) -> RunState:
    """The state of a run whose lock is there, and held by no process that can be seen: the age of its last line decides."""
    age = max(0.0, now - (log.modified or 0.0))
    if log.modified is not None and age < max(_FRESH_SECONDS, _FRESH_STEPS * _step_seconds(log)):
        whose = (
            "its process is not on this machine, or was just killed" if found is None
            else f"process {found.process} is another user's, so whether it holds the lock cannot be seen"
        )  # fmt: skip
        return RunState("running", f"its last line is {duration(age)} old; {whose}")
    since = f"nothing was written for {duration(age)}" if log.modified is not None else "nothing was written"
    holds = "no process holds it" if found is None else f"process {found.process}, another user's, may not hold it"
    return RunState("failed", f"killed or crashed after step {step}: its lock is left, {holds}, and {since}")


def _step_seconds(log: MetricsLog) -> float:
    seconds = log.last.get("seconds")
    return float(seconds) if isinstance(seconds, int | float) and seconds > 0 else 0.0
