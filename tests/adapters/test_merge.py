"""A merged model is a plain one, and says what the live one says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from merging import merger, saved, written
from safetensors.torch import load_file, save_file

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import attach, detach
from graftlm.base.loading import Base, load_base
from graftlm.base.saving import dense_state_dict
from graftlm.errors import AdapterError

IDS = tiny.ids(30)


def loaded(place: Path, precision: Any = "float32") -> Base:
    return load_base(str(place), precision=precision, compute_dtype="float32", device="cpu")


def live_logits(base: Base, folder: Path) -> torch.Tensor:
    """What base and adapter say together, apart."""
    attach(base, adapter_format.load(base, folder), slot=2)
    try:
        return tiny.base_logits(base, IDS, slot=2)
    finally:
        detach(base, slot=2)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).norm() / expected.norm() < 1e-5


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilized": {"rank_stabilized": True},
    "patterns": {"ranks": {"q_proj": 5}, "alphas": {"v_proj": 11.0}, "targets": ("q_proj", "v_proj", "down_proj")},
    "dora": {"dora": True},
    "whole embeddings": {"targets": ("o_proj",), "modules_to_save": ("embeddings",)},
    "whole head": {"targets": ("o_proj",), "modules_to_save": ("head",)},
    "token rows": {"targets": ("o_proj",), "trainable_tokens": (5, 11, 3, 40)},
}


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_merged_model_loads_in_plain_transformers_with_the_live_models_logits(
    architecture: str, tmp_path: Path
) -> None:
    base = loaded(tiny.folder(architecture))
    folder = saved(base, tmp_path / "a")
    out = written(tmp_path / "out", merger(base.folder, [folder]))
    close(tiny.plain_logits(tiny.plain(out), IDS), live_logits(base, folder))
    assert sorted(load_file(out / "model.safetensors")) == sorted(load_file(base.folder / "model.safetensors"))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])  # untied, tied, turned and tied
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_merges_to_the_live_models_logits(kind: str, architecture: str, tmp_path: Path) -> None:
    plan = dict(KINDS[kind])
    if architecture == "gpt2":
        names = {"q_proj": "c_attn", "v_proj": "c_fc", "o_proj": "attn.c_proj", "down_proj": "mlp.c_proj"}
        plan = {k: tuple(names[t] for t in v) if k == "targets" else v for k, v in plan.items()}
        plan = {k: {names[t]: n for t, n in v.items()} if k in ("ranks", "alphas") else v for k, v in plan.items()}
    base = loaded(tiny.folder(architecture))
    folder = saved(base, tmp_path / "a", **plan)
    found = merger(base.folder, [folder])
    assert found.unties == (architecture != "llama" and kind.startswith("whole"))
    out = written(tmp_path / "out", found)
    close(tiny.plain_logits(tiny.plain(out), IDS), live_logits(base, folder))
    assert (live_logits(base, folder) - tiny.base_logits(base, IDS, slot=0)).norm() > 0.01
    # and it is a base like any other
    close(tiny.base_logits(loaded(out), IDS, slot=0), live_logits(base, folder))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mixtral"])
def test_pefts_own_adapters_and_merge_give_the_same_weights(architecture: str, tmp_path: Path) -> None:
    targets = ["q_proj", "o_proj"] if architecture == "mixtral" else "all-linear"
    peft = tiny.with_peft(
        tiny.plain(tiny.folder(architecture)), tiny.peft_config(target_modules=targets, use_rslora=True)
    )
    peft.save_pretrained(tmp_path / "a")
    out = written(tmp_path / "out", merger(tiny.folder(architecture), [tmp_path / "a"]))
    expected = peft.merge_and_unload()
    ours = tiny.plain(out).state_dict()
    for name, tensor in expected.state_dict().items():
        tiny.close(ours[name], tensor, rtol=1e-6)


@pytest.mark.parametrize("precision", ["nf4", "int8", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "qwen3"])
def test_merged_onto_the_dequantized_base_it_is_the_model_that_was_trained(
    architecture: str, precision: str, tmp_path: Path
) -> None:
    base = loaded(tiny.folder(architecture), precision)
    folder = saved(base, tmp_path / "a")
    live = live_logits(base, folder)
    out = written(tmp_path / "out", merger(base.folder, [folder], "dequantized", precision))
    close(tiny.plain_logits(tiny.plain(out), IDS), live)
    other = written(tmp_path / "other", merger(base.folder, [folder], "original", precision))
    far = (tiny.plain_logits(tiny.plain(other), IDS) - live).norm() / live.norm()
    assert far > (0.02 if precision == "nf4" else 1e-4)


def test_merged_onto_a_requantized_base_it_loads_with_bitsandbytes_bit_by_bit(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    place = tiny.write(tmp_path / "base", tiny.random_model("llama", **sizes))
    base = loaded(place, "nf4")
    folder = saved(base, tmp_path / "a")
    found = merger(place, [folder], "requantized", "nf4")
    out = written(tmp_path / "out", found)
    again = loaded(out)  # transformers gives it to bitsandbytes, which gives the values back
    dense = merger(place, [folder], "dequantized", "nf4")
    for name, (_, precision) in found.base.stored_forms().items():
        assert precision == "nf4"
        layer = again.stored()[name.removesuffix(".weight")].value
        wanted = dense_state_dict(base.model, torch.float32)  # its own dequantization, of another weight
        from graftlm import kernels

        expected = kernels.dequantize(kernels.nf4_quantize(dense.weight(name, torch.float32)), torch.float32)
        assert torch.equal(layer, expected), name
        assert not torch.equal(expected, wanted[name])
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_quant_type"] == "nf4"
    assert config["llm_int8_skip_modules"] == ["lm_head"]
    assert (out / "model.safetensors").stat().st_size < (place / "model.safetensors").stat().st_size * 0.45


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
def test_what_no_4_bit_file_holds_is_refused_by_name(architecture: str, tmp_path: Path) -> None:
    base = loaded(tiny.folder(architecture), "nf4")
    folder = saved(base, tmp_path / "a")
    with pytest.raises(AdapterError, match="only those can be written in 4 bits"):
        written(tmp_path / "out", merger(base.folder, [folder], "requantized", "nf4"))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_in_shards_keeps_its_shards_and_what_was_not_adapted_keeps_its_bytes(tmp_path: Path) -> None:
    place = tiny.write(tmp_path / "base", tiny.random_model("mixtral"), max_shard_size="20KB")
    names = sorted(p.name for p in place.glob("*.safetensors"))
    assert len(names) > 3
    base = loaded(place)
    folder = saved(base, tmp_path / "a", targets=("down_proj",))
    out = written(tmp_path / "out", merger(place, [folder]))
    assert sorted(p.name for p in out.glob("*.safetensors")) == names
    changed = 0
    for name in names:
        before, after = load_file(place / name), load_file(out / name)
        assert list(before) == list(after)
        for key, tensor in before.items():
            same = torch.equal(tensor, after[key])
            assert same != ("w2" in key), key
            changed += not same
    assert changed == 6  # three experts in two layers
    close(tiny.plain_logits(tiny.plain(out), IDS), live_logits(base, folder))


def test_names_without_the_models_prefix_are_merged_under_their_own_names(tmp_path: Path) -> None:
    model = tiny.random_model("gpt2")
    place = tiny.write(tmp_path / "base", model)
    named = {n.removeprefix("transformer."): t for n, t in load_file(place / "model.safetensors").items()}
    save_file(named, place / "model.safetensors", metadata={"format": "pt"})
    assert "h.0.attn.c_attn.weight" in named
    base = loaded(place)
    folder = saved(base, tmp_path / "a")
    out = written(tmp_path / "out", merger(place, [folder]))
    assert set(load_file(out / "model.safetensors")) == set(named)
    close(tiny.plain_logits(tiny.plain(out), IDS), live_logits(base, folder))


@pytest.mark.parametrize("kind", ["plain", "token rows", "whole embeddings"])
def test_a_head_that_the_checkpoint_repeats_does_not_stay_behind(kind: str, tmp_path: Path) -> None:
    place = tiny.write(tmp_path / "base", tiny.random_model("qwen3"))
    named = load_file(place / "model.safetensors")
    named["lm_head.weight"] = named["model.embed_tokens.weight"].clone()
    save_file(named, place / "model.safetensors", metadata={"format": "pt"})
    base = loaded(place)
    folder = saved(base, tmp_path / "a", **KINDS[kind])
    out = written(tmp_path / "out", merger(place, [folder]))
    close(tiny.plain_logits(tiny.plain(out), IDS), live_logits(base, folder))
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) == (kind == "whole embeddings")


def test_each_weight_is_rounded_once_from_float32(tmp_path: Path) -> None:
    model = tiny.random_model("llama").to(torch.bfloat16)
    place = tiny.write(tmp_path / "base", model)
    base = loaded(place, "bfloat16")
    folder = saved(base, tmp_path / "a")
    found = merger(place, [folder], precision="bfloat16")
    out = written(tmp_path / "out", found)
    slot = adapter_format.load(base, folder).slots["model.layers.1.mlp.up_proj"].named()
    weight = model.get_parameter("model.layers.1.mlp.up_proj.weight").float()
    exact = weight + 5 / 3 * slot["lora_B.weight"] @ slot["lora_A.weight"]
    new = load_file(out / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert new.dtype == torch.bfloat16
    apart = (new.float() - exact.detach()).abs()
    assert (apart <= exact.detach().abs() * 2**-8).all()  # half a unit in the last place
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_share_of_the_update_that_rounding_takes_is_what_the_files_show(tmp_path: Path) -> None:
    place = tiny.write(tmp_path / "base", tiny.random_model("llama").to(torch.bfloat16))
    base = loaded(place, "bfloat16")
    folder = saved(base, tmp_path / "a", targets=("up_proj",))
    named = load_file(folder / "adapter_model.safetensors")
    for name in named:
        named[name] = named[name] * (0.02 if "lora_B" in name else 1.0)
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "graft.json").unlink()
    found = merger(place, [folder], precision="bfloat16")
    out = written(tmp_path / "out", found)
    before, after = load_file(place / "model.safetensors"), load_file(out / "model.safetensors")
    wanted = lost = 0.0
    moved = values = 0
    for layer in ("0", "1"):
        key = f"model.layers.{layer}.mlp.up_proj"
        A, B = (named[f"base_model.model.{key}.lora_{x}.weight"] for x in "AB")
        update = 5 / 3 * B @ A
        real = after[f"{key}.weight"].float() - before[f"{key}.weight"].float()
        wanted += float(update.square().sum())
        lost += float((update - real).square().sum())
        moved += int((real != 0).sum())
        values += real.numel()
    assert found.rounding.share == pytest.approx((lost / wanted) ** 0.5, rel=1e-4)
    assert found.rounding.unmoved == values - moved
    assert 0.05 < found.rounding.share < 1
    assert 0.2 < found.rounding.unmoved / found.rounding.changed < 1
    exact = merger(place, [folder], precision="bfloat16")
    written(tmp_path / "exact", exact, torch.float32)
    assert exact.rounding.share == 0.0


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_the_type_that_is_asked_for_is_the_type_of_every_tensor_and_of_the_config(
    kind: torch.dtype, tmp_path: Path
) -> None:
    place = tiny.folder("llama")
    folder = saved(loaded(place), tmp_path / "a")
    out = written(tmp_path / "out", merger(place, [folder]), kind)
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {kind}
    assert json.loads((out / "config.json").read_text())["dtype"] == str(kind).removeprefix("torch.")
    assert tiny.plain_logits(tiny.plain(out), IDS).isfinite().all()


@pytest.mark.measured
def test_the_base_is_the_same_after_a_thousand_times_on_and_off(tmp_path: Path, record_property: Any) -> None:
    base = loaded(tiny.folder("llama"), "nf4")
    adapters = [
        adapter_format.load(base, saved(base, tmp_path / str(i), seed=i, **plan))
        for i, plan in enumerate(
            ({}, {"dora": True}, {"targets": ("o_proj",), "modules_to_save": ("head",), "trainable_tokens": (4, 9)})
        )
    ]
    before, expected = digest(base), tiny.base_logits(base, IDS, slot=0)
    for i in range(1000):
        attach(base, adapters[i % 3], slot=1 + i % 5)
        if i % 100 == 0:
            tiny.base_logits(base, IDS, slot=1 + i % 5)
        detach(base, slot=1 + i % 5)
    assert digest(base) == before
    assert torch.equal(tiny.base_logits(base, IDS, slot=0), expected)
    assert all(module.bank is None for module in base.stored().values())
    record_property("attached and detached", 1000)
    record_property("digest of the base before and after", [before[:12], digest(base)[:12]])


def digest(base: Base) -> str:
    """A digest over everything that the base holds, in its stored form."""
    total = hashlib.sha256()
    for name, parameter in base.model.named_parameters():
        total.update(name.encode() + parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    for name, module in base.stored().items():
        for key, tensor in module.compressed.tensors().items() if module.compressed is not None else ():
            total.update(f"{name}.{key}".encode() + tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def test_an_adapters_own_tokenizer_comes_along_and_two_of_them_are_refused(tmp_path: Path) -> None:
    base = loaded(tiny.folder("llama"))
    plain, own = (
        saved(base, tmp_path / "a"),
        saved(base, tmp_path / "b", seed=4, trainable_tokens=(7,), targets=("q_proj",)),
    )
    assert (own / "tokenizer.json").is_file()
    changed = json.loads((own / "tokenizer.json").read_text())
    out = written(tmp_path / "out", merger(base.folder, [plain, own]))
    assert json.loads((out / "tokenizer.json").read_text()) == changed
    other = saved(base, tmp_path / "c", seed=5, trainable_tokens=(8,), targets=("q_proj",))
    tokenizer = (other / "tokenizer.json").read_text().replace('"truncation": null', '"truncation":   null')
    (other / "tokenizer.json").write_text(tokenizer)
    (other / "graft.json").unlink()
    with pytest.raises(AdapterError, match="different tokenizers"):
        written(tmp_path / "two", merger(base.folder, [own, other]))
    assert not (tmp_path / "two").exists()


def test_a_merge_that_fails_on_the_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = loaded(tiny.folder("llama"))
    found = merger(base.folder, [saved(base, tmp_path / "a")])

    def full(name: str, dtype: torch.dtype) -> torch.Tensor:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(found, "tensor", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "out", found)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
