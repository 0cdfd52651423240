"""Plots as hand-made SVG: small, sharp at any size, and coloured by the page they stand in.

No colour is written here. A figure names classes (`c0` ... `c7` for the variants, `axis`, `grid`, `soft`) and the page's
style sheet gives them colours for light, dark and print. Drawn at about the width of a phone, so that text is read there
at its own size; wider pages put figures side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from graftlm.experiments.compare.capacity import Capacity
from graftlm.experiments.compare.results import Comparison, VariantResult
from graftlm.experiments.compare.verdict import Verdict
from graftlm.formatting import size

WIDTH, HEIGHT = 380, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 10, 12, 38
_CHARACTER = 6.1  # width of a character of the 11 px text, about


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
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.add("polyline", points=path, cls=f"line {cls}")

    def axes(self, x: Scale, y: Scale, x_label: str, y_label: str, write: Callable[[float], str] | None = None) -> None:
        """Grid, ticks and labels."""
        write = write or plain
        bottom = self.height - _BOTTOM
        for value in y.ticks():
            at = y(value)
            self.add("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=at, y2=at, cls="grid")
            self.add("text", write(value), x=_LEFT - 5, y=at + 3.5, cls="tick end")
        for value in x.ticks():
            text, at = plain(value), x(value)
            half = 3.5 * len(text)  # of its width, about
            self.add("text", text, x=min(at, WIDTH - half), y=bottom + 14, cls="tick middle")
        self.add("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=bottom, y2=bottom, cls="axis")
        self.add("text", x_label, x=(WIDTH + _LEFT) / 2, y=self.height - 6, cls="label middle")
        self.add(
            "text",
            y_label,
            x=11,
            y=(bottom + _TOP) / 2,
            cls="label middle",
            transform=f"rotate(-90 11 {(bottom + _TOP) / 2})",
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


def plots(found: Comparison) -> list[Plot]:
    """Every figure that there is something to draw for."""
    drawn = [
        Plot(
            "Loss", loss_curves(found.lines),
            "Lines with dots: eval rows. Faint lines: training batches, smoothed. One line a seed.",
        ),
        Plot("Memory", memory_bars(found.lines), _shows_memory(found.lines)),
        Plot(
            "Quality against memory", quality_memory(found),
            f"Share of {found.reference}'s gain over the base, with its 95 % interval.",
        ),
    ]  # fmt: skip
    if len(found.lines) > 1:
        shows = (
            "95 % intervals of rows and seeds" if found.config.seeds > 1 else "95 % intervals of rows alone, one seed"
        )
        drawn.append(Plot("How far behind the best", differences(found), f"{shows}. Shaded: within the margin."))
    adapters = [(i, line.capacity) for i, line in enumerate(found.lines) if line.capacity is not None]
    if adapters:
        shows = "Singular values over the largest, median of all layers; the band holds eight of ten."
        drawn.append(Plot("Spectrum of B A", spectrum(adapters), f"{shows} Flat to the end: the rank is used up."))
    return drawn


def _shows_memory(lines: Sequence[VariantResult]) -> str:
    shows = "Filled: measured peak; its pale part is the idle process."
    planned = any(line.peak_planned is not None for line in lines)
    return f"{shows} Outlined: planned, on top of the idle process." if planned else shows


def loss_curves(lines: Sequence[VariantResult]) -> str:
    """Training and eval loss by step."""
    figure = Figure("loss by step of each variant and seed")
    held = [v for line in lines for c in line.curves for _, v in c.eval_losses]
    train = [v for line in lines for c in line.curves for _, v in smoothed(c.train)]
    last = max((s for line in lines for c in line.curves for s, _ in (*c.train, *c.eval_losses)), default=1)
    low, high = min([*held, *train], default=0.1), max([*held, *train], default=1.0)
    log = low > 0 and high / low > 4
    x = Scale(0, last, _LEFT, WIDTH - _RIGHT)
    y = Scale(low / 1.08 if log else low - 0.05 * (high - low), high * 1.05, HEIGHT - _BOTTOM, _TOP, log)
    figure.axes(x, y, "optimizer step", "nats a token")
    for i, line in enumerate(lines):
        for curve in line.curves:
            figure.line([(x(s), y(v)) for s, v in smoothed(curve.train)], f"c{i % 8} faint")
    for i, line in enumerate(lines):
        for curve in line.curves:
            points = [(x(s), y(v)) for s, v in curve.eval_losses]
            figure.line(points, f"c{i % 8}")
            for at_x, at_y in points:
                figure.add("circle", cx=at_x, cy=at_y, r=2.2, cls=f"c{i % 8} fill")
    return figure.svg()


def smoothed(points: Sequence[tuple[int, float]], share: float = 0.1) -> list[tuple[int, float]]:
    """Running means over a tenth of the steps, at most 200 of them."""
    if not points:
        return []
    window = max(1, round(share * len(points)))
    totals = [0.0]
    for _, value in points:
        totals.append(totals[-1] + value)
    found = [(points[i - 1][0], (totals[i] - totals[i - window]) / window) for i in range(window, len(points) + 1)]
    every = max(1, len(found) // 200)
    return [*found[::every], found[-1]] if (len(found) - 1) % every else found[::every]


def memory_bars(lines: Sequence[VariantResult]) -> str:
    """Planned and measured peak memory, side by side."""
    figure = Figure("peak memory of each variant, planned and measured", height=18 + 46 * len(lines))
    most = max(max(line.peak_measured, line.idle + (line.peak_planned or 0)) for line in lines)
    left = 8
    x = Scale(0, most, left, WIDTH - 84)
    for i, line in enumerate(lines):
        top = 8 + 46 * i
        figure.add("text", line.name, x=left, y=top + 9, cls="name")
        if line.peak_planned is not None:  # a plan is of what comes on top of the idle process
            end = x(line.idle + line.peak_planned)
            figure.add("rect", x=x(line.idle), y=top + 13, width=end - x(line.idle), height=9, cls=f"c{i % 8} outline")
            figure.add("text", f"+{size(line.peak_planned)}", x=end + 5, y=top + 21.5, cls="tick")
        down = 25 if line.peak_planned is not None else 15
        figure.add("rect", x=left, y=top + down, width=x(line.idle) - left, height=10, cls=f"c{i % 8} fill pale")
        figure.add(
            "rect",
            x=x(line.idle),
            y=top + down,
            width=x(line.peak_measured) - x(line.idle),
            height=10,
            cls=f"c{i % 8} fill",
        )
        figure.add("text", size(line.peak_measured), x=x(line.peak_measured) + 5, y=top + down + 9, cls="tick strong")
    return figure.svg()


def quality_memory(found: Comparison) -> str:
    """Share of the reference's gain against measured peak memory."""
    figure = Figure("share of the gain against peak memory")
    lines = [line for line in found.lines if line.share is not None]
    unit = 1e9 if max((line.peak_measured for line in lines), default=0) >= 2e9 else 1e6
    memory = [line.peak_measured / unit for line in lines] or [0.0, 1.0]
    wide = max(memory) - min(memory) or max(memory)
    ends = [(i.low, i.high) if (i := line.share_interval) else (line.share or 0.0,) * 2 for line in lines]
    low = max(0.0, min([100 * low for low, _ in ends], default=0.0))
    high = max([100 * high for _, high in ends], default=100.0)
    room = 0.12 * (high - low or 10)
    x = Scale(min(memory) - 0.15 * wide, max(memory) + 0.3 * wide, _LEFT, WIDTH - _RIGHT)
    y = Scale(low - room, high + room, HEIGHT - _BOTTOM, _TOP)
    figure.axes(x, y, f"peak memory, {'GB' if unit == 1e9 else 'MB'}", "share of the gain, %")
    taken: list[tuple[float, float]] = []
    for i, line in enumerate(found.lines):
        if line not in lines:
            continue
        share, interval = line.share or 0.0, line.share_interval
        at_x, at_y = x(line.peak_measured / unit), y(100 * share)
        if interval is not None and line.name != found.reference:
            figure.line([(at_x, y(100 * interval.low)), (at_x, y(100 * interval.high))], f"c{i % 8}")
        figure.add("circle", cx=at_x, cy=at_y, r=4.5, cls=f"c{i % 8} fill")
        label_y = at_y + 4
        while any(abs(label_y - other) < 12 and abs(at_x - left) < 90 for left, other in taken):
            label_y += 12
        taken.append((at_x, label_y))
        beside = at_x + 9 + _CHARACTER * len(line.name) < WIDTH
        figure.add(
            "text", line.name, x=at_x + 8 if beside else at_x - 8, y=label_y, cls="name" if beside else "name end"
        )
    return figure.svg()


def differences(found: Comparison) -> str:
    """Each variant's distance from the best, with its interval, beside the margin."""
    verdict: Verdict = found.verdict
    against = {d.first: d for d in verdict.differences if d.second == verdict.best}
    names = [line.name for line in found.lines]
    height = 44 + 36 * len(against)
    figure = Figure("distance of each variant from the best in loss", height=height)
    low = min([0.0, *(d.interval.low for d in against.values())])
    high = max([verdict.margin, *(d.interval.high for d in against.values())])
    x = Scale(low - 0.05 * (high - low), high + 0.05 * (high - low), 12, WIDTH - 12)
    bottom = height - _BOTTOM
    figure.add("rect", x=x(0.0), y=4, width=x(verdict.margin) - x(0.0), height=bottom - 4, cls="soft")
    figure.add("line", x1=x(0.0), x2=x(0.0), y1=4, y2=bottom, cls="axis")
    for value in x.ticks():
        figure.add("text", plain(round(value, 10)), x=x(value), y=bottom + 14, cls="tick middle")
    figure.add("line", x1=12, x2=WIDTH - 12, y1=bottom, y2=bottom, cls="axis")
    figure.add("text", f"nats a token behind {verdict.best}", x=WIDTH / 2, y=height - 6, cls="label middle")
    for row, standing in enumerate(s for s in verdict.standings if s.name in against):
        difference, i = against[standing.name], names.index(standing.name)
        at = 28 + 36 * row
        figure.line([(x(difference.interval.low), at), (x(difference.interval.high), at)], f"c{i % 8}")
        figure.add("circle", cx=x(difference.mean), cy=at, r=4.5, cls=f"c{i % 8} fill")
        figure.add("text", standing.name, x=x(difference.mean), y=at - 9, cls="name middle")
    return figure.svg()


def spectrum(found: Sequence[tuple[int, Capacity]]) -> str:
    """Median singular values over layers, relative to the largest, by their number."""
    figure = Figure("spectrum of the adapters' changes")
    most = max(capacity.rank for _, capacity in found)
    curves = [(i, _quantiles(capacity)) for i, capacity in found]
    low = min((v for _, (below, _, _) in curves for v in below if v > 0), default=0.01)
    x = Scale(1, max(most, 2), _LEFT, WIDTH - _RIGHT)
    y = Scale(max(1e-3, low / 1.2), 1.1, HEIGHT - _BOTTOM, _TOP, log=True)
    figure.axes(x, y, "singular value, largest first", "share of the largest")
    for i, (below, middle, above) in curves:
        path = [(x(n + 1), y(v)) for n, v in enumerate(above)] + [
            (x(n + 1), y(v)) for n, v in reversed(list(enumerate(below)))
        ]
        figure.add("polygon", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in path), cls=f"c{i % 8} band")
        figure.line([(x(n + 1), y(v)) for n, v in enumerate(middle)], f"c{i % 8}")
    return figure.svg()


def _quantiles(capacity: Capacity) -> tuple[list[float], list[float], list[float]]:
    """10 %, 50 % and 90 % over layers of each singular value."""
    length = max(len(s.values) for s in capacity.spectra)
    columns = [sorted(s.values[n] for s in capacity.spectra if n < len(s.values)) for n in range(length)]

    def at(share: float) -> list[float]:
        return [column[min(len(column) - 1, int(share * len(column)))] for column in columns]

    return at(0.1), at(0.5), at(0.9)
