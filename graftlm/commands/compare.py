"""`graft compare`: several ways to train one base on the same rows, with statistics and a verdict."""

from __future__ import annotations

from graftlm import terminal
from graftlm.config import CompareConfig
from graftlm.experiments.compare.results import Comparison
from graftlm.experiments.compare.run import compare as run
from graftlm.experiments.compare.view import CompareView


def compare(config: CompareConfig, view: CompareView | None = None) -> Comparison:
    """Run the comparison, or go on with the one in its folder. Raises GraftError, and Stopped on a signal."""
    return run(config, view or CompareView(terminal.console(stderr=True)))
