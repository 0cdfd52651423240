"""The figures of a comparison's report."""

from __future__ import annotations

from collections.abc import Sequence

from graftlm.experiments.compare.capacity import Capacity
from graftlm.experiments.compare.results import Comparison, VariantResult
from graftlm.experiments.compare.verdict import Verdict
from graftlm.experiments.reports.charts import (
    BOTTOM,
    CHARACTER,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Figure,
    Line,
    Plot,
    Scale,
    loss_chart,
    plain,
    smoothed,
)
from graftlm.formatting import size


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
    runs = [(i % 8, curve) for i, line in enumerate(lines) for curve in line.curves]
    train = [Line(smoothed(curve.train), f"c{colour} faint") for colour, curve in runs]
    evals = [Line(curve.eval_losses, f"c{colour}", dots=True) for colour, curve in runs]
    return loss_chart("loss by step of each variant and seed", [*train, *evals])


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
    x = Scale(min(memory) - 0.15 * wide, max(memory) + 0.3 * wide, LEFT, WIDTH - RIGHT)
    y = Scale(low - room, high + room, HEIGHT - BOTTOM, TOP)
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
        beside = at_x + 9 + CHARACTER * len(line.name) < WIDTH
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
    bottom = height - BOTTOM
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
    x = Scale(1, max(most, 2), LEFT, WIDTH - RIGHT)
    y = Scale(max(1e-3, low / 1.2), 1.1, HEIGHT - BOTTOM, TOP, log=True)
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
