"""A sweep in the terminal: one bar for all trials and one for each that is being trained; the table of trials."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Self

from rich.console import Console

from graftlm.config.fields import flag_name
from graftlm.config.sweep import Value
from graftlm.experiments.sweep.concurrency import Concurrency
from graftlm.experiments.sweep.results import SweepResult
from graftlm.experiments.sweep.study import ClaimedTrial
from graftlm.formatting import duration, size
from graftlm.progress import Task, begin, end, working
from graftlm.terminal import Column, table
from graftlm.training.trainer import StepResult
from graftlm.training.trial import Evaluation, Trial
from graftlm.training.view import View


class SweepView(View):
    """Draws a sweep in the terminal; a quiet console draws nothing."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console)
        self._bars: dict[str, Task] = {}
        self._all: Task | None = None

    def planned(self, concurrency: Concurrency, dry_run_bytes: int | None) -> None:
        """How many trials are trained at once, and the memory that they take."""
        count = concurrency.count
        took = "" if dry_run_bytes is None else f"; the dry run took {size(dry_run_bytes)}"
        memory = "" if concurrency.bytes is None else f", {size(concurrency.bytes)} expected{took}"
        self.fact(
            "together",
            f"{count} trial{'s' if count > 1 else ''} at once{memory}; {concurrency.micro_batch_tokens:,} tokens a micro-batch",
        )

    @contextmanager
    def sweeping(self, trials: int, ended: int) -> Iterator[None]:
        """The bars of the sweep."""
        with working("sweep", trials, "trials") as self._all:
            self._all.to(ended)
            try:
                yield
            finally:
                for task in self._bars.values():
                    end(task)
                self._bars.clear()
                self._all = None

    def began(self, claim: ClaimedTrial, trial: Trial) -> None:
        """A trial begins."""
        again = f", from step {trial.step}" if trial.step else ""
        self.note(f"trial {claim.number:>3}  {described(claim.params)}{again}")

    def on_step_end(self, trial: Trial, result: StepResult) -> None:
        self.stepped(trial.name, trial.step, trial.sampler.steps, result.loss)

    def stepped(self, name: str, step: int, steps: int, loss: float) -> None:
        """A trial has taken a step."""
        if self._all is None:
            return
        if name not in self._bars:
            self._bars[name] = begin(f"trial {int(name):>3}", steps, "steps")
        self._bars[name].to(step, note=f"loss {loss:.3f}")

    def ended(self, claim: ClaimedTrial, trial: Trial) -> None:
        """A trial has ended."""
        if trial.stop_reason is not None:
            self.note(f"trial {claim.number:>3}  {trial.stop_reason}")
        elif trial.best_evaluation is not None:
            self.note(
                f"trial {claim.number:>3}  eval loss {trial.best_evaluation.loss:.4f} after step {trial.best_evaluation.step}"
            )
        self.over(trial.name)

    def over(self, name: str) -> None:
        """A trial takes no further step."""
        if self._all is not None:
            if name in self._bars:
                end(self._bars.pop(name))
            self._all.to(self._all.done + 1)

    def counted(self, ended: int) -> None:
        """So many trials have ended, at least."""
        if self._all is not None:
            self._all.to(max(self._all.done, ended))

    def found(self, found: SweepResult, most: int = 20) -> None:
        """The table of trials, best first."""
        print_table(self.console, found, most)


class WorkersView:
    """What the workers of a sweep tell, in one view: the facts of the first, each note once, and all trials' bars."""

    def __init__(self, view: SweepView, trials: int) -> None:
        self._view, self._trials = view, trials
        self._notes: set[str] = set()
        self._lock = threading.Lock()
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._open.enter_context(self._view.sweeping(self._trials, 0))
        return self

    def __exit__(self, *raised: object) -> None:
        self._open.close()

    def of(self, worker: int) -> Callable[[dict[str, Any]], None]:
        """The function that takes a worker's events (`experiments/subprocess_run.py`), from any thread."""

        def heard(event: dict[str, Any]) -> None:
            with self._lock:
                self._heard(worker, event)

        return heard

    def _heard(self, worker: int, event: dict[str, Any]) -> None:
        match event["event"]:
            case "trial":
                self._view.stepped(event["name"], event["step"], event["steps"], event["loss"])
            case "trial-ended":
                self._view.over(event["name"])
            case "trials":
                self._view.counted(event["ended"])
            case "fact" if worker == 0:
                self._view.fact(event["label"], event["text"])
            case "note" if event["text"] not in self._notes:
                self._notes.add(event["text"])
                self._view.note(event["text"])
            case _:
                pass


class TrialView(View):
    """The view of one trial of a sweep: it draws nothing, and passes its notes on."""

    def __init__(self, view: SweepView, number: int) -> None:
        super().__init__(quiet=True)
        self._view, self._number = view, number

    def note(self, text: str) -> None:
        self._view.note(f"trial {self._number:>3}  {text}")

    def on_evaluate(self, trial: Trial, evaluation: Evaluation, best: bool) -> None: ...


def described(params: Mapping[str, Value]) -> str:
    """Values of the searched options, as words."""
    return ", ".join(
        f"{flag_name(n)} {v:.3g}" if isinstance(v, float) else f"{flag_name(n)} {v}" for n, v in params.items()
    )


def print_table(console: Console, found: SweepResult, most: int) -> None:
    """Trials by loss, at most so many."""
    names = list(found.space)
    heads = ("trial", "state", "loss", *map(flag_name, names), "loss before", "steps", "time")
    drops = {"loss before": 3, "time": 2, "steps": 1}
    columns = [Column(head, right=head != "state", drop=drops.get(head, 0)) for head in heads]
    rows: list[tuple[str, ...]] = []
    for tried in found.ranked[:most]:
        own = (
            f"{v:.4g}" if isinstance(v := tried.params.get(n), float) else str("" if v is None else v) for n in names
        )
        before, loss = (f"{v:.4f}" if v is not None else "" for v in (tried.loss_before, tried.loss))
        steps = "" if tried.steps is None else f"{tried.steps:,}"
        time = "" if tried.seconds is None else duration(tried.seconds)
        rows.append((str(tried.number), tried.state, loss, *own, before, steps, time))
    table(console, columns, rows, title=f"{found.name}: {found.counted()}")
    if len(found.tried) > most:
        console.print(f"and {len(found.tried) - most} more: --json has all of them", highlight=False)
