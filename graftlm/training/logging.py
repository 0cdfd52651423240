"""What is logged and saved of a run while it goes on: metrics, trackers, checkpoints, the progress bar, and signals.

Trackers (TensorBoard, Weights & Biases, MLflow) are imported only where `--track` names them.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from graftlm.config import TrainConfig
from graftlm.distributed.group import ALONE, Ranks
from graftlm.errors import ConfigError, ScoreError, TrainingError
from graftlm.training import checkpoint
from graftlm.training.callbacks import Callback, Callbacks
from graftlm.training.checkpoint import RunIdentity
from graftlm.training.run_files import MetricsFile
from graftlm.training.run_folder import writing
from graftlm.training.trainer import StepResult, TrainerCallback
from graftlm.training.trial import Evaluation, Trial
from graftlm.training.view import View


class Recorder(TrainerCallback):
    """Writes what the loop reports of one trial. Raises RunError where it cannot."""

    def __init__(
        self, config: TrainConfig, trial: Trial, identity: RunIdentity, view: View, metrics: MetricsFile,
        trackers: Sequence[Tracker], callbacks: Sequence[Callback] = (), ranks: Ranks = ALONE,
        *, samples: MetricsFile | None = None,
    ) -> None:  # fmt: skip
        self.config, self.trial, self.identity = config, trial, identity
        self.view, self.metrics, self.samples, self.trackers = view, metrics, samples, trackers
        self.callbacks = Callbacks(callbacks)
        self.callbacks.begin(trial.watched, trial.best_by)
        self.ranks = ranks
        self.stopped: int | None = None
        self.tokens, self.seconds = 0, 0.0
        self.loss: float | None = None
        self._improved = False
        self._saved = -1
        self._notes = 0

    def on_step_end(self, trial: Trial, result: StepResult) -> None:
        self.tokens += result.tokens
        self.seconds += result.seconds
        self.loss = result.loss
        values = {
            "loss": result.loss, "learning_rate": result.learning_rate, "grad_norm": result.grad_norm,
            "tokens": result.tokens, "target_tokens": result.target_tokens, "seconds": result.seconds, **_progress(trial),
        }  # fmt: skip
        self._write({"step": result.step, "kind": "train", **values})
        for tracker in self.trackers:
            tracker.log(result.step, {f"train/{name}": float(value) for name, value in values.items()})
        self.view.on_step_end(trial, result)
        for note in trial.warnings[self._notes :]:
            self.view.note(note)
        self._notes = len(trial.warnings)
        self.callbacks.step({"step": result.step, "kind": "train", **values})

    def on_evaluate(self, trial: Trial, evaluation: Evaluation, best: bool) -> None:
        scores = _scores(trial, evaluation)
        values = {
            "eval_loss": evaluation.loss,
            **scores,
            "eval_examples": len(evaluation.example_losses),
            **_progress(trial),
        }
        self._write({"step": evaluation.step, "kind": "eval", **values})
        if self.samples is not None and trial.scorer is not None:
            with writing(self.config.out):
                for sample in trial.scorer.samples:
                    self.samples.write({"step": evaluation.step, **sample})
        for tracker in self.trackers:
            named = {name.replace("eval_", "eval/", 1): value for name, value in scores.items()}
            tracker.log(evaluation.step, {"eval/loss": evaluation.loss, **named})
        self._improved = best and evaluation.step > 0
        self.view.on_evaluate(trial, evaluation, best)
        self.callbacks.evaluate({"step": evaluation.step, "kind": "eval", **values, "best": best})

    def on_failure(self, trial: Trial, error: TrainingError) -> None:
        """Save a checkpoint first if a score function failed: the steps taken are good, and the run can go on from here."""
        if isinstance(error, ScoreError) and trial.step:
            self.save()
        raise error

    def on_iteration_end(self, trials: Sequence[Trial]) -> bool:
        self.save_due()
        reason = self.callbacks.stop_reason
        self.stopped, _ = agreed_stop(self.ranks, self.stopped, reason)
        if self.stopped is not None and not self.trial.done:
            self.event("stopped", signal=self.stopped)
            return False
        if reason is not None and not self.trial.done:
            self.event("ended", reason=reason)
            self.view.note(f"ending after step {self.trial.step}: {reason}")
            self.trial.stop_reason = reason
        self.stopped = None
        return True

    def save_due(self) -> None:
        """Save what is due."""
        if _is_due(self.config, self.trial, self._improved):
            self.save()
        self._improved = False

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        if self._saved != self.trial.step:
            with writing(self.config.out):
                checkpoint.save(
                    self.config.out, self.trial, self.identity.to_json(), self.config.keep_checkpoints, self.ranks
                )
            self._saved = self.trial.step
            self.callbacks.save(self.config.out / "checkpoints" / f"{self.trial.step:06d}")

    def event(self, name: str, **values: Any) -> None:
        """A line in the metrics that is neither a step nor an evaluation."""
        self._write({"step": self.trial.step, "kind": "event", "event": name, **values})

    def stopping(self) -> str:
        """The answer to a signal that asks the run to stop."""
        return "saving the result first" if self.trial.done else "stopping after this step"

    def close(self) -> None:
        """Close the metrics and the trackers: nothing more follows."""
        self.metrics.close()
        if self.samples is not None:
            self.samples.close()
        for tracker in self.trackers:
            tracker.close()
        self.trackers = ()

    def _write(self, line: dict[str, Any]) -> None:
        with writing(self.config.out):
            self.metrics.write(line)


def _is_due(config: TrainConfig, trial: Trial, improved: bool) -> bool:
    """Whether to save: a best step in the middle needs a checkpoint, one at the end becomes the result."""
    due = config.save_every is not None and trial.step % config.save_every == 0
    return (due or improved) and not trial.done


class Follower(TrainerCallback):
    """Of every rank but the first: it writes its rows of what ranks share, no more, and stops when the first one does."""

    def __init__(self, config: TrainConfig, trial: Trial, ranks: Ranks) -> None:
        self.config, self.trial, self.ranks = config, trial, ranks
        self.stopped: int | None = None
        self._improved = False
        self._saved = -1

    def on_step_end(self, trial: Trial, result: StepResult) -> None: ...

    def on_evaluate(self, trial: Trial, evaluation: Evaluation, best: bool) -> None:
        self._improved = best and evaluation.step > 0

    def save(self) -> None:
        """Save with the first rank, unless that was done."""
        if self._saved != self.trial.step:
            checkpoint.save(self.config.out, self.trial, {}, self.config.keep_checkpoints, self.ranks)
            self._saved = self.trial.step

    def on_iteration_end(self, trials: Sequence[Trial]) -> bool:
        if _is_due(self.config, self.trial, self._improved):
            self.save()
        self._improved = False
        self.stopped, ended = agreed_stop(self.ranks, self.stopped, None)
        if self.stopped is not None and not self.trial.done:
            return False
        if ended and not self.trial.done:
            self.trial.stop_reason = "the first rank ended it"
        self.stopped = None
        return True

    def stopping(self) -> str:
        return f"rank {self.ranks.rank} of {self.ranks.size} was asked to stop: all stop after this step"


def agreed_stop(ranks: Ranks, stopped: int | None, reason: str | None) -> tuple[int | None, bool]:
    """The signal that any rank got, the same on all; and whether a callback of the first rank has a reason to end."""
    number, ended = ranks.largest([stopped or 0, reason is not None])
    return number or None, bool(ended)


def _scores(trial: Trial, evaluation: Evaluation) -> dict[str, float]:
    """`eval_score`, and the same under its own name: `eval_exact_match`."""
    if evaluation.score is None or trial.scorer is None:
        return {}
    key = trial.scorer.score.key
    taken = key in ("eval_", "eval_loss", "eval_examples")  # a function of the user may have any name
    return {"eval_score": evaluation.score, **({} if taken else {key: evaluation.score})}


def _progress(trial: Trial) -> dict[str, float]:
    """How far a trial is: tokens read since its first step, and epochs."""
    return {"num_tokens": trial.tokens, "epoch": round(trial.sampler.epoch(trial.step), 6)}


class Stoppable(Protocol):
    """What a signal can ask to stop."""

    stopped: int | None
    """The signal that asked; the run stops after the step."""

    def stopping(self) -> str: ...


@contextmanager
def signals(run: Stoppable, note: Callable[[str], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run after the current step, or once its result is saved; a second Ctrl-C at once."""

    def ask(number: int, frame: Any) -> None:
        if run.stopped is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.stopped = number
        note(run.stopping() + ("; once more to stop at once" if number == signal.SIGINT else ""))

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    except ValueError:
        pass  # not the main thread: signals belong to another
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- trackers --------------------------------------------------------------------------------------------------------


class Tracker(Protocol):
    """Receives numbers by name at a step."""

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
    """The asked trackers, each of which `check_trackers` has found."""
    return [_KNOWN[name](out, config) for name in names]
