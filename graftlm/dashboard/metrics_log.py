"""metrics.jsonl of a run that may go on: only what is new is read, and a curve has a bounded number of points.

A run of 10,000 steps has 3 MB of lines. The list of runs needs its evaluations and its last step, so there the lines of steps
are counted and not parsed (`parse=False`); they are parsed once a curve is asked for. A curve of S steps has at most
`MOST_POINTS` points: point i covers the w steps from i w on, w the smallest power of two that suffices, so while a run grows
only the last points change, until w doubles.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from graftlm.dashboard.folders import Folders
from graftlm.errors import RunError
from graftlm.jsonfile import parse_json
from graftlm.training.run_files import todays_names

MOST_POINTS = 512
_BLOCK = 1 << 22
"""Bytes that are read at once."""
_LONGEST = 1 << 20
"""Bytes of a line; a longer one is damaged."""
_MOST_STEP = 1 << 53
_STEP, _OTHER = b'"kind": "train"', b'"kind": "e'
"""How a run writes the lines of steps, and those of evaluations and events."""
_COMPARED = 256
"""Bytes before the end of what was read, by which a new file with the number of an old one is told from it."""
_GENERATIONS = itertools.count(time.time_ns() // 1_000_000)
"""Begins with the time, so that no generation of a board that was started again is one that a page knows."""
_BATCH = 256
"""Lines that are parsed together."""
COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "tokens", "seconds", "num_tokens")


@dataclass
class CurvePoints:
    """The curve of a run: its steps, in at most `MOST_POINTS` points; what is not finite is None."""

    width: int
    """Steps of a point."""
    first: int
    """Index of the first point that is here."""
    columns: dict[str, list[float | None]]
    """step (last of the point), loss, low, high, learning_rate, grad_norm (highest), rate (tokens/s), tokens, hours."""


@dataclass
class MetricsLog:
    """What has been read of a metrics.jsonl."""

    path: Path
    folders: Folders
    parse: bool = False
    generation: int = 0
    """Another for each object, and whenever the file was begun anew, as by a run that goes on from a checkpoint."""
    evals: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    events: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    last: dict[str, Any] = field(default_factory=dict[str, Any])
    """The last step."""
    damaged: int = 0
    """Lines that could not be read."""
    fault: str | None = None
    """Why the file cannot be read."""
    modified: float | None = None
    """When it was written last, in seconds since 1970."""

    def __post_init__(self) -> None:
        self._file: tuple[int, int] | None = None
        self._mark: object = None
        self._begin()

    def _begin(self) -> None:
        self._offset, self._rest, self._skipping = 0, b"", False
        self.evals, self.events, self.last, self.damaged = [], [], {}, 0
        self._columns = {name: array("d") for name in COLUMNS}
        self._tail = self._last = b""
        self.generation = next(_GENERATIONS)

    def refresh(self, *, parse: bool = False) -> None:
        """Read what is new. `parse` from now on every line."""
        again = parse and not self.parse
        try:
            status = self.folders.checked(self.path).lstat()
            self.fault, self.modified = None, status.st_mtime
            mark = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if mark == self._mark and not again:
                return
            with self.folders.opened(self.path) as stream:
                self._read(stream, again)
            self._mark = mark
        except RunError as error:
            self.fault = str(error) if os.path.lexists(self.path) else None
        except OSError as error:
            self.fault = f"{self.path.name} cannot be read: {error.strerror}"
        self._read_tail()

    def _read(self, stream: BinaryIO, again: bool) -> None:
        """Read what is new of the open file; all of it where it is another, or `again`."""
        status = os.fstat(stream.fileno())
        file = (status.st_dev, status.st_ino)
        if again or file != self._file or status.st_size < self._offset or not self._goes_on(stream):
            self.parse = self.parse or again
            self._file = file
            self._begin()
        stream.seek(self._offset)
        while block := stream.read(_BLOCK):
            self._offset += len(block)
            self._last = (self._last + block if len(block) < _COMPARED else block)[-_COMPARED:]
            self._feed(block)

    def _goes_on(self, stream: BinaryIO) -> bool:
        """Whether the file still has what was read of it last."""
        stream.seek(self._offset - len(self._last))
        return stream.read(len(self._last)) == self._last

    def _feed(self, block: bytes) -> None:
        whole, _, self._rest = (self._rest + block).rpartition(b"\n")
        if self._skipping and whole:  # the end of a line that was too long
            whole = whole.partition(b"\n")[2]
            self._skipping = False
        if len(self._rest) > _LONGEST:
            self._rest = b""
            self.damaged += not self._skipping
            self._skipping = True
        lines = whole.split(b"\n") if self.parse else self._without_steps(whole)
        for at in range(0, len(lines), _BATCH):
            self._read_lines([line for line in lines[at : at + _BATCH] if line])

    def _without_steps(self, whole: bytes) -> list[bytes]:
        """The lines of a block that are no steps, and the last step; all lines, where that is not clear at a glance."""
        steps, others = whole.count(_STEP), whole.count(_OTHER)
        if steps + others < whole.count(b"\n") + (whole != b""):
            kept = [line for line in whole.split(b"\n") if _STEP not in line]
        else:
            kept, at = [], whole.find(_OTHER)
            while at >= 0:
                end = whole.find(b"\n", at)
                end = len(whole) if end < 0 else end
                kept.append(whole[whole.rfind(b"\n", 0, at) + 1 : end])
                at = whole.find(_OTHER, end)
        if steps:
            at = whole.rfind(_STEP)
            end = whole.find(b"\n", at)
            self._tail = whole[whole.rfind(b"\n", 0, at) + 1 : len(whole) if end < 0 else end]
        return kept

    def _read_tail(self) -> None:
        """The last step, where steps are not parsed."""
        if self._tail:
            line, self._tail = self._tail, b""
            self._read_lines([line], keep=False)

    def _read_lines(self, lines: list[bytes], *, keep: bool = True) -> None:
        """Parse lines together, which takes a third of the time, or each alone where one of them is damaged."""
        try:
            found = parse_json(b"[" + b",".join(lines) + b"]")
            if len(found) != len(lines) or max(map(len, lines), default=0) > _LONGEST:
                raise ValueError
            for line in found:
                self._check(line)
        except ValueError:
            found = [line for one in lines if (line := self._alone(one)) is not None]
        for line in found:
            if line["kind"] == "train":
                self.last = line
                if keep:
                    for name, column in self._columns.items():
                        column.append(_number(line.get(name)))
            elif line["kind"] == "eval":
                line = todays_names(line)
                self.evals.append({**line, "eval_loss": _finite(_number(line.get("eval_loss")))})
            else:
                self.events.append(line)

    def _alone(self, line: bytes) -> dict[str, Any] | None:
        try:
            if len(line) > _LONGEST:
                raise ValueError
            found = parse_json(line)
            self._check(found)
        except ValueError:
            self.damaged += 1
            return None
        return found

    @staticmethod
    def _check(line: Any) -> None:
        """Raises ValueError for what is no line of a run."""
        if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
            raise ValueError
        step = line.get("step")
        if type(step) is not int or not 0 <= step < _MOST_STEP:
            raise ValueError
        for name in COLUMNS if line["kind"] == "train" else ("eval_loss", "loss"):
            _number(line.get(name))

    def curve(self, generation: int = -1, width: int = 0, known: int = 0) -> CurvePoints:
        """The curve, without the first `known` points where these are of this `generation` and `width`.

        The last known point is sent again: it may cover more steps by now.
        """
        steps = np.asarray(self._columns["step"])
        if not len(steps):
            return CurvePoints(1, 0, {name: [] for name in (*_SHOWN, "low", "high")})
        wide = 1 << max(0, math.ceil(math.log2((steps.max() + 1) / MOST_POINTS)))
        index = (steps // wide).astype(np.int64)
        starts = np.flatnonzero(np.diff(index, prepend=index[0] - 1))  # first line of each point
        at = max(0, known - 1) if generation == self.generation and width == wide else 0
        return CurvePoints(
            wide, at, {name: _json(values[at:], name in _WHOLE) for name, values in self._points(starts).items()}
        )

    def _points(self, starts: Any) -> dict[str, Any]:
        column = {name: np.asarray(values) for name, values in self._columns.items()}
        ends = np.append(starts[1:], len(column["step"])) - 1
        counts = ends - starts + 1
        tokens = np.add.reduceat(np.nan_to_num(column["tokens"]), starts)
        seconds = np.add.reduceat(np.nan_to_num(column["seconds"]), starts)
        step = column["step"][ends]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return {
                "step": step,
                "loss": np.add.reduceat(column["loss"], starts) / counts,
                "low": np.fmin.reduceat(column["loss"], starts),
                "high": np.fmax.reduceat(column["loss"], starts),
                "learning_rate": column["learning_rate"][ends],
                "grad_norm": np.fmax.reduceat(column["grad_norm"], starts),  # a mean hides the spike of one step
                "rate": tokens / seconds,
                "tokens": column["num_tokens"][ends],
                "hours": np.cumsum(seconds) / 3600,
            }


_WHOLE = ("step", "tokens")
_SHOWN = ("step", "loss", "learning_rate", "grad_norm", "rate", "tokens", "hours")


def _number(value: Any) -> float:
    """A number of a line; NaN where there is none. Raises ValueError for what is no number."""
    if type(value) is float:
        return value
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    try:
        return float(value)
    except OverflowError:
        raise ValueError from None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _json(values: Any, whole: bool) -> list[float | None]:
    """As JSON; of a fraction six digits, which are more than a screen shows."""
    return [
        None if not math.isfinite(value) else int(value) if whole else float(f"{value:.6g}")
        for value in values.tolist()
    ]
