"""The progress of a comparison in the terminal, and the table at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from graftlm.config import CompareConfig
from graftlm.experiments.compare.data import ComparisonData
from graftlm.experiments.compare.learning_rate import RateSearch
from graftlm.experiments.compare.results import Comparison
from graftlm.experiments.reports.table import rows
from graftlm.progress import working
from graftlm.terminal import Column, table

Stepped = Callable[[dict[str, Any]], None]


class CompareView:
    """Draws a comparison in the terminal; a quiet console draws nothing."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def comparison_data(self, config: CompareConfig, comparison_data: ComparisonData) -> None:
        """Print what is compared, on which data."""
        train, eval_dataset = comparison_data.train, comparison_data.eval_dataset
        self.say(
            f"Comparing {', '.join(config.methods)} on {config.model}: {train.rows:,} rows, {comparison_data.steps:,} steps of "
            f"{config.batch_size}, {eval_dataset.rows:,} eval rows, {config.seeds} seed{'s' if config.seeds > 1 else ''}"
        )
        for note in comparison_data.notes:
            self.say(f"note: {note}")

    @contextmanager
    def running(self, label: str, steps: int) -> Iterator[Stepped]:
        """A progress bar for a run; yields the function that takes its events."""
        with working(label, steps, "steps") as task:
            task.to(0, note="loading")

            def stepped(event: dict[str, Any]) -> None:
                if event["event"] == "step":
                    task.to(event["step"], note=f"loss {event['loss']:.3f}" if "loss" in event else "")

            yield stepped

    def rate(self, name: str, found: RateSearch) -> None:
        """Print a learning rate that was found."""
        tried = ", ".join(f"{t.rate:g}: {t.loss:.3f}" for t in found.tried)
        self.say(f"{name:<26} learning rate {found.rate:g}   (loss on other training rows by rate: {tried})")

    def trained(self, label: str, summary: dict[str, Any]) -> None:
        """Print the losses of a finished run."""
        self.say(f"{label:<26} eval loss {summary['eval_loss_before']:.4f} to {summary['eval_loss_after']:.4f}")

    def failed(self, name: str, why: str) -> None:
        """Print why a variant is left out."""
        self.say(f"{name:<26} left out: {why}")

    def comparison(self, found: Comparison) -> None:
        """Print the table and the verdict."""
        columns = [Column(), *(Column(line.name, right=True, words=True) for line in found.lines)]
        self.console.print()
        table(
            self.console, columns, [(row.label, *row.cells) for row in rows(found)], title="As measured on this machine"
        )
        for sentence in found.verdict.sentences:
            self.say(sentence)
