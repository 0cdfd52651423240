"""`graft train` over several ranks: starts them on this machine, or is one of those that torchrun started.

    graft train --ranks 2 ...                              torch's elastic agent starts two of `rank_main.py`
    torchrun --nproc-per-node 2 -m graftlm.cli train ...   torchrun has started this process, so it joins the others

Each rank ends with a file in a folder that the parent reads: its result, the error that all ranks met, or its own. The parent
does not import what only ranks need, transformers above all: they start seconds sooner.
"""

from __future__ import annotations

import logging
import signal
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

from graftlm import errors
from graftlm.config import TrainConfig
from graftlm.errors import ConfigError, GraftError, RunError, Stopped, TrainingError
from graftlm.files import write_json
from graftlm.jsonfile import read_json

ENDED = "ended-{}.json"
GO_ON = "Go on with the same command and --resume"
_SAVING_SECONDS = 600
"""How long the ranks of a run that is stopped may take for their step and a checkpoint."""


def train_over_ranks(config: TrainConfig) -> dict[str, Any]:
    """Train over as many ranks as the config asks for, or torchrun has started; returns the summary, empty on ranks but the
    first. Raises as `train`, and TrainingError for a rank that died."""
    from graftlm.distributed.group import launched

    if config.splits_model:
        _check_torch(config.layout)
    there = launched()
    if there > 1:
        from graftlm.commands.rank import among_others

        return among_others(started_for(config, there))
    if config.ranks == 1:
        from graftlm.commands.train import train

        return train(config)
    if config.layout == "hybrid":
        raise ConfigError(
            f"--layout hybrid has the model once on each node, and --ranks {config.ranks} starts ranks on this one; take "
            "--layout shard, or start them on several nodes with torchrun --nnodes"
        )
    with tempfile.TemporaryDirectory(prefix="graft-ranks-") as place:
        return _launch(config, Path(place))


def _check_torch(layout: str) -> None:
    """Raise ConfigError where this PyTorch cannot split a model."""
    import torch

    from graftlm.distributed.shard import SPLITS, can_split

    if not can_split():
        raise ConfigError(
            f"--layout {layout} needs PyTorch {'.'.join(map(str, SPLITS))} or newer, found {torch.__version__}; install it, "
            "or take --layout replicate"
        )


def started_for(config: TrainConfig, ranks: int) -> TrainConfig:
    """The config of a run that a launcher has started. Raises ConfigError where it asks for another number of ranks."""
    if config.ranks not in (1, ranks):
        raise ConfigError(
            f"--ranks {config.ranks} inside a launcher that has started {ranks}; leave --ranks out, or start {config.ranks}"
        )
    return TrainConfig.build({**config.to_json(), "ranks": ranks})


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
        raise Stopped(number, f"stopped; {_newest(config)}. {GO_ON}") from None
    ended = read_json(place / ENDED.format(0), RunError)
    if "stopped" in ended:
        raise Stopped(ended["stopped"], ended["error"])
    if "error" in ended:
        raise getattr(errors, ended["kind"])(ended["error"])
    return ended["summary"]


def _why(failures: dict[int, Any], config: TrainConfig, place: Path) -> GraftError:
    """What the first rank that failed has said, or how it ended."""
    for rank in range(config.ranks):
        file = place / ENDED.format(rank)
        if file.is_file() and (ended := read_json(file, RunError)).get("own"):
            return getattr(errors, ended["kind"])(ended["error"])
    rank, failure = min(failures.items(), key=lambda item: item[1].timestamp)
    code = failure.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return TrainingError(f"rank {rank} of {config.ranks} {how}, and the others with it; {_newest(config)}. {GO_ON}")


def _newest(config: TrainConfig) -> str:
    from graftlm.training.checkpoint import describe_newest  # imports what ranks need: only where a run has failed

    return describe_newest(config.out)
