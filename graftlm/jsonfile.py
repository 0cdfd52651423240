"""Read untrusted JSON within limits; all JSON in Graft is parsed here.

Python's own parser raises RecursionError for deep nesting and a bare ValueError for a number of thousands of digits, and
silently keeps the last value of a duplicate key. Here all of these are ValueErrors with what was found, where, and the limit.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from graftlm.errors import GraftError

MAX_JSON_BYTES = 32 << 20
MOST_TOKENIZER_BYTES = 256 << 20
"""Largest tokenizer.json; that of Gemma 3, with 262,144 tokens, has 33 MB."""
MOST_DEPTH = 100
"""Most nested lists and objects. Tool schemas and model configs have about ten."""
MOST_DIGITS = 300
"""Most digits in an integer: those of the largest float (1.8e308), so that no later division overflows."""
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text of at most 100 levels and 300 digits a number, without duplicate keys.

    Raises json.JSONDecodeError, with the position, for invalid JSON or a limit; ValueError for a duplicate key, and for bytes
    that are not Unicode.
    """
    text = data.decode(json.detect_encoding(data)) if isinstance(data, bytes) else data
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_whole)
    except RecursionError:
        raise _too_deep(text) from None
    except OverflowError:
        raise _overlong(text) from None
    if text.count("[") + text.count("{") > MOST_DEPTH and not _shallow(value):
        raise _too_deep(text)
    return value


def duplicate_key(data: bytes) -> str | None:
    """The first key that an object of a JSON text has twice; the text is one that another parser has read already."""
    try:
        json.loads(data, object_pairs_hook=_unique)
    except _DuplicateKey as error:
        return error.key
    return None


class RowParser:
    """Parses consecutive values of a longer JSON text, within the same limits."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_whole)

    def at(self, start: int) -> tuple[Any, int]:
        """The value that begins at `start`, and where it ends. Raises as `parse_json`."""
        try:
            value, end = self._decoder.raw_decode(self.text, start)
        except RecursionError:
            raise _too_deep(self.text, start) from None
        except OverflowError:
            raise _overlong(self.text, start) from None
        if not _shallow(value):
            raise _too_deep(self.text, start)
        return value, end


def read_json(
    path: Path, raises: type[GraftError], *, most: int = MAX_JSON_BYTES, stream: BinaryIO | None = None
) -> dict[str, Any]:
    """The object in a JSON file of at most `most` bytes. Raises the given error, which names the file.

    `stream` is the file where it is open already.
    """
    found = read_json_value(path, raises, most=most, stream=stream)
    if not isinstance(found, dict):
        raise raises(f"{path} holds a {type(found).__name__}, expected an object; it is damaged")
    return found


def read_json_value(
    path: Path, raises: type[GraftError], *, most: int = MAX_JSON_BYTES, stream: BinaryIO | None = None
) -> Any:
    """The value in a JSON file of at most `most` bytes. Raises the given error, which names the file and the position."""
    try:
        size = path.stat().st_size if stream is None else os.fstat(stream.fileno()).st_size
        if size > most:
            raise raises(f"{path} has {size:,} bytes, and at most {most:,} are read; it is not what its name says")
        with path.open("rb") if stream is None else nullcontext(stream) as opened:
            return parse_json(opened.read(most + 1))
    except OSError as error:
        raise raises(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise raises(f"{path} is not JSON ({error}); it is damaged") from None


class _DuplicateKey(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(f"'{key}' is there twice")
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        raise _DuplicateKey(next(name for name, _ in pairs if name in seen or seen.add(name)))
    return found


def _whole(digits: str) -> int:
    if len(digits.lstrip("-")) > MOST_DIGITS:
        raise OverflowError
    return int(digits)


def _shallow(value: Any) -> bool:
    """Whether a value has at most `MOST_DEPTH` levels; checked level by level, without recursion."""
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return True
    return False


def _too_deep(text: str, start: int = 0) -> json.JSONDecodeError:
    depth = place = 0
    for token in _TOKEN.finditer(text, start):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth > MOST_DEPTH:
            place = token.start()
            break
    return json.JSONDecodeError(f"nested too deep, at most {MOST_DEPTH} levels are read", text, place)


def _overlong(text: str, start: int = 0) -> json.JSONDecodeError:
    found = re.compile(rf"\d{{{MOST_DIGITS + 1},}}").search(text, start)
    place, digits = (found.start(), len(found[0])) if found else (start, MOST_DIGITS + 1)
    return json.JSONDecodeError(f"a number of {digits:,} digits, at most {MOST_DIGITS} are read", text, place)
