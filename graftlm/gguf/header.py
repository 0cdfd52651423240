"""The header of a GGUF file that somebody else may have written, read with suspicion.

    magic "GGUF", version, counts | metadata: key, type, value ... | tensors: name, shape, type, offset ... | padding | data

Every number in it is only a claim. Each is held against the file's real size, and against a limit, before anything of
that size is allocated. The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftlm.errors import ModelError

MAX_ENTRIES = 100_000
"""Metadata keys, and tensors: a model of 100 layers has about 50 keys and 1,500 tensors."""
MAX_NAME_BYTES = 1024
MAX_STRING_BYTES = 16 << 20
"""One string of the metadata: chat templates reach tens of kilobytes."""
MAX_VALUES = 4 << 20
"""Values of all arrays together: a tokenizer of 262,144 tokens has 1.3 million with its types, scores and merges."""
MAX_HEADER_BYTES = 128 << 20
"""That of Gemma 3, with 262,144 tokens, has 15 MB. As Python's objects a header takes up to five times its bytes."""
_MOST_AXES = 4


@dataclass(frozen=True)
class TensorType:
    """One of ggml's types: `values` of them are stored together in `bytes`."""

    name: str
    values: int
    bytes: int


_TYPES = {
    0: TensorType("f32", 1, 4), 1: TensorType("f16", 1, 2), 2: TensorType("q4_0", 32, 18), 3: TensorType("q4_1", 32, 20),
    6: TensorType("q5_0", 32, 22), 7: TensorType("q5_1", 32, 24), 8: TensorType("q8_0", 32, 34),
    9: TensorType("q8_1", 32, 40), 10: TensorType("q2_k", 256, 84), 11: TensorType("q3_k", 256, 110),
    12: TensorType("q4_k", 256, 144), 13: TensorType("q5_k", 256, 176), 14: TensorType("q6_k", 256, 210),
    15: TensorType("q8_k", 256, 292), 16: TensorType("iq2_xxs", 256, 66), 17: TensorType("iq2_xs", 256, 74),
    18: TensorType("iq3_xxs", 256, 98), 19: TensorType("iq1_s", 256, 50), 20: TensorType("iq4_nl", 32, 18),
    21: TensorType("iq3_s", 256, 110), 22: TensorType("iq2_s", 256, 82), 23: TensorType("iq4_xs", 256, 136),
    24: TensorType("i8", 1, 1), 25: TensorType("i16", 1, 2), 26: TensorType("i32", 1, 4), 27: TensorType("i64", 1, 8),
    28: TensorType("f64", 1, 8), 29: TensorType("iq1_m", 256, 56), 30: TensorType("bf16", 1, 2),
    34: TensorType("tq1_0", 256, 54), 35: TensorType("tq2_0", 256, 66), 39: TensorType("mxfp4", 32, 17),
    40: TensorType("nvfp4", 64, 36), 41: TensorType("q1_0", 128, 18),
}  # fmt: skip

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """One tensor as the header lists it. `first` and `last` are its bytes, counted from the start of the file."""

    type: TensorType
    shape: tuple[int, ...]
    """With the rows' length last, as in PyTorch: the header counts its axes the other way round."""
    first: int
    last: int


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file's metadata and the places of its tensors; `bytes_of` reads one."""

    path: Path
    metadata: dict[str, Any] = field(repr=False)
    tensors: dict[str, GgufTensor] = field(repr=False)

    @property
    def architecture(self) -> str:
        """What `general.architecture` says; ModelError where it says nothing."""
        found = self.metadata.get("general.architecture")
        if not isinstance(found, str):
            raise ModelError(f"{self.path} names no architecture (general.architecture); it is not a model, or damaged")
        return found

    @cached_property
    def _data(self) -> NDArray[np.uint8]:
        return np.memmap(self.path, dtype=np.uint8, mode="r")

    def bytes_of(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes in place, (last - first,) uint8: its pages belong to the file. KeyError for an unknown name."""
        tensor = self.tensors[name]
        return self._data[tensor.first : tensor.last]


def read_gguf(path: Path) -> GgufFile:
    """Read a GGUF file's header; no tensor is read.

    Raises ModelError that names the file and what is wrong: another kind of file, another version or byte order, a header
    that is cut short or over a limit, a tensor of unknown type, with odd shape, outside the file, or over another one.
    """
    try:
        with path.open("rb") as stream:
            size = path.stat().st_size
            magic = stream.read(4)
            if magic != b"GGUF":
                raise ModelError(f"{path} is no GGUF file: it begins with {magic!r}, expected b'GGUF'")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _HeaderReader(path, data, size).file()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None


class _HeaderReader:
    """Walks over the header, whose end it does not know beforehand."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size = path, data, size
        self.end = min(size, MAX_HEADER_BYTES)
        self.at = 4
        self.values = 0

    def file(self) -> GgufFile:
        version = self._number("I")
        if version & 0xFFFF == 0 and version:
            raise self._fault("is big-endian; convert it for this machine, or download the little-endian file")
        if version not in (2, 3):
            raise self._fault(f"has GGUF version {version}, and versions 2 and 3 are read; convert it again")
        tensors, entries = self._count("tensors"), self._count("metadata keys")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._name("metadata key")
            if key in metadata:
                raise self._fault(f"has metadata key '{key}' twice")
            metadata[key] = self._value(self._number("I"), key)
        listed: dict[str, tuple[TensorType, tuple[int, ...], int]] = {}
        for _ in range(tensors):
            name = self._name("tensor")
            if name in listed:
                raise self._fault(f"lists tensor '{name}' twice")
            listed[name] = self._tensor(name)
        return GgufFile(self.path, metadata, self._placed(listed, metadata.get("general.alignment", 32)))

    def _placed(
        self, listed: dict[str, tuple[TensorType, tuple[int, ...], int]], alignment: Any
    ) -> dict[str, GgufTensor]:
        """Each tensor with its place in the file, in the order in which they lie in it."""
        if type(alignment) is not int or not (8 <= alignment <= 1 << 20) or alignment % 8:
            raise self._fault(f"has general.alignment {alignment!r}, expected a multiple of 8 up to 1,048,576")
        start = -(-self.at // alignment) * alignment
        found: dict[str, GgufTensor] = {}
        end, before = start, ""
        for name, (kind, shape, offset) in sorted(listed.items(), key=lambda item: item[1][2]):
            nbytes = math.prod(shape) // kind.values * kind.bytes
            if offset % alignment:
                raise self._fault(f"places tensor '{name}' at {offset:,}, which is no multiple of {alignment}")
            first, last = start + offset, start + offset + nbytes
            if first < end:
                raise self._fault(f"places tensor '{name}' over tensor '{before}'")
            if last > self.size:
                raise self._fault(
                    f"is cut short: tensor '{name}' ends at byte {last:,}, and the file has {self.size:,}; download it again"
                )
            found[name] = GgufTensor(kind, shape, first, last)
            end, before = last, name
        return found

    def _tensor(self, name: str) -> tuple[TensorType, tuple[int, ...], int]:
        axes = self._number("I")
        if not 1 <= axes <= _MOST_AXES:
            raise self._fault(f"gives tensor '{name}' {axes} axes, and 1 to {_MOST_AXES} are read")
        shape = tuple(self._number("Q") for _ in range(axes))[::-1]
        if min(shape) < 1 or math.prod(shape) > 1 << 48:
            raise self._fault(f"gives tensor '{name}' the shape {list(shape)}")
        number = self._number("I")
        kind = _TYPES.get(number)
        if kind is None:
            raise self._fault(f"has tensor '{name}' of ggml type {number}, which is not known here")
        if shape[-1] % kind.values:
            raise self._fault(
                f"has tensor '{name}' of {kind.name} with rows of {shape[-1]}, no multiple of {kind.values}"
            )
        return kind, shape, self._number("Q")

    def _fault(self, what: str) -> ModelError:
        return ModelError(f"{self.path} {what}")

    def _take(self, count: int) -> int:
        """Move over `count` bytes; returns where they begin."""
        first = self.at
        if count > self.end - first:
            if self.end < self.size:
                raise self._fault(
                    f"has a header of more than {MAX_HEADER_BYTES:,} bytes, which is the most that is read"
                )
            raise self._fault(
                f"is cut short: its header goes on at byte {first:,} for {count:,} bytes more, and the file has "
                f"{self.size:,}; download it again"
            )
        self.at = first + count
        return first

    def _number(self, kind: str) -> Any:
        return struct.unpack_from(f"<{kind}", self.data, self._take(struct.calcsize(f"<{kind}")))[0]

    def _count(self, what: str) -> int:
        count: int = self._number("Q")
        if count > MAX_ENTRIES:
            raise self._fault(f"claims {count:,} {what}, and at most {MAX_ENTRIES:,} are read")
        return count

    def _string(self, most: int, what: str) -> str:
        length: int = self._number("Q")
        if length > most:
            raise self._fault(f"has {what} of {length:,} bytes, and at most {most:,} are read")
        first = self._take(length)
        try:
            return self.data[first : first + length].decode()
        except UnicodeDecodeError:
            raise self._fault(f"has {what} that is no UTF-8") from None

    def _name(self, what: str) -> str:
        return self._string(MAX_NAME_BYTES, f"a {what}'s name")

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(MAX_STRING_BYTES, f"'{key}'")
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise self._fault(f"has '{key}' of type {kind}, which is not known here")
        return self._number(_SCALARS[kind])

    def _array(self, key: str) -> Any:
        kind, count = self._number("I"), self._number("Q")
        self.values += count
        if self.values > MAX_VALUES:
            raise self._fault(
                f"has '{key}' of {count:,} values, and at most {MAX_VALUES:,} are read in all lists together"
            )
        if kind == _STRING:
            return [self._string(MAX_STRING_BYTES, f"'{key}'") for _ in range(count)]
        if kind not in _SCALARS:
            raise self._fault(f"has '{key}', a list of values of type {kind}; lists of numbers and strings are read")
        dtype = np.dtype(f"<{_SCALARS[kind]}")
        first = self._take(count * dtype.itemsize)
        return np.frombuffer(self.data, dtype, count, first).tolist()
