"""Advice: which method for which facts, in sentences that quote them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graftlm.planning.activations import Workload
from graftlm.planning.advice import MANY_ROWS, Advice, Facts, advise, bits_to_learn
from graftlm.planning.fitting import PlanCase
from graftlm.planning.hardware import card
from graftlm.planning.method import adapter_shape
from graftlm.planning.models import find
from graftlm.planning.perplexity import DomainShift, Estimate


def shift(answer_loss: float, excess_loss: float, error: float = 0.0) -> DomainShift:
    return DomainShift(
        answer_loss=Estimate(value=answer_loss), prompt_loss=Estimate(value=3.0 + excess_loss),
        prompt_entropy=Estimate(value=3.0), excess_loss=Estimate(value=excess_loss, error=error), rows=10, tokens=900,
        of_rows=5000,
    )  # fmt: skip


NEAR, FAR = shift(2.5, 0.1), shift(4.5, 2.2)


def facts(model: str = "llama-3.1-8b", on: str = "a100-80gb", **given: object) -> Facts:
    load = Workload(tokens=1024, target_tokens=700, longest=1024)
    case = PlanCase(shape=find(model).shape, targets=("all-linear",), rank=16, load=load, card=card(on), fused=True)
    known = {"rows": 5000, "tokens": 900_000, "target_tokens": 600_000, "domain_shift": NEAR, **given}
    return Facts(case=case, **known)  # pyright: ignore[reportArgumentType]


def method(found: Advice) -> str:
    assert found.setting is not None
    return found.setting.key


def text(found: Advice) -> str:
    return " ".join((*found.reasons, *found.would_change))


def test_lora_is_the_default() -> None:
    found = advise(facts())
    assert method(found) == "lora"
    assert "LoRA on a 16-bit base is the default, and fits" in text(found)


@pytest.mark.parametrize(
    ("given", "quoted"),
    [
        ({"domain_shift": FAR}, "2.20 nats a token of excess loss on their prompts (loss 5.20, it expects 3.00)"),
        ({"rows": 250_000}, "250,000 rows are more than an adapter should hold"),
        ({"goal": "quality"}, "The last point of quality counts"),
    ],
)
def test_full_is_a_live_candidate(given: dict[str, object], quoted: str) -> None:
    found = advise(facts(**given))
    assert method(found).startswith("full")
    assert found.rank is None
    assert quoted in text(found)
    assert "`graft compare` measures what it gives up" in text(found)


@pytest.mark.parametrize("given", [{"variants": 40}, {"goal": "cost"}])
def test_nothing_speaks_for_full_where_variants_share_a_base_or_cost_decides(given: dict[str, object]) -> None:
    found = advise(facts(domain_shift=FAR, rows=MANY_ROWS, **given))
    assert not method(found).startswith("full")


def test_many_variants_are_told_the_size_of_one() -> None:
    assert "40 variants share one base when each is an adapter of 167.8 MB" in text(advise(facts(variants=40)))


def test_where_cost_decides_the_base_has_four_bits() -> None:
    assert method(advise(facts(goal="cost"))) == "qlora"


def test_full_that_does_not_fit_is_said_with_its_bytes_and_lora_taken() -> None:
    found = advise(facts("llama-2-13b", on="rtx-4090", domain_shift=FAR))
    assert method(found).startswith("lora")
    assert "But even its leanest form takes" in text(found)


def test_the_last_point_of_quality_may_take_several_cards() -> None:
    found = advise(facts("llama-3.1-70b", "h100", goal="quality"))
    assert method(found) == "full-8bit"
    assert found.cards == 8
    assert "needs 8 x NVIDIA H100" in text(found)


@pytest.mark.parametrize(("on", "wanted"), [("a100-80gb", "lora"), ("rtx-4090", "lora-int8"), ("rtx-3060", "qlora")])
def test_the_base_gets_as_many_bits_as_fit(on: str, wanted: str) -> None:
    assert method(advise(facts("llama-2-13b", on))) == wanted


def test_where_nothing_fits_the_way_out_is_said() -> None:
    found = advise(facts("llama-2-70b", "rtx-3060"))
    assert found.setting is None
    assert found.command == ""
    assert "Nothing fits NVIDIA GeForce RTX 3060" in text(found)
    assert "Instead: " in text(found)


def test_without_data_what_are_defaults_is_called_defaults() -> None:
    found = advise(facts(rows=0, tokens=0, target_tokens=0, domain_shift=None))
    assert "Without --data, rank, batch and epochs are defaults, not advice." in found.reasons


def test_a_distance_that_was_not_measured_is_said() -> None:
    assert "How far the data are from the base was not measured" in text(advise(facts(domain_shift=None)))


def test_the_rank_holds_what_there_is_to_learn() -> None:
    here = facts("smollm2-135m", target_tokens=8_000_000)
    found = advise(here)
    assert found.rank is not None
    values = adapter_shape(here.case.shape, ("all-linear",), found.rank).values(here.case.shape)
    assert 2 * values >= bits_to_learn(here) > 2 * values / 2
    assert found.rank > 16
    assert "8,000,000 target tokens" in text(found)


def test_far_data_get_a_higher_rank() -> None:
    assert advise(facts(variants=2, domain_shift=FAR)).rank == 64
    assert advise(facts(variants=2)).rank == 16


def test_full_takes_a_tenth_of_an_adapters_learning_rate() -> None:
    adapter, full = advise(facts()), advise(facts(goal="quality"))
    assert adapter.learning_rate == 10 * full.learning_rate
    assert advise(facts("smollm2-135m")).learning_rate > advise(facts("llama-2-70b", "b200")).learning_rate


def test_few_rows_are_seen_more_often_and_in_small_batches() -> None:
    few, many = advise(facts(rows=300)), advise(facts(rows=90_000))
    assert (few.epochs, few.batch_size) == (3, 8)
    assert (many.epochs, many.batch_size) == (1, 32)
    assert "300 rows make 112 steps" in text(few)


def test_speed_of_inference_is_answered_with_a_merge() -> None:
    assert "`graft merge`" in text(advise(facts(goal="inference")))


def test_what_other_methods_take_is_said_for_the_same_checkpointing() -> None:
    here = facts("llama-2-13b", on="rtx-5090")
    found = advise(here)
    assert found.setting is not None
    assert found.setting.key == "lora"
    assert found.setting.activation_checkpointing
    lean = here.case.of(replace(found.setting, method="qlora", precision="nf4"))
    assert f"QLoRA takes {lean.peak / 1e9:.1f} GB" in text(found)


def test_the_command_is_one_that_graft_train_takes() -> None:
    from graftlm.config import TrainConfig

    for given in ({}, {"goal": "quality"}, {"goal": "cost"}):
        words = advise(facts(on="h200", **given)).command.split()
        values: dict[str, object] = {"model": "x", "data": ["y"], "out": "z"}
        while words:
            name = words.pop(0).removeprefix("--").replace("-", "_")
            values[name] = words.pop(0) if words and not words[0].startswith("--") else True
        TrainConfig.build(values)
