"""A GGUF header is read as the gguf package reads it, and a file that is not what it claims is refused by name."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf_files as files
import numpy as np
import pytest

from graftlm.errors import ModelError
from graftlm.gguf import header
from graftlm.gguf.header import read_gguf

gguf = pytest.importorskip("gguf")

ONE = files.tensor("a.weight", [2, 4], 0, 0)


def test_what_the_gguf_package_writes_is_read_with_its_values_and_its_tensors(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_context_length(77)
    writer.add_token_list(["a", "ä", ""])
    writer.add_token_scores([0.5, -1.0, 2.0])
    writer.add_add_bos_token(True)
    values = np.arange(64 * 3, dtype=np.float32).reshape(3, 64)
    writer.add_tensor("plain", values)
    kind = gguf.GGMLQuantizationType.Q4_0
    writer.add_tensor("blocks", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf(tmp_path / "m.gguf")
    assert found.architecture == "llama"
    assert found.metadata["llama.context_length"] == 77
    assert found.metadata["tokenizer.ggml.tokens"] == ["a", "ä", ""]
    assert found.metadata["tokenizer.ggml.scores"] == [0.5, -1.0, 2.0]
    assert found.metadata["tokenizer.ggml.add_bos_token"] is True
    for tensor in gguf.GGUFReader(str(tmp_path / "m.gguf")).tensors:
        ours = found.tensors[tensor.name]
        assert ours.type.name == tensor.tensor_type.name.lower()
        assert ours.shape == tuple(int(n) for n in tensor.shape[::-1])
        assert found.bytes_of(tensor.name).tobytes() == tensor.data.tobytes()


def test_every_type_of_the_gguf_package_is_known_with_its_block() -> None:
    known = {number: (kind.name, kind.values, kind.bytes) for number, kind in header._TYPES.items()}  # pyright: ignore
    theirs = {int(kind): (kind.name.lower(), *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert known == theirs


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"PK", "is no GGUF file"),
        (b"PK\3\4" + b"\0" * 60, r"is no GGUF file: it begins with b'PK"),
        (b"GGUF", "is cut short"),
        (files.header({}, [], version=1), "has GGUF version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian"),
        (files.header({}, [], count=1 << 60), "claims 1,152,921,504,606,846,976 tensors"),
        (files.header({}, [], keys=1 << 40), "claims 1,099,511,627,776 metadata keys"),
        (files.header({}, [], keys=3), "is cut short"),
        (files.header({"a": "b"}, [])[:-1], "is cut short"),
        (files.header({}, [], keys=1) + struct.pack("<Q", 1 << 50), "a metadata key's name of 1,125,899,906,842,624 bytes"),
        (files.header({}, [], keys=1) + files.string("k") + struct.pack("<IQ", 8, 1 << 40), "'k' of 1,099,511,627,776 bytes"),
        (files.header({}, [], keys=1) + files.string("k") + struct.pack("<I", 99), "'k' of type 99"),
        (files.header({}, [], keys=1) + files.string("k") + struct.pack("<IIQ", 9, 9, 1), "a list of values of type 9"),
        (files.header({}, [], keys=1) + files.string("k") + struct.pack("<IIQ", 9, 4, 1 << 50), "values, and at most"),
        (files.header({}, [], keys=1) + files.string("k") + struct.pack("<IIQ", 9, 4, 1 << 20), "is cut short"),
        (files.header({}, [], keys=2) + 2 * (files.string("k") + files.value(1)), "metadata key 'k' twice"),
        (files.header({}, [], keys=1) + struct.pack("<Q", 1) + b"\xff" + files.value(1), "no UTF-8"),
        (files.header({}, [ONE, ONE]), "lists tensor 'a.weight' twice"),
        (files.header({}, [files.tensor("a", [2, 4], 77, 0)]), "of ggml type 77"),
        (files.header({}, [files.tensor("a", [0, 4], 0, 0)]), r"the shape \[0, 4\]"),
        (files.header({}, [files.tensor("a", [1 << 40, 1 << 40], 0, 0)]), "the shape"),
        (files.header({}, [files.tensor("a", [1] * 9, 0, 0)]), "9 axes"),
        (files.header({}, [files.tensor("a", [2, 33], 2, 0)]), "q4_0 with rows of 33"),
        (files.header({}, [files.tensor("a", [2, 4], 0, 5)]), "places tensor 'a' at 5"),
        (files.header({}, [files.tensor("a", [2, 4], 0, 1 << 62)]), "is cut short: tensor 'a' ends at byte"),
        (files.header({"general.alignment": 3}, [ONE]), "general.alignment 3"),
        (files.header({}, [files.tensor("a", [99, 4], 0, 0), files.tensor("b", [2, 4], 0, 32)]), "places tensor 'b' over"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_it_claims_is_refused_by_name(data: bytes, fault: str, tmp_path: Path) -> None:
    place = tmp_path / "m.gguf"
    place.write_bytes(data + b"\0" * (0 if "cut short" in fault and "tensor" not in fault else 2048))
    with pytest.raises(ModelError, match=fault) as error:
        read_gguf(place)
    assert str(place) in str(error.value)


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    tensors = [ONE, files.tensor("b.weight", [4, 32], 2, 32)]
    whole = files.write(tmp_path / "m.gguf", files.header({"k": [1, 2], "t": "x"}, tensors), b"\1" * (32 + 72))
    data = whole.read_bytes()
    assert read_gguf(whole).bytes_of("b.weight").size == 72
    for length in range(len(data)):
        whole.write_bytes(data[:length])
        with pytest.raises(ModelError):
            read_gguf(whole)
