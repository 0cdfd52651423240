"""Advice: which method for which facts, in sentences that quote them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graftlm.planning import rules
from graftlm.planning.activations import Workload
from graftlm.planning.advice import Advice, advise
from graftlm.planning.facts import Facts
from graftlm.planning.fitting import PlanCase
from graftlm.planning.hardware import Card, card
from graftlm.planning.models import find
from graftlm.planning.perplexity import DomainShift, Estimate
from graftlm.planning.rules import NF4_DAMAGE, Rule


def shift(answer_loss: float, excess_loss: float, error: float = 0.0) -> DomainShift:
    return DomainShift(
        answer_loss=Estimate(value=answer_loss), prompt_loss=Estimate(value=3.0 + excess_loss),
        prompt_entropy=Estimate(value=3.0), excess_loss=Estimate(value=excess_loss, error=error), rows=10, tokens=900,
        of_rows=5000,
    )  # fmt: skip


NEAR, FAR = shift(2.5, 0.1), shift(4.5, 2.2)


def damaged(nats: float) -> DomainShift:
    return replace(NEAR, nf4_damage=Estimate(value=nats, error=0.02))


def facts(model: str = "llama-3.1-8b", on: str | Card = "a100-80gb", **given: object) -> Facts:
    load = Workload(tokens=1024, target_tokens=700, longest=1024)
    where = card(on) if isinstance(on, str) else on
    case = PlanCase(shape=find(model).shape, targets=("all-linear",), rank=16, load=load, card=where, fused=True)
    known = {"rows": 5000, "tokens": 900_000, "target_tokens": 600_000, "domain_shift": NEAR, **given}
    return Facts(case=case, **known)  # pyright: ignore[reportArgumentType]


def method(found: Advice) -> str:
    assert found.setting is not None
    return found.setting.key


def text(found: Advice) -> str:
    return " ".join(map(str, (*found.reasons, *found.would_change)))


def rule_of(found: Advice, part: str) -> Rule:
    """The rule of the only sentence that has `part`."""
    (reason,) = [reason for reason in (*found.reasons, *found.would_change) if part in reason.text]
    return reason.rule


def tokens_of(here: Facts, rank: int) -> float:
    """Target tokens that teach exactly what an adapter of a rank holds."""
    return here.bits_held(rank) / here.bits_per_token


def test_lora_is_the_default() -> None:
    found = advise(facts())
    assert method(found) == "lora"
    assert "LoRA on a 16-bit base is the default, and fits" in text(found)


def test_full_is_advised_for_the_last_point_of_quality() -> None:
    found = advise(facts(goal="quality"))
    assert method(found).startswith("full")
    assert found.rank is None
    assert rule_of(found, "The last point of quality counts.") is rules.QUALITY
    assert "`graft compare` measures what it gives up" in text(found)


def test_full_is_advised_where_the_data_teach_more_than_the_largest_adapter_holds() -> None:
    here = facts("smollm2-135m")
    most = int(tokens_of(here, 256))
    within, beyond = (
        advise(facts("smollm2-135m", target_tokens=most)),
        advise(facts("smollm2-135m", target_tokens=most + 1)),
    )
    assert (method(within), within.rank) == ("lora", 256)
    assert method(beyond).startswith("full")
    assert rule_of(beyond, f"{most + 1:,} target tokens can teach up to") is rules.CAPACITY
    assert rule_of(within, "target tokens would be more than an adapter of rank 256 holds") is rules.CAPACITY


@pytest.mark.parametrize(
    ("excess", "said"),
    [
        (0.49, "are near"),
        (0.5, "neither near nor far from"),
        (1.0, "neither near nor far from"),
        (1.01, "are far from"),
    ],
)
def test_far_data_do_not_choose_the_method_and_are_said_with_what_lora_gave_up_on_such(
    excess: float, said: str
) -> None:
    found = advise(facts(domain_shift=shift(2.5, excess, error=0.03)))
    assert method(found) == "lora"
    assert found.rank == 16
    assert rule_of(found, f"{said} this base (excess loss on the prompts {excess:.2f} ± 0.06") is rules.DISTANCE


@pytest.mark.parametrize("given", [{"variants": 40}, {"goal": "cost"}])
def test_nothing_speaks_for_full_where_variants_share_a_base_or_cost_decides(given: dict[str, object]) -> None:
    found = advise(facts("smollm2-135m", target_tokens=10**9, **given))
    assert not method(found).startswith("full")


def test_many_variants_are_told_the_size_of_one() -> None:
    assert "40 variants share one base when each is an adapter of 167.8 MB" in text(advise(facts(variants=40)))


def test_one_version_is_no_reason_for_adapters_and_two_are() -> None:
    assert rules.VARIANTS not in advise(facts(variants=1)).rules
    assert rules.VARIANTS in advise(facts(variants=2)).rules


def test_where_cost_decides_the_base_has_four_bits_unless_nf4_damages_it() -> None:
    assert method(advise(facts(goal="cost"))) == "qlora"
    within, beyond = (
        advise(facts(goal="cost", domain_shift=damaged(nats))) for nats in (NF4_DAMAGE, NF4_DAMAGE + 1e-6)
    )
    assert method(within) == "qlora"
    assert method(beyond) == "lora-int8"
    assert rule_of(beyond, "NF4 damages this base on these data") is rules.NF4
    assert rules.COST in beyond.rules


def test_a_damaged_base_that_fits_in_no_other_form_is_taken_and_said_to_be_damaged() -> None:
    found = advise(facts("llama-2-13b", "rtx-3060", domain_shift=damaged(0.3)))
    assert method(found) == "qlora"
    assert rule_of(found, "rises by 0.30 ± 0.04 nats a token") is rules.NF4


def test_the_damage_is_said_beside_the_memory_that_qlora_would_save() -> None:
    assert "changes by +0.29 ± 0.04 nats a token" in text(advise(facts(domain_shift=damaged(0.29))))
    assert "changes by -0.01 ± 0.04 nats a token" in text(advise(facts(domain_shift=damaged(-0.01))))


def test_full_that_does_not_fit_is_said_with_its_bytes_and_lora_taken() -> None:
    found = advise(facts("llama-2-13b", on="rtx-4090", target_tokens=10**12))
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


@pytest.mark.parametrize(("spare", "wanted"), [(0, "lora"), (-1, "lora-int8")])
def test_sixteen_bits_are_taken_up_to_the_last_byte(spare: int, wanted: str) -> None:
    """With activation checkpointing, which is tried before fewer bits."""
    plenty = Card(key="x", name="x", kind="cpu", memory=10**12)
    here = facts("llama-2-7b", plenty)
    need = here.case.of(here.by_key("lora").checkpointed()).peak
    exact = replace(plenty, memory=need + plenty.memory - plenty.usable + spare)
    assert method(advise(facts("llama-2-7b", exact))) == wanted


def test_where_nothing_fits_the_way_out_is_said() -> None:
    found = advise(facts("llama-2-70b", "rtx-3060"))
    assert found.setting is None
    assert found.command == ""
    assert "Nothing fits NVIDIA GeForce RTX 3060" in text(found)
    assert "Instead: " in text(found)


def test_without_data_what_are_defaults_is_called_defaults() -> None:
    found = advise(facts(rows=0, tokens=0, target_tokens=0, domain_shift=None))
    assert "Without --data, rank, batch and epochs are defaults, not advice." in text(found)


def test_a_distance_that_was_not_measured_is_said() -> None:
    assert "How far the data are from the base was not measured" in text(advise(facts(domain_shift=None)))


def test_the_rank_is_the_least_that_holds_what_there_is_to_learn() -> None:
    most = int(tokens_of(facts("smollm2-135m"), 32))
    for tokens, rank in ((most // 3, 16), (most, 32), (most + 1, 64)):
        found = advise(facts("smollm2-135m", target_tokens=tokens))
        assert found.rank == rank
        assert rule_of(found, f"{tokens:,} target tokens can teach at most") is rules.RANK


@pytest.mark.parametrize(
    ("width", "rate"), [(16, 1e-2), (122, 1e-2), (192, 6e-3), (576, 2e-3), (4096, 3e-4), (12_288, 1e-4), (32_768, 5e-5)]
)
def test_the_rate_falls_with_the_width_within_bounds(width: int, rate: float) -> None:
    here = facts()
    shape = replace(here.case.shape, width=width)
    found = advise(replace(here, case=replace(here.case, shape=shape)))
    assert found.learning_rate == rate
    assert rule_of(found, "Learning rate") is rules.LEARNING_RATE


def test_gemma_3_takes_the_rates_that_searches_found_for_it() -> None:
    adapter, full = advise(facts("gemma-3-270m")), advise(facts("gemma-3-270m", goal="quality"))
    assert (adapter.learning_rate, full.learning_rate) == (6e-4, 2e-5)
    said = "an adapter of a Gemma 3 model 640 wide; full training would take 2e-05."
    assert rule_of(adapter, said) is rules.LEARNING_RATE


def test_full_takes_a_tenth_of_an_adapters_learning_rate() -> None:
    adapter, full = advise(facts()), advise(facts(goal="quality"))
    assert adapter.learning_rate == pytest.approx(10 * full.learning_rate)
    assert advise(facts("smollm2-135m")).learning_rate > advise(facts("llama-2-70b", "b200")).learning_rate


@pytest.mark.parametrize(
    ("rows", "epochs", "batch"),
    [
        (1, 3, 4),
        (266, 3, 4),
        (267, 3, 8),
        (1066, 3, 16),
        (1067, 3, 32),
        (19_999, 3, 32),
        (20_000, 1, 32),
        (10**6, 1, 32),
    ],
)
def test_few_rows_are_seen_more_often_and_in_small_batches(rows: int, epochs: int, batch: int) -> None:
    found = advise(facts(rows=rows))
    assert (found.epochs, found.batch_size) == (epochs, batch)
    assert rule_of(found, f"Batch {batch}:") is rules.BATCH
    assert rule_of(found, f"{rows:,} rows are seen") is rules.EPOCHS


def test_speed_of_inference_is_answered_with_a_merge() -> None:
    assert rule_of(advise(facts(goal="inference")), "`graft merge`") is rules.MERGE


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
