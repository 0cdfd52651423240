"""Push to and pull from the hub, through its own client: one commit is a version, and half a transfer is none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stores
from hubs import Hub, talking_to

from graftlm.adapters.store import Store
from graftlm.adapters.store.hub import RECORD
from graftlm.commands.push_pull import pull, push
from graftlm.config import PullConfig, PushConfig
from graftlm.errors import AdapterError, ConfigError, StoreError

HERE = "someone/formal"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process's client talks to."""
    with Hub() as running:
        talking_to(running, tmp_path / "cache", monkeypatch)
        yield running


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path / "store")
    for i in (1, 2):
        found.publish(stores.run(tmp_path / f"run{i}", i), "formal", note=f"number {i}")
    return found


def sent(store: Store, *versions: str, place: str = HERE, **options: Any) -> bool:
    done = push(PushConfig.build({"place": place, "versions": list(versions), "store": store.root, **options}))
    return done["versions"][0]["new"]


def got(root: Path, place: str = HERE, **options: Any) -> dict[str, Any]:
    return pull(PullConfig.build({"place": place, "store": root, **options}))


def commits(hub: Hub) -> int:
    """Commits beside the one that a new repository begins with."""
    return len(hub.repositories.get(HERE, [])[1:])


def test_what_is_pushed_is_one_commit_and_is_pulled_with_its_number_note_and_run(
    hub: Hub, store: Store, tmp_path: Path
) -> None:
    assert sent(store, "formal@1") is True
    there = hub.repositories[HERE][-1]
    assert commits(hub) == 1
    assert set(there.files) == {
        ".gitattributes", "adapter_config.json", "adapter_model.safetensors", "graft.json", "run.json", RECORD,
    }  # fmt: skip
    mine = store.find("formal@1")
    assert there.message == f"formal@1 {mine.digest[:12]}"
    assert there.files["adapter_model.safetensors"] == (mine.folder / "adapter_model.safetensors").read_bytes()
    done = got(tmp_path / "here")
    assert done["versions"] == [{"version": "formal@1", "digest": mine.digest, "fingerprint": stores.BASE, "new": True}]
    here = Store(tmp_path / "here")
    assert here.find("formal@1").event == mine.event
    assert json.loads((here.find("formal@1").folder / "run.json").read_text())["config"]["seed"] == 1
    assert here.verify().faults == []


def test_the_same_version_again_is_no_commit_and_the_next_one_is_the_next_commit(
    hub: Hub, store: Store, tmp_path: Path
) -> None:
    sent(store, "formal@1")
    assert sent(store, "formal@1") is False
    assert commits(hub) == 1
    assert sent(store, "formal@2") is True
    assert [v["version"] for v in got(tmp_path / "here")["versions"]] == ["formal@2"]
    first = hub.repositories[HERE][1].sha
    assert [v["version"] for v in got(tmp_path / "here", revision=first)["versions"]] == ["formal@1"]
    assert [v["new"] for v in got(tmp_path / "here")["versions"]] == [False]
    assert [v.label for v in Store(tmp_path / "here").versions()] == ["formal@1", "formal@2"]


def test_a_tokenizer_that_only_the_version_before_had_goes_with_the_same_commit(hub: Hub, tmp_path: Path) -> None:
    found = Store(tmp_path / "store")
    folder = stores.adapter(tmp_path / "own", 1, extra={"tokenizer.json": "{}"})
    found.publish(folder, "formal")
    found.publish(stores.adapter(tmp_path / "plain", 2), "formal")
    sent(found, "formal@1")
    assert "tokenizer.json" in hub.repositories[HERE][-1].files
    sent(found, "formal@2")
    assert "tokenizer.json" not in hub.repositories[HERE][-1].files


def test_another_name_and_another_content_under_the_number_are_refused(hub: Hub, store: Store, tmp_path: Path) -> None:
    sent(store, "formal@1")
    other = Store(tmp_path / "other")
    other.publish(stores.adapter(tmp_path / "mine", 50), "formal")
    other.publish(stores.adapter(tmp_path / "more", 51), "playful")
    with pytest.raises(StoreError, match=r"has another formal@1 .*publish yours as the next version"):
        sent(other, "formal@1")
    with pytest.raises(StoreError, match=r"holds formal@1, and a repository has versions of one name"):
        sent(other, "playful@1")
    assert commits(hub) == 1


def test_a_commit_that_somebody_else_made_meanwhile_is_not_written_over(hub: Hub, store: Store) -> None:
    sent(store, "formal@1")

    def meanwhile(method: str, path: str) -> bool:
        if "/preupload/" in path:
            commit = hub.repositories[HERE][-1]
            hub.repositories[HERE].append(type(commit)("7" * 40, {**commit.files, "README.md": b"theirs"}))
        return False

    hub.breaks = meanwhile
    with pytest.raises(StoreError, match=r"was not written on the hub: .*412"):
        sent(store, "formal@2")
    assert hub.repositories[HERE][-1].sha == "7" * 40


@pytest.mark.parametrize("step", ["api/repos/create", "/preupload/", "/objects/batch", "lfs/", "/commit/"])
def test_a_push_that_breaks_off_anywhere_is_no_version_and_the_next_one_completes_it(
    step: str, hub: Hub, store: Store, tmp_path: Path
) -> None:
    hub.breaks = lambda method, path: method in ("POST", "PUT") and step in path
    with pytest.raises(StoreError, match="someone/formal was not written on the hub: "):
        sent(store, "formal@1")
    assert commits(hub) == 0
    hub.breaks = lambda method, path: False
    assert sent(store, "formal@1") is True
    assert got(tmp_path / "here")["versions"][0]["digest"] == store.find("formal@1").digest


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "graft.json", RECORD])
def test_a_pull_that_breaks_off_anywhere_leaves_nothing(file: str, hub: Hub, store: Store, tmp_path: Path) -> None:
    sent(store, "formal@1")
    hub.breaks = lambda method, path: method == "GET" and path.endswith(file)
    with pytest.raises(AdapterError, match="could not be downloaded from the hub: "):
        got(tmp_path / "here")
    assert not Store(tmp_path / "here").exists
    hub.breaks = lambda method, path: False
    assert got(tmp_path / "here")["versions"][0]["new"]


def test_a_hub_that_is_not_reached_is_an_error_though_an_earlier_download_is_there(
    hub: Hub, store: Store, tmp_path: Path
) -> None:
    sent(store, "formal@1")
    got(tmp_path / "here")
    hub.breaks = lambda method, path: True
    with pytest.raises(StoreError, match="someone/formal cannot be read on the hub: "):
        got(tmp_path / "there")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "graft.json", RECORD])
def test_a_byte_that_changed_there_is_found_before_the_version_appears(
    file: str, hub: Hub, store: Store, tmp_path: Path
) -> None:
    sent(store, "formal@1")
    commit = hub.repositories[HERE][-1]
    data = bytearray(commit.files[file])
    at = data.index(b'"digest"') + 12 if file == RECORD else len(data) // 2
    data[at] ^= 1
    hub.repositories[HERE].append(type(commit)("8" * 40, {**commit.files, file: bytes(data)}))
    with pytest.raises(StoreError, match=r"someone/formal.* (is damaged and was not published|is another adapter)"):
        got(tmp_path / "here")
    assert not Store(tmp_path / "here").exists


def test_what_graft_did_not_push_is_imported_not_pulled(hub: Hub, store: Store, tmp_path: Path) -> None:
    sent(store, "formal@1")
    commit = hub.repositories[HERE][-1]
    files = {name: content for name, content in commit.files.items() if name != RECORD}
    hub.repositories[HERE].append(type(commit)("9" * 40, files))
    with pytest.raises(StoreError, match=f"has no {RECORD}.*graft adapters import"):
        got(tmp_path / "here")
    with pytest.raises(StoreError, match="no repository 'someone/gone' on the hub"):
        got(tmp_path / "here", "someone/gone")
    with pytest.raises(StoreError, match="has no revision 'v9'"):
        got(tmp_path / "here", revision="v9")


def test_a_repository_holds_one_version(hub: Hub, store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds one version, and 2 are meant"):
        sent(store)
    with pytest.raises(ConfigError, match="leave its name out"):
        got(tmp_path / "here", versions=["formal@1"])
    assert hub.asked == []


def test_private_is_asked_for_where_the_repository_is_made_and_a_public_one_is_refused(hub: Hub, store: Store) -> None:
    sent(store, "formal@1", private=True)
    sent(store, "formal@1", place="someone/open")
    assert hub.private == {HERE: True, "someone/open": False}
    sent(store, "formal@2", private=True)
    with pytest.raises(StoreError, match="someone/open is there already and is public"):
        sent(store, "formal@2", place="someone/open", private=True)


def test_a_push_whose_process_is_killed_is_no_version(store: Store, hub: Hub, tmp_path: Path) -> None:
    settings = {
        **os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    line = [sys.executable, "-m", "graftlm.cli", "adapters", "push", HERE, "formal@1", "--store", str(store.root)]
    pushing = subprocess.Popen(line, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def kills(method: str, path: str) -> bool:
        if method == "PUT":
            pushing.send_signal(signal.SIGKILL)
            pushing.wait()
        return method == "PUT"

    hub.breaks = kills
    _, error = pushing.communicate(timeout=100)
    assert pushing.returncode == -signal.SIGKILL, error
    assert commits(hub) == 0
    hub.breaks = lambda method, path: False
    assert sent(store, "formal@1")
    assert got(tmp_path / "here")["versions"][0]["digest"] == store.find("formal@1").digest
