"""What a process that stays knows of a store's names: another machine's changes are seen, and a bad moment loses nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import stores

from graftlm.adapters.store import LiveNames, Store, live_names
from graftlm.errors import StoreError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    for seed in (1, 2):
        store.publish(stores.run(tmp_path / f"run-{seed}", seed), "formal")
    store.alias("formal", "prod", 1)
    return store


@pytest.fixture
def live(store: Store) -> LiveNames:
    return LiveNames(store.base_versions(stores.BASE))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(live_names.time, "monotonic", lambda: now[0])
    return now


def prod(live: LiveNames) -> int:
    return live.names()["formal"].aliases["prod"]


def test_a_change_is_seen_by_the_next_look_up(store: Store, live: LiveNames, clock: list[float]) -> None:
    assert prod(live) == 1
    store.alias("formal", "prod", 2)
    assert prod(live) == 2
    store.rollback("formal", "prod")
    assert prod(live) == 1


def test_behind_a_cache_of_attributes_a_change_is_seen_within_a_second(
    store: Store, live: LiveNames, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system answers `stat` from this machine's cache, and asks the server when a file is opened."""
    path, before = live._journal.path, os.stat(live._journal.path)
    stat = Path.stat
    monkeypatch.setattr(Path, "stat", lambda p, **more: before if p == path else stat(p, **more))
    assert prod(live) == 1
    store.alias("formal", "prod", 2)
    assert prod(live) == 1, "the cache stands for NFS here"
    clock[0] += live_names.OPEN_SECONDS
    assert prod(live) == 2


def test_a_journal_that_cannot_be_read_for_a_moment_leaves_the_names_as_they_were(
    store: Store, live: LiveNames, clock: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert prod(live) == 1

    def stale(path: Path, *more: Any, **named: Any) -> Any:
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", stale)
        patch.setattr(Path, "open", stale)
        for _ in range(3):
            clock[0] += 0.7
            assert prod(live) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"], "said once"
    assert "Stale file handle" in live.fault
    store.alias("formal", "prod", 2)
    clock[0] += 1
    assert (prod(live), live.fault) == (2, "")


def test_a_volume_that_is_lost_for_a_while_takes_no_name_away(
    store: Store, live: LiveNames, clock: list[float]
) -> None:
    assert prod(live) == 1
    store.root.rename(store.root.with_name("elsewhere"))
    for _ in range(2):
        clock[0] += 1
        assert prod(live) == 1
        assert live.fault.endswith("journal.jsonl is gone")
    store.root.with_name("elsewhere").rename(store.root)
    clock[0] += 1
    assert (prod(live), live.fault) == (1, "")
    store.alias("formal", "prod", 2)
    assert prod(live) == 2


def test_zeros_that_a_network_file_system_shows_before_the_bytes_are_read_again(
    store: Store, live: LiveNames, clock: list[float]
) -> None:
    assert prod(live) == 1
    path = live._journal.path
    store.alias("formal", "prod", 2)
    whole = path.read_bytes()
    line = whole[whole.rfind(b"\n", 0, -1) + 1 :]
    path.write_bytes(whole[: -len(line)] + b"\0" * (len(line) - 9) + line[-9:])
    assert prod(live) == 1
    assert "is damaged" in live.fault
    path.write_bytes(whole)
    clock[0] += 1
    assert (prod(live), live.fault) == (2, "")


def test_a_line_of_a_later_graft_is_not_passed_over(store: Store, live: LiveNames, clock: list[float]) -> None:
    assert prod(live) == 1
    with live._journal.writing() as writer:
        writer.append({"do": "freeze", "name": "formal"})
    store_after = Store(store.root)
    for _ in range(2):
        assert prod(live) == 1
        assert "does not know; update graftlm" in live.fault
        clock[0] += 1
    with pytest.raises(StoreError, match="update graftlm"):
        store_after.alias("formal", "prod", 2)


def test_a_journal_that_never_could_be_read_is_an_error(store: Store, live: LiveNames) -> None:
    path = live._journal.path
    path.write_bytes(path.read_bytes().replace(b"formal", b"formel"))
    for _ in range(2):
        with pytest.raises(StoreError, match="is damaged at line 1"):
            live.names()
    assert LiveNames(store.base_versions("c" * 64)).names() == {}, "and none that is not there yet"
    assert live.fault == ""
