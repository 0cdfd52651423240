"""Rows in memory: lists of dicts, data frames, datasets. They are read like a file's rows, and identified by their index.

source_of(rows, "rows")       Source(path="rows", rows=...); a fault says `rows[17]: ...`
source_of("a.jsonl", ...)     None: a path, which the config takes
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from graftlm.data.sources import Source
from graftlm.errors import DataError

_EXPECTED = (
    "expected a list of dicts, a datasets.Dataset, a pandas DataFrame, a file, a hub id, or a list of files or hub ids"
)


def is_named(data: Any) -> bool:
    """Whether data are given as one or several paths or hub ids."""
    if isinstance(data, str | Path):
        return True
    return isinstance(data, list | tuple) and len(data) > 0 and all(isinstance(part, str | Path) for part in data)


def names_of(data: Any) -> tuple[str, ...]:
    """Paths or hub ids in the form of a config."""
    return (str(data),) if isinstance(data, str | Path) else tuple(str(part) for part in data)


def source_of(data: Any, name: str) -> Source | None:
    """Rows in memory as a source with `name` in messages; None for paths and hub ids. Raises DataError."""
    if is_named(data):
        return None
    rows = _rows(data, name)
    if not rows:
        raise DataError(f"{name} holds no row; expected at least one")
    return Source(path=name, rows=rows)


def _rows(data: Any, name: str) -> list[Any]:
    kind = type(data)
    if isinstance(data, Mapping):
        if kind.__module__.split(".")[0] == "datasets":
            raise DataError(
                f"{name} are a {kind.__name__} of {', '.join(map(str, data))}; give one of them: data['train']"
            )
        raise DataError(f"{name} are one {kind.__name__}; {_EXPECTED}")
    if callable(getattr(data, "to_dict", None)) and hasattr(data, "columns"):  # pandas, which may not be installed
        return [{str(key): _plain(value) for key, value in row.items()} for row in data.to_dict("records")]
    if isinstance(data, Iterable) and not isinstance(data, bytes):
        return [_plain(dict(row)) if isinstance(row, Mapping) else row for row in data]
    raise DataError(f"{name} are a {kind.__name__}; {_EXPECTED}")


def _plain(value: Any) -> Any:
    """NumPy's arrays and numbers as Python's own; NaN, NA and NaT, a data frame's empty cells, as None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if (isinstance(value, float) and math.isnan(value)) or type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
