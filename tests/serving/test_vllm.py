"""`graft serve --engine vllm` checks and exports what it can serve, refuses the rest with its reason, prints the command."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import tiny_server
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from graftlm.adapters.store import Store
from graftlm.cli import app
from graftlm.config import ServeConfig
from graftlm.errors import ConfigError, StoreError
from graftlm.serving.vllm import export_for_vllm


def config(**options: Any) -> ServeConfig:
    return ServeConfig.build({"model": str(tiny_run.folder()), "engine": "vllm", **options})


def modules(command: str) -> dict[str, Path]:
    """The names and folders that a command gives vLLM."""
    words = shlex.split(command)
    return {
        name: Path(path) for name, _, path in (w.partition("=") for w in words[words.index("--lora-modules") + 1 :])
    }


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(tiny_run.folder(), dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, folder)(torch.tensor([[5, 9, 77, 30, 12]])).logits


def test_the_command_serves_every_name_and_alias_from_one_folder_a_version(tmp_path: Path) -> None:
    store = tiny_server.new_store(tmp_path)
    given = ["serve", "--model", tiny_run.folder(), "--store", store, "--engine", "vllm", "--out", tmp_path / "out"]
    more = ["--host", "0.0.0.0", "--port", 9000, "--base-precision", "nf4", "--max-num-seqs", 5, "--json"]
    found = CliRunner().invoke(app, [str(word) for word in [*given, *more]])
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    words = shlex.split(said["command"])
    assert words[:3] == ["vllm", "serve", str(tiny_run.folder())]
    options = dict(itertools.pairwise(words))
    assert (options["--host"], options["--port"], options["--max-num-seqs"]) == ("0.0.0.0", "9000", "5")
    assert (options["--quantization"], options["--max-lora-rank"], options["--max-loras"]) == ("bitsandbytes", "8", "4")
    served = modules(said["command"])
    assert served.keys() == {"alpha", "beta", "says", "says@prod"}
    assert served["says@prod"] == served["alpha"] != served["says"] == served["beta"], "a folder for each content"
    assert all("=" not in str(folder) for folder in served.values())
    for name, folder in served.items():
        written = json.loads((folder / "adapter_config.json").read_text())
        assert (written["r"], written["use_dora"], written["bias"]) == (8, False, "none"), name
        version = Store(store).find(name)
        assert version.digest == said["adapters"][name]["digest"]
        assert torch.allclose(logits(folder), logits(version.folder), atol=1e-5), "it means the same"


def test_the_next_run_takes_what_is_there_and_adds_what_is_new(tmp_path: Path) -> None:
    place = tiny_server.new_store(tmp_path)
    notes: list[str] = []
    first = export_for_vllm(config(store=place, out=tmp_path / "out", adapter=["says@prod"]), notes.append)
    assert modules(first["command"]).keys() == {"says@prod"}
    second = export_for_vllm(config(store=place, out=tmp_path / "out", adapter=["says@1", "says@2"]), notes.append)
    assert [note.split()[0] for note in notes] == ["exported", "there", "exported"]
    assert second["max_lora_rank"] == 8


def test_what_vllm_cannot_serve_is_refused_with_its_name_and_reason_before_a_command(tmp_path: Path) -> None:
    store = Store(tiny_server.new_store(tmp_path))
    tiny_run.train(tmp_path, steps=1, eval_data=None, eval_every=None, dora=True)
    store.publish(tmp_path / "run", "magnitudes")
    given = [
        "serve",
        "--model",
        tiny_run.folder(),
        "--store",
        store.root,
        "--engine",
        "vllm",
        "--out",
        tmp_path / "out",
    ]
    found = CliRunner().invoke(app, [str(word) for word in given])
    assert found.exit_code == 2
    assert found.stdout == "", "no command"
    said = " ".join(found.stderr.split())
    assert "magnitudes: the adapter cannot be served by vLLM: it is a DoRA" in said
    assert "merge it into a model: graft merge" in said
    rest = export_for_vllm(config(store=store.root, out=tmp_path / "out", adapter=["says"]), lambda text: None)
    assert modules(rest["command"]).keys() == {"says"}, "the others can be named"


def test_a_store_without_adapters_for_this_base_is_refused(tmp_path: Path) -> None:
    place = tiny_server.new_store(tmp_path)
    with pytest.raises(StoreError, match="has no adapters for demo"):
        export_for_vllm(config(model="demo", store=place, out=tmp_path / "out"), lambda text: None)
    with pytest.raises(StoreError, match="no adapter named 'gamma'"):
        export_for_vllm(config(store=place, out=tmp_path / "out", adapter=["gamma"]), lambda text: None)
    file = Store(place).find("beta").folder / "adapter_config.json"
    file.chmod(0o644)
    file.write_text(file.read_text().replace('"r": 4', '"r": 5'))
    with pytest.raises(StoreError, match=r"beta: beta@1 is not as .* r is 5, and the adapter was trained with 4"):
        export_for_vllm(config(store=place, out=tmp_path / "out", adapter=["beta"]), lambda text: None)
    assert not any((tmp_path / "out").glob("beta*"))


def test_named_parsers_are_options_of_the_command(tmp_path: Path) -> None:
    place = tiny_server.new_store(tmp_path)
    given = {"store": place, "out": tmp_path / "out", "adapter": ["alpha"]}
    parsers = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
    command = export_for_vllm(config(**given, **parsers), lambda text: None)["command"]
    assert " --enable-auto-tool-choice --tool-call-parser hermes --reasoning-parser qwen3 " in command
    assert "-parser " not in export_for_vllm(config(**given), lambda text: None)["command"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"api_keys": "keys.yaml"}, "vLLM has one --api-key for everything"),
        ({"base_precision": "int8"}, "vLLM does not store a base as int8"),
        ({"kv_cache_gb": 1.0}, "kv-cache-gb: it is an option of the embedded engine"),
        ({"max_queue": 9}, "max-queue: it is an option of the embedded engine"),
        ({"store": None}, "nothing to export for vLLM; give --store"),
    ],
    ids=["keys", "int8", "cache", "queue", "store"],
)
def test_an_option_that_the_command_could_not_carry_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**{"store": "adapters", **options})


def test_a_base_without_a_chat_template_is_mentioned_where_adapters_know_chats(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "yes"}]} for i in range(5)
    ]
    tiny_run.write_rows(tmp_path / "train.jsonl", rows)
    tiny_run.write_rows(tmp_path / "valid.jsonl", rows)
    tiny_run.train(tmp_path, steps=1, eval_data=None, eval_every=None)
    store = Store(tmp_path / "store")
    store.publish(tmp_path / "run", "chats")
    notes: list[str] = []
    export_for_vllm(config(store=store.root, out=tmp_path / "out"), notes.append)
    assert any("no chat template" in note for note in notes), notes
