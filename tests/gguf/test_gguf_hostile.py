"""A GGUF file whose metadata or header is hostile ends in one sentence, and takes little memory and time until then."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files as files
import pytest
import tiny
from tiny_gguf import WORDS, folder

from graftlm.adapters.gguf import write_gguf
from graftlm.base.loading import load_base, load_tokenizer, resolve
from graftlm.errors import GraftError, ModelError
from graftlm.gguf.header import GgufFile, read_gguf

pytest.importorskip("gguf")

ODD = (None, 0, 7, (1 << 31) + 1, 1.5, math.nan, "text", True, [3, 5], [])
"""None leaves the key out."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    place = tmp_path_factory.mktemp("good")
    write_gguf(folder(place / "model", "llama"), place / "m.gguf", "f32")
    return read_gguf(place / "m.gguf")


def forged(place: Path, good: GgufFile, **changes: Any) -> Path:
    """The file with other metadata; the names have '__' for a dot."""
    new = {name.replace("__", "."): value for name, value in changes.items()}
    metadata = {name: value for name, value in {**good.metadata, **new}.items() if value is not None}
    start = min(tensor.first for tensor in good.tensors.values())
    tensors = [files.tensor(n, t.shape, 0, t.first - start) for n, t in good.tensors.items()]
    return files.write(place, files.header(metadata, tensors), good.path.read_bytes()[start:])


def test_no_odd_value_in_the_metadata_ends_in_a_traceback(
    good: GgufFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    tried, said = 0, dict[tuple[str, str], str]()
    for key in sorted(good.metadata):
        if key in ("tokenizer.ggml.tokens", "general.name"):
            continue
        for value in ODD:
            file = forged(tmp_path / f"{tried}.gguf", good, **{key: value})
            tried += 1
            try:
                load_tokenizer(resolve(str(file)))
                if key.startswith("tokenizer."):
                    continue
                base = load_base(str(file), precision="gguf", compute_dtype="float32", device="cpu")
                assert tiny.base_logits(base, tiny.ids(5)).isfinite().all(), (key, value)
            except GraftError as error:
                said[key, repr(value)] = str(error)
    assert tried > 200
    assert len(said) > 100
    assert {key for key, message in said.items() if len(message) > 700} == set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama__block_count": 9999}, "llama.block_count is 9,999, and its tensors are of 2 layers"),
        ({"llama__block_count": 1}, "llama.block_count is 1, and its tensors are of 2 layers"),
        ({"llama__embedding_length": 1 << 30}, r"llama.embedding_length is 1,073,741,824, and its embedding has rows of"),
        ({"general__architecture": "mamba"}, "architecture 'mamba', and GGUF files are read for llama, qwen2"),
        ({"tokenizer__ggml__tokens": None}, "has no tokenizer"),
        ({"tokenizer__ggml__tokens": ["a"] * (WORDS + 1)}, f"has {WORDS + 1} tokens, and its embedding {WORDS} rows"),
    ],
)  # fmt: skip
def test_metadata_that_its_tensors_do_not_bear_out_is_refused_before_a_model_is_built(
    change: dict[str, Any], message: str, good: GgufFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=message):
        resolve(str(forged(tmp_path / "m.gguf", good, **change)))


Hole = tuple[bytes, int]
"""Bytes, and how many zeros follow as a hole in the file, which takes no room on the disk."""


def _list(name: str, kind: int, count: int) -> bytes:
    return files.string(name) + struct.pack("<IIQ", 9, kind, count)


def _many_lists() -> list[Hole]:
    """100 lists of 3 million bytes each."""
    head = files.header({}, [], keys=100)
    return [(head, 0), *((_list(f"k{i}", 0, 3_000_000), 3_000_000) for i in range(100))]


def _many_strings() -> list[Hole]:
    """One list of more strings than are read, all empty."""
    return [(files.header({}, [], keys=1) + _list("k", 8, 1 << 24), 1 << 27)]


def _long_string() -> list[Hole]:
    return [(files.header({}, [], keys=1) + files.string("k") + struct.pack("<IQ", 8, 1 << 33), 1 << 34)]


def _large_tensor() -> list[Hole]:
    """A tensor of 64 GB that is there, and no model around it."""
    return [(files.header({"general.architecture": "llama"}, [files.tensor("a", [1 << 17, 1 << 17], 0, 0)]), 1 << 37)]


READ = """
import resource, sys
from pathlib import Path
from graftlm.errors import ModelError
from graftlm.gguf.folder import model_folder
idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    model_folder(Path(sys.argv[1]))
except ModelError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle) // 1024)
"""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_many_lists, "has 'k1' of 3,000,000 values, and at most 4,194,304 are read in all lists together"),
        (_many_strings, "has 'k' of 16,777,216 values, and at most 4,194,304 are read in all lists together"),
        (_long_string, "has 'k' of 8,589,934,592 bytes, and at most"),
        (_large_tensor, "has no token_embd.weight"),
    ],
)
def test_memory_stays_small_whatever_a_file_claims(
    make: Callable[[], list[Hole]], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "m.gguf"
    with file.open("wb") as stream:
        for data, hole in make():
            stream.write(data)
            stream.truncate(stream.tell() + hole)
            stream.seek(0, 2)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(file)], capture_output=True, text=True, check=True, timeout=60
    )
    error, grown = done.stdout.strip().rsplit("\n", 1)
    assert message in error
    assert int(grown) < 64
