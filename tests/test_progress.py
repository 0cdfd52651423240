"""Progress is said in one place and drawn in one: bars in a terminal, a line now and then in a pipe, nothing elsewhere."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from graftlm import progress
from graftlm.progress import Task, begin, end, shown, working

PACKAGE = Path(__file__).parents[1] / "graftlm"


class Recorder:
    """A display that remembers."""

    def __init__(self) -> None:
        self.begun: list[Task] = []
        self.open: list[Task] = []
        self.calls = 0

    def begin(self, task: Task) -> None:
        self.begun.append(task)
        self.open.append(task)

    def moved(self, task: Task) -> None:
        assert task in self.open
        self.calls += 1

    def end(self, task: Task) -> None:
        if task in self.open:
            self.open.remove(task)


def test_nothing_is_drawn_unless_a_command_turns_it_on(capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    with working("reading", 3, "rows") as task:
        task.to(2)
    assert (task.done, threading.active_count()) == (2, before)
    assert capsys.readouterr() == ("", "")


def test_tasks_are_reported_to_the_display_and_end_with_an_error_too() -> None:
    display = Recorder()
    with shown(display):

        def work() -> None:
            with working("one", 2, "rows") as one:
                one.to(1)
                with working("two"):
                    assert [t.what for t in display.open] == ["one", "two"]
                raise ValueError("x")

        with pytest.raises(ValueError, match="x"):
            work()
        assert display.open == []
        other = begin("three", 5, "steps", done=2)
        assert other.done == 2
        end(other)
        end(other)
    assert [t.what for t in display.begun] == ["one", "two", "three"]
    assert display.calls == 1


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (Task("x", 3000, "rows", done=1024), "1,024 of 3,000 rows"),
        (Task("x", 2e8, "bytes", done=3.41e7), "34.1 of 200.0 MB"),
        (Task("x", None, "bytes", done=3.41e7), "34.1 MB"),
        (Task("x", None, "rows"), ""),
        (Task("x"), ""),
    ],
)
def test_the_progress_of_a_task_as_text(task: Task, said: str) -> None:
    assert task.counted == said


def test_a_pipe_gets_a_line_of_the_innermost_task_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE", 0.2)
    monkeypatch.setattr(progress, "LINES", 0.3)
    monkeypatch.setattr(progress._Lines, "period", 0.02)
    with shown(), working("outer"), working("reading", 10, "rows") as task:
        for i in range(10):
            task.to(i + 1)
            time.sleep(0.1)
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == ""
    assert 2 <= len(lines) <= 4
    assert all(re.fullmatch(r"reading: \d+ of 10 rows, \d s", line) for line in lines)


def test_a_short_task_says_nothing_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(), working("reading", 10, "rows") as task:
        task.to(10)
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


SCRIPT = """
import sys, time
from graftlm import progress
progress.SOON, progress.FIRST_LINE, progress._Lines.period = 0.1, 0.2, 0.05
with progress.shown():
    with progress.working("reading data", 4, "rows") as task:
        for i in range(4):
            time.sleep(0.3)
            task.to(i + 1, note="[bold]")
            if i == 2:
                print("a result")
    print("done")
"""


def in_a_terminal(command: list[str], **environment: str) -> str:
    """What a command writes to a terminal of 80 columns."""
    parent, child = pty.openpty()
    env = {**os.environ, "COLUMNS": "80", "TERM": "xterm", **environment}
    running = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=env)
    os.close(child)
    said = b""
    while True:
        ready, _, _ = select.select([parent], [], [], 60)
        try:
            block = os.read(parent, 4096) if ready else b""
        except OSError:  # its other end is closed
            break
        if not block:
            break
        said += block
    os.close(parent)
    assert running.wait() == 0
    return said.decode()


def test_in_a_terminal_bars_are_drawn_and_vanish_and_results_stay() -> None:
    said = in_a_terminal([sys.executable, "-c", SCRIPT])
    assert "reading data" in said
    assert "of 4 rows [bold]" in said
    assert "━" in said or "╺" in said or "-" in said
    assert "\x1b[2K" in said, "the bar is erased"
    assert "a result" in said
    assert said.rstrip().endswith("done")
    assert "reading data" not in said.rpartition("\x1b[2K")[2]


@pytest.mark.parametrize("kind", ["pipe", "dumb terminal"])
def test_no_bar_reaches_a_pipe_or_a_terminal_that_cannot_draw(kind: str) -> None:
    if kind == "pipe":
        found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
        out, err = found.stdout, found.stderr
        assert out == "a result\ndone\n"
    else:
        err = in_a_terminal([sys.executable, "-c", SCRIPT], TERM="dumb")
    assert "reading data: " in err
    assert "\x1b" not in err


def test_a_display_that_is_closed_draws_no_more_and_a_task_within_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with shown():
        task = begin("left open")
    task.to(3)
    end(task)
    assert capsys.readouterr().err == ""


def test_nothing_but_the_one_home_draws_bars() -> None:
    """`graft chat` draws what is being answered, which is its result."""
    allowed = {"progress.py", "chat.py"}
    for file in PACKAGE.rglob("*.py"):
        if file.name not in allowed:
            text = file.read_text(encoding="utf-8")
            assert "rich.progress" not in text, file
            assert "rich.live" not in text, file
            assert "console.status(" not in text, file
