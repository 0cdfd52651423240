"""What is exported does what the adapter does: for PEFT as it is, for vLLM in the one form that it computes, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import stores
import tiny
import torch
from merging import saved
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import attach, detach
from graftlm.adapters.export import RANKS, export_adapter
from graftlm.adapters.store import Store
from graftlm.base.loading import Base, load_base
from graftlm.config import ExportConfig
from graftlm.errors import AdapterError, ConfigError, StoreError

IDS = tiny.ids(30)
PREFIX = "base_model.model."


def loaded(architecture: str) -> Base:
    return load_base(str(tiny.folder(architecture)), precision="float32", compute_dtype="float32", device="cpu")


def exported(version: Path | str, out: Path, reader: str = "vllm", **options: Any) -> dict[str, Any]:
    return export_adapter(ExportConfig.build({"version": str(version), "out": out, "for": reader, **options}))


def live_logits(base: Base, folder: Path) -> Tensor:
    attach(base, adapter_format.load(base, folder), slot=2)
    try:
        return tiny.base_logits(base, IDS, slot=2)
    finally:
        detach(base, slot=2)


def as_vllm_reads(base: Path, adapter: Path, place: Path) -> Tensor:
    """Logits of the checkpoint with every pair added to the tensor that it is named after, at one alpha / r."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    named, pairs = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for key in pairs:
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            A, B = pairs[key], pairs[key.replace("lora_A", "lora_B")]
            assert A.shape[0] == B.shape[1] == config["r"], key
            named[f"{module}.weight"] += config["lora_alpha"] / config["r"] * (B @ A)
    place.mkdir()
    for file in base.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    save_file(named, place / "model.safetensors", metadata={"format": "pt"})
    return tiny.plain_logits(tiny.plain(place), IDS)


PLANS: dict[str, dict[str, Any]] = {
    "one scale": {"rank": 4, "alpha": 8.0},
    "a scale that is no whole alpha": {"rank": 3, "alpha": 5.0},
    "rank-stabilized": {"rank_stabilized": True},
    "ranks and scales of their own": {
        "targets": ("q_proj", "v_proj", "down_proj"), "ranks": {"q_proj": 9}, "alphas": {"v_proj": 11.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("which", PLANS)
def test_for_vllm_there_is_one_rank_and_one_scale_and_the_same_logits(
    which: str, architecture: str, tmp_path: Path
) -> None:
    base = loaded(architecture)
    plan = PLANS[which]
    folder = saved(base, tmp_path / "a", **plan)
    done = exported(folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert done["rank"] == config["r"] == (16 if "ranks" in plan else 8)
    assert isinstance(config["lora_alpha"], int)
    plain = ("rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters", "trainable_token_indices")
    assert not [key for key in plain if config.get(key)]
    assert (config["bias"], config["use_rslora"], config["use_dora"]) == ("none", False, False)
    found = as_vllm_reads(tiny.folder(architecture), tmp_path / "out", tmp_path / "merged")
    tiny.close(found, live_logits(base, folder), rtol=1e-4)
    assert (found - tiny.base_logits(base, IDS, slot=0)).norm() > 0.01


def test_experts_are_named_one_by_one_as_the_checkpoint_has_them(tmp_path: Path) -> None:
    base = loaded("mixtral")
    exported(saved(base, tmp_path / "a", targets=("down_proj",)), tmp_path / "out")
    names = sorted(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    checkpoint = load_file(tiny.folder("mixtral") / "model.safetensors")
    modules = {n.removeprefix(PREFIX).rpartition(".lora_")[0] for n in names}
    assert len(modules) == 6  # three experts in two layers
    assert all(f"{module}.weight" in checkpoint for module in modules)


@pytest.mark.parametrize(("rank", "padded"), [(1, 8), (8, 8), (9, 16), (17, 32), (33, 64), (65, 128), (129, 256)])
def test_the_rank_is_padded_to_the_next_that_vllm_serves(rank: int, padded: int, tmp_path: Path) -> None:
    base = loaded("llama")
    folder = saved(base, tmp_path / "a", targets=("q_proj",), rank=rank, alpha=float(rank))
    done = exported(folder, tmp_path / "out")
    assert padded in RANKS
    assert (done["rank"], done["alpha"]) == (padded, float(padded))
    assert f"--max-lora-rank {padded}" in done["notes"][0]
    named = load_file(tmp_path / "out" / "adapter_model.safetensors")
    A = next(t for n, t in named.items() if "lora_A" in n)
    assert A.shape[0] == padded
    assert not A[rank:].any()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a rank above 256": ("llama", {"rank": 257}, "rank is 257, and vLLM serves at most 256"),
    "DoRA": (
        "llama",
        {"dora": True},
        "it is a DoRA adapter, whose magnitude is not a low-rank update; merge it into a model",
    ),
    "a whole head": ("llama", {"modules_to_save": ("head",)}, "'lm_head' is trained in full or by token rows"),
    "token rows": ("llama", {"trainable_tokens": (5, 11)}, "'model.embed_tokens' is trained in full or by token rows"),
    "an architecture without LoRA": ("gpt2", {"targets": ("c_attn",)}, "vLLM has no LoRA for GPT2LMHeadModel"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_vllm_cannot_serve_is_refused_with_the_reason_and_not_written(which: str, tmp_path: Path) -> None:
    architecture, plan, message = REFUSED[which]
    folder = saved(loaded(architecture), tmp_path / "a", **{"targets": ("q_proj",), **plan})
    with pytest.raises(AdapterError, match=message):
        exported(folder, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("plan", [{}, {"dora": True}, {"rank_stabilized": True}, {"modules_to_save": ("head",)}])
def test_for_peft_the_files_are_the_same_and_peft_reads_the_same_logits(plan: dict[str, Any], tmp_path: Path) -> None:
    base = loaded("llama")
    folder = saved(base, tmp_path / "a", targets=("q_proj", "down_proj"), **plan)
    done = exported(folder, tmp_path / "out", "peft")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in folder.iterdir()}
    assert all((tmp_path / "out" / p.name).read_bytes() == p.read_bytes() for p in folder.iterdir())
    assert (done["rank"], done["alpha"], done["digest"]) == (3, 5.0, adapter_format.inspect_folder(folder).digest)
    peft = PeftModel.from_pretrained(tiny.plain(tiny.folder("llama")), str(tmp_path / "out")).eval()
    tiny.close(tiny.plain_logits(peft, IDS), live_logits(base, folder))


def test_a_version_of_the_store_is_exported_by_its_alias_without_what_only_the_store_keeps(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.publish(stores.run(tmp_path / "run", 1), "formal")
    store.alias("formal", "prod", 1)
    exported("formal@prod", tmp_path / "out", "peft", store=store.root)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "graft.json",
    }  # fmt: skip
    with pytest.raises(StoreError, match=r"no alias 'prdo', did you mean 'prod'"):
        exported("formal@prdo", tmp_path / "other", "peft", store=store.root)


def test_an_output_that_is_there_is_left_alone(tmp_path: Path) -> None:
    folder = stores.adapter(tmp_path / "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="is there already"):
        exported(folder, tmp_path / "out", "peft")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_an_adapter_that_does_not_fit_the_base_it_is_exported_for_is_refused(tmp_path: Path) -> None:
    folder = saved(loaded("llama"), tmp_path / "a", targets=("q_proj",))
    with pytest.raises(AdapterError, match="was trained on base"):
        exported(folder, tmp_path / "out", model=str(tiny.folder("qwen2")))
    assert not (tmp_path / "out").exists()


def test_a_flipped_byte_is_not_exported(tmp_path: Path) -> None:
    folder = stores.adapter(tmp_path / "a")
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(AdapterError, match="has changed since it was written"):
        exported(folder, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_pefts_own_adapter_is_made_fit_too(tmp_path: Path) -> None:
    peft = tiny.with_peft(
        tiny.plain(tiny.folder("llama")), tiny.peft_config(target_modules=["q_proj", "o_proj"], use_rslora=True)
    )
    peft.save_pretrained(tmp_path / "a")
    expected = tiny.plain_logits(peft, IDS)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="does not say on which base it was trained; name it with --model"):
        exported(tmp_path / "a", tmp_path / "out")
    exported(tmp_path / "a", tmp_path / "out", model=str(tiny.folder("llama")))
    tiny.close(as_vllm_reads(tiny.folder("llama"), tmp_path / "out", tmp_path / "merged"), expected)


def test_a_sum_of_pairs_is_what_padding_and_folding_leave(tmp_path: Path) -> None:
    """The update of each layer, tensor by tensor: s B A before, alpha / r B A after."""
    base = loaded("llama")
    folder = saved(base, tmp_path / "a", targets=("q_proj",), rank=3, alpha=5.0)
    exported(folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    before, after = (load_file(p / "adapter_model.safetensors") for p in (folder, tmp_path / "out"))
    for name in (n for n in before if "lora_A" in n):
        other = name.replace("lora_A", "lora_B")
        torch.testing.assert_close(
            config["lora_alpha"] / config["r"] * after[other] @ after[name], 5 / 3 * before[other] @ before[name]
        )
