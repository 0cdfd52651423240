"""Which layers get an adapter, putting it on and off, and several adapters beside each other."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from graftlm import kernels
from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import (
    AdapterPlan,
    attach,
    coverage,
    detach,
    new_adapter,
    resolve_modules_to_save,
    select_layers,
)
from graftlm.base.context import ForwardContext
from graftlm.base.loading import Base, load_base
from graftlm.base.saving import dense_state_dict
from graftlm.errors import ConfigError
from graftlm.segments import Segments
from graftlm.training.trainer import train


def loaded(architecture: str, precision: str = "float32") -> Base:
    return load_base(str(tiny.folder(architecture)), precision=precision, compute_dtype="float32", device="cpu")  # type: ignore[arg-type]


def ends(names: list[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def test_targets_name_all_linear_layers_those_of_attention_of_the_mlp_or_patterns() -> None:
    base = loaded("llama")
    attention, mlp = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    every = select_layers(base, ("all-linear",))
    assert ends(every) == attention | mlp
    assert len(every) == 14
    assert ends(select_layers(base, ("attention",))) == attention
    assert ends(select_layers(base, ("mlp",))) == mlp
    assert select_layers(base, ("model.layers.1.mlp.up_proj",)) == ["model.layers.1.mlp.up_proj"]
    assert len(select_layers(base, ("up_proj", "mlp.down_proj"))) == 4
    assert len(select_layers(base, ("*.layers.1.*", "q_proj"))) == 8
    assert select_layers(base, ("q_proj", "attention", "mlp")) == every


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_attention_and_mlp_are_all_linear_layers_and_share_none(architecture: str) -> None:
    base = loaded(architecture)
    attention, mlp = select_layers(base, ("attention",)), select_layers(base, ("mlp",))
    assert attention
    assert mlp
    assert sorted(attention + mlp) == sorted(select_layers(base, ("all-linear",)))


def test_experts_and_their_router_belong_to_the_mlp() -> None:
    names = ends(select_layers(loaded("mixtral"), ("mlp",)))
    assert names == {"gate", "gate_up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("target", "words"),
    [("q_prj", "did you mean 'q_proj'"), ("atention", "did you mean 'attention'"), ("all_linear", "'all-linear'"),
     ("*.layers.9.*", "known: "), ("lm_head", "--modules-to-save head")],
)  # fmt: skip
def test_a_target_that_matches_nothing_is_refused_with_the_nearest_name(target: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"target '{target}'".replace("*", r"\*")) as error:
        select_layers(loaded("llama"), ("q_proj", target))
    assert words in str(error.value)


def test_patterns_of_rank_and_alpha_must_match_an_adapted_layer() -> None:
    base = loaded("llama")
    layers = select_layers(base, ("q_proj",))
    for change in ({"ranks": {"k_proj": 3}}, {"alphas": {"q_prj": 3.0}}):
        with pytest.raises(ConfigError, match="matches no adapted layer"):
            new_adapter(base, layers, AdapterPlan(rank=2, alpha=3.0, **change), 0)  # type: ignore[arg-type]


def test_the_first_pattern_that_names_a_layer_gives_its_rank_and_alpha() -> None:
    base = loaded("llama")
    plan = AdapterPlan(rank=2, alpha=3.0, ranks={"layers.0.self_attn.q_proj": 5, "q_proj": 4}, alphas={"v_proj": 7.0})
    slots = new_adapter(base, select_layers(base, ("q_proj", "v_proj")), plan, 0).slots
    found = {name.removeprefix("model.layers."): (slot.rank, slot.scale) for name, slot in slots.items()}  # type: ignore[union-attr]
    assert found == {
        "0.self_attn.q_proj": (5, 3 / 5), "1.self_attn.q_proj": (4, 3 / 4),
        "0.self_attn.v_proj": (2, 7 / 2), "1.self_attn.v_proj": (2, 7 / 2),
    }  # fmt: skip


def test_modules_trained_in_full_are_the_embeddings_and_the_head() -> None:
    base = loaded("llama")
    assert resolve_modules_to_save(base, ("embeddings", "lm_head")) == ["model.embed_tokens", "lm_head"]
    with pytest.raises(ConfigError, match="did you mean 'embeddings'"):
        resolve_modules_to_save(base, ("embedings",))
    with pytest.raises(ConfigError, match="exclude each other"):
        new_adapter(base, [], AdapterPlan(rank=2, alpha=3.0, modules_to_save=("embeddings",), trainable_tokens=(4,)), 0)


@pytest.mark.parametrize("change", [{"dropout": 0.1}, {"dora": True}])
def test_dropout_and_dora_are_refused_on_stacked_experts(change: dict[str, object]) -> None:
    base = loaded("mixtral")
    with pytest.raises(ConfigError, match="stacked experts"):
        new_adapter(base, select_layers(base, ("all-linear",)), AdapterPlan(rank=2, alpha=3.0, **change), 0)  # type: ignore[arg-type]
    new_adapter(base, select_layers(base, ("attention",)), AdapterPlan(rank=2, alpha=3.0, **change), 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"dropout": 0.1}, {"dora": True}])
@pytest.mark.parametrize(
    ("architecture", "targets"),
    [("mixtral", ("gate",)), ("qwen3_moe", ("*.0.mlp.gate",)), ("qwen3_moe", ("*.layers.1.mlp.up_proj",))],
)
def test_target_parameters_of_peft_are_refused_with_dropout_and_dora(
    architecture: str, targets: tuple[str, ...], change: dict[str, object]
) -> None:
    base = loaded(architecture)
    layers = select_layers(base, targets)
    plain = new_adapter(base, layers, AdapterPlan(rank=2, alpha=3.0), 0)
    assert adapter_format.peft_config(base, plain)["target_parameters"] == [f"{name}.weight" for name in layers]
    with pytest.raises(ConfigError, match=f"does not work on '{layers[0]}'.*parameters to PEFT"):
        new_adapter(base, layers, AdapterPlan(rank=2, alpha=3.0, **change), 0)  # type: ignore[arg-type]


def test_a_dense_model_may_have_layers_that_are_named_like_experts() -> None:
    base = loaded("llama")
    adapter = new_adapter(base, select_layers(base, ("mlp",)), AdapterPlan(rank=2, alpha=3.0, dropout=0.1), 0)
    assert adapter_format.peft_config(base, adapter)["target_parameters"] is None


def test_a_head_that_is_more_than_a_linear_layer_cannot_be_trained_in_full() -> None:
    class Scaled(torch.nn.Linear):
        pass

    base = loaded("llama")
    base.model.set_output_embeddings(Scaled(28, 83, bias=False))
    with pytest.raises(ConfigError, match=r"modules-to-save 'head': the head of this model is a Scaled.*--method full"):
        resolve_modules_to_save(base, ("head",))
    assert resolve_modules_to_save(base, ("embeddings",)) == ["model.embed_tokens"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "mixtral"])
@pytest.mark.parametrize("precision", ["float32", "nf4"])
def test_attaching_and_detaching_leaves_the_base_as_it_was(architecture: str, precision: str) -> None:
    base = loaded(architecture, precision)
    before = {n: t.clone() for n, t in dense_state_dict(base.model, torch.float32).items()}
    expected, held = tiny.base_logits(base, tiny.ids(), slot=0), base.bytes
    whole = {} if architecture == "mixtral" else {"modules_to_save": ("embeddings", "head")}
    tiny.adapted(base, slot=3, **whole)
    assert not torch.equal(tiny.base_logits(base, tiny.ids(), slot=3), expected)
    tiny.close(tiny.base_logits(base, tiny.ids(), slot=0), expected, rtol=1e-6)
    detach(base, slot=3)
    for slot in (0, 3):
        assert torch.equal(tiny.base_logits(base, tiny.ids(), slot=slot), expected)
    after = dense_state_dict(base.model, torch.float32)
    assert set(after) == set(before)
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert base.bytes == held


def test_detaching_one_slot_leaves_the_other() -> None:
    base = loaded("llama")
    tiny.adapted(base, slot=1, seed=1)
    expected = tiny.base_logits(base, tiny.ids(), slot=1)
    tiny.adapted(base, slot=2, seed=2, targets=("mlp",), rank=5)
    detach(base, slot=2)
    assert torch.equal(tiny.base_logits(base, tiny.ids(), slot=1), expected)


KINDS: dict[str, dict[str, object]] = {
    "ranks": {"rank": 7, "targets": ("mlp",)},
    "dora": {"dora": True, "rank": 2},
    "whole": {"modules_to_save": ("embeddings", "head"), "targets": ("v_proj",)},
    "tokens": {"trainable_tokens": (5, 9, 17), "rank_stabilized": True},
}


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mixtral"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_different_kinds_in_one_batch_are_each_as_alone(architecture: str, kind: str) -> None:
    if architecture == "mixtral" and kind == "dora":
        pytest.skip("refused on experts")
    base = loaded(architecture)
    tiny.adapted(base, slot=1, seed=1)
    second = tiny.adapted(base, slot=2, seed=2, **KINDS[kind])  # type: ignore[arg-type]
    for name, parameter in second.parameters().items():
        if "lora" not in name:
            with torch.no_grad():
                parameter.mul_(1.2)
    lengths, slots = (5, 7, 3, 3, 8), (0, 1, 1, 2, 2)
    parts = [tiny.ids(n, seed=40 + i) for i, n in enumerate(lengths)]
    segments = Segments(lengths=lengths, slots=slots)
    context = ForwardContext(segments)
    with torch.no_grad():
        found = base.logits(base.hidden(torch.cat(parts), context), context)
    for part, slot, logits in zip(parts, slots, found.split(lengths), strict=True):
        tiny.close(logits, tiny.base_logits(base, part, slot=slot), rtol=1e-5)
    alone = {slot: tiny.base_logits(base, parts[1], slot=slot) for slot in (0, 1, 2)}
    assert (alone[1] - alone[0]).abs().max() > 0.01
    assert (alone[2] - alone[1]).abs().max() > 0.01


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "bloom"])
def test_two_trials_trained_together_are_each_as_trained_alone(architecture: str) -> None:
    plans = ({"rank": 3, "seed": 1}, {"rank": 5, "seed": 2, "targets": ("attention",)})
    rows = (tiny.examples((9, 4, 12), seed=1), tiny.examples((5, 12, 4, 3), seed=2))
    if architecture != "mixtral":
        plans = tuple({**plan, "dropout": 0.2} for plan in plans)  # type: ignore[assignment]
    base = loaded(architecture)
    together = [
        tiny.trial(base, tiny.adapted(base, slot=i + 1, **plan), rows[i], slot=i + 1)  # type: ignore[arg-type]
        for i, plan in enumerate(plans)
    ]
    train(base, together, 26, tiny.Heard())
    for i, plan in enumerate(plans):
        base = loaded(architecture)
        alone = tiny.trial(base, tiny.adapted(base, slot=1, **plan), rows[i])  # type: ignore[arg-type]
        train(base, [alone], 17, tiny.Heard())
        for name, parameter in alone.parameters.items():
            tiny.close(together[i].parameters[name], parameter, rtol=2e-3)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_coverage_adds_up(architecture: str) -> None:
    base = loaded(architecture)
    adapter = tiny.adapted(base, targets=("attention",), modules_to_save=("head",), trainable_tokens=(4, 9, 11))
    rows = coverage(base, adapter)
    assert sum(row.parameters for row in rows) == adapter.count == sum(p.numel() for p in adapter.parameters().values())
    assert sum(row.adapted for row in rows) == len(adapter.slots)
    assert all(0 <= row.adapted <= row.total for row in rows)
    assert sum(row.total for row in rows) == len(select_layers(base, ("all-linear",))) + 2
    assert adapter.bytes == 4 * adapter.count


def test_coverage_says_how_each_kind_is_trained() -> None:
    base = loaded("llama")
    ranks = {"layers.1.self_attn.q_proj": 5}
    adapter = tiny.adapted(base, targets=("q_proj",), ranks=ranks, modules_to_save=("head",), trainable_tokens=(4, 9))
    rows = {row.kind: (row.adapted, row.total, row.parameters, row.rank) for row in coverage(base, adapter)}
    assert rows["q_proj"] == (2, 2, (3 + 5) * (28 + 40), "3, 5")
    assert rows["v_proj"] == (0, 2, 0, "")
    assert rows["lm_head"] == (1, 1, 83 * 28, "whole")
    assert rows["embed_tokens"] == (1, 1, 2 * 28, "rows")


def test_a_new_adapter_depends_on_its_seed_and_its_layers_names_alone() -> None:
    base = loaded("llama")
    every = new_adapter(base, select_layers(base, ("all-linear",)), AdapterPlan(rank=3, alpha=5.0), 7)
    few = new_adapter(base, select_layers(base, ("v_proj",)), AdapterPlan(rank=3, alpha=5.0), 7)
    for name, parameter in few.parameters().items():
        assert torch.equal(parameter, every.parameters()[name])
    other = new_adapter(base, select_layers(base, ("v_proj",)), AdapterPlan(rank=3, alpha=5.0), 8)
    name = "model.layers.0.self_attn.v_proj.lora_A.weight"
    assert not torch.equal(other.parameters()[name], few.parameters()[name])
    assert few.parameters()[name].abs().max() <= 28**-0.5
    attach(base, few)
    assert torch.equal(tiny.base_logits(base, tiny.ids(), slot=1), tiny.base_logits(base, tiny.ids(), slot=0))


def test_an_adapters_rows_are_rounded_alike_beside_another_kind_of_adapter() -> None:
    if not kernels.has_bf16_matmul():
        pytest.skip("this processor has no bfloat16 instructions")
    base = load_base(str(tiny.wide()), compute_dtype="bf16-mixed", device="cpu")
    ids = tiny.ids(9)

    def logits(slots: tuple[int, ...], bf16_matmul: bool = True) -> Tensor:
        context = ForwardContext(Segments(lengths=(9,) * len(slots), slots=slots), bf16_matmul=bf16_matmul)
        with torch.no_grad():
            return base.logits(base.hidden(ids.repeat(len(slots)), context), context)[:9]

    tiny.adapted(base, slot=1)
    alone = logits((1,))
    tiny.adapted(base, slot=2, seed=5, dora=True)
    assert torch.allclose(logits((1, 2)), alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits((1,), bf16_matmul=False), alone, rtol=1e-4, atol=1e-4)
