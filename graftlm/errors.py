"""One tree of exceptions. Each message says what was found, what was expected, and the way out.

    GraftError
    |-- ConfigError      an option is unknown, out of range, or contradicts another
    |-- DataError        a data file or a row of it cannot be trained on (lists up to 20 rows at once)
    |-- ModelError       a base model cannot be found, loaded, or trained as asked
    |-- AdapterError     an adapter's files do not fit together, or do not fit this base
    |-- StoreError       a name, version or alias of a store is not there, in use, or damaged
    |-- RequestError     a request to a server or its engine cannot be answered as asked
    |-- RunError         a run folder is in use, damaged, or belongs to another run
    `-- TrainingError    training cannot continue (a trained tensor without a gradient, a process that died)
        |-- Diverged     a loss or gradient is not finite
        `-- ScoreError   a score function of the user raised, or returned no number

    Stopped              not an error: a run was stopped by a signal and has written a checkpoint

Raise these for problems that a user can fix; use `assert` for bugs. The command line prints a GraftError without a traceback
and exits with 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraftError(Exception):
    """Base class of every error that a user can fix."""

    everywhere = False
    """Whether every rank of a run has raised it."""
    alone = False
    """Whether this rank has, and not all of them."""
    lost = False
    """Whether it says no more than that another rank is gone."""


class ConfigError(GraftError):
    """An option is unknown, out of range, or contradicts another."""


class DataError(GraftError):
    """A data file or rows of it cannot be trained on."""


class ModelError(GraftError):
    """A base model cannot be found, loaded, or trained as asked."""


class AdapterError(GraftError):
    """An adapter's files do not fit together, or do not fit this base."""


class StoreError(GraftError):
    """A name, version or alias of a store is not there, in use, or damaged."""


class RequestError(GraftError):
    """A request cannot be answered; `full` if a retry may succeed when the queue is shorter. `field` is the wrong field."""

    def __init__(self, message: str, *, full: bool = False, field: str | None = None) -> None:
        super().__init__(message)
        self.full, self.field = full, field


class RunError(GraftError):
    """A run folder is in use, damaged, or belongs to another run."""


class TrainingError(GraftError):
    """Training cannot continue."""


class Diverged(TrainingError):
    """A loss or gradient is not finite; mostly the learning rate is too high."""


class ScoreError(TrainingError):
    """A score function of the user raised, or returned something other than a finite number."""


class Stopped(Exception):
    """A run was stopped by a signal and has written a checkpoint; the message says how to continue."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` for the known name closest to `name`, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean '{close[0]}'?" if close else ""
