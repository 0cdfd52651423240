"""A run as plain values: a line of the list, everything about it, and its curve. Losses in nats a target token, bytes, seconds.

Files come from other people's machines: a value of another type than is expected is left out of the list, and shown as it is
among the options.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from graftlm.config.aliases import renamed, renamed_summary
from graftlm.dashboard.folders import Folders, Item, object_in
from graftlm.dashboard.metrics_log import MetricsLog
from graftlm.dashboard.run_state import run_state
from graftlm.errors import RunError
from graftlm.formatting import size
from graftlm.jsonfile import parse_json
from graftlm.training.run_files import CONFIG, DATA, ENVIRONMENT, METRICS, PLAN, SAMPLES, SUMMARY

OUTCOME = "result.json"
"""What a comparison and a sweep leave in the folders of their runs."""
MOST_SAMPLE_BYTES = 4 << 20
MOST_EVENTS = 50
_FILES = (CONFIG, PLAN, DATA, ENVIRONMENT, SUMMARY, OUTCOME)


@dataclass
class RunReader:
    """One run, read again where its files have changed."""

    item: Item
    folders: Folders
    _read: dict[str, tuple[object, dict[str, Any], str | None]] = field(
        default_factory=dict[str, tuple[object, dict[str, Any], "str | None"]]
    )

    _sampled: tuple[object, list[dict[str, Any]], list[str]] | None = None

    def __post_init__(self) -> None:
        self.log = MetricsLog(self.item.folder / METRICS, self.folders)

    def refresh(self, *, parse: bool = False) -> None:
        """Read what has changed. `parse` the steps too, which a curve needs."""
        self.log.refresh(parse=parse)
        for name in _FILES:
            path = self.item.folder / name
            try:
                status = path.lstat()
                mark: object = (status.st_ino, status.st_size, status.st_mtime_ns)
            except OSError:
                mark = None
            if name not in self._read or self._read[name][0] != mark:
                self._read[name] = (mark, *object_in(path, self.folders))

    def file(self, name: str) -> dict[str, Any]:
        """The object in one of its files; empty where that is missing or damaged."""
        return self._read[name][1]

    @property
    def faults(self) -> list[str]:
        """What of its files cannot be read."""
        said = [fault for _, _, fault in self._read.values() if fault is not None]
        if self.log.fault is not None:
            said.append(self.log.fault)
        if self.log.damaged:
            lines = "1 line" if self.log.damaged == 1 else f"{self.log.damaged:,} lines"
            said.append(f"{lines} of {METRICS} cannot be read and {'is' if self.log.damaged == 1 else 'are'} left out")
        return said

    @property
    def config(self) -> dict[str, Any]:
        return _renamed(self.file(CONFIG), renamed)

    @property
    def summary(self) -> dict[str, Any]:
        outcome = self.file(OUTCOME).get("summary")
        return _renamed(self.file(SUMMARY) or (outcome if isinstance(outcome, dict) else {}), renamed_summary)

    def line(self) -> dict[str, Any]:
        """What the list of runs shows."""
        config, summary, log = self.config, self.summary, self.log
        found = run_state(self.item.folder, log, summary, self.file(OUTCOME), time.time())
        best = self._best()
        plan = self.file(PLAN)
        step, tokens, seconds = (number(log.last.get(key)) for key in ("step", "tokens", "seconds"))
        rate = number(summary.get("tokens_per_second")) or (tokens / seconds if tokens and seconds else None)
        before = next((line["eval_loss"] for line in log.evals if line["step"] == 0), None)
        return {
            "id": self.item.id, "name": self.item.name, "parent": self.item.parent, "role": self.item.role,
            "state": found.state, "how": found.how, "faults": self.faults,
            "model": text(config.get("model")), "method": text(config.get("method")),
            "base_precision": text(config.get("base_precision")), "rank": number(config.get("rank")),
            "learning_rate": number(config.get("learning_rate")),
            "step": step if step is not None else number(summary.get("steps")) or 0, "steps": self._steps(config, plan),
            "loss": number(log.last.get("loss")), "rate": rate,
            "eval_before": before if before is not None else number(summary.get("eval_loss_before")),
            "eval_best": best["eval_loss"] if best else number(summary.get("eval_loss_after")),
            "eval_best_step": best["step"] if best else None,
            "score": text(config.get("score")), "score_best": number(best.get("eval_score")) if best else None,
            "memory_planned": number(_within(plan, "predicted", "peak_bytes")),
            "memory_measured": number(_within(plan, "measured", "peak_memory_bytes") or summary.get("peak_memory_bytes")),
            "memory_idle": number(_within(plan, "measured", "idle_memory_bytes") or summary.get("idle_memory_bytes")),
            "adapter": text(summary.get("adapter_digest")),
            "started": text(self.file(ENVIRONMENT).get("started")), "modified": log.modified,
        }  # fmt: skip

    def everything(self) -> dict[str, Any]:
        """The line, the files as they are, evaluations, events and samples."""
        samples, left_out = self._samples()
        line = self.line()
        return {
            **line, "faults": [*line["faults"], *left_out],
            "config": self.config, "summary": self.summary, "plan": self.file(PLAN), "data": self.file(DATA),
            "environment": self.file(ENVIRONMENT), "evals": self.log.evals, "events": self.log.events[-MOST_EVENTS:],
            "samples": samples,
        }  # fmt: skip

    def _best(self) -> dict[str, Any] | None:
        after = [line for line in self.log.evals if line["step"] > 0 and line["eval_loss"] is not None]
        scored = self.config.get("best_by") == "score"
        return min(
            after,
            key=lambda line: (-(number(line.get("eval_score")) or 0.0) if scored else 0.0, line["eval_loss"]),
            default=None,
        )

    def _steps(self, config: dict[str, Any], plan: dict[str, Any]) -> float | None:
        """Steps of the whole run; of one written before plan.json held them, where the options say so."""
        return number(plan.get("steps")) or number(config.get("steps"))

    def _samples(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The samples, and what of them is not shown; read again where the file has changed."""
        path = self.item.folder / SAMPLES
        try:
            status = self.folders.checked(path).lstat()
            mark = (status.st_ino, status.st_size, status.st_mtime_ns)
            if self._sampled is None or self._sampled[0] != mark:
                with self.folders.opened(path) as stream:
                    self._sampled = (mark, *_samples_in(stream))
        except (OSError, RunError) as error:
            return [], [str(error)] if os.path.lexists(path) else []
        return self._sampled[1:]


def _samples_in(stream: BinaryIO) -> tuple[list[dict[str, Any]], list[str]]:
    """The samples at the end of a file, at most `MOST_SAMPLE_BYTES` of it, and what is left out."""
    whole = os.fstat(stream.fileno()).st_size
    begin = max(0, whole - MOST_SAMPLE_BYTES)
    stream.seek(begin)
    lines = stream.read(MOST_SAMPLE_BYTES).split(b"\n")[1 if begin else 0 : -1]
    found: list[dict[str, Any]] = []
    for line in lines:
        try:
            value = parse_json(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            found.append(value)
    said: list[str] = []
    if damaged := len(lines) - len(found):
        said.append(f"{damaged:,} of {len(lines):,} lines of {SAMPLES} cannot be read")
    if begin:
        said.append(f"{SAMPLES} has {size(whole)}; shown are the samples in its last {size(MOST_SAMPLE_BYTES)}")
    return found, said


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def text(value: Any) -> str | None:
    """A text, or None for anything else."""
    return value if isinstance(value, str) else None


def _within(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _renamed(values: dict[str, Any], change: Any) -> dict[str, Any]:
    """Under today's names; a damaged file keeps those that it has."""
    try:
        return change(values)
    except (ValueError, TypeError, AttributeError, KeyError):
        return values
