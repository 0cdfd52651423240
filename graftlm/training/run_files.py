"""The files of a run folder that others read while the run goes on: their names, and JSON lines.

A run appends lines, and a crash may cut the last one short; whoever reads leaves that one out. This module imports no torch, so
that a reader of run folders (`graft board`) starts at once and needs little memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from graftlm.files import write_text
from graftlm.jsonfile import parse_json

LOCK = ".running"
"""Held while a process works in the folder; its number is in it."""
CONFIG, PLAN, DATA, ENVIRONMENT = "config.json", "plan.json", "data.json", "environment.json"
METRICS, SAMPLES, SUMMARY = "metrics.jsonl", "samples.jsonl", "summary.json"
SO_FAR = "{}-so-far"
"""What the result of an interrupted run is called: `adapter-so-far` or `model-so-far`."""


class MetricsFile:
    """metrics.jsonl or samples.jsonl, one line at once; a run that goes on drops the lines after the step it goes on from."""

    def __init__(self, path: Path, from_step: int | None) -> None:
        """`from_step` is None for a run that begins."""
        kept: list[dict[str, Any]] = []
        if from_step is not None and path.is_file():
            kept = [line for line in read_metrics(path) if line.get("step", 0) <= from_step]
        write_lines(path, kept)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        self._stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        with suppress(OSError):  # what could not be flushed was reported where it was written
            self._stream.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl under today's names; one that was written before, or in part, reads the same."""
    return [todays_names(line) for line in read_lines(path)]


def read_evaluation(path: Path) -> list[dict[str, Any]]:
    """The lines of an evaluation.jsonl under today's names."""
    return [todays_names(line) for line in read_lines(path)]


def todays_names(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl or evaluation.jsonl under today's names."""
    names = {"trained_tokens": "target_tokens"}
    if line.get("kind") == "eval":
        names |= {"loss": "eval_loss", "rows": "eval_examples"}
    return {names.get(key, key): value for key, value in line.items()}


def read_lines(path: Path) -> Iterable[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line cut short by a crash is left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield parse_json(line)
        except ValueError:
            continue


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write a JSON-lines file in one piece. Raises OSError."""
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
