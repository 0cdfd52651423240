"""`graft sweep`: many trials at once on one base; `graft sweep show`: what they came to.

    open the search -> load the base, read all data -> compare with the search -> plan the concurrency -> train -> report

Everything that can be wrong is found before a trial begins. The same command goes on with a sweep that was stopped or killed,
and another process with the same command joins it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from graftlm.base.loading import Base, load_base
from graftlm.base.shared_base import borrowed
from graftlm.commands.compare import NO_ROWS
from graftlm.config import ShowSweepConfig, SweepConfig, TrainConfig
from graftlm.errors import Stopped
from graftlm.experiments.reports.sweep import write_reports
from graftlm.experiments.row_files import write_row_files
from graftlm.experiments.sweep.concurrency import plan_concurrency
from graftlm.experiments.sweep.results import SweepResult, read
from graftlm.experiments.sweep.run import (
    SessionStarter,
    check_files,
    content,
    free_slots,
    most_examples,
    publish_best,
    read_datasets,
    settings_by_data,
    train_trials,
)
from graftlm.experiments.sweep.study import Study
from graftlm.experiments.sweep.trial_scheduler import TrialScheduler
from graftlm.experiments.sweep.view import SweepView
from graftlm.heap import mmap_allocations
from graftlm.planning.peak_memory import PeakMemory
from graftlm.training.run import set_checkpointing, stored_precision


def sweep(
    config: SweepConfig,
    view: SweepView | None = None,
    *,
    base: Base | None = None,
    rows: Mapping[Path, str] = NO_ROWS,
) -> SweepResult:
    """Run the sweep, go on with it, or join it; writes its report.

    `base` is a loaded one, which is lent and comes back as it was. `rows` are files to write into the folder first: rows in
    memory that the config names. Raises GraftError, and Stopped on a signal.
    """
    view = view or SweepView()
    settings = settings_by_data(config)
    if not rows:
        check_files(config, settings)
    study = Study(config)
    write_row_files(rows)
    with _base(config, next(iter(settings.values())), base) as shared:
        stopped = _train(config, settings, study, shared, view)
    found = read(config.out, config.storage)
    write_reports(found, config.out)
    if stopped is not None:
        raise Stopped(
            stopped,
            f"stopped; what has ended is kept in {config.out}, what was being trained left checkpoints. "
            "Go on with the same command",
        )
    publish_best(config, found, study.running(), view)
    return found


def _train(
    config: SweepConfig, settings: Mapping[tuple[str, ...], TrainConfig], study: Study, base: Base, view: SweepView
) -> int | None:
    """Train trials until none is left to begin; returns the signal that stopped the sweep, None without one."""
    any_setting = next(iter(settings.values()))
    set_checkpointing(any_setting, base)
    view.base(base)
    datasets = read_datasets(settings, base, view)
    study.identify(content(base, datasets))
    study.set_pruner(most_examples(config, any_setting, datasets))
    use_mmap = config.activation_checkpointing and base.device.type == "cpu"
    with mmap_allocations(use_mmap), PeakMemory(base.device) as memory:
        concurrency = plan_concurrency(config, base, datasets)
        start = SessionStarter(config, base, datasets, concurrency, view)
        scheduler = TrialScheduler(study, free_slots(base, concurrency.count), start, memory, view)
        try:
            train_trials(base, study, scheduler, concurrency, memory, view)
        finally:
            scheduler.close()
    return scheduler.stopped


@contextmanager
def _base(config: SweepConfig, training: TrainConfig, held: Base | None) -> Iterator[Base]:
    """The base that the config names, or the one that is loaded already."""
    if held is not None:
        with borrowed(held, config.compute_dtype, adds_tokens=False) as base:
            yield base
        return
    yield load_base(
        config.model, precision=stored_precision(training), compute_dtype=config.compute_dtype, device=config.device,
        init="pretrained", seed=0, trust_remote_code=config.trust_remote_code, training=True,
    )  # fmt: skip


def show(config: ShowSweepConfig) -> SweepResult:
    """Read a sweep from its folder and write its report again. Raises RunError."""
    found = read(config.folder, config.storage)
    write_reports(found, config.folder)
    return found
