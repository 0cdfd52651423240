"""Charts: one way to draw a loss, in reports and in notebooks, and a style for everything in it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

import graftlm as graft
from graftlm.experiments.reports.charts import HEIGHT, WIDTH, Line, Scale, loss_chart, loss_scale, smoothed, style

TRAIN = [(step, 0.9 + 2.0 * math.exp(-step / 20)) for step in range(1, 61)]
EVALS = [(0, 3.0), (30, 1.4), (60, 1.0)]


def lines(svg: str) -> list[list[tuple[float, float]]]:
    """Points of the polylines of a chart, in pixels."""
    found = ElementTree.fromstring(svg).findall("polyline")
    return [[tuple(map(float, point.split(","))) for point in line.attrib["points"].split()] for line in found]  # type: ignore[misc]


def test_a_loss_that_falls_goes_down_and_to_the_right_within_the_frame() -> None:
    (points,) = lines(loss_chart("loss", [Line(EVALS, "c1", dots=True)]))
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted(y for _, y in points), "pixels count from the top"
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)


def test_what_is_not_finite_is_left_out_and_moves_nothing_else() -> None:
    whole = [*EVALS, (90, math.nan), (120, math.inf)]
    (points,) = lines(loss_chart("loss", [Line([*EVALS, (120, 1.0)], "c0")]))
    (left,) = lines(loss_chart("loss", [Line(whole, "c0")]))
    assert left == points[:3]
    assert lines(loss_chart("loss", [Line([(1, math.nan)], "c0")])) == [[]]


def test_losses_that_span_more_than_a_factor_of_four_are_drawn_by_their_logarithm() -> None:
    scale = loss_scale([0.5, 5.0])
    assert scale.log
    assert scale(1.0) - scale(2.0) == pytest.approx(scale(2.0) - scale(4.0))
    assert not loss_scale([1.0, 3.9]).log
    assert not loss_scale([]).log or loss_scale([]).low > 0


def test_ticks_are_round_and_within_their_range() -> None:
    for low, high in ((0.0, 300.0), (0.93, 3.1), (1e-5, 3e-3), (4.0, 4.0)):
        scale = Scale(low, high, 0.0, 100.0, log=low == 1e-5)
        assert all(low <= tick <= high * (1 + 1e-9) for tick in scale.ticks())
        assert len(scale.ticks()) <= 10


def test_a_smoothed_line_is_the_running_mean_and_short() -> None:
    points = [(step, float(step % 7)) for step in range(1, 5001)]
    for count in (1, 30, 222, 399, 5000):
        assert 1 <= len(smoothed(points[:count])) <= 200
    found = smoothed(points)
    step, value = found[-1]
    assert step == 5000
    assert value == pytest.approx(sum(v for _, v in points[-500:]) / 500)
    assert smoothed([]) == []


def test_a_run_in_a_notebook_shows_the_chart_of_the_reports_with_its_style(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"method": "lora", "model": "demo", "base_precision": "nf4"}))
    metrics = [
        *({"step": step, "kind": "train", "loss": loss} for step, loss in TRAIN),
        *({"step": step, "kind": "eval", "eval_loss": loss} for step, loss in EVALS),
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    html = graft.Run.open(tmp_path)._repr_html_()  # pyright: ignore[reportPrivateUsage]
    svg = html[html.index("<svg") : html.index("</svg>") + len("</svg>")]
    assert svg == loss_chart("loss by step", [Line(smoothed(TRAIN), "c0 faint"), Line(EVALS, "c1", dots=True)])
    assert style() in html
    named = {name for names in re.findall(r'class="([^"]*)"', svg) for name in names.split()}
    assert named <= set(re.findall(r"\.([a-z]\w*)", style())), "every class of a chart has a style"


def test_the_style_of_charts_says_nothing_about_the_page_around_them() -> None:
    rules = re.sub(r"/\*.*?\*/", "", style(), flags=re.DOTALL)
    selectors = [part.strip() for rule in re.findall(r"([^{}]+)\{[^}]*\}", rules) for part in rule.split(",")]
    assert selectors
    assert all(selector.startswith(".graft-charts ") for selector in selectors)
