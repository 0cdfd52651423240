"""Every command that reads a version refuses one that is not as it was published, and names it; none answers with another.

A door is a command; a break is what somebody did to the version's folder.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run
import tiny_server
from test_cli import graft

from graftlm.adapters.store import Store
from graftlm.errors import StoreError

BASE = str(tiny_run.folder())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with good@1 (ALPHA) and evil@1 (BETA), each with the run.json of its run."""
    store = Store(tmp_path_factory.mktemp("doors") / "adapters")
    for name, word in (("good", "ALPHA"), ("evil", "BETA")):
        store.publish(tiny_server.trained(word), name, run={"config": {"seed": 3, "of": word}})
    return store.root


@pytest.fixture
def place(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a store of one's own."""
    shutil.copytree(whole, tmp_path / "adapters")
    tiny_run.options(tmp_path)  # writes the rows
    monkeypatch.chdir(tmp_path)
    return tmp_path


def link_to_another(good: Path, evil: Path) -> None:
    shutil.rmtree(good)
    good.symlink_to(evil)


def link_to_the_same(good: Path, evil: Path) -> None:
    away = good.parents[4] / "away"
    if not away.exists():
        good.rename(away)
    else:
        shutil.rmtree(good)
    good.symlink_to(away)


def link_above(good: Path, evil: Path) -> None:
    away = good.parents[4] / "away"
    good.parent.rename(away)
    good.parent.symlink_to(away)


def another_instead(good: Path, evil: Path) -> None:
    shutil.rmtree(good)
    shutil.copytree(evil, good)


def file_replaced(good: Path, evil: Path) -> None:
    file = good / "adapter_model.safetensors"
    file.unlink()
    shutil.copyfile(evil / file.name, file)


def run_replaced(good: Path, evil: Path) -> None:
    (good / "run.json").unlink()
    shutil.copyfile(evil / "run.json", good / "run.json")


def file_linked(good: Path, evil: Path) -> None:
    file = good / "adapter_model.safetensors"
    away = good.parents[4] / "away.safetensors"
    file.rename(away)
    file.symlink_to(away)


def extra_file(good: Path, evil: Path) -> None:
    (good / "chat_template.jinja").write_text("{{ 'other' }}")


BREAKS: dict[str, Callable[[Path, Path], None]] = {
    f.__name__: f
    for f in (link_to_another, link_to_the_same, link_above, another_instead, file_replaced, run_replaced, file_linked,
              extra_file)
}  # fmt: skip

ASK = ["--model", BASE, "--base-precision", "float32", "--compute-dtype", "float32"]
DOORS: dict[str, list[str]] = {
    "generate": ["generate", *ASK, "--adapter", "good", "--prompt", "3: ", "--max-tokens", "3"],
    "chat": ["chat", *ASK, "--adapter", "good@1"],
    "chat beside": ["chat", *ASK, "--adapter", "base", "--beside", "good@1"],
    "merge": ["merge", "--model", BASE, "--adapter", "good@1", "--out", "merged", "--unmeasured"],
    "train": ["train", *ASK, "--from-adapter", "good@1", "--data", "train.jsonl", "--steps", "1", "--out", "more"],
    "show": ["adapters", "show", "good@1"],
    "diff first": ["adapters", "diff", "good@1", "evil@1"],
    "diff second": ["adapters", "diff", "evil@1", "good@1"],
    "export peft": ["adapters", "export", "good@1", "out", "--for", "peft"],
    "export vllm": ["adapters", "export", "good@1", "out", "--for", "vllm", "--model", BASE],
    "push": ["adapters", "push", "./shared", "good@1"],
    "serve for vllm": ["serve", "--model", BASE, "--store", "adapters", "--engine", "vllm", "--out", "out",
                       "--adapter", "good@1"],
}  # fmt: skip


def broken(place: Path, how: str) -> None:
    """Do it to good@1."""
    store = Store(place / "adapters")
    BREAKS[how](store.find("good@1").folder, store.find("evil@1").folder)


@pytest.mark.parametrize("door", DOORS)
def test_no_door_lets_a_version_in_that_is_not_as_it_was_published(
    door: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for how in BREAKS:
        here = tmp_path / how
        here.mkdir()
        shutil.copytree(whole, here / "adapters")
        tiny_run.options(here)
        monkeypatch.chdir(here)
        broken(here, how)
        found = graft(*DOORS[door], input="3: \n")
        text = " ".join(found.stderr.split())
        assert found.exit_code == 2, (how, found.output)
        named = "(good|evil)@1" if how == "link_above" else "good@1"
        assert re.search(f"{named} is not as it was published: ", text), (how, text)
        for left in ("merged", "more", "out", "shared"):
            assert not list(here.glob(f"{left}/*")), (how, left)
        verified = graft("adapters", "verify")
        assert (verified.exit_code, "good@1" in verified.stdout) == (2, True), how


@pytest.mark.parametrize("how", sorted(BREAKS.keys() - {"run_replaced"}))
def test_the_path_of_a_version_is_no_way_round_the_check(how: str, place: Path) -> None:
    folder = Store(Path("adapters")).find("good@1").folder
    assert graft("adapters", "export", folder, "whole", "--for", "peft").exit_code == 0
    broken(place, how)
    assert graft("adapters", "export", folder, "out", "--for", "peft").exit_code == 2
    assert not Path("out").exists()


@pytest.mark.parametrize("door", DOORS)
def test_every_door_is_open_for_a_version_as_it_was_published(door: str, place: Path) -> None:
    found = graft(*DOORS[door], input="3: \n")
    assert found.exit_code == 0, found.output


@pytest.mark.parametrize("how", sorted(BREAKS.keys() - {"run_replaced"}))
def test_a_server_answers_with_no_version_that_is_not_as_it_was_published(how: str, place: Path) -> None:
    broken(place, how)
    with tiny_server.serving(store=str(place / "adapters")) as server, server.client() as client:
        for path, body in (
            ("/v1/completions", tiny_server.asked("good@1")),
            ("/v1/chat/completions", {"model": "good", "messages": [{"role": "user", "content": "3: "}]}),
        ):
            answer = client.post(path, json=body)
            assert answer.status_code in (404, 500), (how, answer.text)
            assert str(place) not in answer.text
        loaded = client.post("/v1/adapters/load", json={"adapter": "good@1"})
        assert loaded.status_code >= 400, loaded.text


@pytest.mark.parametrize("how", BREAKS)
def test_publishing_or_pulling_the_same_again_puts_a_version_back(how: str, place: Path) -> None:
    store = Store(place / "adapters")
    assert graft("adapters", "push", "./shared").exit_code == 0
    broken(place, how)
    if how == "link_above":
        with pytest.raises(StoreError, match="is a link"):  # which is for whoever made it to mend
            store.publish(tiny_server.trained("ALPHA"), "good")
        return
    assert graft("adapters", "pull", "./shared", "good@1").exit_code == 0
    assert store.verify().faults == []
    BREAKS[how](store.find("good@1").folder, store.find("evil@1").folder)
    run = {"config": {"seed": 3, "of": "ALPHA"}}
    assert store.publish(tiny_server.trained("ALPHA"), "good", run=run)[1] is False
    check = store.verify()
    assert (check.faults, check.leftovers) == ([], [])
    incoming = store.root / "bases" / store.find("good@1").base / "incoming"
    assert list(incoming.iterdir()) == [], "and nothing of the damaged copy is left"
