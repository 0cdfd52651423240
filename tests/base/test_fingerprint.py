"""A base is its tensors: their names, types, shapes and bytes, wherever and however they are kept."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from graftlm.base.fingerprint import cache_folder, fingerprint, weight_files
from graftlm.errors import ModelError


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.folder("llama"), tmp_path / "llama"))


def test_it_does_not_depend_on_the_folder_or_on_how_it_is_cut_into_files(copy: Path, tmp_path: Path) -> None:
    expected = fingerprint(tiny.folder("llama"))
    assert len(expected) == 64
    assert fingerprint(copy) == expected
    sharded = tiny.write(tmp_path / "sharded", tiny.plain(copy), max_shard_size="30KB")
    assert len(weight_files(sharded)) > 2
    assert fingerprint(sharded) == expected
    (copy / "config.json").write_text("{}")
    assert fingerprint(copy) == expected


def test_one_flipped_bit_changes_it(copy: Path) -> None:
    expected = fingerprint(copy)
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert fingerprint(copy) != expected


@pytest.mark.parametrize("change", ["name", "type", "shape", "order"])
def test_names_types_and_shapes_count_and_the_order_in_the_file_does_not(copy: Path, change: str) -> None:
    expected = fingerprint(copy)
    named = load_file(copy / "model.safetensors")
    norm = named.pop("model.norm.weight")
    if change == "name":
        named["model.norm.scale"] = norm
    elif change == "type":
        named["model.norm.weight"] = norm.view(torch.int32)
    elif change == "shape":
        named["model.norm.weight"] = norm[None]
    else:
        (copy / "model.safetensors").unlink()
        save_file({"model.norm.weight": norm}, copy / "a.safetensors")
        save_file(named, copy / "b.safetensors")
    if change != "order":
        save_file(named, copy / "model.safetensors")
    assert (fingerprint(copy) == expected) == (change == "order")


def test_it_is_remembered_until_a_file_changes(copy: Path, graft_cache: Path) -> None:
    first = fingerprint(copy)
    entries = list((cache_folder() / "fingerprints").iterdir())
    assert len(entries) == 1
    assert graft_cache in entries[0].parents
    entries[0].write_text("f" * 64)
    assert fingerprint(copy) == "f" * 64
    time.sleep(0.01)
    (copy / "model.safetensors").touch()
    assert fingerprint(copy) == first


def test_a_cache_that_cannot_be_written_or_is_damaged_costs_nothing_but_time(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graft_cache: Path
) -> None:
    expected = fingerprint(copy)
    next((graft_cache / "fingerprints").iterdir()).write_text("damaged")
    assert fingerprint(copy) == expected
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "file"))
    assert fingerprint(copy) == expected


@pytest.mark.parametrize("kept", [4, 100, -9])
def test_a_file_cut_short_is_refused(copy: Path, kept: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        fingerprint(copy)
