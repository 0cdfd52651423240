"""A running vLLM is kept in step with a store: here a stub with vLLM's endpoints, which `vllm_stub.py` describes."""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import vllm_stub
from typer.testing import CliRunner

from graftlm.adapters.store import Store
from graftlm.cli import app
from graftlm.config import ServeConfig
from graftlm.errors import ConfigError
from graftlm.serving.vllm import VllmFollower, follower
from graftlm.serving.vllm.client import VllmRefused, VllmServer, VllmUnreachable


@functools.cache
def _store() -> Path:
    """formal@1 (prod) and formal@2 of rank 8 for vLLM, terse@1 of rank 16; made once in a session."""
    place = Path(tempfile.mkdtemp(prefix="graft-followed-"))
    tiny_run.write_rows(place / "train.jsonl", [{"prompt": f"{i}: ", "completion": "yes"} for i in range(6)])
    store = Store(place / "store")
    for name, seed, rank in (("formal", 1, 4), ("formal", 2, 4), ("terse", 3, 12)):
        run = place / f"run-{seed}"
        tiny_run.train(
            place, steps=1, seed=seed, rank=rank, eval_data=None, eval_every=None, out=run,
            data=[str(place / "train.jsonl")],
        )  # fmt: skip
        store.publish(run, name)
    store.alias("formal", "prod", 1)
    return store.root


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(Path(shutil.copytree(_store(), tmp_path / "store")))


@pytest.fixture
def vllm() -> Iterator[vllm_stub.VllmStub]:
    with vllm_stub.serving() as stub:
        yield stub


class Following:
    """A follower and its notes; `step` is one look at the store and one comparison."""

    def __init__(
        self, store: Store, stub: vllm_stub.VllmStub, out: Path, key: str | None = None, **options: Any
    ) -> None:
        self.out, self.notes = out, list[str]()
        self.config = ServeConfig.build(
            {
                "model": str(tiny_run.folder()),
                "engine": "vllm",
                "store": store.root,
                "out": out,
                "follow": stub.url,
                **options,
            }
        )
        self.follower = VllmFollower(self.config, VllmServer(stub.url, key), self.notes.append)

    def step(self) -> list[str]:
        """The notes of this step."""
        before = len(self.notes)
        self.follower._look()
        self.follower.compare()
        return self.notes[before:]


@pytest.fixture
def out(store: Store) -> Path:
    """Where versions are exported to, once for all tests: a folder is named by its content."""
    return _store().parent / "out"


@pytest.fixture
def following(store: Store, vllm: vllm_stub.VllmStub, out: Path) -> Following:
    return Following(store, vllm, out)


IN_STEP = {"formal": "formal@2", "formal@prod": "formal@1", "terse": "terse@1"}


# ---- in step -----------------------------------------------------------------------------------------------------------


def test_a_server_gets_every_name_and_follows_aliases_versions_and_removals(
    store: Store, vllm: vllm_stub.VllmStub, following: Following
) -> None:
    following.step()
    assert vllm.versions() == IN_STEP
    assert (following.out / follower.IN_STEP).is_file()
    calls = len(vllm.calls)
    assert following.step() == []
    assert len(vllm.calls) == calls, "nothing is loaded twice"
    store.alias("formal", "prod", 2)
    assert following.step()[-1] == "moved      formal@prod: formal@1 -> formal@2"
    assert vllm.versions()["formal@prod"] == "formal@2"
    store.rollback("formal", "prod")
    following.step()
    assert vllm.versions() == IN_STEP
    third, _ = store.publish(_store().parent / "run-3", "formal")
    following.step()
    assert vllm.versions() == {**IN_STEP, "formal": "formal@3"}
    assert third.digest[:12] in vllm.adapters["formal"]
    store.remove("formal@3")
    store.remove("terse@1")
    assert "unloaded   terse: the store has it no more" in following.step()
    assert vllm.versions() == {"formal": "formal@2", "formal@prod": "formal@1"}


def test_names_that_were_asked_for_are_the_only_ones(store: Store, vllm: vllm_stub.VllmStub, out: Path) -> None:
    following = Following(store, vllm, out, adapter=["formal@prod", "terse@1"])
    following.step()
    assert vllm.versions() == {"formal@prod": "formal@1", "terse@1": "terse@1"}
    store.alias("formal", "prod", 2)
    store.remove("terse@1")
    following.step()
    assert vllm.versions() == {"formal@prod": "formal@2"}


def test_a_server_that_was_restarted_is_brought_into_step_from_its_own_list(
    store: Store, vllm: vllm_stub.VllmStub, following: Following
) -> None:
    following.step()
    kept = dict(vllm.adapters)
    store.alias("formal", "prod", 2)
    following.step()
    vllm.restart(
        formal=kept["formal"], formal__prod=kept["formal@prod"], other="/elsewhere/other"
    )  # as its command has it
    following.step()
    assert vllm.versions() == {**IN_STEP, "formal@prod": "formal@2", "other": ""}
    again = Following(store, vllm, following.out)  # the follower was restarted
    again.step()
    assert not [note for note in again.notes if note.startswith(("loaded", "moved", "unloaded"))], again.notes


def test_adapters_of_others_are_left_alone(store: Store, vllm: vllm_stub.VllmStub, following: Following) -> None:
    vllm.restart(formal="/elsewhere/formal", other="/elsewhere/other")
    notes = following.step()
    assert vllm.adapters["formal"] == "/elsewhere/formal"
    assert vllm.adapters["other"] == "/elsewhere/other"
    assert set(vllm.versions()) == {"formal", "formal@prod", "other", "terse"}
    assert any("formal: the server has another adapter of this name, from /elsewhere/formal" in note for note in notes)


# ---- what a server refuses ----------------------------------------------------------------------------------------------


def test_a_version_that_is_refused_leaves_the_earlier_one_and_is_tried_again_when_something_changes(
    store: Store, vllm: vllm_stub.VllmStub, following: Following
) -> None:
    following.step()
    vllm.broken.add("formal@2")
    store.alias("formal", "prod", 2)
    (refused,) = [note for note in following.step() if note.startswith("refused")]
    assert "formal@prod: Call to add_lora method failed: out of memory. Until then formal@1 keeps the name" in refused
    assert vllm.versions() == IN_STEP, "never without an answer, and no trial is left behind"
    assert "unload formal@prod" not in vllm.calls
    calls = len(vllm.calls)
    assert following.step() == []
    assert len(vllm.calls) == calls, "not tried again while nothing changes"
    vllm.broken.clear()
    store.alias("terse", "prod", 1)
    following.step()
    assert vllm.versions() == {**IN_STEP, "formal@prod": "formal@2", "terse@prod": "terse@1"}


@pytest.mark.parametrize(("status", "flat"), [(500, False), (400, True)], ids=["now", "earlier releases"])
def test_a_rank_above_the_servers_is_named_with_the_way_out(
    vllm: vllm_stub.VllmStub, following: Following, status: int, flat: bool
) -> None:
    vllm.max_lora_rank, vllm.load_failed_status, vllm.flat_errors = 8, status, flat
    (refused,) = [note for note in following.step() if note.startswith("refused")]
    assert "terse: terse@1 has rank 16, and the running server takes 8 at most" in refused
    assert "start vLLM again with --max-lora-rank 16. Until then the name is not served" in refused
    assert set(vllm.versions()) == {"formal", "formal@prod"}, "the others are served"
    vllm.max_lora_rank = 16
    vllm.restart()
    following.step()
    assert vllm.versions() == IN_STEP


def test_an_adapter_that_vllm_cannot_serve_stops_no_other(
    store: Store, vllm: vllm_stub.VllmStub, following: Following, tmp_path: Path
) -> None:
    following.step()
    tiny_run.write_rows(tmp_path / "train.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    tiny_run.train(tmp_path, steps=1, eval_data=None, eval_every=None, dora=True)
    store.publish(tmp_path / "run", "formal")
    store.alias("formal", "prod", 2)
    (refused,) = [note for note in following.step() if note.startswith("refused")]
    assert "formal: the adapter cannot be served by vLLM: it is a DoRA" in refused
    assert "Until then formal@2 keeps the name" in refused
    assert vllm.versions() == {**IN_STEP, "formal@prod": "formal@2"}


def test_a_server_is_in_step_with_what_it_takes_and_not_while_it_has_nothing_or_less_than_before(
    store: Store, vllm: vllm_stub.VllmStub, following: Following
) -> None:
    def in_step() -> bool:
        following.step()
        return (following.out / follower.IN_STEP).exists()

    vllm.runtime_updating = False
    assert not in_step(), "it has none"
    vllm.runtime_updating, vllm.max_lora_rank = True, 8
    vllm.restart(other="/elsewhere/other")
    assert in_step()
    assert "terse" not in vllm.versions(), "refused from the start"
    vllm.max_lora_rank = 16
    vllm.restart()
    assert in_step()
    vllm.broken.add("formal@2")
    store.alias("formal", "prod", 2)
    assert in_step(), "the earlier version keeps the name"
    vllm.max_lora_rank = 8
    vllm.restart()
    assert not in_step(), "terse was there before"
    store.remove("terse@1")
    assert not in_step(), "formal was there before, too"
    store.alias("formal", "prod", 1)
    store.remove("formal@2")
    assert in_step()
    store.unalias("formal", "prod")
    store.remove("formal@1")
    assert in_step(), "there is nothing to have"


def test_a_server_without_runtime_updating_or_without_the_folder_is_told_apart(
    vllm: vllm_stub.VllmStub, following: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm.runtime_updating = False
    notes = following.step()
    assert any("was started without VLLM_ALLOW_RUNTIME_LORA_UPDATING=True; start it again" in note for note in notes)
    vllm.runtime_updating = True
    load = vllm._load
    monkeypatch.setattr(vllm, "_load", lambda name, folder, in_place: load(name, Path("/not/mounted"), in_place))
    vllm.restart(other="/elsewhere/other")
    notes = following.step()
    assert any("No adapter found for /not/mounted" in n and "the same folder where vLLM runs" in n for n in notes), (
        notes
    )


def test_a_name_that_cannot_be_unloaded_is_replaced_in_place(
    store: Store, vllm: vllm_stub.VllmStub, following: Following
) -> None:
    following.step()
    vllm.dropped.add("formal@prod")
    store.alias("formal", "prod", 2)
    following.step()
    assert vllm.versions() == {**IN_STEP, "formal@prod": "formal@2"}
    assert vllm.in_place == {"formal@prod"}, "only where there is no other way: every later step would read it again"


def test_a_name_that_the_server_does_not_give_up_is_named_once(
    store: Store, vllm: vllm_stub.VllmStub, following: Following
) -> None:
    following.step()
    vllm.dropped.add("terse")
    store.remove("terse@1")
    assert [note.split(":")[0] for note in following.step()] == ["refused    terse"]
    assert following.step() == []
    vllm.dropped.clear()
    store.unalias("formal", "prod")
    following.step()
    assert vllm.versions() == {"formal": "formal@2"}


def test_a_load_that_fails_after_the_trial_brings_the_earlier_one_back(
    store: Store, vllm: vllm_stub.VllmStub, following: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    following.step()
    load = vllm._load

    def only_the_trial(name: str, folder: Path, in_place: bool) -> tuple[int, Any]:
        if name == "formal@prod" and folder.name.startswith("formal@2"):
            return vllm._error(500, "CUDA out of memory", "InternalServerError")
        return load(name, folder, in_place)

    monkeypatch.setattr(vllm, "_load", only_the_trial)
    store.alias("formal", "prod", 2)
    assert any("CUDA out of memory. Until then formal@1 keeps the name" in note for note in following.step())
    assert vllm.versions() == IN_STEP
    vllm.broken.add("formal@1")  # and the earlier one cannot be loaded again either
    store.alias("terse", "prod", 1)
    assert any("CUDA out of memory. Until then the name is not served" in note for note in following.step())
    vllm.broken.clear()
    monkeypatch.setattr(vllm, "_load", load)
    following.step()
    assert vllm.versions() == {**IN_STEP, "formal@prod": "formal@2", "terse@prod": "terse@1"}


def test_a_full_disk_is_a_refusal(
    store: Store, vllm: vllm_stub.VllmStub, following: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> int:
        raise OSError(28, "No space left on device")

    following.step()
    monkeypatch.setattr(follower, "export_version", full)
    store.alias("formal", "prod", 2)
    assert any("No space left on device. Until then formal@1 keeps the name" in note for note in following.step())
    assert vllm.versions() == IN_STEP


def test_prefix_caching_is_mentioned_where_names_can_move(store: Store, vllm: vllm_stub.VllmStub, out: Path) -> None:
    vllm.prefix_caching = True
    moving = Following(store, vllm, out)
    assert any("prefix cache knows adapters by name" in n and "--no-enable-prefix-caching" in n for n in moving.step())
    vllm.restart()
    fixed = Following(store, vllm, out, adapter=["formal@1", "terse@1"])
    assert not any("prefix cache" in note for note in fixed.step())
    vllm.prefix_caching = False
    vllm.restart()
    assert not any("prefix cache" in note for note in Following(store, vllm, out).step())


# ---- a server that is not there ------------------------------------------------------------------------------------------


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_follower_waits_for_a_server_that_is_not_there_yet_and_for_its_key(
    store: Store, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with vllm_stub.serving() as stub:
        pass
    url = stub.url  # nobody listens there now
    pauses: list[float] = []
    following = Following(store, stub, out)

    def pause(self: VllmFollower, seconds: float) -> None:
        pauses.append(seconds)
        self.stopping = len(pauses) == 7

    monkeypatch.setattr(VllmFollower, "_pause", pause)
    following.follower.run()
    assert pauses == [1, 2, 4, 8, 15, 15, 15]
    (waiting,) = following.notes
    assert waiting.startswith(f"waiting    {url} does not answer: Connection refused; tried again")
    assert not (out / follower.IN_STEP).exists()
    with vllm_stub.serving() as stub:
        stub.key = "sk-vllm"
        keyless = Following(store, stub, out)
        pauses.clear()
        keyless.follower.run()
        (waiting,) = keyless.notes
        assert "wants its API key (Unauthorized); set VLLM_API_KEY to the one that vLLM was started with" in waiting
        assert stub.calls == []
        Following(store, stub, out, key="sk-vllm").step()
        assert stub.versions() == IN_STEP


def test_answers_that_are_not_vllms_are_no_adapters(vllm: vllm_stub.VllmStub, monkeypatch: pytest.MonkeyPatch) -> None:
    server = VllmServer(vllm.url)
    for status, body in ((200, "<html>"), (200, {"data": [{"id": "x", "parent": "y"}]}), (200, []), (503, "starting")):
        monkeypatch.setattr(vllm, "answer", lambda *asked, said=(status, body): said)
        with pytest.raises(VllmUnreachable):
            server.adapters()
    monkeypatch.setattr(vllm, "answer", lambda *asked: (422, {"detail": [{"msg": "odd"}]}))
    with pytest.raises(VllmRefused, match="odd"):
        server.load("a", "/b")


def test_a_store_that_cannot_be_read_for_a_moment_unloads_nothing(
    store: Store, vllm: vllm_stub.VllmStub, following: Following
) -> None:
    following.step()
    journal = store.bases()[0].journal.path
    whole = journal.read_bytes()
    journal.write_bytes(whole + b"0123456789abcdef {}\n")
    notes = following.step()
    assert any(note.startswith("store      the names stay as they were") for note in notes)
    assert vllm.versions() == IN_STEP
    journal.write_bytes(whole)
    store.root.rename(store.root.with_name("elsewhere"))
    following.step()
    assert vllm.versions() == IN_STEP
    store.root.with_name("elsewhere").rename(store.root)


def test_a_follower_that_has_not_read_its_store_yet_unloads_nothing(
    store: Store, vllm: vllm_stub.VllmStub, following: Following, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    following.step()
    journal = store.bases()[0].journal.path
    journal.write_bytes(journal.read_bytes().replace(b"formal", b"formel"))
    again, pauses = Following(store, vllm, out), list[float]()

    def pause(self: VllmFollower, seconds: float) -> None:
        pauses.append(seconds)
        self.stopping = len(pauses) == 3

    monkeypatch.setattr(VllmFollower, "_pause", pause)
    again.follower.run()
    assert (vllm.versions(), len(pauses)) == (IN_STEP, 3)
    (said,) = again.notes
    assert "is damaged at line 1" in said


# ---- the command ---------------------------------------------------------------------------------------------------------


def test_the_command_prints_what_to_start_and_follows_until_a_signal(
    store: Store, vllm: vllm_stub.VllmStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm.key = "sk-vllm"
    monkeypatch.setenv("VLLM_API_KEY", "sk-vllm")
    monkeypatch.setattr(follower, "STORE_SECONDS", 0.02)
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def move_and_stop() -> None:
        until(lambda: vllm.versions() == IN_STEP)
        store.alias("formal", "prod", 2)
        until(lambda: vllm.versions() == {**IN_STEP, "formal@prod": "formal@2"})
        os.kill(os.getpid(), signal.SIGTERM)

    mover = threading.Thread(target=move_and_stop, daemon=True)
    mover.start()
    words = [
        "serve",
        "--model",
        tiny_run.folder(),
        "--store",
        store.root,
        "--engine",
        "vllm",
        "--out",
        "out",
        "--follow",
    ]
    found = CliRunner().invoke(app, [*(str(word) for word in words), f"{vllm.url}/v1/"])
    mover.join(20)
    assert found.exit_code == 0, found.output
    assert signal.getsignal(signal.SIGTERM) is before
    command = shlex.split(found.stdout)
    assert command[:3] == ["VLLM_ALLOW_RUNTIME_LORA_UPDATING=True", "vllm", "serve"]
    assert command[command.index("--port") + 1] == vllm.url.rpartition(":")[2], "the port that is followed"
    assert "--no-enable-prefix-caching" in command
    assert f"formal@prod={tmp_path}/out/formal@1-{Store(store.root).find('formal@1').digest[:12]}" in command
    assert "moved      formal@prod: formal@1 -> formal@2" in found.stderr
    assert "sk-vllm" not in found.output
    assert not (tmp_path / "out" / follower.IN_STEP).exists()


def test_one_adapter_that_cannot_be_exported_does_not_keep_the_follower_from_the_others(
    store: Store, vllm: vllm_stub.VllmStub, tmp_path: Path
) -> None:
    from graftlm.serving.vllm import export_for_vllm

    file = store.find("terse").folder / "adapter_config.json"
    file.chmod(0o644)
    file.write_text(file.read_text().replace('"r": 12', '"r": 5'))
    following = Following(store, vllm, tmp_path / "out")
    notes: list[str] = []
    exported = export_for_vllm(following.config, notes.append)
    assert exported["adapters"].keys() == {"formal", "formal@prod"}
    assert any(note.startswith("refused    terse: terse@1 is not as it was published") for note in notes)
    assert json.loads(json.dumps(exported))["max_lora_rank"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"follow": "127.0.0.1:8000"}, "follow: '127.0.0.1:8000' is not the address of a server; give one such as http://"),
        ({"follow": "http://host:port"}, "is not the address of a server"),
        ({"follow": "http://host:8000/?a=b"}, "is not the address of a server"),
        ({"follow": "http://me:secret@host:8000"}, "the address holds a password; leave it out"),
        ({"follow": "http://me:secret@host:port"}, "the address holds a password; leave it out"),
        ({"follow": "http://me:secret@host:8000/?a=b"}, "the address holds a password; leave it out"),
        ({"follow": "http://host:8000", "engine": "embedded"}, "follow: it is for --engine vllm only"),
    ],
    ids=["scheme", "port", "query", "password", "password and port", "password and query", "engine"],
)  # fmt: skip
def test_an_address_that_cannot_be_followed_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")) as error:
        ServeConfig.build({"model": "demo", "store": "adapters", "engine": "vllm", **options})
    assert "secret" not in str(error.value)
