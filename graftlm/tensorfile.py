"""Headers of safetensors files that somebody else may have written, read with suspicion.

A safetensors file is 8 bytes that say how long its header is, the header (JSON: each tensor's dtype, shape and position), and
the tensors. Every number in it is only a claim. So each is held against the file's real size and against a limit before
anything of that size is allocated, and nothing here, or behind it, ever unpickles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.errors import GraftError
from graftlm.jsonfile import parse_json

MAX_HEADER_BYTES = 64 << 20
MAX_TENSORS = 400_000
"""A mixture of 128 experts in 94 layers, each with its own A and B, has about 72,000."""
_MOST_AXES = 16
# Bytes of one value; types that are not listed (4 and 6 bits) are not held against their shape.
_WIDTHS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor, and where its bytes are, counted from the start of the file."""

    dtype: str
    """In safetensors' words: F32, BF16, U8, ..."""
    shape: tuple[int, ...]
    first: int
    last: int


def read_header(path: Path, raises: type[GraftError]) -> dict[str, TensorInfo]:
    """The tensors that a safetensors file holds, in the order in which they lie in it; none of them is read.

    Raises the given error, which names the file and what is wrong: a header longer than the file or than 64 MB, more than
    400,000 tensors, tensors that overlap, leave gaps, or need other sizes than their shapes say.
    """
    try:
        with path.open("rb") as stream:
            size = path.stat().st_size
            head = stream.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > size - 8:
                raise raises(
                    f"{path} is cut short or no safetensors file: its header claims {length:,} bytes of {size:,}"
                )
            if length > MAX_HEADER_BYTES:
                raise raises(f"{path} has a header of {length:,} bytes, and at most {MAX_HEADER_BYTES:,} are read")
            text = stream.read(length)
    except OSError as error:
        raise raises(f"{path} cannot be read: {error.strerror}") from None
    count = text.count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise raises(f"{path} lists {count:,} tensors, and at most {MAX_TENSORS:,} are read")
    try:
        header = parse_json(text)
        if not isinstance(header, dict):
            raise ValueError("expected an object")
        found = {name: _info(name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"}
    except ValueError as error:
        raise raises(f"{path} cannot be read, its header is damaged: {error}") from None
    ordered = dict(sorted(found.items(), key=lambda item: (item[1].first, item[1].last)))
    end = 8 + length
    for name, info in ordered.items():
        if info.first != end:
            raise raises(f"{path} cannot be read: tensor '{name}' does not begin where the one before it ends")
        end = info.last
    if end != size:
        what = "is cut short" if end > size else "holds bytes that belong to no tensor"
        raise raises(f"{path} {what}: its tensors end at byte {end:,}, and it has {size:,}")
    return ordered


def _info(name: str, entry: Any, start: int) -> TensorInfo:
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"tensor '{name}' has no dtype, shape and two data_offsets") from None
    numbers = [*shape, first, last] if isinstance(shape, list) else [None]
    if not isinstance(dtype, str) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers) or last < first:
        raise ValueError(f"tensor '{name}' has odd numbers: {str(entry)[:200]}")
    if len(shape) > _MOST_AXES:
        raise ValueError(f"tensor '{name}' has {len(shape)} axes, at most {_MOST_AXES} are read")
    width = _WIDTHS.get(dtype)
    if width is not None and math.prod(shape) * width != last - first:
        raise ValueError(f"tensor '{name}' is {dtype} of shape {shape} and has {last - first:,} bytes")
    return TensorInfo(dtype, tuple(shape), start + first, start + last)
