"""A run in a process of its own: how it ends is told to the parent, and it never waits for a reader."""

from __future__ import annotations

import json
import signal
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import tiny_run

from graftlm.commands import subprocess_main
from graftlm.commands import train as train_command
from graftlm.config import TrainConfig
from graftlm.errors import DataError, Stopped, TrainingError
from graftlm.experiments.subprocess_run import run_subprocess, train_in_subprocess


def answering(code: str) -> dict[str, Any]:
    """What the parent makes of a child that runs `code`."""
    return run_subprocess([sys.executable, "-c", f"import sys, json\n{code}"], "{}", lambda event: None)


@pytest.mark.timeout(30)
def test_a_child_that_writes_much_to_standard_error_does_not_hang() -> None:
    code = 'sys.stderr.write("x" * 300_000)\nprint(json.dumps({"event": "done", "summary": {"a": 1}}))'
    assert answering(code) == {"a": 1}


def test_a_child_that_dies_is_told_with_its_last_lines() -> None:
    with pytest.raises(TrainingError, match=r"ended with status 3: one \| two"):
        answering('sys.stderr.write("one\\ntwo\\n")\nsys.exit(3)')


def test_a_child_that_was_stopped_stops_the_parent() -> None:
    with pytest.raises(Stopped, match="after step 2") as stopped:
        answering('print(json.dumps({"event": "stopped", "signal": 15, "message": "after step 2"}))')
    assert stopped.value.signal_number == 15


def test_a_run_that_is_stopped_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopping(*args: Any, **options: Any) -> None:
        raise Stopped(signal.SIGTERM, "stopped after step 2")

    monkeypatch.setattr(train_command, "train", stopping)
    answers = StringIO()
    subprocess_main.main(StringIO(json.dumps(tiny_run.options(tmp_path))), answers)
    assert json.loads(answers.getvalue()) == {"event": "stopped", "signal": 15, "message": "stopped after step 2"}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_training_apart_tells_its_steps_and_gives_its_summary(tmp_path: Path, method: str) -> None:
    steps: list[int] = []
    config = TrainConfig.build(tiny_run.options(tmp_path, method=method, steps=2, eval_data=None) | {"eval_data": None})
    summary = train_in_subprocess(
        config, lambda event: steps.append(event["step"]) if event["event"] == "step" else None
    )
    assert (summary["steps"], steps) == (2, [1, 2])


def test_an_error_of_the_child_is_the_parents(tmp_path: Path) -> None:
    config = TrainConfig.build(tiny_run.options(tmp_path, data=[str(tmp_path / "gone.jsonl")]))
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        train_in_subprocess(config, lambda event: None)
