"""report.md and report.html of a sweep: the best trial, the others, and the loss by each searched option."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graftlm.config.fields import flag_name
from graftlm.config.sweep import Choice, Range, Space, Value, read_space
from graftlm.experiments.reports.charts import (
    BOTTOM,
    CHARACTER,
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    Figure,
    Line,
    Plot,
    Scale,
    loss_chart,
    loss_scale,
)
from graftlm.experiments.reports.comparison import render
from graftlm.experiments.sweep.results import SweepResult, TrialResult
from graftlm.experiments.sweep.view import described
from graftlm.files import write_text

_EDGE = 0.08
"""A best value this near to an end of its range, as a share of the range, may lie beyond it."""


def write_reports(found: SweepResult, out: Path) -> None:
    """Write both reports into `out`. Raises OSError."""
    values = contents(found)
    write_text(out / "report.md", render("sweep.md.jinja", values, html=False))
    write_text(out / "report.html", render("sweep.html.jinja", values, html=True))


def contents(found: SweepResult) -> dict[str, Any]:
    """The contents of both reports, as plain values."""
    space = read_space(dict(found.space))
    names = [flag_name(name) for name in space]
    searched = ", ".join(f"{flag_name(name)} {found.space[name]}" for name in space)
    return {
        "title": f"Sweep {found.name}: {found.options.get('method', 'lora')} on {found.model}",
        "facts": f"{found.counted() or 'no trial yet'}; searched: {searched}",
        "headline": headline(found),
        "sentences": sentences(found, space),
        "columns": ["trial", "state", *names, "loss before", "loss", "steps"],
        "rows": [_row(tried, space) for tried in found.ranked],
        "plots": plots(found, space),
        "storage": found.storage,
    }


def headline(found: SweepResult) -> str:
    """The best trial in a few words."""
    best = found.best
    if best is None:
        return "No trial has ended yet."
    return f"Trial {best.number}: {described(best.params)}."


def sentences(found: SweepResult, space: Space) -> list[str]:
    """The result of the sweep, and what a further one might search."""
    best = found.best
    if best is None or best.loss is None:
        return ["Nothing can be said before a trial has ended."]
    said = [f"Its eval loss is {best.loss:.4f}" + (f", {best.loss_before:.4f} before." if best.loss_before else ".")]
    others = [t for t in found.tried if t.state == "complete" and t.loss is not None and t is not best]
    if others and best.loss_before is not None:
        gain = best.loss_before - best.loss
        near = [t for t in others if t.loss is not None and t.loss - best.loss <= 0.02 * gain]
        if near:
            said.append(
                f"{len(near)} of the {len(others)} other complete trials are within 2 % of its gain: one run each cannot tell "
                "them apart, so take the cheapest, or compare them with graft compare."
            )
        else:
            said.append("No other complete trial is within 2 % of its gain.")
    said += [s for name, searched in space.items() if (s := _at_edge(name, searched, best.params.get(name)))]
    diverged = [t for t in found.tried if t.state == "diverged"]
    if diverged:
        said.append(f"{len(diverged)} trials diverged, the first with {described(diverged[0].params)}.")
    if best.folder is not None:
        said.append(
            f"Its run folder is {best.folder}; the same run again: graft train {best.folder}/config.json --out OUT."
        )
    return said


def _at_edge(name: str, searched: Range | Choice, value: Value | None) -> str | None:
    if isinstance(searched, Choice) or not isinstance(value, (int, float)):
        return None
    low, high, at = searched.low, searched.high, float(value)
    if searched.log:
        low, high, at = math.log(low), math.log(high), math.log(at)
    place = (at - low) / (high - low)
    if _EDGE < place < 1 - _EDGE:
        return None
    end = "low" if place <= _EDGE else "high"
    return (
        f"The best {flag_name(name)}, {value:.4g}, lies at the {end} end of its range: a range that reaches further may hold "
        "better."
    )


def _row(tried: TrialResult, space: Space) -> list[str]:
    own = (f"{v:.4g}" if isinstance(v := tried.params.get(n), float) else "" if v is None else str(v) for n in space)
    losses = ("" if v is None else f"{v:.4f}" for v in (tried.loss_before, tried.loss))
    return [str(tried.number), tried.state, *own, *losses, "" if tried.steps is None else f"{tried.steps:,}"]


# ---- figures --------------------------------------------------------------------------------------------------------


def plots(found: SweepResult, space: Space) -> list[Plot]:
    """Loss by trial, loss against each option, and the losses as they fell."""
    ended = [t for t in found.tried if t.state == "complete" and t.loss is not None]
    if not ended:
        return []
    drawn = [Plot("Loss by trial", history(found, ended), "Dots: complete trials. Line: the best so far.")]
    for name, searched in space.items():
        drawn.append(
            Plot(f"Loss by {flag_name(name)}", against(found, ended, name, searched), "Filled: the best trial.")
        )
    if any(len(t.eval_losses) > 1 for t in found.tried):
        drawn.append(Plot("Eval loss", curves(found), "One line a trial; strong: the best, faint: the others."))
    return drawn


def history(found: SweepResult, ended: Sequence[TrialResult]) -> str:
    """Loss of each complete trial by its number, and the best so far."""
    figure = Figure("eval loss of each trial")
    losses = [t.loss for t in ended if t.loss is not None]
    x, y = Scale(0, max(1, max(t.number for t in found.tried)), LEFT, WIDTH - RIGHT), loss_scale(losses)
    figure.axes(x, y, "trial", "nats a token")
    best: list[tuple[float, float]] = []
    low = math.inf
    for tried in ended:
        loss = tried.loss or 0.0
        if best:
            best.append((x(tried.number), y(low)))
        low = min(low, loss)
        best.append((x(tried.number), y(low)))
        figure.add("circle", cx=x(tried.number), cy=y(loss), r=3.5, cls="c0 fill")
    figure.line(best, "c1")
    return figure.svg()


def against(found: SweepResult, ended: Sequence[TrialResult], name: str, searched: Range | Choice) -> str:
    """Loss of each complete trial by one of its options."""
    figure = Figure(f"eval loss by {flag_name(name)}")
    y = loss_scale([t.loss for t in ended if t.loss is not None])
    if isinstance(searched, Choice):
        values = [str(v) for v in searched.values]
        x = Scale(-0.5, len(values) - 0.5, LEFT, WIDTH - RIGHT)
        figure.axes(Scale(0, 0, LEFT, LEFT), y, flag_name(name), "nats a token")
        for i, value in enumerate(values):
            most = max(4, int((WIDTH - LEFT) / len(values) / CHARACTER))
            short = value if len(value) <= most else "…" + value[-most + 1 :]
            figure.add("text", short, x=x(i), y=HEIGHT - BOTTOM + 14, cls="tick middle")
    else:
        values = []
        x = Scale(searched.low, searched.high, LEFT, WIDTH - RIGHT, searched.log)
        figure.axes(x, y, flag_name(name), "nats a token")
    for tried in ended:
        value = tried.params.get(name)
        place = values.index(str(value)) if values else float(value or 0)
        best = tried is found.best
        figure.add(
            "circle",
            cx=x(place),
            cy=y(tried.loss or 0.0),
            r=5 if best else 3.5,
            cls="c1 fill" if best else "c0 fill pale",
        )
    return figure.svg()


def curves(found: SweepResult) -> str:
    """Eval loss of every trial by its step."""
    trials = sorted(found.tried, key=lambda t: t is found.best)
    lines = [Line(t.eval_losses, "c1" if t is found.best else "c0 faint") for t in trials]
    return loss_chart("eval loss of every trial by step", lines)
