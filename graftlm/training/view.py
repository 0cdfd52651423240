"""What a person sees of a run: on standard error, so that `--json` has standard output to itself.

A `View` is told values and draws them with rich: the base, the data, the coverage table, a progress bar with loss, tokens a
second and the time left, and the end. `quiet=True` draws nothing (tests, runs within runs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from graftlm.adapters.attach import Adapter, CoverageRow
from graftlm.base.load import Base
from graftlm.data.documents import Dataset
from graftlm.training.loop import StepResult
from graftlm.training.trial import Evaluation, Trial


def size(count: float) -> str:
    """Bytes in the unit that reads best, powers of 1000 as disks and cards are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class View:
    """Draws a run for a person."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, quiet=quiet)
        self._bar: Progress | None = None
        self._task: Any = None
        self._tokens, self._seconds = 0, 0.0

    def note(self, text: str) -> None:
        """One line."""
        self.console.print(text, highlight=False)

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """A spinner while something of unknown length goes on."""
        with self.console.status(what):
            yield

    @contextmanager
    def reading(self) -> Iterator[Callable[[int, int], None]]:
        """A bar over rows tokenized; yields what to call with (rows so far, rows in all)."""
        columns = (SpinnerColumn(), TextColumn("reading data"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"))
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def base(self, base: Base) -> None:
        """What was loaded and how it will run."""
        how = "documents packed end to end" if base.packs else f"stacks of equally long documents, because {base.why_not}"
        self.note(
            f"base      {base.name}: {base.parameters / 1e6:.1f}M parameters as {base.precision}, {size(base.bytes)}; "
            f"products in {base.compute} on {base.device.type}; {how}"
        )
        for name, why in list(base.kept.items())[:5]:
            self.note(f"          kept as it is: {name}, {why}")

    def data(self, dataset: Dataset, held_out: Dataset | None) -> None:
        """What is trained on."""
        extra = f", {dataset.dropped} too long and dropped" if dataset.dropped else ""
        extra += f", {dataset.cut} cut" if dataset.cut else ""
        other = f"; {held_out.rows:,} rows held out" if held_out else "; no held-out rows"
        self.note(
            f"data      {dataset.rows:,} rows, {dataset.tokens:,} tokens, {dataset.trained_tokens:,} trained{extra}{other}"
        )

    def coverage(self, rows: Sequence[CoverageRow], adapter: Adapter) -> None:
        """Which layers are adapted."""
        table = Table("layer", "adapted", "rank", "trained", box=None, pad_edge=False)
        for row in rows:
            table.add_row(row.kind, f"{row.adapted} of {row.total}", row.rank, f"{row.parameters:,}")
        table.add_row("adapter", "", "", f"{adapter.count:,}  ({size(adapter.bytes)})")
        self.console.print(table)

    @contextmanager
    def training(self, trial: Trial) -> Iterator[None]:
        """The bar of the run."""
        columns = (
            TextColumn("training "), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"),
            TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.console) as bar:
            self._bar = bar
            self._task = bar.add_task("", total=trial.order.steps, completed=trial.step, numbers="")
            try:
                yield
            finally:
                self._bar = None

    def stepped(self, trial: Trial, result: StepResult) -> None:
        self._tokens += result.tokens
        self._seconds += result.seconds
        if self._bar is not None:
            rate = self._tokens / self._seconds if self._seconds else 0
            self._bar.update(self._task, completed=trial.step, numbers=f"loss {result.loss:.3f}  {rate:,.0f} tokens/s")

    def evaluated(self, trial: Trial, evaluation: Evaluation, best: bool) -> None:
        mark = "  best so far" if best and evaluation.step else ""
        self.note(f"step {evaluation.step:>5}  held-out loss {evaluation.loss:.4f}{mark}")

    def done(self, summary: dict[str, Any]) -> None:
        """Where the result is and what it cost."""
        place = summary.get("adapter_folder") or summary.get("model_folder")
        rate = summary["tokens_per_second"]
        speed = f", {rate:,.0f} tokens/s" if rate else ""
        self.note(f"saved     {place} ({size(summary['saved_bytes'])}), peak memory {size(summary['peak_memory_bytes'])}{speed}")
