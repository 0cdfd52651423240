"""Hears the loop for all trials that are trained together, and fills the places of those that end.

    place 1   trial 0 ............ done | trial 4 ...        a place is a slot of the bank: the base's products run once for
    place 2   trial 1 .. pruned | trial 3 .......            all of them, each token adds its own trial's A and B
    place 3   trial 2 .................................

What a trial writes is its session's doing, the same as for `graft train`. A trial that cannot go on ends alone. What is being
trained when the sweep is stopped or killed keeps its checkpoint, and its place in the search.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.errors import Diverged, RunError, TrainingError
from graftlm.experiments.sweep.study import ClaimedTrial, Study
from graftlm.experiments.sweep.view import SweepView
from graftlm.files import write_json
from graftlm.jsonfile import read_json
from graftlm.planning.peak_memory import PeakMemory
from graftlm.training.run import Session
from graftlm.training.run_folder import LOCK
from graftlm.training.trainer import StepResult, TrainerCallback
from graftlm.training.trial import Evaluation, Trial

RESULT = "result.json"


@dataclass(eq=False)
class RunningTrial:
    """A trial in its place."""

    claim: ClaimedTrial
    session: Session


class TrialScheduler(TrainerCallback):
    """Trains whatever the search asks for, as many at once as there are places."""

    def __init__(
        self,
        study: Study,
        places: int,
        start: Callable[[ClaimedTrial, int], Session],
        memory: PeakMemory,
        view: SweepView,
    ) -> None:
        """`start(claim, slot)` makes a claim's session, ready to step. Slots are 1 to `places`."""
        self.study, self.start, self.memory, self.view = study, start, memory, view
        self.stopped: int | None = None
        self._places: dict[int, RunningTrial | None] = dict.fromkeys(range(1, places + 1))

    @property
    def running_trials(self) -> list[RunningTrial]:
        """What is being trained, by place."""
        return [one for one in self._places.values() if one is not None]

    # ---- what the loop says ----

    def on_step_end(self, trial: Trial, result: StepResult) -> None:
        self._at(trial).session.recorder.on_step_end(trial, result)
        self.view.on_step_end(trial, result)

    def on_evaluate(self, trial: Trial, evaluation: Evaluation, best: bool) -> None:
        one = self._at(trial)
        one.session.recorder.on_evaluate(trial, evaluation, best)
        if evaluation.step == 0:
            return
        examples = min(evaluation.step * trial.sampler.batch_size, trial.sampler.draws)
        if one.claim.report(examples, evaluation.loss) and not trial.complete:
            trial.stop_reason = (
                f"pruned after step {trial.step} of {trial.sampler.steps} at an eval loss of {evaluation.loss:.4f}"
            )

    def on_failure(self, trial: Trial, error: TrainingError) -> None:
        """A trial that diverged ends alone; anything else would meet the others too."""
        if not isinstance(error, Diverged):
            raise error

    def on_iteration_end(self, trials: Sequence[Trial]) -> bool:
        self._clear()
        for one in self.running_trials:
            one.session.recorder.save_due()
        if self.stopped is None:
            return True
        for one in self.running_trials:
            one.session.recorder.event("stopped", signal=self.stopped)
            one.session.recorder.save()
        return False

    def new_trials(self) -> Sequence[Trial]:
        """Fill the free places: with trials that lost their worker first, then with new ones."""
        self._clear()
        joined: list[Trial] = []
        for slot in [slot for slot, one in self._places.items() if one is None]:
            while self._places[slot] is None:
                claim = self.study.next()
                if claim is None:
                    return joined
                if not _told_already(claim):
                    joined += self._seat(claim, slot)
        return joined

    def stopping(self) -> str:
        """What somebody who asks the sweep to stop is told."""
        return "stopping after this step; what is being trained keeps its checkpoint"

    # ---- places ----

    def _at(self, trial: Trial) -> RunningTrial:
        one = self._places[trial.slot]
        assert one is not None
        assert one.session.trial is trial
        return one

    def _seat(self, claim: ClaimedTrial, slot: int) -> list[Trial]:
        try:
            session = self.start(claim, slot)
        except BaseException:
            claim.release()
            raise
        self._places[slot] = RunningTrial(claim, session)
        self.view.began(claim, session.trial)
        self._clear()  # it may have been killed between its last step and its result
        return [] if session.trial.done else [session.trial]

    def _clear(self) -> None:
        """End the trials that take no further step."""
        for one in self.running_trials:
            if one.session.trial.done:
                self._end(one)

    def _end(self, one: RunningTrial) -> None:
        """Save what a trial has come to, tell the search, and clear its place."""
        claim, session, trial = one.claim, one.session, one.session.trial
        facts: dict[str, Any] = {
            "folder": str(claim.folder), "steps": trial.step, "tokens": trial.tokens, "seconds": session.recorder.seconds,
            "loss_before": trial.first.loss if trial.first else None,
        }  # fmt: skip
        if trial.stop_reason is None:
            measured = {"peak_memory_bytes": self.memory.bytes, "idle_memory_bytes": self.memory.start}
            summary = {**session.finish(), **measured}  # memory is that of all that were trained together
            session.write_measured(summary)
            loss = float(summary["eval_loss_after"])
            told = {**facts, "digest": summary["adapter_digest"], "bytes": summary["saved_bytes"]}
            write_json(claim.folder / RESULT, {"state": "complete", "loss": loss, "facts": told, "summary": summary})
            claim.tell("complete", loss, **told)
        else:
            pruned = trial.stop_reason.startswith("pruned")
            session.recorder.event("pruned" if pruned else "failed", reason=trial.stop_reason)
            # A search should keep away from what diverges: to Optuna it is a trial that was ended early.
            write_json(claim.folder / RESULT, {"state": "pruned", "why": trial.stop_reason, "facts": facts})
            shutil.rmtree(claim.folder / "checkpoints", ignore_errors=True)
            claim.tell("pruned", why=trial.stop_reason, **facts)
        session.close()
        self._places[trial.slot] = None
        self.view.ended(claim, trial)

    def close(self) -> None:
        """Let go of every trial that is still being trained."""
        for one in self.running_trials:
            one.session.close()
            one.claim.release()


def _told_already(claim: ClaimedTrial) -> bool:
    """Tell of a trial whose worker was killed between its result and the telling; else make its folder ready."""
    if (claim.folder / RESULT).is_file():
        known = read_json(claim.folder / RESULT, RunError)
        why = {"why": known["why"]} if "why" in known else {}
        claim.tell(known["state"], known.get("loss"), **why, **known["facts"])
        return True
    if (claim.folder / "adapter").exists():  # saved, and its figures were not
        clear(claim.folder)
    return False


def clear(folder: Path) -> None:
    """Empty a run folder that this process holds."""
    for entry in folder.iterdir():
        if entry.name == LOCK:
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
