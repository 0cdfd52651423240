"""Rows in memory as files of a run folder: other processes read them, and `graft train` can run a trial again from them.

    file, text = row_file(source, Path("runs/sweep"))        runs/sweep/rows/rows-1f0c2a9b73d4e586.jsonl

A file is named by its content, so rows that have changed make another file and never replace those of finished runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftlm.data.sources import Source
from graftlm.errors import DataError
from graftlm.files import write_text

ROWS = "rows"
"""Folder of these files."""


def row_file(source: Source, out: Path) -> tuple[Path, str]:
    """Where rows in memory are written in the folder `out`, and the text of that file. Raises DataError."""
    assert source.rows is not None
    text = "".join(f"{_line(row, source.path, number)}\n" for number, row in enumerate(source.rows))
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()
    return out / ROWS / f"{source.path}-{digest}.jsonl", text


def _line(row: Any, name: str, number: int) -> str:
    try:
        text = json.dumps(row, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name}[{number}]: {error}, and this call hands its rows to runs as JSON; expected strings, numbers, lists and "
            "dicts"
        ) from None
    # Half a surrogate pair is no UTF-8; escaped it reaches the reader, which names the row.
    return text if _encodes(text) else json.dumps(row)


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def write_row_files(files: Mapping[Path, str]) -> None:
    """Write what `row_file` gave; a file that is there is the same one."""
    for file, text in files.items():
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, text)
