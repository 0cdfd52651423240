"""What the forks of `forked.py` do, each as one rank: arguments and results are JSON."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from graftlm import files
from graftlm.commands.ranks import naming
from graftlm.commands.train import train
from graftlm.config import TrainConfig
from graftlm.distributed import group, watch
from graftlm.distributed.group import Ranks
from graftlm.distributed.pulse import Pulse
from graftlm.errors import DataError
from graftlm.training import checkpoint, trainer
from graftlm.training.trainer import StepResult
from graftlm.training.trial import Trial
from graftlm.training.view import View

group._SEEN_WITHIN = 1.0  # pyright: ignore[reportPrivateUsage]


def run(
    ranks: Ranks, config: dict[str, Any], stop_after: int | None = None, other: dict[str, Any] | None = None,
    fault: dict[str, Any] | None = None,
) -> Any:  # fmt: skip
    """A training run. The last rank gets a SIGTERM after a step, or has `other` options, where these are given; with a `fault`,
    the ranks are watched."""
    if fault is not None:
        ranks = replace(ranks, pulse=Pulse(5))
        with naming(ranks), _watched(ranks, Path(config["out"]).parent / "watch"):
            if ranks.rank == fault["rank"]:
                FAULTS[fault["kind"]](fault["step"])
            return run(ranks, config)
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


# ---- faults of one rank ----------------------------------------------------------------------------------------------


@contextmanager
def _watched(ranks: Ranks, file: Path) -> Iterator[None]:
    def tell(message: str) -> None:
        Path(os.environ["RANK_ENDED"]).write_text(json.dumps({"kind": "watch", "told": message}))

    watch.PERIOD = 0.1
    with watch.watched(ranks.pulse, ranks.rank, ranks.size, dist.FileStore(str(file), ranks.size), tell):
        yield


def _hang(step: int) -> None:
    _before_step(step, lambda: time.sleep(1000))


def _freeze(step: int) -> None:
    _before_step(step, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def _before_step(step: int, do: Any) -> None:
    taken = trainer.optimizer_step

    def with_fault(base: Any, trials: Any, *given: Any) -> list[StepResult | None]:
        if trials[0].step + 1 == step:
            do()
        return taken(base, trials, *given)

    trainer.optimizer_step = with_fault


def _killed_while_saving(step: int) -> None:
    _when_written(step, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _full_disk(step: int) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _when_written(step, full)


def _when_written(step: int, do: Any) -> None:
    """When the tensors of a step's checkpoint are written, and its manifest is not."""
    save, sha256 = checkpoint.save, files.sha256

    def at_the_manifest(path: Path) -> str:
        files.sha256 = sha256
        do()
        return sha256(path)

    def saving(out: Path, trial: Trial, *given: Any) -> Any:
        if trial.step == step:
            files.sha256 = at_the_manifest
        return save(out, trial, *given)

    checkpoint.save = saving


FAULTS = {"hang": _hang, "freeze": _freeze, "killed while saving": _killed_while_saving, "full disk": _full_disk}
