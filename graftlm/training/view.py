"""What a person sees of a run: on standard error, so that `--json` has standard output to itself.

A `View` is told values and draws them with rich: the base, the data, the coverage table, a progress bar with loss,
tokens a second and the time left, and the end. `quiet=True` draws nothing (tests, runs within runs).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from graftlm import terminal
from graftlm.adapters.attach import Adapter, CoverageRow
from graftlm.base.load import Base
from graftlm.config.fields import PRODUCTS
from graftlm.data.documents import Dataset
from graftlm.planning.words import count, size
from graftlm.progress import Task, working
from graftlm.training.foresight import Foresight
from graftlm.training.loop import StepResult
from graftlm.training.trial import Evaluation, Trial

_LABEL = 11  # width of the labels in front of facts


class View:
    """Draws a run for a person."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or terminal.console(stderr=True, quiet=quiet)
        self._task: Task | None = None
        self._tokens, self._seconds = 0, 0.0

    def note(self, text: str) -> None:
        """One line."""
        self.console.print(text, highlight=False, markup=False)

    def fact(self, label: str, text: str) -> None:
        """A line under a label, its continuation lines in the column of its text."""
        columns = [terminal.Column(), terminal.Column(words=True)]
        terminal.table(self.console, columns, [(f"{label:<{_LABEL - 2}}", text)])

    def base(self, base: Base) -> None:
        """What was loaded and how it will run."""
        self.fact("base", f"{base.name}: {count(base.parameters)} parameters as {base.precision}, {size(base.bytes)}")
        how = "documents packed end to end" if base.packs else f"stacks of equally long documents: {base.why_not}"
        self.fact("", f"products in {PRODUCTS[base.compute]} on {base.device.type}; {how}")
        for name, why in list(base.kept.items())[:5]:
            self.fact("", f"kept as it is: {name}, {why}")
        if len(base.kept) > 5:
            self.fact("", f"and {len(base.kept) - 5} more of these")
        for note in base.notes:
            self.fact("", note)

    def data(self, dataset: Dataset, held_out: Dataset | None, notes: Sequence[str] = ()) -> None:
        """What is trained on."""
        extra = f"; {dataset.dropped:,} too long and dropped" if dataset.dropped else ""
        extra += f"; {dataset.cut:,} cut" if dataset.cut else ""
        other = f"; {held_out.rows:,} rows held out" if held_out else "; no held-out rows"
        self.fact(
            "data",
            f"{dataset.rows:,} rows, {dataset.tokens:,} tokens, {dataset.trained_tokens:,} of them trained"
            f"{extra}{other}",
        )
        for note in dict.fromkeys((*notes, *dataset.notes, *(held_out.notes if held_out else ()))):
            self.fact("", note)

    def coverage(self, rows: Sequence[CoverageRow], adapter: Adapter, notes: Sequence[str] = ()) -> None:
        """Which layers are adapted, and what is to be said of others."""
        columns = [terminal.Column("layer"), *(terminal.Column(h, right=True) for h in ("adapted", "rank", "trained"))]
        cells = [
            (f"{row.kind:<{_LABEL - 2}}", f"{row.adapted} of {row.total}", row.rank, f"{row.parameters:,}", "")
            for row in rows
        ]
        cells.append(("adapter", "", "", f"{adapter.count:,}", size(adapter.bytes)))
        terminal.table(self.console, [*columns, terminal.Column()], cells)
        for note in notes:
            self.fact("", note)

    def everything(self, parameters: int) -> None:
        """That no layer is left out."""
        self.fact("trained", f"every weight, {parameters:,} values")

    def ahead(self, ahead: Foresight, rehearsed: int | None) -> None:
        """What the run is expected to take, and what a pass over its longest batch took."""
        if ahead.need is None:
            return
        took = "" if rehearsed is None else f"; one pass over the longest batch took {size(rehearsed)}"
        self.fact("memory", f"{size(ahead.need.training)} expected{took}; {ahead.tokens_per_pass:,} tokens a pass")

    @contextmanager
    def training(self, trial: Trial) -> Iterator[None]:
        """The bar of the run."""
        with working("training", trial.order.steps, "steps") as self._task:
            self._task.to(
                trial.step, note="held-out rows first" if trial.wants_evaluation and trial.first is None else ""
            )
            try:
                yield
            finally:
                self._task = None

    def stepped(self, trial: Trial, result: StepResult) -> None:
        self._tokens += result.tokens
        self._seconds += result.seconds
        if self._task is not None:
            rate = self._tokens / self._seconds if self._seconds else 0
            self._task.to(trial.step, note=f"loss {result.loss:.3f}  {rate:,.0f} tokens/s")

    def evaluated(self, trial: Trial, evaluation: Evaluation, best: bool) -> None:
        base = trial.first.loss if trial.first is not None else evaluation.loss
        mark = "  above the base's" if evaluation.loss > base else "  best so far" if best else ""
        self.note(f"step {evaluation.step:>5}  held-out loss {evaluation.loss:.4f}{mark}")

    def done(self, summary: dict[str, Any]) -> None:
        """What came out, where it is and what it cost."""
        before, after = summary["eval_loss_before"], summary["eval_loss_after"]
        if before is not None and after is not None:
            self.fact("held out", f"loss {before:.4f} before, {after:.4f} after step {summary['saved_step']}")
            if after > before:
                self.fact(
                    "", "worse than the base: lower --learning-rate, or train on data more like the held-out rows"
                )
        place = summary.get("adapter_folder") or summary.get("model_folder")
        rate = summary["tokens_per_second"]
        speed = f", {rate:,.0f} tokens/s" if rate else ""
        self.fact("saved", f"{place} ({size(summary['saved_bytes'])})")
        self.fact("", f"peak memory {size(summary['peak_memory_bytes'])}{speed}")
