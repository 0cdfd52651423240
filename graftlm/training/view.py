"""What a person sees of a run: on standard error, so that `--json` has standard output to itself.

A `View` receives values and draws them with rich: the base, the data, the coverage table, a progress bar with loss,
tokens a second and the time left, and the end. `quiet=True` draws nothing (tests, runs within runs).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from graftlm import terminal
from graftlm.adapters.attach import Adapter, CoverageRow
from graftlm.base.loading import Base
from graftlm.config.fields import COMPUTE_DTYPE_NAMES
from graftlm.data.dataset import Dataset
from graftlm.formatting import count, size
from graftlm.progress import Task, working
from graftlm.training.memory import MemoryEstimate
from graftlm.training.trainer import StepResult
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
        how = (
            "examples packed end to end" if base.packs else f"stacks of equally long examples: {base.no_packing_reason}"
        )
        self.fact("", f"matmuls in {COMPUTE_DTYPE_NAMES[base.compute_dtype]} on {base.device.type}; {how}")
        for name, why in list(base.not_converted.items())[:5]:
            self.fact("", f"kept as it is: {name}, {why}")
        if len(base.not_converted) > 5:
            self.fact("", f"and {len(base.not_converted) - 5} more of these")
        for note in base.notes:
            self.fact("", note)

    def data(self, dataset: Dataset, eval_dataset: Dataset | None, notes: Sequence[str] = ()) -> None:
        """What is trained on."""
        extra = f"; {dataset.dropped:,} too long and dropped" if dataset.dropped else ""
        extra += f"; {dataset.truncated:,} cut" if dataset.truncated else ""
        other = f"; {eval_dataset.rows:,} eval rows" if eval_dataset else "; no eval rows"
        self.fact(
            "data",
            f"{dataset.rows:,} rows, {dataset.tokens:,} tokens, {dataset.target_tokens:,} of them targets"
            f"{extra}{other}",
        )
        for note in dict.fromkeys((*notes, *dataset.notes, *(eval_dataset.notes if eval_dataset else ()))):
            self.fact("", note)

    def coverage(self, rows: Sequence[CoverageRow], adapter: Adapter, notes: Sequence[str] = ()) -> None:
        """Which layers are adapted, and notes on others."""
        columns = [terminal.Column("layer"), *(terminal.Column(h, right=True) for h in ("adapted", "rank", "trained"))]
        cells = [
            (f"{row.kind:<{_LABEL - 2}}", f"{row.adapted} of {row.total}", row.rank, f"{row.parameters:,}", "")
            for row in rows
        ]
        cells.append(("adapter", "", "", f"{adapter.count:,}", size(adapter.bytes)))
        terminal.table(self.console, [*columns, terminal.Column()], cells)
        for note in notes:
            self.fact("", note)

    def full_training(self, parameters: int) -> None:
        """That every weight is trained."""
        self.fact("trained", f"every weight, {parameters:,} values")

    def memory(self, estimate: MemoryEstimate, dry_run_bytes: int | None) -> None:
        """What the run is expected to take, and what the dry run over its longest batch took."""
        if estimate.requirement is None:
            return
        took = "" if dry_run_bytes is None else f"; the dry run over the longest batch took {size(dry_run_bytes)}"
        tokens = f"micro-batches of {estimate.micro_batch_tokens:,} tokens"
        self.fact("memory", f"{size(estimate.requirement.training)} expected{took}; {tokens}")

    @contextmanager
    def training(self, trial: Trial) -> Iterator[None]:
        """The bar of the run."""
        with working("training", trial.sampler.steps, "steps") as self._task:
            self._task.to(trial.step, note="eval rows first" if trial.wants_evaluation and trial.first is None else "")
            try:
                yield
            finally:
                self._task = None

    def on_step_end(self, trial: Trial, result: StepResult) -> None:
        self._tokens += result.tokens
        self._seconds += result.seconds
        if self._task is not None:
            rate = self._tokens / self._seconds if self._seconds else 0
            self._task.to(trial.step, note=f"loss {result.loss:.3f}  {rate:,.0f} tokens/s")

    def on_evaluate(self, trial: Trial, evaluation: Evaluation, best: bool) -> None:
        base = trial.first.loss if trial.first is not None else evaluation.loss
        mark = "  above the base's" if evaluation.loss > base else ""
        if best and (not mark or trial.best_by == "score"):
            mark = "  best so far"
        score = ""
        if evaluation.score is not None and trial.scorer is not None:
            score = f"  {trial.scorer.score.name} {evaluation.score:.4g}"
        self.note(f"step {evaluation.step:>5}  eval loss {evaluation.loss:.4f}{score}{mark}")

    def done(self, summary: dict[str, Any]) -> None:
        """What came out, where it is and what it cost."""
        before, after = summary["eval_loss_before"], summary["eval_loss_after"]
        if before is not None and after is not None:
            self.fact("eval loss", f"{before:.4f} before, {after:.4f} after step {summary['saved_step']}")
            if after > before:
                self.fact("", "worse than the base: lower --learning-rate, or train on data more like the eval rows")
        if summary["score"] is not None:
            before, after = (summary[f"eval_score_{when}"] for when in ("before", "after"))
            parts = [f"{before:.4g} before"] if before is not None else []
            parts += [f"{after:.4g} after step {summary['saved_step']}"] if after is not None else []
            self.fact("score", f"{summary['score']} {', '.join(parts)}")
        place = summary.get("adapter_folder") or summary.get("model_folder")
        rate = summary["tokens_per_second"]
        speed = f", {rate:,.0f} tokens/s" if rate else ""
        self.fact("saved", f"{place} ({size(summary['saved_bytes'])})")
        self.fact("", f"peak memory {size(summary['peak_memory_bytes'])}{speed}")
