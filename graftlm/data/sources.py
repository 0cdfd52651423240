"""Sources of rows: files (JSONL, JSON, CSV, Parquet, gzipped or not), dataset folders and datasets of the hub.

Every row has its position, `file:line`, for messages about it. So JSONL, JSON and CSV are read line by line (`lines.py`,
`tables.py`); folders and the hub are read through `datasets`, and their rows are numbered.

A source is given as `PATH[:weight]`; a hub dataset is `owner/name` or `owner/name@split`. The weight is how many times each row
is used in an epoch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftlm import demo
from graftlm.config.fields import plain_number
from graftlm.data.columns import Fault, RawRow
from graftlm.data.lines import (
    MOST_ROW_BYTES,
    SIZE_EXPECTED,
    SIZE_MEND,
    Moved,
    Overlong,
    lines,
    not_utf8,
    size_found,
)
from graftlm.data.tables import read_csv
from graftlm.errors import ConfigError, DataError, nearest
from graftlm.jsonfile import RowParser, parse_json
from graftlm.progress import LONG, sign_of_life

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
MOST_FILE_BYTES = 4 << 30
"""Largest .json file, which is read in one piece; other formats have no limit."""
_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w.\[\]:%+-]+)?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file, folder, hub dataset or list in memory that rows come from."""

    path: str  # a file, a folder, or a hub id; `@split` included
    weight: float = 1.0  # uses of each row in an epoch
    rows: Sequence[Any] | None = field(default=None, repr=False, compare=False)
    """The rows if they are in memory; `path` is then their name in messages."""

    @classmethod
    def parse(cls, text: str) -> Source:
        """Read `PATH[:weight]`. Raises DataError if the weight is not a positive number."""
        head, colon, tail = text.rpartition(":")
        if (
            not colon
            or not head
            or Path(text).exists()
            or not re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?|nan|inf", tail)
        ):
            return cls(path=text)
        try:
            weight = float(tail)
        except ValueError:
            return cls(path=text)
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(f"the weight of '{head}' is {tail}; expected a number above 0, such as 0.5 or 2")
        return cls(path=head, weight=weight)


def named_source(text: str, part: demo.Split) -> Source:
    """A source that the user gave: `FILE[:weight]`, a hub id, or a bundled set such as `demo`."""
    source = Source.parse(text)
    return Source(path=demo.resolve_data(source.path, part), weight=source.weight)


def share(text: str | None) -> float | None:
    """The fraction of a share such as `5%`; None for anything else. Raises ConfigError for an invalid share."""
    if text is None or not text.strip().endswith("%"):
        return None
    try:
        return plain_number(text.strip()[:-1]) / 100
    except ValueError:
        raise ConfigError(f"eval-data '{text}' is not a share; give one such as 5%, or a file") from None


def token_limit(requested: int | None, positions: int | None) -> int | None:
    """Most tokens in an example: `requested`, else the model's longest position. Raises ConfigError if it is above that."""
    if requested and positions and requested > positions:
        raise ConfigError(
            f"max-length is {requested}, and this model's longest position is {positions}; take at most that"
        )
    return requested or positions or None


def read(source: Source, moved: Moved | None = None) -> Iterator[RawRow | Fault]:
    """The rows of a source in order, with a Fault for a line that is not a row. Raises DataError for the source itself.

    `moved` is called with the number of bytes read so far, out of `size_of(source)`.
    """
    path = Path(source.path).expanduser()
    if source.rows is not None:
        rows = (_bounded(f"{source.path}[{i}]", row) for i, row in enumerate(source.rows))
        yield from _counted(source.path, rows)
    elif path.is_file():
        if path.stat().st_size == 0:
            raise DataError(f"{source.path} is empty (0 bytes); expected one row a line")
        yield from _counted(source.path, _read_file(path, source.path, moved))
    elif path.is_dir():
        if not any(_format(inner) for inner in path.rglob("*")):
            raise DataError(
                f"{source.path} is a folder without data files ({', '.join(FORMATS)}); give a file, such as "
                f"{source.path.rstrip('/')}/train.jsonl"
            )
        yield from _counted(source.path, _read_dataset(source.path))
    elif is_hub_id(source.path):
        yield from _counted(source.path, _read_dataset(source.path))
    else:
        raise _missing(path, source.path)


def _counted(name: str, rows: Iterator[RawRow | Fault]) -> Iterator[RawRow | Fault]:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{name} holds no row; expected at least one")


def _format(path: Path) -> str | None:
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return suffix.lower() if suffix.lower() in FORMATS else None


def is_hub_id(text: str) -> bool:
    """Whether a name that is not a file here is a dataset id on the hub: `name` or `owner/name`, dots allowed."""
    path = Path(text)
    looks_like_a_file = _format(path) is not None or path.suffix in (".gz", ".txt", ".md", ".yaml", ".zip")
    if path.exists() or looks_like_a_file or _HUB.fullmatch(text) is None:
        return False
    if "/" not in text and path.suffix:
        return False  # data.jsn is a misspelt file, not a dataset
    parent = path.parent
    return str(parent) == "." or not parent.is_dir()  # if the folder exists, a file was meant


def _missing(path: Path, name: str) -> DataError:
    folder = path.parent
    if not folder.is_dir():
        return DataError(f"there is no file {name}: the folder {folder} does not exist")
    near = nearest(path.name, (inner.name for inner in folder.iterdir()))
    return DataError(f"there is no file {name}{near or f'; {folder.resolve()} has no file of a similar name'}")


def size_of(source: Source) -> int:
    """Bytes of a source that is a file, else 0."""
    path = Path(source.path).expanduser()
    return path.stat().st_size if source.rows is None and path.is_file() else 0


def _read_file(path: Path, name: str, moved: Moved | None) -> Iterator[RawRow | Fault]:
    kind = _format(path)
    if kind in (".jsonl", ".ndjson"):
        return _read_jsonl(path, name, moved)
    if kind == ".json":
        return _read_json(path, name, moved)
    if kind in (".csv", ".tsv"):
        return read_csv(path, name, moved)
    if kind == ".parquet" and path.suffix != ".gz":
        return _read_parquet(path, name, moved)
    found = f"the file name ends in '{path.suffix}'" if path.suffix else "the file name has no ending"
    near = nearest(path.suffix, FORMATS) if path.suffix else ""
    raise DataError(f"{name}: {found}{near}; expected one of {', '.join(FORMATS)} (the text formats also with .gz)")


def _read_jsonl(path: Path, name: str, moved: Moved | None) -> Iterator[RawRow | Fault]:
    for number, line in enumerate(lines(path, name, moved), 1):
        where = f"{name}:{number}"
        if isinstance(line, Overlong):
            yield Fault(where, "line", size_found(line), SIZE_EXPECTED, SIZE_MEND)
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            found, mend = not_utf8(line, error, name)
            yield Fault(where, "line", found, "UTF-8", mend)
            continue
        if not text:
            continue
        try:
            value = parse_json(text)
        except json.JSONDecodeError as error:
            found = f"broken JSON at column {error.colno} ({error.msg}): {_around(text, error.pos)}"
            yield Fault(where, "line", found, "one JSON object a line", "repair or remove the line")
            continue
        except ValueError as error:
            yield Fault(where, "line", str(error), "each key once", "keep one of the two")
            continue
        yield _object(where, value)


def _whole_text(path: Path, name: str) -> str:
    parts: list[str] = []
    for number, line in enumerate(lines(path, name, most=MOST_FILE_BYTES), 1):
        if isinstance(line, Overlong):
            raise DataError(f"{name} has a line of {size_found(line)}, and at most {MOST_FILE_BYTES:,} are read")
        try:
            parts.append(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            found, mend = not_utf8(line, error, name)
            raise DataError(f"{name}:{number}: {found}; {mend}") from None
    return "".join(parts)


def _read_json(path: Path, name: str, moved: Moved | None) -> Iterator[RawRow | Fault]:
    text = _whole_text(path, name)
    parser, size = RowParser(text), path.stat().st_size
    space = re.compile(r"[\s]*")

    def skip(at: int) -> int:
        match = space.match(text, at)
        return match.end() if match else at

    at = skip(0)
    if not text[at : at + 1] == "[":
        raise DataError(
            f"{name} begins with {text[at : at + 20]!r}; expected a list of rows, [{{...}}, {{...}}]. "
            "If it has one object a line, name it .jsonl"
        )
    line, counted = 1, 0
    at = skip(at + 1)
    while text[at : at + 1] != "]":
        line += text.count("\n", counted, at)
        counted = at
        where = f"{name}:{line}"
        try:
            value, end = parser.at(at)
        except json.JSONDecodeError as error:
            found = (
                f"broken JSON at line {error.lineno}, column {error.colno} ({error.msg}): {_around(text, error.pos)}"
            )
            yield Fault(where, "file", found, "a list of JSON objects", "repair the file; what follows was not read")
            return
        except ValueError as error:
            mend = "keep one of the two; what follows was not read"
            yield Fault(where, "file", str(error), "each key once", mend)
            return
        if end - at > MOST_ROW_BYTES:
            yield Fault(where, "row", size_found(Overlong(end - at)), SIZE_EXPECTED, SIZE_MEND)
        else:
            yield _object(where, value)
        at = skip(end)
        if moved is not None:
            moved(int(size * at / len(text)))
        if text[at : at + 1] == ",":
            at = skip(at + 1)
        elif text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            found = f"{_around(text, at)} after a row" if text[at:] else "the end of the file"
            yield Fault(f"{name}:{line}", "file", found, "',' or ']'", "repair the file; what follows was not read")
            return


def _read_parquet(path: Path, name: str, moved: Moved | None) -> Iterator[RawRow | Fault]:
    import pyarrow
    import pyarrow.parquet

    try:
        table: Any = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name} is no Parquet file that can be read ({error}); write it again") from error
    number, size = 0, path.stat().st_size
    for batch in table.iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            number += 1
            yield _bounded(f"{name}:{number}", row)
        if moved is not None:
            moved(int(size * number / max(1, table.metadata.num_rows)))


def _read_dataset(name: str) -> Iterator[RawRow | Fault]:
    """Rows of a dataset folder, or of a dataset of the hub, through `datasets`."""
    import datasets

    path, _, split = name.partition("@")
    if Path(name).is_dir():
        path, split = name, ""
    sign_of_life(LONG)
    try:
        rows: Any = datasets.load_dataset(path, split=split or "train")
    except Exception as error:  # the library may raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"'{name}' is no file here, and as a dataset it cannot be loaded ({reason[:200]}). "
            "Give a file, a folder with data files, or owner/name@split of a dataset on the hub"
        ) from error
    for number, row in enumerate(rows, 1):
        yield _bounded(f"{name}:{number}", row)


def _bounded(where: str, row: Any) -> RawRow | Fault:
    """A row from Arrow, or a Fault if its texts together exceed the limit."""
    size, level = 0, [row]
    while level:
        size += sum(len(value) for value in level if isinstance(value, str | bytes))
        inner = [value for value in level if isinstance(value, dict | list)]
        level = [v for value in inner for v in (value.values() if isinstance(value, dict) else value)]
    if size > MOST_ROW_BYTES:
        return Fault(where, "row", size_found(Overlong(size)), SIZE_EXPECTED, SIZE_MEND)
    return _object(where, _without_nothing(row))


def _without_nothing(value: Any) -> Any:
    """Drop None values: Arrow gives every row all keys of all rows."""
    if isinstance(value, dict):
        return {str(key): _without_nothing(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nothing(inner) for inner in value]
    return value


def _object(where: str, value: Any) -> RawRow | Fault:
    if isinstance(value, dict):
        return RawRow(where, {str(key): inner for key, inner in value.items()})
    mend = 'write {"prompt": ..., "completion": ...}'
    return Fault(
        where, "line", f"{type(value).__name__} {_around(json.dumps(value, default=repr), 0)}", "a JSON object", mend
    )


def _around(text: str, position: int) -> str:
    begin = max(0, position - 20)
    return repr(text[begin : position + 20])
