"""Whether a run is running, finished, stopped or failed, from the files of its folder alone, and how that is known.

A running process holds the lock of its folder. The board takes no lock, not even for a moment: a run that begins in that
moment would be refused. It looks whether the process whose number is in the lock file has that file open. Of a run on another
machine, or in another container, neither can be seen: there the age of the last line decides.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graftlm.dashboard.metrics_log import MetricsLog
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


def holder(lock: Path) -> int | None:
    """The number of the process of this machine that has a lock file open; None where none can be seen."""
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
            return process
        return None
    try:
        held = list(place.iterdir())
    except PermissionError:  # another user's process, which lives
        return process
    except OSError:
        return None
    for entry in held:
        with contextlib.suppress(OSError):
            found = entry.stat()
            if (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino):
                return process
    return None


def run_state(
    folder: Path, log: MetricsLog, summary: Mapping[str, Any], outcome: Mapping[str, Any], now: float
) -> RunState:
    """The state of a run; `outcome` is the result.json that a comparison leaves, `now` in seconds since 1970."""
    process = holder(folder / LOCK)
    if process is not None:
        return RunState("running", f"process {process} holds its lock")
    if any((folder / kind).is_dir() for kind in ("adapter", "model")):
        reason = summary.get("stop_reason")
        return RunState("finished", f"ended early: {reason}" if reason else "its result is saved")
    if outcome.get("diverged"):
        return RunState("failed", str(outcome["diverged"]))
    if outcome.get("summary"):  # of the search for a learning rate, which keeps no result
        return RunState("finished", "its summary is saved")
    step = log.last.get("step", log.evals[-1]["step"] if log.evals else 0)
    last = log.events[-1] if log.events else {}
    if last.get("event") == "stopped":
        return RunState("stopped", f"stopped by signal {last.get('signal')} after step {step}; --resume goes on")
    age = max(0.0, now - (log.modified or 0.0))
    fresh = log.modified is not None and age < max(_FRESH_SECONDS, _FRESH_STEPS * _step_seconds(log))
    locked = os.path.lexists(folder / LOCK)
    if fresh and locked:
        return RunState(
            "running", f"its last line is {duration(age)} old; its process is not on this machine, or was just killed"
        )
    if any((folder / SO_FAR.format(kind)).is_dir() for kind in ("adapter", "model")):
        return RunState("stopped", f"stopped after step {step}, its best so far is saved; --resume goes on")
    if locked:
        since = f"nothing was written for {duration(age)}" if log.modified is not None else "nothing was written"
        return RunState(
            "failed", f"killed or crashed after step {step}: its lock is left, no process holds it, and {since}"
        )
    return RunState("failed", f"ended by an error after step {step}: it has no result, and its process has gone")


def _step_seconds(log: MetricsLog) -> float:
    seconds = log.last.get("seconds")
    return float(seconds) if isinstance(seconds, int | float) and seconds > 0 else 0.0
