"""A session: one trial with its run folder, from what is trained to what is saved.

    Session(...)        the trial over its examples, with the adapter that is in its slot, or the base's own weights
    session.resume_from_checkpoint(...)  its identity; the newest checkpoint, where the config asks for it
    session.begin(...)  write what the run is, open its metrics
    session.finish()    put the best step back and save it
    session.close()     end the metrics; the adapter leaves its slot

`graft train` holds one, a sweep many on one base. Which folder it is and whose (`locked`) is the caller's, as is the loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftlm.adapters.attach import Adapter, detach
from graftlm.base.chat import Encoder
from graftlm.base.loading import Base
from graftlm.config import TrainConfig
from graftlm.data.dataset import Dataset
from graftlm.files import write_json
from graftlm.training.callbacks import Callback
from graftlm.training.logging import Recorder
from graftlm.training.prepare import make_trial
from graftlm.training.result import about, finish, save_so_far
from graftlm.training.resume import RunIdentity, identify, resume_from_checkpoint
from graftlm.training.run_folder import SUMMARY, MetricsFile, environment, writing
from graftlm.training.trackers import open_trackers
from graftlm.training.trial import Trial
from graftlm.training.view import View


@dataclass(frozen=True, eq=False)
class TrainingData:
    """What is trained on and measured by."""

    encoder: Encoder
    dataset: Dataset
    eval_dataset: Dataset | None


class Session:
    """One trial and its run folder."""

    identity: RunIdentity
    recorder: Recorder

    def __init__(
        self,
        config: TrainConfig,
        base: Base,
        adapter: Adapter | None,
        training_data: TrainingData,
        view: View,
        *,
        slot: int,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """`adapter` is attached in `slot`; None for full training, in slot 0. Raises ConfigError."""
        assert (adapter is None) == (slot == 0)
        self.config, self.base, self.adapter, self.training_data, self.view = config, base, adapter, training_data, view
        self.callbacks = callbacks
        self.trial: Trial = make_trial(base, config, adapter, slot, training_data.dataset, training_data.eval_dataset)
        self._open = True

    def resume_from_checkpoint(self, micro_batch_tokens: int) -> None:
        """Say what this run is by content, and where the config says so go on from its newest checkpoint.

        Raises RunError for a checkpoint of another run, or where there are some and none is whole.
        """
        self.resolved = resolve(self.config, self.base, self.trial, micro_batch_tokens)
        training_data = self.training_data
        self.identity = identify(
            self.resolved, self.base, self.adapter, training_data.dataset, training_data.eval_dataset
        )
        self.resumed = self.config.resume and resume_from_checkpoint(self.config, self.trial, self.identity, self.view)

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Write what this run is, `plan` with it, and open its metrics. Raises RunError."""
        config, out, step = self.config, self.config.out, self.trial.step
        self.plan = dict(plan)
        self.facts = about(
            config, self.base, self.training_data.encoder, self.training_data.dataset, self.training_data.eval_dataset
        )
        with writing(out):
            write_json(out / "config.json", self.resolved)
            write_json(out / "environment.json", environment())
            write_json(out / "data.json", self.facts["data"])
            write_json(out / "plan.json", self.plan)
            metrics = MetricsFile(out / "metrics.jsonl", step if self.resumed else None)
            for change in self.identity.changes if self.resumed else ():
                if change["step"] == step:
                    metrics.write({"step": step, "kind": "event", "event": "changed", **change})
            trackers = open_trackers(config.track, out, self.resolved)
        self.recorder = Recorder(config, self.trial, self.identity, self.view, metrics, trackers, self.callbacks)

    def finish(self) -> dict[str, Any]:
        """Save the best step; returns what the run was and did. Raises RunError where it cannot be written."""
        with writing(self.config.out):
            summary = self._summary(finish(*self._result()))
            write_json(self.config.out / SUMMARY, summary)
        return summary

    def save_so_far(self) -> dict[str, Any]:
        """Save the best step of a run that is interrupted after its checkpoint; returns what it was and did until here.

        The trial then holds the best step, so nothing goes on with it. Raises RunError.
        """
        with writing(self.config.out):
            summary = self._summary(save_so_far(*self._result()))
            write_json(self.config.out / SUMMARY, summary)
        return summary

    def _result(self) -> tuple[TrainConfig, Base, Adapter | None, Trial, Encoder, dict[str, Any], RunIdentity, View]:
        encoder = self.training_data.encoder
        return self.config, self.base, self.adapter, self.trial, encoder, self.facts, self.identity, self.view

    def _summary(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        config, base, trial, recorder = self.config, self.base, self.trial, self.recorder
        return {
            "out": str(config.out),
            **saved,
            "method": config.method,
            "model": config.model,
            "trainable_parameters": sum(p.numel() for p in trial.parameters.values()),
            "base_parameters": base.parameters,
            "base_precision": base.precision,
            "base_bytes": base.bytes,
            "compute_dtype": base.compute_dtype,
            "packed": base.packs,
            "steps": trial.step,
            "num_tokens": trial.tokens,
            "target_tokens": trial.target_tokens,
            "tokens_per_second": recorder.tokens / recorder.seconds if recorder.seconds else None,
            "train_loss": recorder.loss,
            "eval_loss_before": trial.first.loss if trial.first else None,
            "eval_loss_after": trial.best.loss if trial.best else None,
            "score": config.score,
            "eval_score_before": trial.first.score if trial.first else None,
            "eval_score_after": trial.best.score if trial.best else None,
            "stop_reason": trial.stop_reason,
        }

    def measured(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, and what was measured beside what was planned. Raises RunError."""
        keys = ("base_bytes", "peak_memory_bytes", "idle_memory_bytes", "tokens_per_second")
        with writing(self.config.out):
            write_json(self.config.out / SUMMARY, dict(summary))
            write_json(self.config.out / "plan.json", {**self.plan, "measured": {key: summary[key] for key in keys}})

    def close(self) -> None:
        """End the metrics and free the adapter's slot; a second call does nothing."""
        if not self._open:
            return
        self._open = False
        if hasattr(self, "recorder"):
            self.recorder.close()
        if self.adapter is not None:
            detach(self.base, self.trial.slot)


def resolve(config: TrainConfig, base: Base, trial: Trial, micro_batch_tokens: int) -> dict[str, Any]:
    """Every option with what its default came to; a file of these is the same run again."""
    full = config.method == "full"
    return {
        **config.to_json(),
        "base_precision": base.precision,
        "compute_dtype": base.compute_dtype,
        "device": str(base.device),
        "save_precision": (config.save_precision or base.precision) if full else None,
        "max_length": config.max_length or base.structure.max_positions or None,
        "alpha": None if full or config.from_adapter is not None else config.scale_numerator,
        "learning_rate": config.peak_learning_rate,
        "epochs": None if config.steps is not None else config.epochs or 1.0,
        "micro_batch_tokens": micro_batch_tokens,
        "eval_every": trial.eval_every if trial.eval_examples else None,
        "resume": False,
        "allow_change": [],
    }
