"""A folder or file that is written is there as a whole, or what was there before still is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from graftlm import files
from graftlm.files import atomic_folder, find_damage, remove_leftovers, write_json


def fill(folder: Path, text: str) -> None:
    (folder / "a.txt").write_text(text)
    (folder / "deep").mkdir()
    (folder / "deep" / "b.txt").write_text(text * 2)


def test_a_folder_is_there_with_a_manifest_that_fits(tmp_path: Path) -> None:
    place = tmp_path / "x" / "place"
    with atomic_folder(place, manifest=True) as folder:
        fill(folder, "one")
        assert not place.exists()
    assert find_damage(place) is None
    assert set(json.loads((place / "manifest.json").read_text())["files"]) == {"a.txt", "deep/b.txt"}
    assert [p.name for p in place.parent.iterdir()] == ["place"]


def full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(28, "No space left on device")


def full_at_the_last_rename(self: Path, target: Path, rename: Any = Path.rename) -> Path:
    return full() if self.name.endswith(".partial") else rename(self, target)


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (Path, "write_text", full), (os, "fsync", full), (files, "write_json", full), (Path, "rename", full),
        (Path, "rename", full_at_the_last_rename),
    ],
    ids=["a file", "a flush", "the manifest", "the first rename", "the last rename"],
)  # fmt: skip
def test_what_was_there_stays_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, broken: Any
) -> None:
    place = tmp_path / "place"

    def write(text: str) -> None:
        with atomic_folder(place, manifest=True) as folder:
            fill(folder, text)

    write("old")
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(OSError, match="No space"):
        write("new")
    monkeypatch.undo()
    assert find_damage(place) is None
    assert (place / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["place"]


def test_files_and_folders_are_flushed_before_the_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def flushing(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renaming(self: Path, target: Path) -> Path:
        done.append(f"rename to {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(Path, "rename", renaming)
    with atomic_folder(tmp_path / "place", manifest=True) as folder:
        fill(folder, "x")
        name = folder.name
    last = done.index("rename to place")
    assert {"a.txt", "b.txt", "deep", name} <= set(done[:last])
    assert any(n.startswith(".manifest.json") for n in done[:last])
    assert done.index(name) > max(i for i, n in enumerate(done) if n.startswith(".manifest.json"))
    assert done[last + 1] == tmp_path.name


def test_a_json_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "x.json", {"a": 1})

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_only_what_a_writer_leaves_is_cleared_away(tmp_path: Path) -> None:
    for name in (".x.json.12", ".adapter.12.partial", ".adapter.12.old"):
        (tmp_path / name).mkdir()
    for name in (".gitignore", ".running", ".x.json.12a", "x.12.partial"):
        (tmp_path / name).write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / ".link.12.partial").symlink_to(elsewhere)
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        ".gitignore",
        ".running",
        ".x.json.12a",
        "x.12.partial",
        "elsewhere",
    }


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"files": 5}', '{"files": {"a": {}}}', '{"files": {"a": {"bytes": "x"}}}']
)
def test_a_manifest_that_says_nothing_is_damage(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert find_damage(tmp_path) == "its manifest is missing or unreadable"


def test_a_file_that_another_machine_wrote_is_in_the_manifest_although_it_cannot_be_seen_yet(tmp_path: Path) -> None:
    sums = {"rows-00002-of-00002.safetensors": {"bytes": 3, "sha256": "0" * 64}}
    with atomic_folder(tmp_path / "made", manifest=True, sums=sums) as folder:
        (folder / "own.txt").write_text("here")
    entries = json.loads((tmp_path / "made" / files.MANIFEST).read_text())["files"]
    assert set(entries) == {"own.txt", *sums}
    assert find_damage(tmp_path / "made") is not None
