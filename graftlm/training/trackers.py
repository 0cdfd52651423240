"""Sending metrics to TensorBoard, Weights & Biases or MLflow as well; each is asked for by name, imported only then."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from graftlm.errors import ConfigError


class Tracker(Protocol):
    """Takes numbers by name at a step."""

    def log(self, step: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, out: Path, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"))
        self.writer.add_text("config", "\n".join(f"    {k}: {v}" for k, v in config.items()))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, out: Path, config: dict[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self.run: Any = wandb.init(project="graft", name=out.name, dir=str(out), config=config)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class _MLflow:
    def __init__(self, out: Path, config: dict[str, Any]) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]

        self.mlflow: Any = mlflow
        mlflow.start_run(run_name=out.name)
        mlflow.log_params(config)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.mlflow.log_metrics({name.replace("/", "."): value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


def check_trackers(names: Sequence[str]) -> None:
    """ConfigError with the install command for a tracker whose package is not there; imports nothing."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"--track {name} needs its package: pip install {name}")


_KNOWN = {"tensorboard": _TensorBoard, "wandb": _WandB, "mlflow": _MLflow}


def open_trackers(names: Sequence[str], out: Path, config: dict[str, Any]) -> list[Tracker]:
    """The asked trackers, each of them `check_trackers` has found."""
    return [_KNOWN[name](out, config) for name in names]
