"""The store: what is published stays as it was, whoever publishes beside it, and names lead to it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stores
from stores import BASE, OTHER

from graftlm.adapters.store import NamedAdapter, Store, apply_events, looks_like_a_name, open_adapter, parse, resolve
from graftlm.adapters.store import base_versions as shelves
from graftlm.adapters.store.journal import Event, Journal
from graftlm.errors import AdapterError, GraftError, StoreError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with formal@1, formal@2 and formal@3."""
    found = Store(tmp_path / "store")
    for i in (1, 2, 3):
        found.publish(stores.run(tmp_path / f"run{i}", i), "formal")
    return found


def content(store: Store) -> Path:
    return store.root / "bases" / BASE / "versions"


# ---- publishing -----------------------------------------------------------------------------------------------------


def test_versions_are_numbered_from_1_and_hold_the_adapters_own_files(store: Store, tmp_path: Path) -> None:
    assert [v.label for v in store.versions()] == ["formal@1", "formal@2", "formal@3"]
    second = store.find("formal@2")
    for name in ("adapter_config.json", "adapter_model.safetensors", "graft.json"):
        assert (second.folder / name).read_bytes() == (tmp_path / "run2" / "adapter" / name).read_bytes()
    assert second.folder.name == second.digest == json.loads((second.folder / "graft.json").read_text())["digest"]
    assert json.loads((second.folder / "run.json").read_text())["config"]["seed"] == 2


def test_the_same_content_is_stored_once_and_not_numbered_twice(store: Store, tmp_path: Path) -> None:
    again, new = store.publish(stores.adapter(tmp_path / "again", 2), "formal")
    assert (again.label, new) == ("formal@2", False)
    other, new = store.publish(tmp_path / "again", "playful")
    assert (other.label, new) == ("playful@1", True)
    assert len(list(content(store).iterdir())) == 3


def test_a_published_version_does_not_follow_its_source(store: Store, tmp_path: Path) -> None:
    before = (store.find("formal@1").folder / "adapter_model.safetensors").read_bytes()
    (tmp_path / "run1" / "adapter" / "adapter_model.safetensors").write_bytes(b"gone")
    assert (store.find("formal@1").folder / "adapter_model.safetensors").read_bytes() == before
    assert not os.access(store.find("formal@1").folder / "graft.json", os.W_OK) or os.geteuid() == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "gone", "there is no folder"),
        (lambda p: (p / "empty").mkdir() or p / "empty", "holds neither a run nor an adapter"),
        (lambda p: (p / "full" / "model").mkdir(parents=True) or p / "full", "is a full run"),
    ],
)
def test_what_is_no_adapter_is_not_published(make, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(StoreError, match=message):
        Store(tmp_path / "store").publish(make(tmp_path), "x")


def test_an_adapter_without_a_manifest_or_with_a_changed_byte_is_not_published(tmp_path: Path) -> None:
    folder, found = stores.adapter(tmp_path / "a"), Store(tmp_path / "store")
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(AdapterError, match="has changed since it was written"):
        found.publish(folder, "x")
    (folder / "graft.json").unlink()
    with pytest.raises(AdapterError, match="graft adapters import"):
        found.publish(folder, "x")
    assert not found.exists


def test_a_folder_with_other_files_does_not_become_a_store(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(StoreError, match="holds other files and is not a store"):
        Store(tmp_path / "mine").publish(stores.adapter(tmp_path / "a"), "x")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


# ---- names, aliases, rollback ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "a@b", "x" * 65, "ä", "a\n"])
def test_names_that_could_be_paths_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not allowed"):
        Store(tmp_path / "store").publish(stores.adapter(tmp_path / "a"), name)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fromal", "did you mean 'formal'"),
        ("formal@9", r"formal@9 is not there; versions of 'formal': 1, 2, 3"),
        ("formal@prdo", r"has no alias 'prdo', did you mean 'prod'\? It has: prod -> 1"),
        ("formal@0", "counted from 1"),
        ("formal@", "alias '' is not allowed"),
    ],
)
def test_an_unknown_reference_is_refused_with_what_there_is(store: Store, text: str, message: str) -> None:
    store.alias("formal", "prod", 1)
    with pytest.raises(StoreError, match=message):
        store.find(text)


def test_a_name_alone_is_its_newest_version_and_an_alias_what_it_points_at(store: Store) -> None:
    store.alias("formal", "prod", 1)
    assert [resolve(t, store.root).number for t in ("formal", "formal@2", "formal@prod")] == [3, 2, 1]
    assert resolve("formal@prod", store.root).aliases == ("prod",)
    store.remove("formal@3")
    assert store.find("formal").number == 2


def test_an_alias_that_is_a_number_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="numbers are versions"):
        store.alias("formal", "7", 1)


def test_rolling_back_goes_back_one_at_a_time_and_not_to_and_fro(store: Store) -> None:
    for number in (1, 2, 3):
        store.alias("formal", "prod", number)
    assert store.rollback("formal", "prod") == (3, 2)
    assert store.rollback("formal", "prod") == (2, 1)
    with pytest.raises(StoreError, match="no previous version"):
        store.rollback("formal", "prod")
    store.alias("formal", "prod", 3)
    assert store.rollback("formal", "prod") == (3, 1)
    assert [e["do"] for e in store.name("formal")[1].history] == ["alias"] * 3 + ["rollback"] * 2 + [
        "alias",
        "rollback",
    ]


def test_rolling_back_passes_over_what_was_removed(store: Store) -> None:
    for number in (1, 2, 3):
        store.alias("formal", "prod", number)
    store.remove("formal@2")
    assert store.rollback("formal", "prod") == (3, 1)


def test_a_version_that_an_alias_points_at_is_not_removed(store: Store) -> None:
    store.alias("formal", "prod", 2)
    with pytest.raises(StoreError, match=r"formal@2 is what formal@prod points at"):
        store.remove("formal@2")
    assert store.find("formal@2").folder.is_dir()
    store.unalias("formal", "prod")
    store.remove("formal@2")
    with pytest.raises(StoreError, match="formal@2 was removed"):
        store.find("formal@2")


def test_a_number_is_never_given_twice(store: Store, tmp_path: Path) -> None:
    store.remove("formal@3")
    assert store.publish(stores.adapter(tmp_path / "new", 9), "formal")[0].label == "formal@4"


def test_removing_keeps_a_content_that_another_name_has(store: Store, tmp_path: Path) -> None:
    store.publish(stores.adapter(tmp_path / "again", 1), "playful")
    assert store.remove("formal@1")[1] is False
    assert store.find("playful").folder.is_dir()
    assert store.remove("playful@1")[1] is True
    assert len(list(content(store).iterdir())) == 2


def test_a_name_on_two_bases_asks_for_the_base(store: Store, tmp_path: Path) -> None:
    store.publish(stores.adapter(tmp_path / "b", 1, base=OTHER), "formal")
    with pytest.raises(StoreError, match=r"is there for 2 bases.*choose one with --base"):
        store.find("formal")
    assert store.find("formal", OTHER[:8]).base == OTHER
    assert store.find("formal", BASE).number == 3
    with pytest.raises(StoreError, match="no adapters on base 'cccccc'"):
        store.find("formal", "cccccc")


def test_what_a_user_gives_is_a_folder_or_a_name(store: Store, tmp_path: Path) -> None:
    assert open_adapter(tmp_path / "run1" / "adapter").path == tmp_path / "run1" / "adapter"
    assert open_adapter("formal@2", store.root).path == store.find("formal@2").folder
    assert not looks_like_a_name("./formal")
    assert not looks_like_a_name("runs/formal")
    assert str(parse("formal@2")) == "formal@2"
    with pytest.raises(AdapterError, match="no adapter folder at nowhere, and no store"):
        open_adapter("nowhere")


# ---- several at once, and crashes -----------------------------------------------------------------------------------

PUBLISH = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
import stores
from graftlm.adapters import peft_format as format
from graftlm.adapters.store import Store
root = Path(sys.argv[1])

def work(worker):
    store = Store(root / "store")
    told = []
    for i in range(25):
        # every fifth content is one that all workers publish, every name is shared by all
        folder = stores.adapter(root / f"w{worker}-{i}", i if i % 5 == 0 else 1000 * (worker + 1) + i)
        version, new = store.publish(folder, f"name{i % 3}")
        told.append(f"{version.label} {version.digest} {new}")
    (root / f"told{worker}").write_text(chr(10).join(told))

children = []
for worker in range(8):  # forked with every library loaded, so that they really run beside each other
    child = os.fork()
    if child == 0:
        try:
            work(worker)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    children.append(child)
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""


@pytest.mark.measured
def test_eight_processes_publish_200_times_and_no_version_is_lost_or_torn(tmp_path: Path, record_property: Any) -> None:
    arguments = [sys.executable, "-c", PUBLISH, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(
        arguments, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    told = [line.split() for w in range(8) for line in (tmp_path / f"told{w}").read_text().splitlines()]
    assert len(told) == 200
    store = Store(tmp_path / "store")
    there = {v.label: v.digest for v in store.versions()}
    assert all(there[label] == digest for label, digest, _ in told)  # what was promised is there, under its number
    assert Counter(new for _, _, new in told)["True"] == len(there) == 8 * 20 + 5
    for name in ("name0", "name1", "name2"):
        numbers = sorted(store.name(name)[1].versions)
        assert numbers == list(range(1, len(numbers) + 1))
    check = store.verify()
    assert (check.faults, check.leftovers, check.versions) == ([], [], len(there))
    assert list((store.root / "bases" / BASE / "incoming").iterdir()) == []
    record_property("published", {"by processes": 8, "publishes": len(told), "versions": len(there), "lost or torn": 0})


@pytest.mark.parametrize("moment", ["copying", "moved"])
def test_a_publish_that_is_killed_leaves_no_version_and_what_is_left_is_cleaned(
    moment: str, store: Store, tmp_path: Path
) -> None:
    code = f"""
import os, sys
from pathlib import Path
from graftlm.adapters.store import Store, base_versions, journal
def die(*args, **kwargs): os._exit(9)
{"base_versions.BaseVersions.settle = die" if moment == "copying" else "journal.JournalWriter.append = die"}
Store(Path(sys.argv[1])).publish(Path(sys.argv[2]), "formal")
"""
    folder = stores.adapter(tmp_path / "new", 9)
    done = subprocess.run([sys.executable, "-c", code, str(store.root), str(folder)])
    assert done.returncode == 9
    assert [v.number for v in store.versions()] == [1, 2, 3]
    gone = store.clean()
    assert len(gone) == 1
    assert store.clean() == []
    assert not store.verify().leftovers
    assert store.publish(folder, "formal")[0].label == "formal@4"
    assert store.verify().faults == []


def test_cleaning_leaves_what_a_living_process_writes(store: Store) -> None:
    base_versions = store.base_versions(BASE)
    with base_versions.incoming() as place:
        (place / "half").write_text("x")
        assert store.clean() == []
        assert (place / "half").is_file()
    assert not place.exists()


def test_a_line_that_a_crash_cut_short_is_passed_over_and_taken_away(store: Store, tmp_path: Path) -> None:
    journal = store.root / "bases" / BASE / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'0123456789abcdef {"do":"publish","na')
    assert [v.number for v in store.versions()] == [1, 2, 3]
    store.publish(stores.adapter(tmp_path / "new", 9), "formal")
    assert [v.number for v in store.versions()] == [1, 2, 3, 4]
    assert journal.read_bytes().startswith(whole)
    assert journal.read_bytes().count(b"\n") == 4


@pytest.mark.parametrize(
    "tail", [b"0123", b"0123456789abcdef", b"0123456789abcdef ", b"0123456789abcdef {\0\0", b"\0\0\0"]
)
def test_a_tail_that_a_crash_can_leave_is_passed_over(tail: bytes, store: Store) -> None:
    journal = store.root / "bases" / BASE / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + tail)
    assert [v.number for v in store.versions()] == [1, 2, 3]


@pytest.mark.parametrize("tail", [b"\x80\x04\x95not a line", b"0123456789abcdeF", b"0123456789abcdef[", b"{}"])
def test_a_tail_that_is_no_beginning_of_a_line_is_damage(tail: bytes, store: Store) -> None:
    journal = store.root / "bases" / BASE / "journal.jsonl"
    whole = journal.read_bytes()
    for content, line in ((whole + tail, 3), (tail, 0)):
        journal.write_bytes(content)
        with pytest.raises(StoreError, match=rf"damaged after line {line}"):
            store.versions()
        assert store.verify().faults


def test_a_journal_that_is_read_on_says_what_one_read_from_its_beginning_says(store: Store, tmp_path: Path) -> None:
    journal = store.bases()[0].journal
    follower, names = journal.follow(), dict[str, NamedAdapter]()

    def follow() -> list[Event]:
        nonlocal names
        anew, events = follower.news()
        names = apply_events({} if anew else names, events)
        return events

    def as_read() -> dict[str, Any]:
        return {key: (name.versions, name.highest, name.aliases) for key, name in store.bases()[0].names.items()}

    def as_followed() -> dict[str, Any]:
        return {key: (name.versions, name.highest, name.aliases) for key, name in names.items()}

    assert len(follow()) == len(journal.read())
    before = as_followed()
    assert before == as_read()
    kept = names
    changes: list[Callable[[], object]] = [
        lambda: store.alias("formal", "prod", 1), lambda: store.alias("formal", "prod", 2),
        lambda: store.rollback("formal", "prod"), lambda: store.publish(stores.run(tmp_path / "more", 9), "formal"),
        lambda: store.remove("formal@2"), lambda: store.publish(stores.run(tmp_path / "other", 10), "another"),
    ]  # fmt: skip
    for change in changes:
        change()
        assert len(follow()) == 1, "the new line alone"
        assert as_followed() == as_read()
        assert follow() == []
    assert {key: (name.versions, name.highest, name.aliases) for key, name in kept.items()} == before, "a reader's stay"
    with journal.path.open("ab") as stream:
        stream.write(b"0123456789abcdef {")  # cut short
    assert follow() == []
    journal.path.write_bytes(journal.path.read_bytes()[: journal.path.read_bytes().rfind(b"\n") + 1])
    longer = b"".join(journal.path.read_bytes().splitlines(keepends=True)[:-1])
    journal.path.write_bytes(longer)  # an older copy was put back
    follow()
    assert as_followed() == as_read()
    with journal.path.open("r+b") as stream:  # the same file, other lines
        stream.seek(len(longer) - 5)
        stream.write(b"?")
    with journal.path.open("ab") as stream:
        stream.write(b"0123456789abcdef {}\n")
    with pytest.raises(StoreError, match=r"is damaged at line \d+"):
        follow()


def test_a_journal_that_cannot_be_written_records_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (store.root / "bases" / BASE / "journal.jsonl").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    folder = stores.adapter(tmp_path / "new", 9)
    with monkeypatch.context() as patch:
        patch.setattr("graftlm.adapters.store.journal.os.fsync", full)
        with pytest.raises(GraftError, match="No space left"):
            store.publish(folder, "formal")
    assert (store.root / "bases" / BASE / "journal.jsonl").read_bytes() == before
    assert store.publish(folder, "formal")[0].label == "formal@4"


# ---- verify ---------------------------------------------------------------------------------------------------------


def test_a_store_as_it_was_published_is_whole(store: Store) -> None:
    check = store.verify()
    assert (check.versions, check.contents, check.faults, check.leftovers) == (3, 3, [], [])


def test_one_flipped_byte_anywhere_is_found(store: Store) -> None:
    generator = random.Random(5)
    files = [p for p in store.root.rglob("*") if p.is_file() and p.name not in (".lock", "store.json")]
    assert {p.name for p in files} >= {"journal.jsonl", "graft.json", "adapter_model.safetensors", "run.json"}
    for file in files:
        file.chmod(0o644)
        data = file.read_bytes()
        for _ in range(12):
            at = generator.randrange(len(data))
            flipped = bytearray(data)
            flipped[at] ^= 1 << generator.randrange(8)
            file.write_bytes(flipped)
            cut_short = (
                file.name == "journal.jsonl" and at == len(data) - 1
            )  # the last line's end: as if a crash cut it
            found = store.verify()
            assert found.faults or (cut_short and found.leftovers), f"{file.name}: byte {at} of {len(data)}"
        file.write_bytes(data)
    assert store.verify().faults == []


def test_a_missing_and_an_added_file_are_found(store: Store) -> None:
    folder = store.find("formal@2").folder
    (folder / "notes.txt").write_text("x")
    assert "was not published with it" in store.verify().faults[0].what
    (folder / "notes.txt").unlink()
    (folder / "adapter_config.json").unlink()
    fault = store.verify().faults[0]
    assert (fault.where, "adapter_config.json" in fault.what) == ("formal@2", True)


def test_publishing_the_same_content_again_heals_a_damaged_one(store: Store, tmp_path: Path) -> None:
    (store.find("formal@2").folder / "adapter_config.json").unlink()
    assert store.verify().faults
    assert store.publish(tmp_path / "run2", "formal")[1] is False
    assert store.verify().faults == []


def test_a_line_taken_out_of_the_journal_is_found(store: Store) -> None:
    journal = store.root / "bases" / BASE / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + lines[2])
    with pytest.raises(StoreError, match="damaged at line 2"):
        store.find("formal@1")


# ---- many -----------------------------------------------------------------------------------------------------------


@pytest.mark.measured
def test_10_000_versions_are_listed_in_under_half_a_second(tmp_path: Path, record_property: Any) -> None:
    store = Store(tmp_path / "store")
    one, _ = store.publish(stores.adapter(tmp_path / "a"), "name0")
    journal = Journal(store.root / "bases" / BASE / "journal.jsonl")
    journal.path.unlink()
    from graftlm.adapters.store import journal as module

    lines, last = [], "0" * 16
    for i in range(10_000):
        event = {**one.event, "name": f"name{i % 100}", "version": i // 100 + 1, "digest": f"{i:064x}"}
        text = json.dumps(event, separators=(",", ":"))
        last = module._sum(last, text)  # pyright: ignore[reportPrivateUsage]
        lines.append(f"{last} {text}\n")
    journal.path.write_text("".join(lines))
    seconds: list[float] = []
    for _ in range(3):
        started = time.process_time()
        found = Store(store.root).versions()
        seconds.append(time.process_time() - started)
    assert len(found) == 10_000
    assert min(seconds) < 0.5
    record_property("seconds to list 10,000 versions", round(min(seconds), 3))
    assert shelves.RUN == "run.json"
