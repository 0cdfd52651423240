"""Callbacks of a run, which can also end it: `Callback` to derive from, and `EarlyStopping`.

    class Printer(Callback):
        def on_step(self, metrics):
            print(metrics["step"], metrics["loss"])

A callback that returns False or calls `stop()` ends the run after that step: the best step so far is saved as the result,
as at the end of a run that took all of its steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from graftlm.errors import ConfigError


class Callback:
    """Called during a run. Override what you need; returning False, or calling `stop`, ends the run after the current step."""

    stop_reason: str | None = None
    """Why it asked the run to stop; None while it did not."""

    def stop(self, reason: str = "") -> None:
        """End the run after the current step, with its result saved; `reason` stands in the summary."""
        self.stop_reason = f"{type(self).__name__}: {reason}" if reason else type(self).__name__

    def on_step(self, metrics: Mapping[str, Any]) -> bool | None:
        """After an optimizer step: its line of metrics.jsonl.

        `step`, `loss` (nats a target token, before the update), `learning_rate`, `grad_norm`, `tokens`, `target_tokens`,
        `seconds`, `num_tokens` (since the first step), `epoch`.
        """

    def on_evaluate(self, metrics: Mapping[str, Any]) -> bool | None:
        """After an evaluation: `step` (0 before the first), `eval_loss` (nats a target token), `eval_examples`, `epoch`,
        with a score `eval_score` (higher is better), and `best`, whether no later step than 0 was better."""

    def on_save(self, folder: Path) -> bool | None:
        """After a checkpoint was written to `folder`."""

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """After the result was saved: the run's summary. Not called for a run that is interrupted or fails."""


class EarlyStopping(Callback):
    """Ends a run whose eval loss has not fallen by more than `min_delta` nats for `patience` evaluations in a row.

    If the best step is chosen by the score (`best_by`), it watches the score instead, which has to rise.
    """

    def __init__(self, patience: int = 3, min_delta: float = 0.0) -> None:
        """Raises ConfigError for a patience below 1 or a negative min_delta."""
        if patience < 1:
            raise ConfigError(f"early-stopping waits for {patience} evaluations; take at least 1")
        if min_delta < 0:
            raise ConfigError(f"min_delta is {min_delta:g}; take 0 or more")
        self.patience, self.min_delta = patience, min_delta
        self.begin()

    def begin(self, evaluations: Sequence[tuple[int, float]] = (), best_by: Literal["loss", "score"] = "loss") -> None:
        """Forget an earlier run, and watch `best_by`.

        `evaluations`, (step, loss or score), are those of a run that goes on from a checkpoint.
        """
        self.stop_reason = None
        self._best_by, self._sign = best_by, 1 if best_by == "loss" else -1
        self._best, self._waited = float("inf"), 0  # of the loss, or of the negated score
        for step, value in evaluations:
            self._observe(step, value)

    def on_evaluate(self, metrics: Mapping[str, Any]) -> None:
        self._observe(int(metrics["step"]), float(metrics[f"eval_{self._best_by}"]))

    def _observe(self, step: int, value: float) -> None:
        value *= self._sign
        if value < self._best - self.min_delta:
            self._best, self._waited = value, 0
            return
        self._waited += 1
        if self._waited >= self.patience:
            best = f"below {self._best:.4f}" if self._best_by == "loss" else f"above {-self._best:.4g}"
            self.stop(f"eval {self._best_by} not {best} in {self._waited} evaluations, the last after step {step}")


class Callbacks:
    """Several callbacks of one run, called in order."""

    callbacks: tuple[Callback, ...]

    def __init__(self, callbacks: Sequence[Any]) -> None:
        """Raises ConfigError for anything that is not a Callback."""
        for callback in callbacks:
            if not isinstance(callback, Callback):
                hint = "; give an instance of it" if isinstance(callback, type) else ""
                raise ConfigError(f"a callback is an instance of graft.Callback, found {callback!r:.80}{hint}")
        self.callbacks = tuple(callbacks)

    def begin(self, evaluations: Sequence[tuple[int, float]], best_by: Literal["loss", "score"] = "loss") -> None:
        """A run begins, or goes on after these evaluations, (step, loss or score); `best_by` chooses its best step."""
        for callback in self.callbacks:
            callback.stop_reason = None
            if isinstance(callback, EarlyStopping):
                callback.begin(evaluations, best_by)

    def step(self, metrics: Mapping[str, Any]) -> None:
        for callback in self.callbacks:
            _stop_if_false(callback, callback.on_step(metrics))

    def evaluate(self, metrics: Mapping[str, Any]) -> None:
        for callback in self.callbacks:
            _stop_if_false(callback, callback.on_evaluate(metrics))

    def save(self, folder: Path) -> None:
        for callback in self.callbacks:
            _stop_if_false(callback, callback.on_save(folder))

    def end(self, summary: Mapping[str, Any]) -> None:
        for callback in self.callbacks:
            callback.on_end(summary)

    @property
    def stop_reason(self) -> str | None:
        """The reason of the first of them that asked the run to stop."""
        return next((c.stop_reason for c in self.callbacks if c.stop_reason is not None), None)


def _stop_if_false(callback: Callback, answer: bool | None) -> None:
    if answer is False and callback.stop_reason is None:
        callback.stop()
