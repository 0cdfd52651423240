"""Read CSV and similar tables: the delimiter is found from the header, and each row has the number of its first line."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graftlm.data.columns import Fault, RawRow, format_of
from graftlm.data.lines import MOST_ROW_BYTES, SIZE_EXPECTED, SIZE_MEND, Moved, Overlong, lines, not_utf8, size_found
from graftlm.errors import DataError
from graftlm.jsonfile import parse_json

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_EXCEL = re.compile(r"sep=(.)\s*")
"""A first line that tells Excel the delimiter."""


def read_csv(path: Path, name: str, moved: Moved | None = None) -> Iterator[RawRow | Fault]:
    """The rows of a table with a header. Raises DataError for a header that names a column twice."""
    csv.field_size_limit(sys.maxsize)  # rows are bounded by `lines`
    text = _Text(path, name, moved)
    try:
        first = next(text, None)
    except _Unreadable as error:
        yield error.fault
        return
    if first is None:
        return
    excel = _EXCEL.fullmatch(first)
    delimiter = excel[1] if excel else delimiter_of(first)
    if not excel:
        text.back(first)
    reader = csv.reader(text, strict=True, delimiter=delimiter)
    header: list[str] | None = None
    while True:
        where = f"{name}:{text.number + 1}"
        text.row_bytes = 0
        try:
            cells = next(reader)
        except StopIteration:
            return
        except _Unreadable as error:
            yield error.fault
            return
        except csv.Error as error:
            yield Fault(where, "line", f"broken CSV ({error})", "CSV in UTF-8", "repair it; the rest was not read")
            return
        if header is None:
            header = [cell.strip() for cell in cells]
            twice = next((column for column in header if header.count(column) > 1), None)
            if twice is not None:
                raise DataError(f"{name}: the header names the column '{twice}' twice; rename one of them")
        elif cells and len(cells) != len(header):
            expected = f"{len(header)} ({', '.join(header)})"
            mend = f"quote cells that hold {_DELIMITERS.get(delimiter, repr(delimiter))}"
            yield Fault(where, "line", f"{len(cells)} columns", expected, mend)
        elif cells:
            yield RawRow(where, _with_lists(dict(zip(header, cells, strict=True))))


def delimiter_of(header: str) -> str:
    """The delimiter: the one that makes the header a known format, else the one that gives the most columns."""
    found = {mark: next(csv.reader([header], delimiter=mark), []) for mark in _DELIMITERS}
    for mark, cells in found.items():
        columns = {cell.strip(): "" for cell in cells}
        if len(cells) > 1 and not isinstance(format_of(RawRow("", columns)), Fault):
            return mark
    return max(found, key=lambda mark: len(found[mark]))  # the first of equals: a comma


class _Unreadable(Exception):
    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


class _Text:
    """The lines of a file as text, with line numbers and the number of bytes of the current row."""

    def __init__(self, path: Path, name: str, moved: Moved | None) -> None:
        self.name = name
        self.number = 0
        self.row_bytes = 0
        self._lines = lines(path, name, moved)
        self._waiting: list[str] = []  # parts of a line, the next one last

    def __iter__(self) -> _Text:
        return self

    def back(self, line: str) -> None:
        """Put a line back to be read again."""
        self._waiting.append(line)
        self.number -= 1

    def __next__(self) -> str:
        if self._waiting:
            self.number += 1
            return self._waiting.pop()
        line = next(self._lines)
        self.number += 1
        where = f"{self.name}:{self.number}"
        self.row_bytes += line.bytes if isinstance(line, Overlong) else len(line)
        if isinstance(line, Overlong) or self.row_bytes > MOST_ROW_BYTES:
            raise _Unreadable(
                Fault(
                    where, "row", size_found(Overlong(self.row_bytes)), SIZE_EXPECTED,
                    f"{SIZE_MEND}, or close the quote that was left open; the rest was not read",
                )
            )  # fmt: skip
        try:
            text = line.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            found, mend = not_utf8(line, error, self.name)
            raise _Unreadable(Fault(where, "line", found, "UTF-8", mend)) from None
        if "\r" in text.rstrip("\r\n"):  # carriage returns as line ends: csv needs separate lines
            parts = re.findall(r"[^\r\n]*(?:\r\n?|\n|$)", text)
            self._waiting += [part for part in reversed(parts) if part]
            return self._waiting.pop()
        return text


def _with_lists(cells: dict[str, str]) -> dict[str, Any]:
    """A CSV row with its columns of messages and tools parsed as JSON; an answer such as `[1, 2]` stays text."""
    row: dict[str, Any] = dict(cells)
    for group, kind in (
        (("messages",), dict),
        (("tools",), dict),
        (("history",), list),
        (("prompt", "completion"), dict),
    ):
        held = {name: _listed(cells[name], kind) for name in group if name in cells}
        if held and all(found is not None for found in held.values()):
            row.update(held)
    return row


def _listed(cell: str, kind: type) -> list[Any] | None:
    """The list of objects, or of lists, in a cell's JSON, or None."""
    if not cell.lstrip().startswith("["):
        return None
    try:
        found = parse_json(cell)
    except ValueError:
        return None
    return found if all(isinstance(item, kind) for item in found) else None
