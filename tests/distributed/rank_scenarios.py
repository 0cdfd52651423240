"""What the forks of `forked.py` do, each as one rank: arguments and results are JSON."""

from __future__ import annotations

import os
import signal
from typing import Any

from graftlm.commands.train import train
from graftlm.config import TrainConfig
from graftlm.distributed.group import Ranks
from graftlm.errors import DataError
from graftlm.training import trainer
from graftlm.training.trainer import StepResult
from graftlm.training.view import View


def run(
    ranks: Ranks, config: dict[str, Any], stop_after: int | None = None, other: dict[str, Any] | None = None
) -> Any:
    """A training run. The last rank gets a SIGTERM after a step, or has `other` options, where these are given."""
    last = ranks.rank == ranks.size - 1
    if stop_after is not None and last:
        _signal_after(stop_after)
    given = {**config, **(other or {})} if last else config
    return train(TrainConfig.build({**given, "ranks": ranks.size}), View(quiet=True), ranks=ranks)


def one_fails(ranks: Ranks) -> None:
    """An error of the second rank alone, in the set-up."""
    with ranks.agreeing():
        if ranks.rank == 1:
            raise DataError("a file is gone")


def _signal_after(step: int) -> None:
    """In this process alone: a SIGTERM once a step was taken."""
    taken = trainer.optimizer_step

    def step_and_signal(*given: Any) -> list[StepResult | None]:
        results = taken(*given)
        if results[0] is not None and results[0].step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return results

    trainer.optimizer_step = step_and_signal
