"""`graft train`: from its config to a finished run folder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from graftlm.config import TrainConfig
from graftlm.training.run import Given, run
from graftlm.training.view import View

NOTHING = Given()


def train(config: TrainConfig, view: View | None = None, given: Given = NOTHING) -> dict[str, Any]:
    """Train; returns the run's summary. `given` holds what a Python caller hands over: a loaded base, rows, callbacks, a score.

    Raises GraftError, and Stopped on a signal.
    """
    if config.score is not None and given.generate is None:
        from graftlm.serving.engine.generate import answer_texts  # not imported by a run that answers nothing

        given = replace(given, generate=answer_texts)
    return run(config, view or View(), given)
