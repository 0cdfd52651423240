"""Going on training an adapter: through the one loader, with its own formula, and its parent's digest in the manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
import torch
from safetensors.torch import load_file

from graftlm.adapters.peft_format import inspect_folder
from graftlm.adapters.store import Store
from graftlm.commands.train import train
from graftlm.config import TrainConfig
from graftlm.errors import AdapterError, ConfigError, StoreError
from graftlm.training.view import View


def first(tmp_path: Path, **options: Any) -> Path:
    """An adapter of rank 3, and where it is."""
    tiny_run.train(tmp_path, out=str(tmp_path / "first"), **{"eval_data": None, **options})
    return tmp_path / "first" / "adapter"


def further(tmp_path: Path, parent: Path, **options: Any) -> tuple[dict[str, Any], str]:
    given = {"from_adapter": str(parent), "rank": None, "alpha": None, "eval_data": None, **options}
    return tiny_run.heard(tmp_path, **given)


def test_it_begins_where_the_adapter_stands_and_names_it_as_its_parent(tmp_path: Path) -> None:
    parent = first(tmp_path)
    valid = str(tmp_path / "valid.jsonl")
    summary, _ = further(tmp_path, parent, eval_data=valid, steps=3)
    found = inspect_folder(tmp_path / "run" / "adapter")
    assert found.parents == (inspect_folder(parent).digest,)
    assert (found.config["r"], found.config["lora_alpha"]) == (3, 7.0)
    again = tiny_run.train(tmp_path, out=str(tmp_path / "again"), eval_data=valid)
    assert summary["eval_loss_before"] != again["eval_loss_before"], "the base's own"
    steps = tiny_run.lines(tmp_path / "run" / "metrics.jsonl")
    assert steps[0]["eval_loss"] == summary["eval_loss_before"]
    one, two = (load_file(place / "adapter_model.safetensors") for place in (parent, tmp_path / "run" / "adapter"))
    assert one.keys() == two.keys()
    assert not any(torch.equal(one[name], two[name]) for name in one)
    assert inspect_folder(parent).digest == found.parents[0], "the parent stays as it was"


def test_the_config_that_it_saved_is_the_same_run_again(tmp_path: Path) -> None:
    parent = first(tmp_path)
    further(tmp_path, parent, steps=2)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["rank"], saved["alpha"], saved["from_adapter"]) == (None, None, str(parent))
    train(TrainConfig.read(tmp_path / "run" / "config.json", {"out": str(tmp_path / "b")}), View(quiet=True))
    assert tiny_run.adapter_bytes(tmp_path / "run") == tiny_run.adapter_bytes(tmp_path / "b")


def test_an_adapter_is_named_by_its_version_in_a_store(tmp_path: Path) -> None:
    parent = first(tmp_path)
    store = Store(tmp_path / "adapters")
    store.publish(parent, "formal")
    further(tmp_path, Path("formal@1"), store=str(tmp_path / "adapters"), steps=1)
    assert inspect_folder(tmp_path / "run" / "adapter").parents == (inspect_folder(parent).digest,)
    with pytest.raises(StoreError, match="formal@2"):
        further(tmp_path, Path("formal@2"), store=str(tmp_path / "adapters"), steps=1, out=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="--store is for --from-adapter NAME"):
        tiny_run.train(tmp_path, store="x")


def test_the_base_is_stored_as_the_adapter_had_it_unless_asked_otherwise(tmp_path: Path) -> None:
    parent = first(tmp_path, base_precision="nf4")
    summary, _ = further(tmp_path, parent, base_precision=None, steps=1)
    assert summary["base_precision"] == "nf4"
    _, text = further(tmp_path, parent, base_precision="float32", steps=1, out=str(tmp_path / "other"))
    assert "trained on a base in nf4 and runs on float32" in " ".join(text.split())


def test_an_adapter_of_pefts_is_taken_with_its_note(tmp_path: Path) -> None:
    peft = tiny.with_peft(tiny.plain(tiny_run.folder()), tiny.peft_config(target_modules=["q_proj"]))
    peft.save_pretrained(tmp_path / "peft")
    _, text = further(tmp_path, tmp_path / "peft", steps=1)
    assert "no graft.json (PEFT's own)" in " ".join(text.split())
    assert inspect_folder(tmp_path / "run" / "adapter").parents == (inspect_folder(tmp_path / "peft").digest,)


def test_tokens_of_its_own_stay_its_own(tmp_path: Path) -> None:
    place = tmp_path / "base"
    tiny.random_model("llama", vocab_size=tiny_run.VOCABULARY + 3, max_position_embeddings=256).save_pretrained(place)
    tiny_run.byte_tokenizer().save_pretrained(place)
    parent = first(tmp_path, model=str(place), trainable_tokens=["<mill>"], steps=2)
    further(tmp_path, parent, model=str(place), steps=1)
    found = inspect_folder(tmp_path / "run" / "adapter")
    assert "tokenizer.json" in found.files
    assert found.config["trainable_token_indices"] == [tiny_run.VOCABULARY]


@pytest.mark.parametrize(
    ("option", "value"), [("rank", 3), ("alpha", 7), ("targets", "all-linear"), ("lora-dropout", 0.1), ("dora", True)]
)
def test_what_an_adapter_is_made_of_is_its_own(tmp_path: Path, option: str, value: Any) -> None:
    given = {"rank": None, "alpha": None, option: value, "from_adapter": "x"}
    with pytest.raises(
        ConfigError, match=f"--{option} is that of the adapter which training starts from; leave it out"
    ):
        tiny_run.train(tmp_path, **given)


def test_full_training_has_no_adapter_to_go_on_with(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found method full; take lora or qlora"):
        tiny_run.train(tmp_path, method="full", from_adapter="x")


def test_an_adapter_that_the_loader_refuses_is_not_trained_on(tmp_path: Path) -> None:
    parent = first(tmp_path)
    (parent / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="peft_type is null"):
        further(tmp_path, parent)
