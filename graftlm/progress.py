"""Progress of long operations: reported from anywhere, drawn in one place.

    with working("reading data", total=size, unit="bytes") as task:
        task.to(done)

A command turns drawing on with `shown()`; elsewhere (from Python, in tests, in the child processes of `graft compare`) the
calls do nothing. In a terminal, tasks are progress bars on standard error that disappear at their end. If standard error is a
file or a pipe, the innermost task prints a line after ten seconds, then every thirty.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Unit = Literal["", "bytes", "rows", "steps", "tokens", "files", "trials", "prompts", "versions", "tensors"]
SOON, FIRST_LINE, LINES = 0.4, 10.0, 30.0
"""Seconds until a bar is drawn, until the first line of a pipe, and between its lines."""


@dataclass(eq=False)
class Task:
    """A running operation."""

    what: str
    total: float | None = None
    unit: Unit = ""
    done: float = 0
    note: str = ""
    began: float = field(default_factory=time.monotonic)
    _moved: Callable[[Task], None] | None = field(default=None, repr=False)

    def to(self, done: float, total: float | None = None, note: str | None = None) -> None:
        """Report progress; `note` is shown after the numbers."""
        self.done = done
        self.total = self.total if total is None else total
        self.note = self.note if note is None else note
        sign_of_life()
        if self._moved is not None:
            self._moved(self)

    @property
    def counted(self) -> str:
        """The progress as text: `1,024 of 3,000 rows`."""
        if self.unit == "bytes":
            whole = f" of {self.total / 1e6:,.1f}" if self.total else ""
            return f"{self.done / 1e6:,.1f}{whole} MB"
        if not self.unit or (not self.done and self.total is None):
            return ""
        whole = f" of {self.total:,.0f}" if self.total is not None else ""
        return f"{self.done:,.0f}{whole} {self.unit}"

    @property
    def line(self) -> str:
        """The task on one line."""
        parts = [part for part in (self.counted, self.note, f"{time.monotonic() - self.began:.0f} s") if part]
        return f"{self.what}: {', '.join(parts)}"


class Display(Protocol):
    """A display that draws tasks."""

    def begin(self, task: Task) -> None: ...

    def moved(self, task: Task) -> None: ...

    def end(self, task: Task) -> None: ...


LONG = 3600.0
"""Seconds for which a library may be called that reports nothing itself: it downloads or converts a whole model."""
_displays: list[Display] = []  # the last one draws
_listeners: list[Callable[[float], None]] = []


@contextmanager
def heard(listener: Callable[[float], None]) -> Iterator[None]:
    """Call `listener` at every sign of progress during the block, whether or not it is drawn; see `sign_of_life`."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def sign_of_life(quiet_for: float = 0.0) -> None:
    """Tell the listeners that work goes on, and that the next sign may take `quiet_for` seconds; moves of tasks are signs.

    For each tensor or block of bytes of what is not drawn, or takes long between two moves.
    """
    for listener in _listeners:
        listener(quiet_for)


def begin(what: str, total: float | None = None, unit: Unit = "", *, done: float = 0) -> Task:
    """Start a task; `end` ends it, and `working` does both."""
    task = Task(what, total, unit, done)
    sign_of_life()
    if _displays:
        display = _displays[-1]
        task._moved = display.moved  # pyright: ignore[reportPrivateUsage]
        display.begin(task)
    return task


def end(task: Task) -> None:
    """End a task."""
    sign_of_life()
    if _displays:
        _displays[-1].end(task)


@contextmanager
def working(what: str, total: float | None = None, unit: Unit = "") -> Iterator[Task]:
    """Report the block as a task."""
    task = begin(what, total, unit)
    try:
        yield task
    finally:
        end(task)


@contextmanager
def shown(display: Display | None = None) -> Iterator[None]:
    """Draw the tasks of the block: in a terminal as bars, else as lines."""
    chosen: Display = display or (_Bars() if _terminal() else _Lines())
    _displays.append(chosen)
    try:
        yield
    finally:
        _displays.remove(chosen)
        if isinstance(chosen, _Drawn):
            chosen.close()


def _terminal() -> bool:
    from rich.console import Console

    console = Console(stderr=True)
    return console.is_terminal and not console.is_dumb_terminal


class _Drawn:
    """Tasks, and a thread that draws them while there are any."""

    period = 0.1

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.lock = threading.RLock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, task: Task) -> None:
        with self.lock:
            self.tasks.append(task)
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="graft-progress", daemon=True)
                self._thread.start()

    def moved(self, task: Task) -> None: ...

    def end(self, task: Task) -> None:
        with self.lock:
            if task in self.tasks:
                self.tasks.remove(task)
            self.gone(task)

    def close(self) -> None:
        """Stop drawing."""
        with self.lock:
            self._wake.set()
            for task in list(self.tasks):
                self.end(task)

    def _look(self) -> None:
        while not self._wake.wait(self.period):
            with self.lock:
                if self.tasks and not self._wake.is_set():
                    self.look()

    def look(self) -> None:
        raise NotImplementedError

    def gone(self, task: Task) -> None: ...


class _Lines(_Drawn):
    """Prints a line for the newest task from time to time."""

    period = 0.5

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[Task, float] = {}

    def look(self) -> None:
        task, now = self.tasks[-1], time.monotonic()
        if now < self._next.setdefault(task, task.began + FIRST_LINE):
            return
        self._next[task] = now + LINES
        try:
            sys.stderr.write(task.line + "\n")
            sys.stderr.flush()
        except (OSError, ValueError):  # nobody reads it any more
            self._wake.set()

    def gone(self, task: Task) -> None:
        self._next.pop(task, None)


class _Bars(_Drawn):
    """Draws a bar for each task, the newest at the bottom."""

    def __init__(self) -> None:
        super().__init__()
        self._live: Any = None
        self._bars: dict[Task, Any] = {}

    def look(self) -> None:
        now = time.monotonic()
        for task in self.tasks:
            if task not in self._bars and now - task.began >= SOON:
                self._bars[task] = self._open().add_task("", total=task.total, what=task.what, text="", left="")
        for task, bar in self._bars.items():
            text = " ".join(part for part in (task.counted, task.note) if part)
            self._live.update(bar, completed=task.done, total=task.total, text=text)

    def gone(self, task: Task) -> None:
        bar = self._bars.pop(task, None)
        if bar is None:
            return
        self._live.remove_task(bar)
        if not self._bars:
            self._live.stop()
            self._live = None

    def _open(self) -> Any:
        if self._live is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                Progress,
                SpinnerColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            columns = (
                SpinnerColumn(), TextColumn("{task.fields[what]}", markup=False), BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}", markup=False), TimeElapsedColumn(), TimeRemainingColumn(),
            )  # fmt: skip
            self._live = Progress(*columns, console=Console(stderr=True), transient=True)
            self._live.start()
        return self._live
