"""The same A, B, data and steps give PEFT's losses, gradients and weights, whatever the switches of the formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import Adapter, attach, detach
from graftlm.adapters.layer_adapter import LowRank, ModulesToSave, TrainableTokens
from graftlm.base.loading import Base, load_base
from graftlm.base.saving import dense_state_dict
from graftlm.training.micro_batch import BatchItem, collate, forward
from graftlm.training.trainer import train

ROWS = tiny.examples((9, 4, 12, 9, 7), seed=2)

# Switches of PEFT's LoraConfig, and the same as a plan of ours.
FORMULAS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "regular expression": {"target_modules": r".*layers\.1\..*(k_proj|up_proj)"},
    "rank-stabilized": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\.down_proj": 2},
        "alpha_pattern": {"v_proj": 11, r"layers\.0\.self_attn\.q_proj": 1.5},
    },
    "embeddings": {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"]},
    "head": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
    "embeddings and head": {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "the head's low rank": {"target_modules": ["o_proj", "lm_head"]},
    "tokens": {"target_modules": ["o_proj"], "trainable_token_indices": [5, 11, 3, 40]},
    "tokens of both": {
        "target_modules": ["o_proj"],
        "trainable_token_indices": {"embed_tokens": [5, 11, 40], "lm_head": [5, 40]},
    },
    "tokens by module": {"target_modules": ["o_proj"], "trainable_token_indices": {"embed_tokens": [5, 11, 40]}},
}
BASES = {"untied": "llama", "tied": "qwen3"}


def loaded(place: Path | str, precision: Any = "float32") -> Base:
    return load_base(str(place), precision=precision, compute_dtype="float32", device="cpu")


def ours(base: Base, adapter: Adapter) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of all rows in one pass, and each trained tensor's gradient."""
    parameters = adapter.parameters()
    for parameter in parameters.values():
        parameter.grad = None
    count = sum(int(row.loss_mask[1:].sum()) for row in ROWS)
    micro_batch = collate(base, [BatchItem(row, 1, (0, i), 1.0 / count) for i, row in enumerate(ROWS)])
    total, _ = forward(base, micro_batch)
    total.backward()
    return total.item(), {name: p.grad for name, p in parameters.items() if p.grad is not None}


def theirs(peft: Any) -> tuple[float, dict[str, torch.Tensor]]:
    for parameter in peft.parameters():
        parameter.grad = None
    loss = tiny.mean_loss(peft, ROWS)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in peft.named_parameters() if p.requires_grad and p.grad is not None}


def our_name(name: str) -> str:
    """PEFT's name of a parameter while it runs, as ours."""
    for part in ("base_model.model.", ".default", ".modules_to_save", ".token_adapter"):
        name = name.replace(part, "")
    return name.replace("trainable_tokens_delta", "token_adapter.trainable_tokens_delta").replace(
        "lora_magnitude_vector.weight", "lora_magnitude_vector"
    )


def assert_same_gradients(base: Base, adapter: Adapter, peft: Any) -> None:
    loss, gradients = ours(base, adapter)
    expected, wanted = theirs(peft)
    wanted = {our_name(name): gradient for name, gradient in wanted.items()}
    assert loss == pytest.approx(expected, rel=1e-5)
    assert set(gradients) == set(wanted)
    for name, gradient in gradients.items():
        assert wanted[name].abs().max() > 0, name
        tiny.close(gradient, wanted[name])


@pytest.mark.parametrize("tied", BASES)
@pytest.mark.parametrize("formula", FORMULAS)
def test_an_adapter_of_pefts_is_read_with_its_logits_losses_and_gradients(
    formula: str, tied: str, tmp_path: Path
) -> None:
    if tied == "tied" and formula in ("embeddings and head", "tokens of both"):
        pytest.skip("PEFT unties them, which no file says")
    base = loaded(tiny.folder(BASES[tied]))
    peft = tiny.with_peft(tiny.plain(base.folder), tiny.peft_config(**FORMULAS[formula]))
    peft.save_pretrained(tmp_path)
    adapter = adapter_format.load(base, tmp_path)
    attach(base, adapter)
    tiny.close(tiny.base_logits(base, tiny.ids(30)), tiny.plain_logits(peft, tiny.ids(30)))
    assert_same_gradients(base, adapter, peft)
    again = tmp_path / "again"
    again.mkdir()
    adapter_format.save(base, adapter, again, {})
    read = tiny.read_peft(tiny.plain(base.folder), again)
    tiny.close(tiny.plain_logits(read, tiny.ids(30)), tiny.plain_logits(peft, tiny.ids(30)))


PLANS: dict[str, dict[str, Any]] = {
    "plain": {"targets": ("q_proj", "down_proj")},
    "attention": {"targets": ("attention",)},
    "one layer": {"targets": ("*layers.1.mlp.up_proj",)},
    "rank-stabilized": {"rank_stabilized": True},
    "dora": {"dora": True},
    "patterns": {"ranks": {"q_proj": 5, "layers.1.mlp.down_proj": 2}, "alphas": {"v_proj": 11.0, "*.0.*.q_proj": 1.5}},
    "embeddings": {"targets": ("o_proj",), "modules_to_save": ("embeddings",)},
    "head": {"targets": ("o_proj",), "modules_to_save": ("head",)},
    "tokens": {"targets": ("o_proj",), "trainable_tokens": (5, 11, 3, 40)},
}


@pytest.mark.parametrize("tied", BASES)
@pytest.mark.parametrize("plan", PLANS)
def test_several_steps_of_training_are_pefts_with_torchs_adamw(plan: str, tied: str, tmp_path: Path) -> None:
    base = loaded(tiny.folder(BASES[tied]))
    adapter = tiny.adapted(base, **PLANS[plan])
    first, last = tmp_path / "first", tmp_path / "last"
    first.mkdir()
    last.mkdir()
    adapter_format.save(base, adapter, first, {})
    peft = tiny.read_peft(tiny.plain(base.folder), first)
    assert_same_gradients(base, adapter, peft)

    heard = tiny.Heard()
    train(base, [tiny.trial(base, adapter, ROWS, steps=4, rate=2e-3)], 25, heard)
    optimizer = torch.optim.AdamW(
        [p for p in peft.parameters() if p.requires_grad], lr=2e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.0
    )
    expected: list[float] = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = tiny.mean_loss(peft, ROWS)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert heard.losses == pytest.approx(expected, rel=1e-4)

    adapter_format.save(base, adapter, last, {})
    read = tiny.read_peft(tiny.plain(base.folder), last)
    tiny.close(tiny.plain_logits(read, tiny.ids(30)), tiny.base_logits(base, tiny.ids(30)))
    again = loaded(base.folder)
    attach(again, adapter_format.load(again, last))
    assert torch.equal(tiny.base_logits(again, tiny.ids(30)), tiny.base_logits(base, tiny.ids(30)))


def test_an_untrained_adapter_of_every_kind_leaves_the_base_as_it_is() -> None:
    for architecture in ("llama", "qwen3", "gemma3"):
        for precision in ("float32", "nf4"):
            base = loaded(tiny.folder(architecture), precision)
            expected = tiny.base_logits(base, tiny.ids(), slot=0)
            for plan in ({}, {"dora": True}, {"modules_to_save": ("embeddings", "head")}, {"trainable_tokens": (4, 9)}):
                adapter = tiny.new_adapter(
                    base, tiny.select_layers(base, ("all-linear",)), tiny.AdapterPlan(rank=3, alpha=5.0, **plan), 0
                )
                attach(base, adapter, slot=2)
                tiny.close(tiny.base_logits(base, tiny.ids(), slot=2), expected, rtol=1e-5)
                detach(base, slot=2)


@pytest.mark.parametrize("precision", ["nf4", "int8", "bfloat16"])
def test_dora_on_a_stored_base_has_pefts_gradients_on_the_dequantized_weights(precision: str, tmp_path: Path) -> None:
    base = loaded(tiny.folder("llama"), precision)
    adapter = tiny.adapted(base, dora=True, rank_stabilized=True)
    adapter_format.save(base, adapter, tmp_path, {})
    plain = tiny.plain(base.folder)
    plain.load_state_dict(dense_state_dict(base.model, torch.float32))
    assert_same_gradients(base, adapter, tiny.read_peft(plain, tmp_path))


# What bitsandbytes multiplies on a CPU: outputs in blocks of 32, inputs in blocks of 64.
BLOCKS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
    "gpt2": {"n_embd": 64, "n_inner": 128, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}


@pytest.mark.parametrize("architecture", BLOCKS)
def test_qlora_is_pefts_on_a_bitsandbytes_base(architecture: str, tmp_path: Path) -> None:
    model = tiny.random_model(architecture, **BLOCKS[architecture])
    with torch.no_grad():  # bitsandbytes leaves embedding and head in 32 bits, we store them in 16
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight.copy_(module.weight.to(torch.bfloat16).float())
    place = tiny.write(tmp_path / "base", model)
    base = loaded(place, "nf4")
    bnb_nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    bitsandbytes = AutoModelForCausalLM.from_pretrained(
        place, quantization_config=bnb_nf4, dtype=torch.float32, device_map="cpu"
    ).train()  # in evaluation mode bitsandbytes multiplies in bfloat16 on some CPUs
    tiny.close(tiny.base_logits(base, tiny.ids(), slot=0), tiny.plain_logits(bitsandbytes, tiny.ids()))

    adapter = tiny.adapted(base)
    folder = tmp_path / "adapter"
    folder.mkdir()
    adapter_format.save(base, adapter, folder, {})
    peft = tiny.read_peft(bitsandbytes, folder).train()
    assert any("4bit" in type(m).__name__ for m in peft.modules())
    for _ in range(3):
        assert_same_gradients(base, adapter, peft)
        wanted = {our_name(n): p for n, p in peft.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, parameter in adapter.parameters().items():
                assert parameter.grad is not None
                step = 0.05 * parameter.grad
                parameter -= step
                wanted[name] -= step


def test_the_kinds_of_slots_are_those_of_the_files() -> None:
    base = loaded(tiny.folder("llama"))
    adapter = tiny.adapted(base, targets=("o_proj",), modules_to_save=("head",), trainable_tokens=(4, 9))
    kinds = {name: type(slot) for name, slot in adapter.layers.items()}
    assert kinds["lm_head"] is ModulesToSave
    assert kinds["model.embed_tokens"] is TrainableTokens
    assert {kind for name, kind in kinds.items() if name.endswith("o_proj")} == {LowRank}
