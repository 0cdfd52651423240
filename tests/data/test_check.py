"""What `graft check` finds and how it shows it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from small_rows import encoder, numbered, write

from graftlm.base.chat import Encoder
from graftlm.data.check import check, histogram
from graftlm.data.dataset import load
from graftlm.data.sources import Source


def rendered(report: Any, *, color: bool = False) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=160, force_terminal=color, color_system="standard" if color else None)
    report.render(console)
    return stream.getvalue()


def test_a_report_counts_what_load_gives(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", numbered(50))
    report, dataset = check([source], encoder()), load([source], encoder())
    assert (report.rows, report.tokens, report.target_tokens) == (50, dataset.tokens, dataset.target_tokens)
    assert report.longest == dataset.longest
    assert sum(step.rows for step in report.histogram) == 50
    assert report.good
    assert (report.duplicates, report.overlap, report.overlong, report.faults) == (0, 0, 0, 0)


def test_bad_long_repeated_and_overlapping_rows_are_found_with_their_places(tmp_path: Path) -> None:
    long = {"prompt": "The pub", "completion": " near the river" * 30}
    train = write(tmp_path / "a.jsonl", [*numbered(4), numbered(4)[1], long, {"prompt": "x", "completion": 3}])
    valid = write(tmp_path / "b.jsonl", [numbered(4)[2], *numbered(2, start=100)])
    report = check([train], encoder(), eval_sources=[valid], max_tokens=40)
    assert report.duplicate_rows == ((f"{train.path}:2", f"{train.path}:5"),)
    assert report.overlap_rows == ((f"{valid.path}:1", f"{train.path}:3"),)
    assert len(report.overlong_rows) == 1
    assert report.overlong_rows[0].startswith(f"{train.path}:6 (")
    assert report.fault_rows[0].startswith(f"{train.path}:7: completion: 3")
    assert (report.rows, report.eval_rows, report.duplicates, report.faults) == (6, 3, 1, 1)
    assert not report.good
    text = rendered(report)
    for part in ("too long", "duplicates", "bad rows", f"{train.path}:7: completion: 3", f"{train.path}:2 = "):
        assert part in text


def test_more_than_twenty_bad_rows_are_counted(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [*numbered(1), *[{"prompt": "x", "completion": ""}] * 25])
    report = check([source], encoder())
    assert report.faults == 25
    assert len(report.fault_rows) == 20
    assert "and 5 more" in rendered(report)


def test_a_report_is_plain_json(tmp_path: Path) -> None:
    report = check([write(tmp_path / "a.jsonl", numbered(5))], encoder())
    value = json.loads(json.dumps(report.to_json()))
    assert value == report.to_json()
    assert value["good"] is True
    assert value["previews"][0]["pieces"] == [
        {"text": "0:", "in_loss": False},
        {"text": " 0<|endoftext|>", "in_loss": True},
    ]


def test_two_examples_show_the_trained_tokens_in_green(tmp_path: Path) -> None:
    report = check([write(tmp_path / "a.jsonl", numbered(5))], encoder())
    assert len(report.previews) == 2
    assert "\x1b[32m 0<|endoftext|>\x1b[0m" in rendered(report, color=True)


def test_text_that_looks_like_console_markup_is_shown_as_it_is(tmp_path: Path) -> None:
    source = write(
        tmp_path / "a.jsonl",
        [{"prompt": "[bold]x[/nothing]", "completion": "[red]"}, {"prompt": 1, "completion": "[/x]"}],
    )
    text = rendered(check([source], encoder()))
    assert "[bold]x[/nothing]{+[red]<|endoftext|>+}" in text, "what is trained is marked where no colour can"


def test_a_file_of_bad_rows_only_still_gives_a_report(tmp_path: Path) -> None:
    report = check([write(tmp_path / "a.jsonl", [{"text": 1}])], encoder())
    assert (report.rows, report.faults, report.previews, report.histogram) == (0, 1, (), ())
    assert "bad rows" in rendered(report)
    json.dumps(report.to_json())


def test_histogram_steps_double_and_hold_every_row() -> None:
    steps = histogram(np.array([3, 16, 17, 100, 1000]))
    assert [(step.low, step.high, step.rows) for step in steps][:3] == [(1, 16, 2), (17, 32, 1), (33, 64, 0)]
    assert sum(step.rows for step in steps) == 5
    assert histogram(np.array([], np.int64)) == ()


def test_the_template_in_use_is_named(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    report = check(
        [write(tmp_path / "a.jsonl", [{"messages": messages}])], Encoder(encoder().tokenizer, date="2020-02-02")
    )
    assert "plain (the model has none), date 2020-02-02" in rendered(report)
    assert report.template_digest == encoder().template_digest


def test_a_source_is_read_by_path(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", numbered(2))
    assert check([Source.parse(source.path)], encoder()).rows == 2
