"""Every number in a file is a claim: it is held against the file and a limit before anything of its size is allocated."""

from __future__ import annotations

import json
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftlm import tensorfile
from graftlm.errors import RunError
from graftlm.jsonfile import read_json
from graftlm.tensorfile import TensorInfo, read_header


def entry(shape: list[Any], first: int, last: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def empty(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def test_the_header_is_what_safetensors_wrote(tmp_path: Path) -> None:
    named = {"b": torch.arange(6).reshape(2, 3).float(), "a": torch.ones(5, dtype=torch.bfloat16), "c": torch.zeros(0)}
    file = tmp_path / "x.safetensors"
    save_file(named, file, metadata={"format": "pt"})
    found = read_header(file, RunError)
    assert {n: (i.dtype, i.shape) for n, i in found.items()} == {
        "a": ("BF16", (5,)), "b": ("F32", (2, 3)), "c": ("F32", (0,)),
    }  # fmt: skip
    info = found["b"]
    assert file.read_bytes()[info.first : info.last] == named["b"].numpy().tobytes()
    assert load_file(file).keys() == found.keys()


ODD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a header of 2^60 bytes": (lambda p: write(p, {}, length=1 << 60), "its header claims 1,152,921,504,606,846,976 bytes"),
    "a header one byte longer than the file": (lambda p: write(p, {}, length=3), "claims 3 bytes of 10"),
    "a header that is no JSON": (lambda p: write(p, b"{]"), "header is damaged"),
    "a header that is a list": (lambda p: write(p, []), "expected an object"),
    "a header that is no text": (lambda p: write(p, b"\xff\xfe{}"), "header is damaged"),
    "a header nested without end": (lambda p: write(p, b"[" * 100_000), "nested too deep"),
    "a name twice": (
        lambda p: write(p, b'{"a":%b,"a":%b}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2), bytes(4)),
        "'a' is there twice",
    ),
    "an entry without a shape": (lambda p: write(p, {"a": {"dtype": "F32", "data_offsets": [0, 4]}}), "has no dtype"),
    "an entry that is a number": (lambda p: write(p, {"a": 5}), "has no dtype"),
    "three offsets": (lambda p: write(p, {"a": {**entry([1], 0, 4), "data_offsets": [0, 2, 4]}}), "two data_offsets"),
    "a negative size": (lambda p: write(p, {"a": entry([-1], 0, 4)}), "odd numbers"),
    "a size in words": (lambda p: write(p, {"a": entry(["many"], 0, 4)}), "odd numbers"),
    "a shape that is a number": (lambda p: write(p, {"a": {**entry([], 0, 4), "shape": 1}}, bytes(4)), "odd numbers"),
    "a size that is true": (lambda p: write(p, {"a": entry([True], 0, 4)}, bytes(4)), "odd numbers"),
    "a tensor that ends before it begins": (lambda p: write(p, {"a": entry([1], 8, 4)}, bytes(8)), "odd numbers"),
    "a thousand axes": (lambda p: write(p, {"a": entry([1] * 1000, 0, 4)}, bytes(4)), "1000 axes"),
    "2^80 values": (lambda p: write(p, {"a": entry([1 << 40, 1 << 40], 0, 4)}, bytes(4)), "has 4 bytes"),
    "a tensor past the end": (lambda p: write(p, {"a": entry([1 << 40], 0, 4 << 40)}, bytes(4)), "is cut short"),
    "bytes that belong to nothing": (lambda p: write(p, {"a": entry([1], 0, 4)}, bytes(5)), "belong to no tensor"),
    "a gap": (lambda p: write(p, {"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), "'b' does not begin"),
    "tensors that overlap": (lambda p: write(p, {"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, bytes(8)), "'b' does not"),
    "nothing": (empty, "claims 0 bytes of 0"),
}  # fmt: skip


@pytest.mark.parametrize("which", ODD)
def test_a_header_that_cannot_be_true_is_refused_by_the_files_name(tmp_path: Path, which: str) -> None:
    make, words = ODD[which]
    file = make(tmp_path / "x.safetensors")
    with pytest.raises(RunError) as error:
        read_header(file, RunError)
    assert str(file) in str(error.value)
    assert words in str(error.value)


def test_millions_of_tensors_are_refused_before_they_are_parsed(tmp_path: Path) -> None:
    one = json.dumps(entry([0], 0, 0), separators=(",", ":")).encode()
    text = b"{" + b",".join(b'"%d":%b' % (i, one) for i in range(tensorfile.MAX_TENSORS + 1)) + b"}"
    file = write(tmp_path / "x.safetensors", text)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(RunError, match="lists 400,001 tensors, and at most 400,000 are read"):
        read_header(file, RunError)
    assert time.process_time() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4 * len(text) // 1024


def test_a_header_longer_than_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with file.open("wb") as stream:  # with a hole, so that nothing of that size is written either
        stream.write(struct.pack("<Q", tensorfile.MAX_HEADER_BYTES + 1))
        stream.truncate(tensorfile.MAX_HEADER_BYTES + 100)
    with pytest.raises(RunError, match="has a header of 67,108,865 bytes, and at most 67,108,864 are read"):
        read_header(file, RunError)


def test_json_of_hundreds_of_megabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    with file.open("wb") as stream:
        stream.truncate(300 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RunError, match="has 314,572,800 bytes, and at most 33,554,432 are read"):
        read_json(file, RunError)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    file.write_text("{}")
    assert read_json(file, RunError) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[1]", "holds a list, expected an object"), (b"{", "is not JSON"), (b"\xff", "is not JSON"),
        (b"[" * 100_000, "nested too deep"), (b'{"a":1,"a":2}', "'a' is there twice"), (b"1" * 9999, "is not JSON"),
    ],
)  # fmt: skip
def test_json_that_is_none_is_refused_by_the_files_name(tmp_path: Path, text: bytes, words: str) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(text)
    with pytest.raises(RunError, match=words) as error:
        read_json(file, RunError)
    assert str(file) in str(error.value)


def test_a_file_that_cannot_be_opened_is_one_sentence(tmp_path: Path) -> None:
    for read in (read_json, read_header):
        with pytest.raises(RunError, match="cannot be read: No such file"):
            read(tmp_path / "nothing", RunError)


def test_types_of_less_than_a_byte_are_not_held_against_their_shape(tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", {"a": entry([6], 0, 3, "F4")}, bytes(3))
    assert read_header(file, RunError) == {"a": TensorInfo("F4", (6,), file.stat().st_size - 3, file.stat().st_size)}
