"""The plot of `bench/memory.py`: planned against measured, and each run's error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"full": "#1f77b4", "lora": "#d95f02", "qlora": "#1b9e77"}
MARKERS = {"smollm2": "s", "gemma": "D"}
TICKS = (50, 100, 200, 500, 1000, 2000, 5000)
SHORT = {"activation checkpointing": "checkpointing", "optimizer in backward": "in backward", "targets ['attention']":
         "attention", "targets ['q_proj', 'v_proj']": "q and v", "score exact-match": "with answers"}  # fmt: skip


def plot(found: list[dict[str, Any]], file: Path) -> None:
    """Planned against measured, and the errors; real bases have marks of their own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 0.155 * len(found) + 1.2), width_ratios=(1, 1))
    _planned_against_measured(left, found)
    _errors(right, found)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def _planned_against_measured(axes: Any, found: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    most = 1.1 * max(max(f["planned"], f["measured"]) for f in found) / 1e6
    least = 0.8 * min(min(f["planned"], f["measured"]) for f in found) / 1e6
    axes.plot([least, most], [least, most], color="0.4", linewidth=1)
    axes.fill_between(
        [least, most], [0.9 * least, 0.9 * most], [1.1 * least, 1.1 * most], color="0.92", label="within 10 %"
    )
    for kind, marker in {"random Llamas": "o", **MARKERS}.items():
        own = [f for f in found if MARKERS.get(f["base"], "o") == marker]
        if own:
            axes.scatter([], [], color="0.4", marker=marker, label=kind, s=26)
        for f in own:
            axes.scatter(f["measured"] / 1e6, f["planned"] / 1e6, color=COLOURS[f["method"]], marker=marker, s=26)
    for method, colour in COLOURS.items():
        axes.plot([], [], color=colour, linewidth=5, label=method)
    axes.set(
        xscale="log", yscale="log", xlim=(least, most), ylim=(least, most), xlabel="measured MB", ylabel="planned MB"
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator([mb for mb in TICKS if least < mb < most]))
        axis.set_major_formatter(lambda mb, place: f"{mb:,.0f}")
        axis.set_minor_locator(NullLocator())
    axes.set_title("Peak memory of a training run", fontsize=11)
    axes.legend(frameon=False, fontsize=9)


def _errors(axes: Any, found: list[dict[str, Any]]) -> None:
    ordered = sorted(found, key=lambda f: f["error"])
    places = range(len(ordered))
    axes.barh(places, [100 * f["error"] for f in ordered], color=[COLOURS[f["method"]] for f in ordered])
    axes.set_yticks(places, [_short(f) for f in ordered], fontsize=6)
    axes.set_ylim(-1, len(ordered))
    axes.axvline(0, color="0.3", linewidth=0.8)
    for bar in (-10, 10):
        axes.axvline(bar, color="0.6", linewidth=0.8, linestyle="--")
    edge = max(15.0, *(105 * abs(f["error"]) for f in found))
    axes.set(xlim=(-edge, edge), xlabel="planned above measured, %")
    axes.set_title("Signed error of each run", fontsize=11)


def _short(figures: dict[str, Any]) -> str:
    what = figures["what"]
    for text, short in SHORT.items():
        what = what.replace(text, short)
    return f"{figures['base']} {what}, {figures['batch']} x {figures['length']}"
