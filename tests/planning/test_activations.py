"""The table of what a pass saves, held against what autograd saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from graftlm.base.context import ForwardContext
from graftlm.base.fused import unfuse
from graftlm.base.loading import Base, load_base
from graftlm.planning.activations import Workload, saved_activations
from graftlm.planning.instantiate import instantiate
from graftlm.planning.method import NO_ADAPTER, TrainingSetting, adapter_shape
from graftlm.training.micro_batch import BatchItem, collate

LENGTHS = (20, 20, 20)
LOAD = Workload(tokens=60, target_tokens=40, longest=20, examples=3)
FULL = TrainingSetting(key="full", label="", method="full", precision="float32", compute_dtype="float32")
LORA = TrainingSetting(key="lora", label="", method="lora", precision="bfloat16", compute_dtype="float32")
DORA = replace(LORA, key="dora", dora=True)


def saved_by_autograd(base: Base, slot: int) -> int:
    """Bytes of every tensor that a pass through the body saves, each once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in base.model.parameters()}
    for module in base.stored().values():
        if module.bank is not None:
            own |= {p.untyped_storage().data_ptr() for s in module.bank.adapters.values() for p in s.named().values()}
    alive: list[torch.Tensor] = []
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in found:
            alive.append(tensor)
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    examples = tiny.examples(LENGTHS)
    micro_batch = collate(base, [BatchItem(d, slot, (0, i), 0.01) for i, d in enumerate(examples)])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        base.hidden(micro_batch.ids, ForwardContext(micro_batch.segments))
    return sum(found.values())


def _base(architecture: str, setting: TrainingSetting, targets: tuple[str, ...] = ("all-linear",)) -> Base:
    base = load_base(str(tiny.folder(architecture)), precision=setting.precision, compute_dtype="float32", device="cpu")
    if setting.full:
        base.model.requires_grad_(True)
    else:
        tiny.adapted(base, rank=3, targets=targets, dora=setting.dora)
    return base


@pytest.mark.parametrize(
    ("architecture", "setting"),
    [
        *((name, setting) for name in tiny.ARCHITECTURES for setting in (FULL, LORA)),
        *((name, DORA) for name in tiny.ARCHITECTURES if name not in tiny.MIXTURES),  # refused there
    ],
    ids=lambda value: value if isinstance(value, str) else value.key,
)
def test_the_table_says_what_is_saved(architecture: str, setting: TrainingSetting) -> None:
    base = _base(architecture, setting)
    shape = instantiate(base.model.config)
    adapter = NO_ADAPTER if setting.full else adapter_shape(shape, ("all-linear",), 3)
    found = saved_activations(shape, setting, adapter, LOAD, fused=base.fused.norms > 0)
    measured = saved_by_autograd(base, 0 if setting.full else 1)
    assert found.layers + found.outside == pytest.approx(measured, rel=0.035)


@pytest.mark.parametrize("setting", [FULL, LORA], ids=lambda s: s.key)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_the_table_says_what_is_saved_where_nothing_is_fused(architecture: str, setting: TrainingSetting) -> None:
    base = _base(architecture, setting)
    unfuse(base.model)
    shape = instantiate(base.model.config)
    adapter = NO_ADAPTER if setting.full else adapter_shape(shape, ("all-linear",), 3)
    found = saved_activations(shape, setting, adapter, LOAD, fused=False)
    assert found.layers + found.outside == pytest.approx(saved_by_autograd(base, 0 if setting.full else 1), rel=0.05)


@pytest.mark.parametrize("setting", [FULL, LORA], ids=lambda s: s.key)
def test_phi3_that_is_not_fused_saves_one_more_width_a_layer_than_the_table_has(setting: TrainingSetting) -> None:
    """Its own rotation puts heads together anew in another order of memory, so attention's result is copied once for the
    matrix behind it. Fused it does not, and the table is right (above); for phi-4 it would be 2 % of a pass."""
    base = _base("phi3", setting)
    unfuse(base.model)
    shape = instantiate(base.model.config)
    found = saved_activations(
        shape, setting, NO_ADAPTER if setting.full else adapter_shape(shape, ("all-linear",), 3), LOAD, fused=False
    )
    missing = saved_by_autograd(base, 0 if setting.full else 1) - found.layers - found.outside
    assert missing == pytest.approx(shape.layers * shape.width * 4 * LOAD.tokens, rel=0.05)


@pytest.mark.parametrize(
    "targets", [("attention",), ("q_proj", "v_proj"), ("o_proj",), ("mlp",), ("down_proj",)], ids="+".join
)
def test_layers_without_an_adapter_save_no_input_and_nothing_is_saved_in_front_of_the_first(
    targets: tuple[str, ...],
) -> None:
    base = _base("llama", LORA, targets)
    shape = instantiate(base.model.config)
    found = saved_activations(shape, LORA, adapter_shape(shape, targets, 3), LOAD, fused=base.fused.norms > 0)
    assert found.layers + found.outside == pytest.approx(saved_by_autograd(base, 1), rel=0.06)


def test_attention_in_c_keeps_keys_and_values_with_the_heads_that_they_have(tmp_path: Path) -> None:
    place = tiny.write(tmp_path / "wide", tiny.random_model("llama", head_dim=16))
    base = load_base(str(place), precision="float32", compute_dtype="float32", device="cpu")
    base.model.requires_grad_(True)
    shape = instantiate(base.model.config)
    assert (shape.attention_width, shape.key_value_width) == (64, 32)
    found = saved_activations(shape, FULL, NO_ADAPTER, LOAD, fused=True, shares_keys=True)
    assert found.layers + found.outside == pytest.approx(saved_by_autograd(base, 0), rel=0.01)


def test_run_again_a_layer_keeps_its_input_alone() -> None:
    base = _base("llama", LORA)
    base.structure.checkpoint_layers(True)
    shape = instantiate(base.model.config)
    found = saved_activations(shape, LORA, adapter_shape(shape, ("all-linear",), 3), LOAD, fused=True)
    assert found.inputs == 2 * 28 * 4 * 60
    assert found.inputs <= saved_by_autograd(base, 1) <= found.inputs + found.outside + 28 * 4 * 60


def test_twice_the_tokens_take_twice_as_much_where_attention_is_fused() -> None:
    shape = instantiate(tiny.config("llama"))
    one = saved_activations(shape, FULL, NO_ADAPTER, LOAD, fused=True)
    two = saved_activations(shape, FULL, NO_ADAPTER, replace(LOAD, tokens=120), fused=True)
    assert (two.layers, two.outside) == (2 * one.layers, 2 * one.outside)


def test_scores_that_are_written_out_grow_with_the_length_of_a_document() -> None:
    shape = instantiate(tiny.config("bloom"))
    short = saved_activations(shape, FULL, NO_ADAPTER, LOAD, fused=False)
    long = saved_activations(shape, FULL, NO_ADAPTER, replace(LOAD, longest=60, examples=1), fused=False)
    assert long.layers - short.layers == shape.layers * shape.heads * 60 * (60 - 20) * 4
