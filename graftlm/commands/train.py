"""`graft train`: from its config to a finished run folder."""

from __future__ import annotations

from typing import Any

from graftlm.config import TrainConfig
from graftlm.training.run import Given, run
from graftlm.training.view import View

NOTHING = Given()


def train(config: TrainConfig, view: View | None = None, given: Given = NOTHING) -> dict[str, Any]:
    """Train; returns the run's summary. `given` holds what a Python caller hands over: a loaded base, rows, callbacks.

    Raises GraftError, and Stopped on a signal.
    """
    return run(config, view or View(), given)
