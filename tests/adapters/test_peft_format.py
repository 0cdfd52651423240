"""An adapter's files as PEFT writes them: what is written, and that nothing which does not fit is read.

The folders that are damaged here have no manifest of ours, which would find every damage by its checksums first
(test_loader.py); so what is tested is what the loader sees by itself.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import attach, detach
from graftlm.base.loading import Base, load_base
from graftlm.errors import AdapterError

PREFIX = "base_model.model.model.layers."
Tensors = dict[str, Tensor]
Options = dict[str, Any]


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(str(tiny.folder("llama")), device="cpu")


@pytest.fixture
def saved(base: Base, tmp_path: Path) -> Path:
    """A good adapter on two kinds of layers, as files."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    adapter = tiny.adapted(base, targets=("q_proj", "down_proj"), ranks={"down_proj": 2})
    detach(base)
    adapter_format.save(base, adapter, folder, {})
    return folder


def change(folder: Path, *, tensors: Callable[[Tensors], Any] | None = None, **options: Any) -> None:
    """Damage an adapter without a manifest: its tensors through a function, its config by key."""
    (folder / "graft.json").unlink(missing_ok=True)
    if tensors is not None:
        named = load_file(folder / "adapter_model.safetensors")
        tensors(named)
        save_file({name: tensor.contiguous() for name, tensor in named.items()}, folder / "adapter_model.safetensors")
    config: Options = json.loads((folder / "adapter_config.json").read_text())
    config.update(options)
    (folder / "adapter_config.json").write_text(json.dumps(config))


def refused(base: Base, folder: Path, *words: str) -> None:
    with pytest.raises(AdapterError) as error:
        adapter_format.load(base, folder)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_the_files_are_pefts_and_one_manifest(base: Base, saved: Path) -> None:
    assert {p.name for p in saved.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "graft.json"}
    named = load_file(saved / "adapter_model.safetensors")
    assert named[f"{PREFIX}0.self_attn.q_proj.lora_A.weight"].shape == (3, 28)
    assert named[f"{PREFIX}0.self_attn.q_proj.lora_B.weight"].shape == (40, 3)
    assert named[f"{PREFIX}1.mlp.down_proj.lora_A.weight"].shape == (2, 44)
    assert len(named) == 8
    manifest = json.loads((saved / "graft.json").read_text())
    assert {n: tuple(t["shape"]) for n, t in manifest["tensors"].items()} == {
        n: tuple(t.shape) for n, t in named.items()
    }
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert config["r"] == 3
    assert config["lora_alpha"] == 5.0


def test_what_is_saved_is_read_back_exactly(base: Base, saved: Path, tmp_path: Path) -> None:
    adapter = adapter_format.load(base, saved)
    again = tmp_path / "again"
    again.mkdir()
    adapter_format.save(base, adapter, again, {})
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again / name).read_bytes() == (saved / name).read_bytes()


def test_reading_a_version_again_and_again_keeps_nothing(base: Base, saved: Path) -> None:
    def blocks() -> int:
        gc.collect()
        return sys.getallocatedblocks()

    tensors, kept = len(adapter_format.load(base, saved).parameters()), list[int]()
    for _ in range(8):  # what libraries keep for the next time is there after some
        before = blocks()
        for _ in range(20):
            adapter_format.load(base, saved)
        kept.append(blocks() - before)
        if kept[-1] < 5 * tensors:
            break
    assert kept[-1] < 5 * tensors, f"{kept}: one object kept of each tensor each time would be {20 * tensors}"


def test_another_base_is_refused_by_its_fingerprint(saved: Path, tmp_path: Path) -> None:
    other = load_base(str(tiny.write(tmp_path / "other", tiny.random_model("llama", seed=1))), device="cpu")
    refused(other, saved, "was trained on base", other.fingerprint[:12])


def test_another_architecture_is_refused_by_the_targets_that_it_has_not(saved: Path) -> None:
    (saved / "graft.json").unlink()
    refused(
        load_base(str(tiny.folder("gpt2")), device="cpu"), saved, "name no layer of this base", "another architecture"
    )


def zero_b(named: Tensors) -> None:
    for name in named:
        if "lora_B" in name:
            named[name].zero_()


DAMAGES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "B zero in every tensor": (zero_b, "B is zero in all of its 4 layers"),
    "a layer is missing": (lambda t: [t.pop(k) for k in list(t) if "1.mlp.down_proj" in k], "1 of 4 target layers"),
    "an A is missing": (lambda t: t.pop(f"{PREFIX}0.mlp.down_proj.lora_A.weight"), "has no lora_A"),
    "a B is missing": (lambda t: t.pop(f"{PREFIX}0.mlp.down_proj.lora_B.weight"), "has no lora_B"),
    "a layer too many": (
        lambda t: t.update({f"{PREFIX}7.mlp.down_proj.lora_A.weight": torch.ones(2, 44)}),
        "fits no layer",
    ),
    "an unknown tensor": (
        lambda t: t.update({f"{PREFIX}0.mlp.down_proj.lora_C.weight": torch.ones(2)}),
        "fits no layer",
    ),
    "a bias": (lambda t: t.update({f"{PREFIX}0.mlp.down_proj.lora_B.bias": torch.ones(28)}), "fits no layer"),
    "a whole weight": (lambda t: t.update({f"{PREFIX}0.mlp.down_proj.weight": torch.ones(28, 44)}), "down_proj"),
    "a wrong prefix": (
        lambda t: t.update({"model.layers.0.mlp.down_proj.lora_A.weight": torch.ones(2, 44)}),
        "start with",
    ),
    "a turned A": (
        lambda t: t.update({f"{PREFIX}0.mlp.down_proj.lora_A.weight": torch.ones(44, 2)}),
        "shape (44, 2), expected (2, 44)",
    ),
    "a longer B": (
        lambda t: t.update({f"{PREFIX}0.mlp.down_proj.lora_B.weight": torch.ones(29, 2)}),
        "shape (29, 2), expected (28, 2)",
    ),
    "a NaN": (lambda t: t[f"{PREFIX}0.mlp.down_proj.lora_B.weight"][3, 1].fill_(float("nan")), "not finite"),
    "an infinity": (lambda t: t[f"{PREFIX}0.mlp.down_proj.lora_A.weight"][0, 1].fill_(float("inf")), "not finite"),
    "a magnitude without DoRA": (
        lambda t: t.update({f"{PREFIX}0.mlp.down_proj.lora_magnitude_vector": torch.ones(28)}),
        "use_dora is False",
    ),
    "a head that is too small": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(5, 28)}),
        "modules_to_save does not name it",
    ),
    "another head": (
        lambda t: t.update({"base_model.model.lm_head.base_layer.weight": torch.ones(83, 28)}),
        "differs from",
    ),
    "token rows that nothing names": (
        lambda t: t.update(
            {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 28)}
        ),
        "trainable_token_indices",
    ),
    "nothing at all": (lambda t: t.clear(), "4 target layers"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_tensors_that_do_not_fit_are_refused(base: Base, saved: Path, damage: str) -> None:
    act, words = DAMAGES[damage]
    change(saved, tensors=act)
    refused(base, saved, words)


CONFIGS: dict[str, tuple[Options, str]] = {
    "another rank": ({"r": 4}, "expected (4, 28)"),
    "rank zero": ({"r": 0}, "r is 0"),
    "no rank": ({"r": None}, "r is None"),
    "a rank in words": ({"r": "many"}, "r is 'many'"),
    "another rank by pattern": ({"rank_pattern": {"down_proj": 7}}, "expected (7, 44)"),
    "alpha zero": ({"lora_alpha": 0}, "lora_alpha is 0"),
    "alpha not finite": ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha is None"),
    "another method": ({"peft_type": "IA3"}, 'peft_type is "IA3"'),
    "trained biases": ({"bias": "all"}, 'bias = "all"'),
    "lora biases": ({"lora_bias": True}, "lora_bias = true"),
    "activated lora": ({"alora_invocation_tokens": [4, 5]}, "alora_invocation_tokens"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "block-diagonal": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    "repeated layers": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "a key from the future": ({"use_wonderlora": True}, "unknown key 'use_wonderlora'"),
    "DoRA without magnitudes": ({"use_dora": True}, "no magnitude"),
    "more targets than tensors": ({"target_modules": ["q_proj", "down_proj", "up_proj"]}, "2 of 6 target layers"),
    "modules to save without tensors": ({"modules_to_save": ["lm_head"]}, "lm_head"),
    "token rows without tensors": ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
    "targets that are a number": ({"target_modules": 7}, "target_modules is 7"),
    "a pattern that is no regular expression": ({"rank_pattern": {"(": 3}}, "'(' is not a regular expression"),
    "targets that are no regular expression": ({"target_modules": "*q_proj"}, "is not a regular expression"),
    "a list of ranks": ({"rank_pattern": [3]}, "rank_pattern is [3]"),
    "a rank by pattern in words": ({"rank_pattern": {"q_proj": "3"}}, "rank_pattern is"),
    "a dropout above one": ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
    "token rows in words": ({"trainable_token_indices": ["w3"]}, "trainable_token_indices is ['w3']"),
}


@pytest.mark.parametrize("which", CONFIGS)
def test_configs_that_would_compute_something_else_are_refused(base: Base, saved: Path, which: str) -> None:
    options, words = CONFIGS[which]
    change(saved, **options)
    refused(base, saved, words)


@pytest.mark.parametrize(
    "key", ["peft_type", "bias", "lora_bias", "init_lora_weights", "use_wonderlora", "x" * 30_000, "layers_pattern"]
)
def test_an_entry_of_any_size_is_refused_in_a_few_words(base: Base, saved: Path, key: str) -> None:
    for value in ("x" * 30_000, ["x" * 30_000], {"x" * 30_000: [1] * 10_000}):
        change(saved, **{key: value})
        with pytest.raises(AdapterError, match=key[:40]) as error:
            adapter_format.load(base, saved)
        assert len(str(error.value)) < 600 + len(str(saved)), str(error.value)


def test_a_module_to_save_of_another_shape_is_refused(base: Base, saved: Path) -> None:
    small = {"base_model.model.lm_head.weight": torch.ones(5, 28)}
    change(saved, tensors=lambda t: t.update(small), modules_to_save=["lm_head"])
    refused(base, saved, "shape (5, 28), expected (83, 28)")


@pytest.mark.parametrize("indices", [[3, 3], [3, 83], [-1, 4], [1, 2, 3]])
def test_token_rows_must_be_as_many_as_their_indices_and_lie_in_the_vocabulary(
    base: Base, saved: Path, indices: list[int]
) -> None:
    rows = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 28)}
    change(saved, tensors=lambda t: t.update(rows), trainable_token_indices=indices)
    refused(base, saved, "trainable_token_indices")


def test_a_copy_of_the_bases_own_head_is_passed_over(base: Base, saved: Path) -> None:
    head: Any = base.structure.head
    copy = {"base_model.model.lm_head.base_layer.weight": head.weight.detach().clone()}
    change(saved, tensors=lambda t: t.update(copy))
    assert len(adapter_format.load(base, saved).layers) == 4


def test_switches_that_change_nothing_are_read(base: Base, saved: Path) -> None:
    change(
        saved,
        use_wonderlora=False,
        peft_version="9.9",
        init_lora_weights="gaussian",
        revision="main",
        lora_dropout=None,
    )
    assert len(adapter_format.load(base, saved).layers) == 4


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_a_start_that_leaves_the_base_as_it_is_is_read(base: Base, saved: Path, start: object) -> None:
    change(saved, init_lora_weights=start)
    assert len(adapter_format.load(base, saved).layers) == 4


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "mica", "new", 7])
def test_a_start_that_changes_the_base_is_refused_with_pefts_conversion(base: Base, saved: Path, start: object) -> None:
    change(saved, init_lora_weights=start)
    refused(base, saved, f"init_lora_weights = {json.dumps(start)}", "path_initial_model_for_weight_conversion")


def test_files_that_are_missing_or_no_files_of_an_adapter_are_refused(base: Base, saved: Path, tmp_path: Path) -> None:
    (saved / "graft.json").unlink()
    refused(base, tmp_path / "nothing", "no adapter folder")
    refused(base, tmp_path, "did you mean", str(saved))
    (saved / "adapter_model.safetensors").write_bytes(b"not tensors")
    refused(base, saved, "cut short or no safetensors file")
    (saved / "adapter_model.safetensors").unlink()
    refused(base, saved, "has no adapter_model.safetensors")
    (saved / "adapter_model.bin").write_bytes(b"\x80")
    refused(base, saved, "is a pickle, which is never read")
    (saved / "adapter_config.json").write_text("{")
    refused(base, saved, "is not JSON")


def test_a_damaged_manifest_is_refused(base: Base, saved: Path) -> None:
    (saved / "graft.json").write_text("{")
    refused(base, saved, "graft.json is not JSON")


def test_a_file_cut_short_is_refused(base: Base, saved: Path) -> None:
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    refused(base, saved, "adapter_model.safetensors is cut short")


def test_tensors_in_16_bits_are_read(base: Base, saved: Path) -> None:
    def narrow(named: Tensors) -> None:
        for name in named:
            named[name] = named[name].to(torch.bfloat16)

    change(saved, tensors=narrow)
    assert all(p.dtype == torch.float32 for p in adapter_format.load(base, saved).parameters().values())


@pytest.mark.parametrize("architecture", tiny.MIXTURES)
def test_experts_are_nested_as_peft_nests_them(architecture: str, tmp_path: Path) -> None:
    base = load_base(str(tiny.folder(architecture)), device="cpu")
    adapter = tiny.adapted(base)
    adapter_format.save(base, adapter, tmp_path, {})
    named = load_file(tmp_path / "adapter_model.safetensors")
    experts = sorted(n for n in named if ".0.mlp.experts." in n)
    assert [re.sub(r".*\.mlp\.", "", n) for n in experts] == [
        "experts.base_layer.lora_A.weight", "experts.base_layer.lora_B.weight",
        "experts.lora_A.weight", "experts.lora_B.weight",
    ]  # fmt: skip
    inner = adapter.layers["model.layers.0.mlp.experts.gate_up_proj"].named()
    assert torch.equal(named[experts[0]], inner["lora_A.weight"])
    assert f"{PREFIX}0.mlp.gate.lora_A.weight" in named
    again = adapter_format.load(base, tmp_path)
    assert {n: tuple(p.shape) for n, p in again.parameters().items()} == {
        n: tuple(p.shape) for n, p in adapter.parameters().items()
    }
    expected = tiny.base_logits(base, tiny.ids())
    detach(base)
    attach(base, again)
    assert torch.equal(tiny.base_logits(base, tiny.ids()), expected)


@pytest.mark.parametrize("only", ["gate_up_proj", "down_proj"])
def test_one_adapted_stack_stands_without_nesting_and_peft_reads_it(only: str, tmp_path: Path) -> None:
    base = load_base(str(tiny.folder("mixtral")), device="cpu")
    tiny_adapter = tiny.adapted(base, targets=("attention", only), ranks={only: 2})
    adapter_format.save(base, tiny_adapter, tmp_path, {})
    assert not [n for n in load_file(tmp_path / "adapter_model.safetensors") if "base_layer" in n]
    peft = tiny.read_peft(tiny.plain(base.folder), tmp_path)
    tiny.close(tiny.plain_logits(peft, tiny.ids()), tiny.base_logits(base, tiny.ids()))
    assert set(adapter_format.load(base, tmp_path).layers) == set(tiny_adapter.layers)
