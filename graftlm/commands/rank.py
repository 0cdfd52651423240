"""One rank of a training: joins the others, takes its own GPU and trains; what ends it is said once.

`ranks.py` starts ranks, in processes of `rank_main.py`, or is one of those that torchrun started.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from graftlm.base.loading import default_device
from graftlm.commands.ranks import GO_ON
from graftlm.commands.train import train
from graftlm.config import TrainConfig
from graftlm.distributed.group import Ranks, joined, lost_others
from graftlm.errors import GraftError, Stopped, TrainingError
from graftlm.training.view import View


def among_others(config: TrainConfig) -> dict[str, Any]:
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


def train_as_rank(config: TrainConfig, tell: Callable[[str], None]) -> dict[str, Any]:
    """Train as one of the ranks that were started; returns the summary, empty on ranks but the first.

    Raises as `train`. An error of this rank alone has its number in front. A rank that hangs ends this process: `tell` is
    called with the reason, on one of the ranks.
    """

    def ended(reason: str) -> None:
        tell(f"{reason}; every rank was ended. {GO_ON}, or give a longer --rank-timeout")

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
        lost = TrainingError(f"rank {ranks.rank} of {ranks.size} has lost the others ({said}). {GO_ON}")
        lost.everywhere = lost.lost = True  # the one that is gone has the reason
        raise lost from None


def _of_rank(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """The config with the rank's own GPU. Each takes its part of the processor's threads, which the ranks on a machine share:
    with a GPU too, for the steps of weights in the host's memory."""
    device = default_device(config.device)
    ranks.take_threads()
    if device.type == "cpu":
        return config
    own = f"{device.type}:{os.environ.get('LOCAL_RANK', '0')}"
    return config.model_copy(update={"device": str(default_device(own))})  # one GPU is refused from a user alone
