"""`graft adapters ...`, `graft merge` and `graft generate --store` on the command line, as a user types them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
from test_cli import graft, refused

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))

import stores

COMMANDS = (
    "publish", "list", "show", "diff", "verify", "alias", "rollback", "remove", "import", "export", "push", "pull",
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two runs, published as formal@1 and formal@2 in ./adapters; prod is the first."""
    monkeypatch.chdir(tmp_path)
    for i in (1, 2):
        stores.run(tmp_path / f"runs/{i}", i, evaluation={"before": 3.0, "after": 2.5 - i / 10})
        assert graft("adapters", "publish", f"runs/{i}", "--name", "formal").exit_code == 0
    assert graft("adapters", "alias", "formal", "prod", 1).exit_code == 0
    return tmp_path


def said(*words: object) -> str:
    """Standard output of a command that succeeds, on one line."""
    found = graft("adapters", *words)
    assert found.exit_code == 0, found.stderr
    return " ".join(found.stdout.split())


def told(*words: object) -> Any:
    """The one JSON object of a command that succeeds."""
    found = graft("adapters", *words, "--json")
    assert (found.exit_code, found.stdout.count("\n")) == (0, 1), found.stderr
    return json.loads(found.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_and_its_options(command: str) -> None:
    found = graft("adapters", command, "--help")
    assert f"graft adapters {command} " in found.stdout.partition("Example")[2].replace("\n", " ") + " "
    assert "--json" in found.stdout
    assert "--store" in found.stdout
    assert command in graft("adapters", "--help").stdout


def test_publish_says_the_version_and_its_digest_and_once_is_enough(place: Path) -> None:
    stores.run(place / "runs/3", 3)
    first = told("publish", "runs/3", "--name", "formal", "--note", "three epochs", "--parents", "formal@prod")
    assert (first["version"], first["new"], first["note"]) == ("formal@3", True, "three epochs")
    assert first["parents"] == [told("show", "formal@1")["digest"]]
    assert said("publish", "runs/3", "--name", "formal") == "formal@3 holds this already"
    assert said("publish", "runs/3", "--name", "playful") == f"published playful@1 {first['digest'][:12]}"


def test_list_has_a_line_for_each_name_and_for_each_version_of_one(place: Path) -> None:
    text = said("list")
    assert "formal@2" in text
    assert "prod -> 1" in text
    assert "3.0000 -> 2.3000" in text
    one = said("list", "formal")
    assert one.index("formal@1") < one.index("formal@2") < one.index("history")
    assert [v["version"] for v in told("list")["versions"]] == ["formal@1", "formal@2"]
    found = told("list", "formal")
    assert [v["aliases"] for v in found["versions"]] == [["prod"], []]
    assert [event["do"] for event in found["history"]] == ["alias"]


def test_show_prints_base_data_config_losses_and_parents(place: Path) -> None:
    text = said("show", "formal@prod")
    for words in ("formal@1 (prod)", "tiny, nf4, LlamaForCausalLM", stores.BASE, "dddddddddddd", "learning rate 0.0002",
                  "rank 3, alpha 5", "3.0000 -> 2.4000", "parents none", "graftlm 0.1.0"):  # fmt: skip
        assert words in text
    found = told("show", "formal@prod")
    assert (found["version"], found["aliases"], found["metrics"]["after"]) == ("formal@1", ["prod"], 2.4)


def test_diff_names_what_differs_and_how_far_the_weights_are_apart(place: Path) -> None:
    text = said("diff", "formal@1", "formal@2")
    assert "config: 1 differs" in text
    assert "config.seed 1 2" in text
    assert "over 2 layers" in text
    found = told("diff", "formal@1", "formal@2")
    assert [row["key"] for row in found["config"]] == ["config.seed"]
    assert found["weights"]["distance"] > 0.1
    assert told("diff", "formal@1", "formal@1")["weights"]["distance"] == 0.0


def test_verify_exits_2_for_a_flipped_byte_and_names_the_version(place: Path) -> None:
    assert said("verify").startswith("whole: 2 versions of 2 contents")
    file = Path(told("show", "formal@2")["folder"]) / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(data)
    found = graft("adapters", "verify")
    assert found.exit_code == 2
    assert "1 is not as published, of 2 versions" in found.stdout
    assert "formal@2" in found.stdout
    found = graft("adapters", "verify", "--json")
    assert (found.exit_code, [f["where"] for f in json.loads(found.stdout)["faults"]]) == (2, ["formal@2"])


def test_verify_cleans_what_no_name_has(place: Path) -> None:
    content = Path(told("show", "formal@2")["folder"])
    left = content.with_name("f" * 64)
    left.mkdir()
    (left / "x").write_text("x")
    assert "left over, no version refers to it" in said("verify")
    assert told("verify", "--clean")["cleaned"] == [str(left)]
    assert not left.exists()


def test_alias_and_rollback_say_before_and_now(place: Path) -> None:
    assert said("alias", "formal", "prod", 2) == "formal@prod -> 2, before 1"
    assert said("rollback", "formal", "prod") == "formal@prod -> 1, before 2"
    assert told("alias", "formal", "beta", 2) == {"name": "formal", "alias": "beta", "before": None, "now": 2}
    assert said("alias", "formal", "beta", "--delete") == "formal@beta is gone; it pointed at 2"
    assert "no previous version that is still there" in refused("adapters", "rollback", "formal", "prod")
    assert "which is given after it: graft adapters alias formal prod 2" in refused(
        "adapters", "alias", "formal", "prod"
    )


def test_remove_is_refused_while_an_alias_points_there(place: Path) -> None:
    assert "formal@1 is what formal@prod points at" in refused("adapters", "remove", "formal@1")
    assert said("remove", "formal@2") == "removed formal@2"
    assert "formal@2 was removed" in refused("adapters", "show", "formal@2")
    said("alias", "formal", "prod", "--delete")
    assert told("remove", "formal@1")["content_removed"] is True


def test_push_and_pull_a_folder(place: Path) -> None:
    assert said("push", "./shared", "formal@1").startswith("pushed formal@1 ")
    assert said("push", "./shared", "formal@1").startswith("there already: formal@1 ")
    assert said("pull", "./shared", "--store", "other").startswith("pulled formal@1 ")
    assert said("pull", "./shared", "--store", "other").startswith("here already: formal@1 ")
    assert told("list", "--store", "other")["versions"][0]["digest"] == told("show", "formal@1")["digest"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "fromal@1"], "StoreError: no adapter named 'fromal' in adapters, did you mean 'formal'?"),
        (["show", "formal@7"], "StoreError: formal@7 is not there; versions of 'formal': 1, 2"),
        (["diff", "formal@1", "formal@beta"], "StoreError: 'formal' has no alias 'beta'"),
        (["list", "--store", "nowhere"], "StoreError: no store of adapters at nowhere (is not there)"),
        (["publish", "runs", "--name", "x"], "StoreError: runs holds neither a run nor an adapter"),
        (["publish", "runs/1", "--name", "a/b"], "StoreError: name 'a/b' is not allowed"),
        (["export", "formal@1", "runs", "--for", "peft"], "ConfigError: runs is there already"),
        (["export", "formal@1", "out", "--for", "pfet"], "for: must be 'peft', 'vllm' or 'gguf', found 'pfet'"),
        (["import", "./gone", "--name", "x"], "AdapterError: no adapter at './gone'"),
        (["pull", "./gone"], "StoreError: there is nothing at ./gone"),
        (["push", "nosuch://x", "formal@1"], "nosuch"),
        (["push", "./shared", "--private"], "ConfigError: --private is for a repository of the hub"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_sentence_and_exit_status_2(place: Path, words: list[str], message: str) -> None:
    assert message in refused("adapters", *words)


def test_what_was_trained_is_published_used_exported_imported_and_merged_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = str(tiny_run.folder())
    tiny_run.train(tmp_path, method="qlora", base_precision="nf4")
    said("publish", "run", "--name", "formal")
    said("alias", "formal", "prod", 1)
    ask = ["generate", "--model", base, "--prompt", "3 old: ", "--max-tokens", 5, "--json"]
    by_name = json.loads(graft(*ask, "--adapter", "formal@prod").stdout)
    by_folder = json.loads(graft(*ask, "--adapter", "run/adapter").stdout)
    assert by_name == {**by_folder, "adapter": "formal@prod"}
    assert by_name["precision"] == "nf4"
    elsewhere = json.loads(graft(*ask, "--adapter", "formal", "--store", tmp_path / "adapters").stdout)
    assert elsewhere["text"] == by_folder["text"]
    assert "did you mean 'formal'" in refused(*ask[:-1], "--adapter", "fromal")
    assert "--store is for --adapter NAME" in refused(*ask[:-1], "--store", "adapters")

    assert said("export", "formal@prod", "out", "--for", "vllm").startswith("wrote out: rank 8, alpha ")
    (tmp_path / "theirs").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "theirs" / name).write_bytes((tmp_path / "run" / "adapter" / name).read_bytes())
    found = told("import", "theirs", "--name", "theirs", "--base-precision", "nf4")
    assert (found["version"], found["new"], found["method"]) == ("theirs@1", True, "qlora")
    assert "no graft.json (PEFT's own)" in found["notes"][0]

    merge = ["merge", "--model", base, "--adapter", "formal@prod", "--out"]
    refusal = graft(*merge, "a", "--onto", "original", "--max-drift", 0.001)
    assert refusal.exit_code == 2
    assert "relative difference" in refusal.stderr, "the table is shown with the refusal"
    assert "MergeRefused: merged onto original" in " ".join(refusal.stderr.split())
    assert not Path("a").exists()
    done = graft(*merge, "b", "--max-drift", 0.001)
    assert done.exit_code == 0, done.stderr
    assert "dequantized (chosen)" in done.stdout
    assert tiny.plain(tmp_path / "b").num_parameters() > 0
    assert json.loads(graft(*merge, "c", "--json").stdout)["onto"] == "dequantized"
