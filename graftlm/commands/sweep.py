"""`graft sweep`: many trials at once on one base; `graft sweep show`: what they came to.

    open the search -> load the base, read all data -> compare with the search -> plan the concurrency -> train -> report

Everything that can be wrong is found before a trial begins. The same command goes on with a sweep that was stopped or killed,
and another process with the same command joins it. `--workers` starts such processes: each does all of the above on a GPU of
its own, and this one waits for them and reports.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from graftlm.base.loading import Base, default_device, load_base
from graftlm.base.shared_base import borrowed
from graftlm.commands.compare import NO_ROWS, terminated_as_interrupted
from graftlm.config import ShowSweepConfig, SweepConfig, TrainConfig
from graftlm.distributed.group import Ranks
from graftlm.errors import ConfigError, Stopped, TrainingError
from graftlm.experiments.reports.sweep import write_reports
from graftlm.experiments.row_files import write_row_files
from graftlm.experiments.subprocess_run import sweep_in_subprocess
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
from graftlm.experiments.sweep.study import Study, claim_folder, trials_wanted
from graftlm.experiments.sweep.trial_scheduler import TrialScheduler
from graftlm.experiments.sweep.view import SweepView, WorkersView
from graftlm.experiments.workers import Worker, spread, workers_for
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
    try:
        if config.workers > 1:
            if base is not None:
                raise ConfigError(
                    f"workers={config.workers} starts processes of their own, which do not have the loaded model; give its "
                    "name instead, or leave workers out"
                )
            found = _search_with_workers(config, view, rows)
        else:
            found = search(config, view, base=base, rows=rows)
    except Stopped as stopped:
        raise Stopped(
            stopped.signal_number,
            f"stopped; what has ended is kept in {config.out}, what was being trained left checkpoints. "
            "Go on with the same command",
        ) from None
    publish_best(config, found, view)
    return found


def search(
    config: SweepConfig, view: SweepView, *, base: Base | None = None, rows: Mapping[Path, str] = NO_ROWS
) -> SweepResult:
    """Be a worker of the sweep in this process, until no trial is left to begin. Raises as `sweep`."""
    settings = settings_by_data(config)
    if not rows:
        check_files(config, settings)
    study = Study(config)
    write_row_files(rows)
    if config.workers > 1 and default_device(config.device).type == "cpu":
        Ranks(on_machine=config.workers).take_threads()
    with _base(config, next(iter(settings.values())), base) as shared:
        stopped = _train(config, settings, study, shared, view)
    found = read(config.out, config.storage)
    write_reports(found, config.out)
    if stopped is not None:
        raise Stopped(stopped, "stopped")
    return found


def _search_with_workers(config: SweepConfig, view: SweepView, rows: Mapping[Path, str]) -> SweepResult:
    """Start the workers and wait for them. Raises what ended one of them; one that died leaves its trials to the others."""
    workers = workers_for(config.workers, config.device)
    if not rows:
        check_files(config, settings_by_data(config))
    claim_folder(config)
    write_row_files(rows)
    died: list[str] = []
    with WorkersView(view, trials_wanted(config)) as seen, terminated_as_interrupted():

        def work(number: int, worker: Worker) -> TrainingError | None:
            try:
                sweep_in_subprocess(config, seen.of(number), worker)
            except TrainingError as error:
                return type(error)(f"{worker.name}: {error}")
            return None

        def ended(number: int, error: TrainingError | None) -> None:
            if error is not None:
                died.append(str(error))
                view.note(died[-1])

        try:
            spread(range(len(workers)), workers, work, ended)
        except KeyboardInterrupt:
            raise Stopped(signal.SIGINT, "stopped") from None
    if len(died) == len(workers):
        raise TrainingError(f"every worker has failed; {died[0]}")
    found = read(config.out, config.storage)
    write_reports(found, config.out)
    left = trials_wanted(config) - sum(tried.state != "running" for tried in found.tried)
    if died and left:
        raise TrainingError(
            f"{died[0]}; {left} trial{'s are' if left > 1 else ' is'} left, which the same command goes on with"
        )
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
