"""Tables fit the terminal and break no name; into a pipe goes text alone."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from graftlm import terminal
from graftlm.terminal import Column

NAMES = ("good@1", "a-name-of-thirty-two-characters@7")
DIGESTS = ("81a44a83db08", "066d5e68dab4")
NOTE = "trained again with the rows that were missing before"
COLUMNS = [
    Column("version"), Column("digest"), Column("eval loss", drop=2), Column("size", right=True, drop=3),
    Column("aliases", drop=1), Column("note", words=True),
]  # fmt: skip
ROWS = [
    (NAMES[0], DIGESTS[0], "3.0000 -> 2.0000", "2.5 kB", "prod", NOTE),
    (NAMES[1], DIGESTS[1], "3.0000 -> 2.1250", "12.5 kB", "beta\nstaging", ""),
]


def printed(width: int, *given: Any, **options: Any) -> list[str]:
    console = Console(file=StringIO(), width=width)
    terminal.table(console, *given, **options)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [60, 70, 80, 100, 120, 200])
def test_a_table_fits_and_breaks_no_name_no_digest_and_no_number(width: int) -> None:
    lines = printed(width, COLUMNS, ROWS)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    for whole in (*NAMES, *DIGESTS):
        assert whole in text
    for row in ROWS:
        for cell in row[2:4]:
            assert cell in text or "left out" in text
    for word in NOTE.split():
        assert word in text
    assert all(line == line.rstrip() for line in lines)


def test_columns_that_matter_least_are_left_out_first_and_named() -> None:
    left = [
        next((line.partition("columns: ")[2] for line in printed(width, COLUMNS, ROWS) if "left out" in line), "")
        for width in (200, 100, 86, 71)
    ]
    assert left == ["", "size", "eval loss, size", "eval loss, size, aliases"]


def test_what_may_not_be_left_out_stands_in_a_second_block_behind_the_first_column() -> None:
    columns = [Column("variant"), *(Column(f"figure-{i}", right=True) for i in range(4))]
    lines = printed(34, columns, [("full", *("123456789",) * 4), ("lora", "1", "2", "3", "4")])
    assert lines == [
        "variant   figure-0   figure-1",
        "full     123456789  123456789",
        "lora             1          2",
        "variant   figure-2   figure-3",
        "full     123456789  123456789",
        "lora             3          4",
    ]


def test_a_word_that_is_longer_than_the_terminal_stays_whole_and_the_others_keep_to_it() -> None:
    console = Console(file=StringIO(), width=40)
    digest = "d" * 64
    terminal.facts(console, [("digest", digest), ("note", NOTE)])
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0] == f"digest  {digest}"
    assert max(map(len, lines[1:])) <= 40
    assert " ".join(" ".join(lines[1:]).split()) == f"note {NOTE}"


def test_wide_characters_take_two_columns() -> None:
    lines = printed(40, [Column("name"), Column("n", right=True)], [("日本", "1"), ("abcd", "22")])
    assert lines == ["name   n", "日本   1", "abcd  22"]


def test_into_a_pipe_go_words_without_frames_colours_or_blanks() -> None:
    console = terminal.console(file=StringIO())
    assert isinstance(console, terminal.Plain)
    table = Table("head", title="of a table")
    table.add_row("cell")
    for shown in (Panel(Text("inside", style="red"), title="of a frame"), table, "[bold]bold[/bold]"):
        console.print(shown)
    console.rule("of a rule", align="left")
    with console.status("waiting"):
        pass
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.isascii()
    assert "\x1b" not in text
    for words in ("inside", "of a frame", "head", "cell", "of a table", "bold", "of a rule"):
        assert words in " ".join(text.split())
    assert "waiting" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_lines_in_a_pipe_are_as_long_as_they_are_unless_columns_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, lines in (("", 1), ("x", 1), ("40", 2)):
        monkeypatch.setenv("COLUMNS", columns)
        console = terminal.console(file=StringIO())
        console.print(NOTE)
        assert console.file.getvalue().count("\n") == lines  # type: ignore[attr-defined]
