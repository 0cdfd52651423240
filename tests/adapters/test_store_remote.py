"""Push and pull: a real S3 server on loopback, a folder, and the hub's protocol; half a transfer is no version."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stores
from stores import BASE

from graftlm.adapters.store import Store
from graftlm.adapters.store.remote import Remote
from graftlm.commands.push_pull import is_hub_id, pull, push
from graftlm.config import PullConfig, PushConfig
from graftlm.errors import ConfigError, StoreError

s3fs = pytest.importorskip("s3fs")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """moto's S3 server in a thread: the address."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture(params=["s3", "folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place to push to."""
    if request.param == "folder":
        return str(tmp_path / "shared")
    for key, value in {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_ENDPOINT_URL": request.getfixturevalue("server"),
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"b{abs(hash(request.node.name)) % 10**9}"
    s3fs.S3FileSystem(client_kwargs={"region_name": "eu-central-1"}).mkdir(bucket)
    return f"s3://{bucket}/adapters"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path / "store")
    for i in (1, 2):
        found.publish(stores.run(tmp_path / f"run{i}", i), "formal", note=f"number {i}")
    found.publish(stores.adapter(tmp_path / "other", 7), "playful")
    return found


def sent(store: Store, place: str, *versions: str) -> dict[str, Any]:
    return push(PushConfig.build({"place": place, "versions": list(versions), "store": store.root}))


def got(root: Path, place: str, *versions: str, **options: Any) -> dict[str, Any]:
    return pull(PullConfig.build({"place": place, "versions": list(versions), "store": root, **options}))


def test_what_is_pushed_is_pulled_with_its_names_numbers_and_lineage(store: Store, place: str, tmp_path: Path) -> None:
    assert [v["new"] for v in sent(store, place)["versions"]] == [True] * 3
    done = got(tmp_path / "here", place)
    assert [v["version"] for v in done["versions"]] == ["formal@1", "formal@2", "playful@1"]
    here = Store(tmp_path / "here")
    for mine, theirs in zip(here.versions(), store.versions()):
        assert (mine.label, mine.digest, mine.base, mine.event) == (theirs.label, theirs.digest, BASE, theirs.event)
        assert {p.name for p in mine.folder.iterdir()} == {p.name for p in theirs.folder.iterdir()}
    assert here.verify().faults == []


def test_pushing_and_pulling_again_changes_nothing(store: Store, place: str, tmp_path: Path) -> None:
    sent(store, place, "formal@1")
    assert [v["new"] for v in sent(store, place, "formal@1")["versions"]] == [False]
    got(tmp_path / "here", place)
    assert [v["new"] for v in got(tmp_path / "here", place)["versions"]] == [False]
    assert len(Store(tmp_path / "here").versions()) == 1


def test_one_version_may_be_named_and_taken_under_another_name(store: Store, place: str, tmp_path: Path) -> None:
    sent(store, place)
    got(tmp_path / "here", place, "formal@2", name="theirs")
    assert [v.label for v in Store(tmp_path / "here").versions()] == ["theirs@1"]
    with pytest.raises(StoreError, match=r"has no fromal@2, did you mean 'formal@2'"):
        got(tmp_path / "here", place, "fromal@2")
    with pytest.raises(StoreError, match=r"an alias"):
        got(tmp_path / "here", place, "formal@prod")
    with pytest.raises(ConfigError, match="--name is for one version"):
        got(tmp_path / "here", place, name="x")


def test_another_content_under_the_same_number_is_refused_on_both_ways(
    store: Store, place: str, tmp_path: Path
) -> None:
    sent(store, place, "formal@1")
    other = Store(tmp_path / "other-store")
    other.publish(stores.adapter(tmp_path / "mine", 50), "formal")
    with pytest.raises(StoreError, match=r"has another formal@1"):
        sent(other, place, "formal@1")
    with pytest.raises(StoreError, match="is here already with other content"):
        got(other.root, place)
    assert [v.digest for v in other.versions()] == [other.find("formal@1").digest]
    assert Remote(place).records()[0].digest == store.find("formal@1").digest


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_push_that_breaks_off_is_no_version_and_the_next_one_completes_it(
    after: int, store: Store, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = Remote(place).fs  # one instance for all: fsspec keeps it
    real = fs.put_file
    calls = iter(range(100))

    def breaks(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= after:
            raise ConnectionResetError("connection reset by peer")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(fs, "put_file", breaks)
        with pytest.raises(StoreError, match="cannot be written: ConnectionResetError"):
            sent(store, place, "formal@1")
    fs.invalidate_cache()
    assert not fs.exists(Remote(place).root) or Remote(place).records() == []
    assert sent(store, place, "formal@1")["versions"][0]["new"]
    assert got(tmp_path / "here", place)["versions"][0]["digest"] == store.find("formal@1").digest


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_pull_that_breaks_off_leaves_nothing(
    after: int, store: Store, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent(store, place, "formal@1")
    fs = Remote(place).fs  # one instance for all: fsspec keeps it
    real = fs.get_file
    calls = iter(range(100))

    def breaks(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= after:
            raise TimeoutError("timed out")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(fs, "get_file", breaks)
        with pytest.raises(StoreError, match="cannot be read: TimeoutError"):
            got(tmp_path / "here", place)
    assert not Store(tmp_path / "here").exists
    assert got(tmp_path / "here", place)["versions"][0]["new"]


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "graft.json"])
def test_a_byte_that_changed_there_is_found_before_the_version_appears(
    file: str, store: Store, place: str, tmp_path: Path
) -> None:
    sent(store, place, "formal@1")
    remote = Remote(place)
    path = f"{remote.root}/{BASE}/versions/{store.find('formal@1').digest}/{file}"
    data = bytearray(remote.fs.cat_file(path))
    data[len(data) // 2] ^= 4
    remote.fs.pipe_file(path, bytes(data))
    with pytest.raises(StoreError, match=r"is damaged and was not published|is another adapter"):
        got(tmp_path / "here", place)
    assert not Store(tmp_path / "here").exists


def test_a_record_that_names_another_content_is_refused(store: Store, place: str, tmp_path: Path) -> None:
    sent(store, place)
    remote = Remote(place)
    path = f"{remote.root}/{BASE}/names/formal/1.json"
    event = json.loads(remote.fs.cat_file(path))
    remote.fs.pipe_file(path, json.dumps({**event, "version": 2}).encode())
    with pytest.raises(StoreError, match="record of formal@1 is damaged"):
        got(tmp_path / "here", place)
    first, second = (f"{remote.root}/{BASE}/versions/{store.find(f'formal@{n}').digest}" for n in (1, 2))
    remote.fs.pipe_file(path, json.dumps(event).encode())
    for name in ("adapter_model.safetensors", "graft.json"):
        remote.fs.pipe_file(f"{first}/{name}", remote.fs.cat_file(f"{second}/{name}"))
    with pytest.raises(StoreError, match="is another adapter than its record says"):
        got(tmp_path / "here", place, "formal@1")


def test_a_damaged_version_is_not_pushed(store: Store, place: str) -> None:
    folder = store.find("formal@1").folder
    (folder / "adapter_config.json").unlink()
    with pytest.raises(Exception, match=r"adapter_config\.json"):
        sent(store, place, "formal@1")


def test_a_place_that_is_not_there_or_not_readable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is nothing at"):
        got(tmp_path / "here", str(tmp_path / "gone"))
    with pytest.raises(StoreError, match="nosuch"):
        got(tmp_path / "here", "nosuch://x/y")


def test_nothing_to_push_and_nothing_to_pull_are_errors(store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="empty holds no versions; push some there first"):
        got(tmp_path / "here", str(tmp_path / "empty"))
    for version in store.versions():
        store.remove(version.label)
    with pytest.raises(StoreError, match="holds no versions to push; publish one first"):
        sent(store, str(tmp_path / "empty"))


def test_two_words_with_a_slash_are_the_hub_and_paths_are_places() -> None:
    assert is_hub_id("owner/name")
    assert not any(is_hub_id(p) for p in ("./owner/name", "/a/b", "s3://a/b", "~/x", "a/b/c", "name"))
