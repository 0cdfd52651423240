"""What commands print on: a terminal, or a pipe that gets plain text.

Into a pipe or a file goes text alone: no frames, no colours, no bars, no blanks at a line's end, and lines as long as they are.
On a terminal a table fits its width: columns that matter least are left out and named below it, columns of words go over
several lines, and what still finds no room stands in a second block. A name, a digest or a number is never broken.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import IO, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

ENDLESS = 100_000
"""Columns of what is no terminal, unless $COLUMNS says how many."""
_HELP = 120
_GAP = 2
_LEAST = 16
"""Columns that a column of words gets before another is left out for it."""


class Plain(Console):
    """Prints text alone, whatever is given: of a frame, a rule or a table their words."""

    def __init__(self, *, width: int | None = None, **given: Any) -> None:
        known = os.environ.get("COLUMNS", "")
        width = width or (int(known) if known.isascii() and known.isdigit() and int(known) > 0 else ENDLESS)
        given.update(width=width, color_system=None, force_terminal=False)
        super().__init__(**given)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """As rich's, without what frames."""
        if isinstance(renderable, Panel):
            title = renderable.title
            if title:
                words = title.plain if isinstance(title, Text) else str(title)
                yield from super().render(Text(f"\n{words}"), options)
            renderable = renderable.renderable
        elif isinstance(renderable, Rule):
            renderable = Text(str(renderable.title))
        elif isinstance(renderable, Table) and renderable.box is not None:
            renderable.box = None
        yield from super().render(renderable, options)

    def _render_buffer(self, buffer: Any) -> str:
        return re.sub(r"[ \t]+\n", "\n", super()._render_buffer(buffer))


def console(
    *, stderr: bool = False, soft_wrap: bool = False, quiet: bool = False, file: IO[str] | None = None
) -> Console:
    """The console that a command prints on: rich's on a terminal, else a plain one."""
    found = Console(stderr=stderr, soft_wrap=soft_wrap, quiet=quiet, file=file)
    return found if found.is_terminal else Plain(stderr=stderr, soft_wrap=soft_wrap, quiet=quiet, file=file)


def help_console(**given: Any) -> Console:
    """For what describes commands: the same, in lines that a person reads."""
    found = Console(**given)
    if found.is_terminal:
        return found
    given["width"] = None if os.environ.get("COLUMNS") else _HELP
    return Plain(**given)


def as_text(draw: Callable[[Console], None], width: int = 120) -> str:
    """What `draw` prints, as plain text of lines of at most `width` characters: a value's `repr`."""
    text = StringIO()
    draw(Plain(width=width, file=text))
    return text.getvalue().rstrip()


def as_html(draw: Callable[[Console], None], width: int = 120) -> str:
    """What `draw` prints, with its colours, for a notebook."""
    where = Console(width=width, file=StringIO(), record=True, force_terminal=True, color_system="truecolor")
    draw(where)
    style = "white-space:pre;overflow-x:auto;line-height:1.3;font-family:monospace"
    return where.export_html(inline_styles=True, code_format=f'<pre style="{style}">{{code}}</pre>')


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    head: str = ""
    right: bool = False
    drop: int = 0
    """Where there is no room, columns with the highest number are left out first; those with 0 never are."""
    words: bool = False
    """Whether its cells may go over several lines, between words."""


Cell = str | Text


def table(
    where: Console, columns: Sequence[Column], rows: Sequence[Sequence[Cell]], *, title: str = "", note: str = ""
) -> None:
    """Print a table that fits; `note` stands below it. A cell may hold line breaks."""
    room = where.width
    heads = [column.head for column in columns]
    natural = [max([_width(h), *(_width(row[i]) for row in rows)]) for i, h in enumerate(heads)]
    least = [_least(column, natural[i], [row[i] for row in rows]) for i, column in enumerate(columns)]
    kept = list(range(len(columns)))
    while _total(least, kept) > room and any(columns[i].drop for i in kept):
        kept.remove(max(kept, key=lambda i: columns[i].drop))
    if title:
        where.print(Text(title, style="bold"), soft_wrap=True)
    for block in _blocks(kept, least, room):
        widths = _shared_out(block, columns, natural, least, room)
        if any(heads):
            _print_row(where, block, columns, widths, [Text(head, style="bold") for head in heads])
        for row in rows:
            _print_row(where, block, columns, widths, row)
    left = [columns[i].head for i in range(len(columns)) if i not in kept]
    if note:
        where.print(Text(note, style="dim"))
    if left:
        where.print(Text(f"left out at {room} columns: {', '.join(left)}", style="dim"))


def facts(where: Console, rows: Sequence[tuple[str, str]]) -> None:
    """Print labels with what they say, its further lines below its first."""
    table(where, [Column(), Column(words=True)], [(Text(label, style="bold"), text) for label, text in rows])


def _width(cell: Cell) -> int:
    return max((cell_len(line) for line in str(cell).split("\n")), default=0)


def _least(column: Column, natural: int, cells: Sequence[Cell]) -> int:
    """Columns that it takes at least: a head may go over several lines, what stands below it only where it is words."""
    word = max((cell_len(part) for part in column.head.split()), default=0)
    below = max((_width(cell) for cell in cells), default=0)
    if column.words:
        longest = max((cell_len(part) for cell in cells for part in str(cell).split()), default=0)
        below = min(below, max(longest, _LEAST))
    return min(natural, max(word, below))


def _total(widths: Sequence[int], block: Sequence[int]) -> int:
    return sum(widths[i] for i in block) + _GAP * (len(block) - 1)


def _blocks(kept: Sequence[int], least: Sequence[int], room: int) -> list[list[int]]:
    """Columns that stand beside each other; each block begins with the first column."""
    blocks: list[list[int]] = [[kept[0]]]
    for i in kept[1:]:
        if len(blocks[-1]) > 1 and _total(least, [*blocks[-1], i]) > room:
            blocks.append([kept[0]])
        blocks[-1].append(i)
    return blocks


def _shared_out(
    block: Sequence[int], columns: Sequence[Column], natural: Sequence[int], least: Sequence[int], room: int
) -> dict[int, int]:
    """The width of each column: its least, and from the left what is over up to what it would like."""
    widths = {i: least[i] for i in block}
    over = room - _total(least, block)
    for i in block:  # a word that is longer than the whole line stands out of it, and the other lines do not
        if columns[i].words and over < 0:
            less = min(-over, max(widths[i] - max(_LEAST, _width(columns[i].head)), 0))
            widths[i] -= less
            over += less
    for i in sorted(block, key=lambda i: columns[i].words):  # words can do with less
        more = min(natural[i] - widths[i], max(over, 0))
        widths[i] += more
        over -= more
    return widths


def _print_row(
    where: Console, block: Sequence[int], columns: Sequence[Column], widths: dict[int, int], row: Sequence[Cell]
) -> None:
    cells = {i: _lines(row[i], widths[i]) for i in block}
    for at in range(max(len(lines) for lines in cells.values())):
        line = Text()
        for i in block:
            part = cells[i][at] if at < len(cells[i]) else Text()
            blank = " " * (widths[i] - cell_len(part.plain))
            line.append(blank if columns[i].right else "").append_text(part)
            line.append("" if columns[i].right else blank).append(" " * _GAP)
        line.rstrip()
        where.print(line, soft_wrap=True, highlight=False)


def _lines(cell: Cell, width: int) -> list[Text]:
    """A cell's lines, cut between words; a word that is longer than the column stays whole."""
    text = cell if isinstance(cell, Text) else Text(cell)
    found: list[Text] = []
    for line in text.split("\n", allow_blank=True):
        start = end = 0  # of the line that is being filled
        for word in re.finditer(r"\S+", line.plain):
            if end > start and cell_len(line.plain[start : word.end()]) > width:
                found.append(line[start:end])
                start = word.start()
            end = word.end()
        found.append(line[start:end])
    return found


__all__ = ["Cell", "Column", "Plain", "as_html", "as_text", "console", "facts", "help_console", "table"]
