"""What a message advises to run, runs: each advised command is taken from the message as it stands, and must succeed."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import tiny_run
from test_cli import graft, refused

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))

import stores

from graftlm.adapters.store import Store

STORES = ("adapters", "my other store")
"""The default one, which no command has to name, and one that has to be named and quoted."""


@pytest.fixture(params=STORES)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with math@1 to math@3, of which 2 was removed; prod is 1; once is the one version of single."""
    monkeypatch.chdir(tmp_path)
    store = Store(Path(request.param))
    for i in (1, 2, 3):
        store.publish(stores.run(tmp_path / f"runs/{i}", i), "math")
    store.remove("math@2")
    store.alias("math", "prod", 1)
    store.publish(tmp_path / "runs/1", "single")
    store.alias("single", "once", 1)
    return store


def advised(message: str) -> list[str]:
    """The one command that a message ends with."""
    found = re.findall(r"graft [a-z]+ .*", message)
    assert len(found) == 1, message
    words = shlex.split(found[0])
    assert words[0] == "graft"
    return words[1:]


@pytest.mark.parametrize(
    "words",
    [
        ["alias", "math@1", "prod"],
        ["alias", "math@3", "prod"],
        ["alias", "math", "prod"],
        ["alias", "math", "fresh"],
        ["alias", "math@1", "prod", "3"],
        ["alias", "math@prod", "beta"],
        ["rollback", "math", "prod"],
        ["rollback", "single", "once"],
        ["remove", "math"],
        ["remove", "math@prod"],
        ["remove", "math@1"],
        ["remove", "single@once"],
        ["pull", "there", "--name", "mine"],
    ],
    ids=" ".join,
)
def test_the_command_that_a_refusal_advises_succeeds(words: list[str], place: Store) -> None:
    assert graft("adapters", "push", "./there", "--store", place.root).exit_code == 0
    own = [] if place.root == Path("adapters") else ["--store", str(place.root)]
    again = advised(refused("adapters", *words, *own))
    found = graft(*again)
    assert found.exit_code == 0, (again, found.stderr)


def test_a_name_on_two_bases_is_advised_about_with_its_base(place: Store, tmp_path: Path) -> None:
    place.publish(stores.adapter(tmp_path / "b", 5, base=stores.OTHER), "math")
    own = ["--store", str(place.root), "--base", stores.BASE[:12]]
    found = graft(*advised(refused("adapters", "alias", "math", "beta", *own)))
    assert found.exit_code == 0, found.stderr


def test_the_advised_number_is_that_of_the_version_that_was_named(place: Store) -> None:
    own = ["--store", str(place.root)]
    said = advised(refused("adapters", "alias", "math@1", "beta", *own))
    assert said[:5] == ["adapters", "alias", "math", "beta", "1"]
    assert "so it takes no number; leave 3 out" in refused("adapters", "alias", "math", "prod", "3", "--delete", *own)


def test_what_verify_says_of_leftovers_and_damage_runs(place: Store) -> None:
    folder = place.find("math@1").folder
    shutil.copytree(folder, folder.with_name("e" * 64))
    said = graft("adapters", "verify", "--store", place.root)
    assert said.exit_code == 0, "what is left over is no damage"
    assert graft(*advised(" ".join(said.stdout.split()))).exit_code == 0
    assert place.verify().leftovers == []
    (folder / "adapter_config.json").unlink()
    message = refused("adapters", "show", "math@1", "--store", place.root)
    found = graft(*advised(message))
    assert (found.exit_code, "math@1" in found.stdout) == (2, True), "verify lists what is damaged"


def test_pefts_own_adapter_is_brought_in_by_the_command_that_publish_advises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_run.train(tmp_path)
    theirs = tmp_path / "their adapter"
    theirs.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(tmp_path / "run" / "adapter" / name, theirs / name)
    again = advised(refused("adapters", "publish", theirs, "--name", "theirs"))
    assert graft(*again).exit_code == 0
    assert Store(Path("adapters")).find("theirs").number == 1


def test_an_adapter_that_vllm_cannot_serve_is_merged_by_the_command_that_export_advises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_run.train(tmp_path, dora=True)
    assert graft("adapters", "publish", "run", "--name", "dora").exit_code == 0
    again = advised(refused("adapters", "export", "dora", "out", "--for", "vllm"))
    found = graft(*again)
    assert found.exit_code == 0, (again, found.stderr)
    assert (tmp_path / "merged" / "config.json").is_file()
