"""Charts as SVG, for reports and notebooks: axes, and line charts of losses.

    loss_chart("loss by step", [Line(train, "c0 faint"), Line(evals, "c1", dots=True)])

Written by hand because matplotlib is no dependency of Graft: a chart here is a few hundred bytes of SVG that is sharp at any
size and takes the colours of its page. No colour is in it. It names classes (`c0` ... `c7` for the series, `axis`, `grid`,
`soft`), and `charts.css` gives them colours from variables of the page, with defaults for a notebook. Drawn at about the
width of a phone, so that text is read there at its own size; wider pages put charts side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 60, 10, 12, 38
CHARACTER = 6.1  # width of a character of the 11 px text, about


@dataclass(frozen=True)
class Scale:
    """From values to a range of pixels, linear or logarithmic."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(max(value, 1e-12))
        part = (at - low) / (high - low) if high > low else 0.5
        return self.first + min(1.1, max(-0.1, part)) * (self.last - self.first)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values within the range: 1, 2 or 5 times a power of ten."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [m * 10.0**p for p in powers for m in (1, 2, 5) if self.low <= m * 10.0**p <= self.high]
            return found if len(found) <= 2 * count else [v for v in found if math.log10(v) % 1 < 1e-9]
        step = 10 ** math.floor(math.log10(max(self.high - self.low, 1e-12) / count))
        step = next(step * m for m in (1, 2, 5, 10) if (self.high - self.low) / (step * m) <= count)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass
class Figure:
    """An SVG that is being drawn."""

    title: str
    height: int = HEIGHT
    parts: list[str] = field(default_factory=list[str])

    def add(self, tag: str, text: str | None = None, **attributes: object) -> None:
        """One element; `cls` is its class, and an underscore in a name is a hyphen."""
        named = {"class" if k == "cls" else k.replace("_", "-"): v for k, v in attributes.items()}
        written = "".join(f' {k}="{_number(v)}"' for k, v in named.items())
        self.parts.append(f"<{tag}{written}/>" if text is None else f"<{tag}{written}>{escape(text)}</{tag}>")

    def line(self, points: Sequence[tuple[float, float]], cls: str) -> None:
        """A line through points in pixels."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.add("polyline", points=path, cls=f"line {cls}")

    def axes(self, x: Scale, y: Scale, x_label: str, y_label: str, write: Callable[[float], str] | None = None) -> None:
        """Grid, ticks and labels."""
        write = write or plain
        bottom = self.height - BOTTOM
        for value in y.ticks():
            at = y(value)
            self.add("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, cls="grid")
            self.add("text", write(value), x=LEFT - 5, y=at + 3.5, cls="tick end")
        for value in x.ticks():
            text, at = plain(value), x(value)
            half = 3.5 * len(text)  # of its width, about
            self.add("text", text, x=min(at, WIDTH - half), y=bottom + 14, cls="tick middle")
        self.add("line", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom, cls="axis")
        self.add("text", x_label, x=(WIDTH + LEFT) / 2, y=self.height - 6, cls="label middle")
        self.add(
            "text",
            y_label,
            x=11,
            y=(bottom + TOP) / 2,
            cls="label middle",
            transform=f"rotate(-90 11 {(bottom + TOP) / 2})",
        )

    def svg(self) -> str:
        """The whole element, sized by its place."""
        head = f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{escape(self.title, quote=True)}">'
        return head + "".join(self.parts) + "</svg>"


def _number(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else escape(str(value), quote=True)


def plain(value: float) -> str:
    """A tick's number, as short as it can be."""
    return f"{value:g}" if abs(value) < 10_000 else f"{value:,.0f}"


@dataclass(frozen=True)
class Plot:
    """A figure with its heading and what it shows."""

    title: str
    svg: str
    shows: str


@dataclass(frozen=True)
class Line:
    """A series of a line chart."""

    points: Sequence[tuple[int, float]]
    """(step, value)."""
    cls: str
    dots: bool = False
    """Whether each point has a dot."""


def loss_chart(title: str, lines: Sequence[Line]) -> str:
    """Losses in nats a target token by optimizer step; later lines lie on top."""
    figure = Figure(title)
    points = [point for line in lines for point in line.points]
    x = Scale(0, max((step for step, _ in points), default=1), LEFT, WIDTH - RIGHT)
    y = loss_scale([value for _, value in points])
    figure.axes(x, y, "optimizer step", "nats a token")
    for line in lines:
        placed = [(x(step), y(value)) for step, value in line.points if math.isfinite(value)]
        figure.line(placed, line.cls)
        for at_x, at_y in placed if line.dots else ():
            figure.add("circle", cx=at_x, cy=at_y, r=2.2, cls=f"{line.cls} fill")
    return figure.svg()


def loss_scale(losses: Sequence[float]) -> Scale:
    """The vertical scale for losses: logarithmic where they span more than a factor of four."""
    finite = [loss for loss in losses if math.isfinite(loss)] or [0.1, 1.0]
    low, high = min(finite), max(finite)
    log = low > 0 and high / low > 4
    room = 0.06 * (high - low or abs(high) or 1.0)
    return Scale(low / 1.08 if log else low - room, high * 1.08 if log else high + room, HEIGHT - BOTTOM, TOP, log)


def smoothed(points: Sequence[tuple[int, float]], share: float = 0.1) -> list[tuple[int, float]]:
    """Running means over a tenth of the steps, at most 200 of them."""
    if not points:
        return []
    window = max(1, round(share * len(points)))
    totals = [0.0]
    for _, value in points:
        totals.append(totals[-1] + value)
    found = [(points[i - 1][0], (totals[i] - totals[i - window]) / window) for i in range(window, len(points) + 1)]
    every = -(-len(found) // 199)
    return [*found[::every], found[-1]] if (len(found) - 1) % every else found[::every]


def style() -> str:
    """The style sheet of charts; they stand inside an element of class `graft-charts`."""
    return (Path(__file__).parent / "charts.css").read_text(encoding="utf-8")


def in_notebook(svg: str, caption: str) -> str:
    """A chart with its style and caption, for a page that knows nothing of either."""
    return (
        f'<div class="graft-charts" style="max-width:{WIDTH}px"><style>{style()}</style>{svg}'
        f"<small>{escape(caption)}</small></div>"
    )
