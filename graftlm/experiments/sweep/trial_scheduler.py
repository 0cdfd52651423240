"""The training callback of all trials that are trained together; it starts the next trial when one ends.

    slot 1   trial 0 ............ done | trial 4 ...        the base's matmuls run once for all slots of the bank,
    slot 2   trial 1 .. pruned | trial 3 .......            and each token adds its own trial's A and B
    slot 3   trial 2 .................................

Each trial's session writes its run folder, as for `graft train`. A trial that diverges ends alone. Trials that are running when
the sweep is stopped or killed keep their checkpoints and stay in the search.
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
from graftlm.training.run_files import LOCK
from graftlm.training.trainer import StepResult, TrainerCallback
from graftlm.training.trial import Evaluation, Trial

RESULT = "result.json"


@dataclass(eq=False)
class RunningTrial:
    """A trial that is being trained."""

    claim: ClaimedTrial
    session: Session


class TrialScheduler(TrainerCallback):
    """Trains the trials of a study, as many at once as there are slots."""

    def __init__(
        self,
        study: Study,
        slots: Sequence[int],
        start: Callable[[ClaimedTrial, int], Session],
        memory: PeakMemory,
        view: SweepView,
    ) -> None:
        """`start(claim, slot)` makes the session of a claimed trial, ready to step; `slots` are those of the bank to use."""
        self.study, self.start, self.memory, self.view = study, start, memory, view
        self.stopped: int | None = None
        self._running: dict[int, RunningTrial | None] = dict.fromkeys(slots)

    @property
    def running_trials(self) -> list[RunningTrial]:
        """The trials that are being trained, by slot."""
        return [one for one in self._running.values() if one is not None]

    # ---- callbacks of the training loop ----

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
        """A trial that diverged ends alone; any other error concerns all trials."""
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
        """Trials for the free slots: first those that lost their worker, then new ones."""
        self._clear()
        joined: list[Trial] = []
        for slot in [slot for slot, one in self._running.items() if one is None]:
            while self._running[slot] is None:
                claim = self.study.next()
                if claim is None:
                    return joined
                if not _already_reported(claim):
                    joined += self._start_in(claim, slot)
        return joined

    def stopping(self) -> str:
        """The message for somebody who stops the sweep."""
        return "stopping after this step; what is being trained keeps its checkpoint"

    # ---- slots ----

    def _at(self, trial: Trial) -> RunningTrial:
        one = self._running[trial.slot]
        assert one is not None
        assert one.session.trial is trial
        return one

    def _start_in(self, claim: ClaimedTrial, slot: int) -> list[Trial]:
        try:
            session = self.start(claim, slot)
        except BaseException:
            claim.release()
            raise
        self._running[slot] = RunningTrial(claim, session)
        self.view.began(claim, session.trial)
        self._clear()  # it may have been killed between its last step and its result
        return [] if session.trial.done else [session.trial]

    def _clear(self) -> None:
        """End the trials that take no further step."""
        for one in self.running_trials:
            if one.session.trial.done:
                self._end(one)

    def _end(self, one: RunningTrial) -> None:
        """Save the result of a trial, report it to the search, and free its slot."""
        claim, session, trial = one.claim, one.session, one.session.trial
        facts: dict[str, Any] = {
            "folder": str(claim.folder), "steps": trial.step, "tokens": trial.tokens, "seconds": session.recorder.seconds,
            "loss_before": trial.first_evaluation.loss if trial.first_evaluation else None,
        }  # fmt: skip
        if trial.stop_reason is None:
            measured = {"peak_memory_bytes": self.memory.bytes, "idle_memory_bytes": self.memory.start}
            summary = {**session.finish(), **measured}  # memory is that of all that were trained together
            session.write_measured(summary)
            loss = float(summary["eval_loss_after"])
            complete = {**facts, "digest": summary["adapter_digest"], "bytes": summary["saved_bytes"]}
            write_json(
                claim.folder / RESULT, {"state": "complete", "loss": loss, "facts": complete, "summary": summary}
            )
            claim.report_result("complete", loss, **complete)
        else:
            pruned = trial.stop_reason.startswith("pruned")
            session.recorder.event("pruned" if pruned else "failed", reason=trial.stop_reason)
            # Reported as pruned, not failed, so that the sampler avoids what diverges.
            write_json(claim.folder / RESULT, {"state": "pruned", "why": trial.stop_reason, "facts": facts})
            shutil.rmtree(claim.folder / "checkpoints", ignore_errors=True)
            claim.report_result("pruned", why=trial.stop_reason, **facts)
        session.close()
        self._running[trial.slot] = None
        self.view.ended(claim, trial)

    def close(self) -> None:
        """Release every trial that is still being trained."""
        for one in self.running_trials:
            one.session.close()
            one.claim.release()


def _already_reported(claim: ClaimedTrial) -> bool:
    """Report the result of a trial whose worker was killed before it could; else make its folder ready."""
    if (claim.folder / RESULT).is_file():
        known = read_json(claim.folder / RESULT, RunError)
        why = {"why": known["why"]} if "why" in known else {}
        claim.report_result(known["state"], known.get("loss"), **why, **known["facts"])
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
