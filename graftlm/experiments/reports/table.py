"""The table of a comparison; terminal, report.md and report.html show the same rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graftlm.experiments.compare.results import Comparison, VariantResult
from graftlm.experiments.compare.statistics import Interval
from graftlm.formatting import duration, size

NONE = "-"


@dataclass(frozen=True)
class TableRow:
    """A label and a cell for each variant."""

    label: str
    cells: tuple[str, ...]


def rows(found: Comparison) -> list[TableRow]:
    """Every row of the table; rows without any figure are left out."""
    drawn: list[TableRow] = []

    def row(label: str, write: Callable[[VariantResult], str]) -> None:
        drawn.append(TableRow(label, tuple(write(line) for line in found.lines)))

    metric = found.config.metric
    row("what is trained", lambda line: line.trained)
    row("trained parameters", lambda line: f"{line.trainable_parameters:,}")
    row("  of the base's", lambda line: share(line.trainable_parameters / line.base_parameters))
    row("base stored as", lambda line: f"{line.base_precision}, {size(line.base_bytes)}")
    row("learning rate", lambda line: f"{line.learning_rate:g}" + (" (searched)" if line.tried else ""))
    row("peak memory, measured", lambda line: size(line.peak_measured))
    row("  above the idle process", lambda line: size(line.peak_measured - line.idle))
    row("  the same, planned", lambda line: NONE if line.peak_planned is None else size(line.peak_planned))
    row("saved adapter or model", lambda line: size(line.saved_bytes))
    row("eval loss before", lambda line: f"{line.loss_before:.3f}")
    row(
        "eval loss after",
        lambda line: f"{line.loss:.3f}" + ("" if line.std is None else f" ± {line.std:.3f}"),
    )
    row(f"share of {found.reference}'s gain", lambda line: _share(line, found.reference))
    if metric is not None:
        row(
            f"{metric} before", lambda line: NONE if line.task_score_before is None else f"{line.task_score_before:.1f}"
        )
        row(f"{metric} after", lambda line: NONE if line.task_score is None else f"{line.task_score:.1f}")
    if any(line.general_after is not None for line in found.lines):
        row("loss on general text", _forgetting)
    row("tokens/s", lambda line: NONE if line.tokens_per_second is None else f"{line.tokens_per_second:,.0f}")
    row("training time of a run", lambda line: duration(line.seconds))
    row("many adapters on one base", lambda line: "yes" if line.shares_base else "no")
    row("when to use it", lambda line: line.when)
    return drawn


def share(value: float) -> str:
    return f"{value:.1%}" if value >= 0.001 else f"{value:.2g}"


def interval(found: Interval, digits: int = 1) -> str:
    return f"{100 * found.low:.{digits}f} to {100 * found.high:.{digits}f}"


def _share(line: VariantResult, reference: str) -> str:
    if line.share is None:
        return NONE
    if line.name == reference or line.share_interval is None:
        return f"{line.share:.1%}"
    return f"{line.share:.1%} ({interval(line.share_interval)} %)"


def _forgetting(line: VariantResult) -> str:
    if line.general_before is None or line.general_after is None:
        return NONE
    return f"{line.general_before:.3f} to {line.general_after:.3f} ({line.general_after - line.general_before:+.3f})"
