"""`graft sweep`: many trials at once on one base; `graft sweep show`: what they came to."""

from __future__ import annotations

from graftlm.config import ShowSweepConfig, SweepConfig
from graftlm.experiments.reports.sweep import write_reports
from graftlm.experiments.sweep.results import SweepResult, read
from graftlm.experiments.sweep.run import sweep as run
from graftlm.experiments.sweep.view import SweepView


def sweep(config: SweepConfig, view: SweepView | None = None) -> SweepResult:
    """Run the sweep, go on with it, or join it. Raises GraftError, and Stopped on a signal."""
    return run(config, view or SweepView())


def show(config: ShowSweepConfig) -> SweepResult:
    """Read a sweep from its folder and write its report again. Raises RunError."""
    found = read(config.folder, config.storage)
    write_reports(found, config.folder)
    return found
