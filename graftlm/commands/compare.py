"""`graft compare`: several ways to train one base on the same data, side by side, with statistics and a verdict.

    read and check the data -> search learning rates -> train every variant with every seed -> score -> judge -> report

Everything that can be wrong with the data is found before the first run. The same command goes on with what is there.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from graftlm import terminal
from graftlm.config import CompareConfig
from graftlm.errors import Stopped, TrainingError
from graftlm.experiments.compare.data import load_comparison_data
from graftlm.experiments.compare.results import Comparison, collect
from graftlm.experiments.compare.run import (
    MARK,
    Progress,
    claim,
    score_models,
    search_learning_rates,
    train_variants,
)
from graftlm.experiments.compare.view import CompareView
from graftlm.experiments.reports.comparison import write_reports
from graftlm.experiments.row_files import write_row_files
from graftlm.experiments.workers import workers_for
from graftlm.files import write_json
from graftlm.training.run_folder import locked

NO_ROWS: Mapping[Path, str] = MappingProxyType({})


def compare(config: CompareConfig, view: CompareView | None = None, rows: Mapping[Path, str] = NO_ROWS) -> Comparison:
    """Run the comparison, or go on with the one in its folder; writes compare.json and the reports.

    `rows` are files to write into the folder first: rows in memory that the config names. Raises GraftError, and Stopped on
    a signal.
    """
    view = view or CompareView(terminal.console(stderr=True))
    with locked(config.out):
        claim(config.out)
        write_row_files(rows)
        try:
            with terminated_as_interrupted():
                return _compare(config, view)
        except (KeyboardInterrupt, Stopped) as stopped:
            number = stopped.signal_number if isinstance(stopped, Stopped) else int(signal.SIGINT)
            raise Stopped(
                number,
                f"stopped; finished runs are kept in {config.out}, those in the middle left checkpoints. "
                "Go on with the same command",
            ) from None


def _compare(config: CompareConfig, view: CompareView) -> Comparison:
    workers = workers_for(config.workers, config.device)
    data = load_comparison_data(config)
    view.comparison_data(config, data)
    done = Progress()
    search_learning_rates(config, data, done, view, workers)
    train_variants(config, data, done, view, workers)
    if len(done.failed) == len(config.variants):
        reasons = "; ".join(f"{name}: {why}" for name, why in done.failed.items())
        raise TrainingError(f"no method could be trained: {reasons}")
    score_models(config, data, done, view, workers)
    comparison = collect(config, data, done.learning_rates, done.failed)
    write_json(config.out / MARK, {"written_by": "graft compare", **comparison.to_json()})
    write_reports(comparison, config.out)
    return comparison


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: the processes that it has started are told to leave checkpoints."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number, "stopped")

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
