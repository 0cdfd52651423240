"""`graft train` over several ranks: starts them on this machine, or is one of those that torchrun started.

    graft train --ranks 2 ...                              torch's elastic agent starts two of `rank_main.py`
    torchrun --nproc-per-node 2 -m graftlm.cli train ...   torchrun has started this process, so it joins the others

Each rank ends with a file in a folder that the parent reads: its result, the error that all ranks met, or its own.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from graftlm import errors
from graftlm.base.loading import default_device
from graftlm.commands.train import train
from graftlm.config import TrainConfig
from graftlm.distributed.group import Ranks, joined, launched, lost_others
from graftlm.distributed.shard import SPLITS, can_split
from graftlm.errors import ConfigError, GraftError, RunError, Stopped, TrainingError
from graftlm.files import write_json
from graftlm.jsonfile import read_json
from graftlm.training import checkpoint
from graftlm.training.run_files import SUMMARY
from graftlm.training.view import View

ENDED = "ended-{}.json"
_SAVING_SECONDS = 600
"""How long the ranks of a run that is stopped may take for their step and a checkpoint."""


def train_over_ranks(config: TrainConfig) -> dict[str, Any]:
    """Train over as many ranks as the config asks for, or torchrun has started; returns the summary, empty on ranks but the
    first. Raises as `train`, and TrainingError for a rank that died."""
    if config.layout == "shard" and not can_split():
        raise ConfigError(
            f"--layout shard needs PyTorch {'.'.join(map(str, SPLITS))} or newer, found {torch.__version__}; install it, or "
            "take --layout replicate"
        )
    there = launched()
    if there > 1:
        return _among_others(started_for(config, there))
    if config.ranks == 1:
        if config.layout == "shard":
            raise ConfigError(
                "--layout shard splits a model over ranks, and there is one; give --ranks N, or leave it out"
            )
        return train(config)
    with tempfile.TemporaryDirectory(prefix="graft-ranks-") as place:
        return _launch(config, Path(place))


def _among_others(config: TrainConfig) -> dict[str, Any]:
    """Train as one of torchrun's ranks. What ends all of them, the first one says; the others leave without a word."""

    def tell(message: str) -> None:
        sys.stderr.write(f"{TrainingError.__name__}: {message}\n")
        sys.stderr.flush()

    try:
        return train_as_rank(config, tell)
    except (GraftError, Stopped) as error:
        if os.environ["RANK"] == "0" or (isinstance(error, GraftError) and not error.everywhere):
            raise
        raise SystemExit(128 + error.signal_number if isinstance(error, Stopped) else 2) from None


def started_for(config: TrainConfig, ranks: int) -> TrainConfig:
    """The config of a run that a launcher has started. Raises ConfigError where it asks for another number of ranks."""
    if config.ranks not in (1, ranks):
        raise ConfigError(
            f"--ranks {config.ranks} inside a launcher that has started {ranks}; leave --ranks out, or start {config.ranks}"
        )
    return TrainConfig.build({**config.to_json(), "ranks": ranks})


def train_as_rank(config: TrainConfig, tell: Callable[[str], None]) -> dict[str, Any]:
    """Train as one of the ranks that were started; returns the summary, empty on ranks but the first.

    Raises as `train`. An error of this rank alone has its number in front. A rank that hangs ends this process: `tell` is
    called with the reason, on one of the ranks.
    """

    def ended(reason: str) -> None:
        tell(f"{reason}; every rank was ended. {_GO_ON}, or give a longer --rank-timeout")

    with joined(ended, config.rank_timeout) as ranks, naming(ranks):
        return train(_of_rank(config, ranks), View(quiet=not ranks.first), ranks=ranks)


@contextmanager
def naming(ranks: Ranks) -> Iterator[None]:
    """Put the rank's number in front of an error that it alone met; say that it lost the others, where that is what it met."""
    try:
        yield
    except GraftError as error:
        if isinstance(error, TrainingError) and not error.alone:  # follows from what all ranks know
            error.everywhere = True
        if error.everywhere:
            raise
        raise type(error)(f"rank {ranks.rank} of {ranks.size}: {error}") from error
    except RuntimeError as error:
        if not lost_others(error):
            raise
        said = next(iter(str(error).splitlines()), type(error).__name__)[:160]
        lost = TrainingError(f"rank {ranks.rank} of {ranks.size} has lost the others ({said}). {_GO_ON}")
        lost.everywhere = lost.lost = True  # the one that is gone has the reason
        raise lost from None


def _of_rank(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """The config with the rank's own GPU; on a processor, which the ranks share, each takes its part of the threads."""
    device = default_device(config.device)
    if device.type == "cpu":
        ranks.take_threads()
        return config
    own = f"{device.type}:{os.environ.get('LOCAL_RANK', '0')}"
    return config.model_copy(update={"device": str(default_device(own))})  # one GPU is refused from a user alone


def _launch(config: TrainConfig, place: Path) -> dict[str, Any]:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # what a rank ended with is said below
    write_json(place / "config.json", config.to_json())
    settings = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=config.ranks, max_restarts=0, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", local_addr="localhost", logs_specs=DefaultLogsSpecs(log_dir=str(place)),
        shutdown_timeout=_SAVING_SECONDS,
    )  # fmt: skip
    try:
        elastic_launch(settings, sys.executable)("-m", "graftlm.commands.rank_main", str(place))
    except ChildFailedError as error:
        raise _why(error.failures, config, place) from None
    except SignalException as error:
        number = int(error.sigval)
        raise Stopped(number, f"stopped; {checkpoint.describe_newest(config.out)}. {_GO_ON}") from None
    ended = read_json(place / ENDED.format(0), RunError)
    if "stopped" in ended:
        raise Stopped(ended["stopped"], ended["error"])
    if "error" in ended:
        raise getattr(errors, ended["kind"])(ended["error"])
    return read_json(config.out / SUMMARY, RunError)


_GO_ON = "Go on with the same command and --resume"


def _why(failures: dict[int, Any], config: TrainConfig, place: Path) -> GraftError:
    """What the first rank that failed has said, or how it ended."""
    for rank in range(config.ranks):
        file = place / ENDED.format(rank)
        if file.is_file() and (ended := read_json(file, RunError)).get("own"):
            return getattr(errors, ended["kind"])(ended["error"])
    rank, failure = min(failures.items(), key=lambda item: item[1].timestamp)
    code = failure.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return TrainingError(
        f"rank {rank} of {config.ranks} {how}, and the others with it; {checkpoint.describe_newest(config.out)}. {_GO_ON}"
    )
