"""Tiny GGUF files for tests, written value by value: what a file claims is then for the test to choose."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
KINDS = {U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q"}


class Int32(list[int]):
    """A list of numbers that the file has as signed ones."""


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(found: Any) -> bytes:
    """A value with its type in front: bool, int (32 bits), float, str, or a list of one of these."""
    if isinstance(found, list):
        inner = [value(v) for v in found] or [struct.pack("<I", U32)]
        if isinstance(found, Int32):
            inner = [struct.pack("<Ii", I32, v) for v in found]
        return (
            struct.pack("<I", ARRAY)
            + inner[0][:4]
            + struct.pack("<Q", len(found))
            + b"".join(v[4:] for v in inner if found)
        )
    if isinstance(found, str):
        return struct.pack("<I", STRING) + string(found)
    kind = BOOL if isinstance(found, bool) else U32 if isinstance(found, int) else F32
    return struct.pack(f"<I{KINDS[kind]}", kind, found)


def tensor(name: str, shape: Sequence[int], kind: int, offset: int) -> bytes:
    axes = shape[::-1]
    return string(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, offset)


def header(
    metadata: Mapping[str, Any], tensors: Sequence[bytes], *, version: int = 3, count: int | None = None,
    keys: int | None = None,
) -> bytes:  # fmt: skip
    """Magic to the last tensor's entry; `count` and `keys` may claim other numbers of tensors and of metadata keys."""
    counts = struct.pack(
        "<IQQ", version, len(tensors) if count is None else count, len(metadata) if keys is None else keys
    )
    return b"GGUF" + counts + b"".join(string(k) + value(v) for k, v in metadata.items()) + b"".join(tensors)


def write(path: Path, head: bytes, data: bytes = b"", alignment: int = 32) -> Path:
    path.write_bytes(head + b"\0" * (-len(head) % alignment) + data)
    return path
