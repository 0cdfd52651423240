"""What is heard and kept of a run while it goes on: metrics, trackers, checkpoints, the progress bar, and signals."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from graftlm.config import TrainConfig
from graftlm.errors import ScoreError, TrainingError
from graftlm.training import checkpoint
from graftlm.training.callbacks import Callback, Callbacks
from graftlm.training.resume import RunIdentity
from graftlm.training.run_folder import MetricsFile, writing
from graftlm.training.trackers import Tracker
from graftlm.training.trainer import StepResult, TrainerCallback
from graftlm.training.trial import Evaluation, Trial
from graftlm.training.view import View


class Recorder(TrainerCallback):
    """Hears the loop and writes. Raises RunError where it cannot."""

    def __init__(
        self, config: TrainConfig, trial: Trial, identity: RunIdentity, view: View, metrics: MetricsFile,
        trackers: Sequence[Tracker], callbacks: Sequence[Callback] = (),
    ) -> None:  # fmt: skip
        self.config, self.trial, self.identity = config, trial, identity
        self.view, self.metrics, self.trackers = view, metrics, trackers
        self.callbacks = Callbacks(callbacks)
        self.callbacks.begin(trial.watched, trial.best_by)
        self.stopped: int | None = None
        self.tokens, self.seconds = 0, 0.0
        self.loss: float | None = None
        self._improved = False
        self._saved = -1
        self._notes = 0

    def stepped(self, trial: Trial, result: StepResult) -> None:
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
        self.view.stepped(trial, result)
        for note in trial.notes[self._notes :]:
            self.view.note(note)
        self._notes = len(trial.notes)
        self.callbacks.step({"step": result.step, "kind": "train", **values})

    def evaluated(self, trial: Trial, evaluation: Evaluation, best: bool) -> None:
        scores = _scores(trial, evaluation)
        values = {"eval_loss": evaluation.loss, **scores, "eval_examples": len(evaluation.rows), **_progress(trial)}
        self._write({"step": evaluation.step, "kind": "eval", **values})
        for tracker in self.trackers:
            named = {name.replace("eval_", "eval/", 1): value for name, value in scores.items()}
            tracker.log(evaluation.step, {"eval/loss": evaluation.loss, **named})
        self._improved = best and evaluation.step > 0
        self.view.evaluated(trial, evaluation, best)
        self.callbacks.evaluate({"step": evaluation.step, "kind": "eval", **values, "best": best})

    def failed(self, trial: Trial, error: TrainingError) -> None:
        """What somebody else's scoring function does takes no step away: the run can go on from here."""
        if isinstance(error, ScoreError) and trial.step:
            self.save()
        raise error

    def settled(self, trials: Sequence[Trial]) -> bool:
        self.save_due()
        if self.stopped is not None and not self.trial.done:
            self.event("stopped", signal=self.stopped)
            return False
        reason = self.callbacks.stop_reason
        if reason is not None and not self.trial.done:
            self.event("ended", reason=reason)
            self.view.note(f"ending after step {self.trial.step}: {reason}")
            self.trial.stop_reason = reason
        self.stopped = None
        return True

    def save_due(self) -> None:
        """Save what is due; a best step in the middle needs a checkpoint, one at the end becomes the result."""
        due = self.config.save_every is not None and self.trial.step % self.config.save_every == 0
        if (due or self._improved) and not self.trial.done:
            self.save()
        self._improved = False

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        if self._saved != self.trial.step:
            with writing(self.config.out):
                checkpoint.save(self.config.out, self.trial, self.identity.to_json(), self.config.keep_checkpoints)
            self._saved = self.trial.step
            self.callbacks.save(self.config.out / "checkpoints" / f"{self.trial.step:06d}")

    def event(self, name: str, **values: Any) -> None:
        """A line in the metrics that is neither a step nor an evaluation."""
        self._write({"step": self.trial.step, "kind": "event", "event": name, **values})

    def stopping(self) -> str:
        """What somebody who asks the run to stop is told."""
        return "saving the result first" if self.trial.done else "stopping after this step"

    def close(self) -> None:
        """Nothing more will be heard."""
        self.metrics.close()
        for tracker in self.trackers:
            tracker.close()
        self.trackers = ()

    def _write(self, line: dict[str, Any]) -> None:
        with writing(self.config.out):
            self.metrics.write(line)


def _scores(trial: Trial, evaluation: Evaluation) -> dict[str, float]:
    """`eval_score`, and the same under its own name: `eval_exact_match`."""
    if evaluation.score is None or trial.scorer is None:
        return {}
    key = trial.scorer.score.key
    taken = key in ("eval_", "eval_loss", "eval_examples")  # a function of one's own may be called anything
    return {"eval_score": evaluation.score, **({} if taken else {key: evaluation.score})}


def _progress(trial: Trial) -> dict[str, float]:
    """How far a trial is: tokens read since its first step, and epochs."""
    return {"num_tokens": trial.tokens, "epoch": round(trial.sampler.epoch(trial.step), 6)}


class Stoppable(Protocol):
    """What may be asked to stop."""

    stopped: int | None
    """The signal that asked; to be heeded after the step."""

    def stopping(self) -> str: ...


@contextmanager
def signals(asked: Stoppable, say: Callable[[str], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run after the current step, or once its result is saved; a second Ctrl-C at once."""

    def ask(number: int, frame: Any) -> None:
        if asked.stopped is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.stopped = number
        say(asked.stopping() + ("; once more to stop at once" if number == signal.SIGINT else ""))

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    except ValueError:
        pass  # not the main thread: signals are somebody else's
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
