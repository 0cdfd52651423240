"""What a comparison's report says to try next: each sentence at its threshold, and each with the rule that supports it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from graftlm.config import CompareConfig
from graftlm.experiments.compare import advice as module
from graftlm.experiments.compare.advice import (
    ALL,
    ALL_LINEAR,
    DATA,
    EDGE,
    EMBEDDING,
    FALLING,
    NOT_SEARCHED,
    ROOM,
    USED_UP,
    advice,
    gap_sentences,
    still_falling,
)  # fmt: skip
from graftlm.experiments.compare.capacity import Capacity
from graftlm.experiments.compare.learning_rate import TriedRate
from graftlm.experiments.compare.results import Comparison, Curve, VariantResult
from graftlm.experiments.compare.verdict import Standing, Verdict
from graftlm.planning.rules import Reason, Rule, table

ROOT = Path(__file__).parents[3]
TRIED = (TriedRate(1e-3, 2.0), TriedRate(3e-3, 1.9), TriedRate(1e-2, 2.1))
FLAT = Curve(seed=0, train=(), eval_losses=((0, 3.0), (50, 1.01), (100, 1.0)))


def line(name: str, *, share: float = 0.6, rank: int = 16, **changes: Any) -> VariantResult:
    """A line of the table; only what the advice reads differs."""
    known: dict[str, Any] = dict.fromkeys(VariantResult.__dataclass_fields__)
    method = name.partition(":")[0]
    used = Capacity(rank=rank, effective=share * rank, share=share, by_kind={}, spectra=())
    return VariantResult(
        **{
            **known, "name": name, "method": method, "tried": TRIED, "at_edge": False, "curves": (FLAT,),
            "share": 0.95, "capacity": None if method == "full" else used, **changes,
        }
    )  # fmt: skip


def compared(lora: VariantResult, place: str = "behind", *, best: str = "full") -> Comparison:
    """Full and one adapter, of which one is behind the other."""
    names = ("full", lora.name) if best == "full" else (lora.name, "full")
    standings = (Standing(names[0], "best", 0.0, None), Standing(names[1], place, 0.2, None))  # pyright: ignore[reportArgumentType]
    verdict = Verdict(
        best=names[0], choice=names[0], certain=True, margin=0.02, standings=standings, differences=(), sentences=()
    )
    config = CompareConfig.build({"model": "demo", "data": "demo", "methods": ["full", lora.name]})
    return Comparison(
        config=config, lines=(line("full"), lora), failed={}, reference="full", verdict=verdict, data={}, notes=(),
        environment={},
    )  # fmt: skip


def rule_of(reasons: list[Reason], part: str) -> Rule:
    (reason,) = [reason for reason in reasons if part in reason.text]
    return reason.rule


@pytest.mark.parametrize(("share", "higher"), [(0.7499, False), (0.75, True), (1.0, True)])
def test_a_higher_rank_is_worth_trying_where_the_rank_is_used_up_and_the_adapter_behind(
    share: float, higher: bool
) -> None:
    found = advice(compared(line("lora", share=share)))
    assert any("a higher rank is worth trying, lora:rank=64" in reason.text for reason in found) == higher
    assert any("rank, for it is used up: lora:rank=64" in reason.text for reason in found) == higher
    assert rule_of(found, "its change is spread over") is USED_UP
    ahead = advice(compared(line("lora", share=share), best="lora"))
    assert not any("higher rank" in reason.text for reason in ahead)


@pytest.mark.parametrize(("share", "lower"), [(0.5, True), (0.5001, False)])
def test_a_lower_rank_may_do_where_half_of_it_is_in_use_and_the_adapter_is_not_behind(
    share: float, lower: bool
) -> None:
    found = advice(compared(line("lora", share=share), "within"))
    assert any("a lower rank may do as well, lora:rank=8" in reason.text for reason in found) == lower
    assert rule_of(found, "its change is spread over") is ROOM
    assert not any("lower rank" in reason.text for reason in advice(compared(line("lora", share=share), "behind")))


def test_only_an_adapter_behind_full_is_told_how_to_come_nearer() -> None:
    assert gap_sentences(compared(line("lora"), "within")) == []
    assert gap_sentences(compared(line("lora"), best="lora")) == []
    assert gap_sentences(compared(line("lora"), "open")) != []


def test_targets_and_then_the_embedding_are_ways_to_come_nearer() -> None:
    few = gap_sentences(compared(line("lora:targets=attention")))
    assert rule_of(few, "only some layers are adapted: targets=all-linear") is ALL_LINEAR
    assert EMBEDDING not in [reason.rule for reason in few]
    most = gap_sentences(compared(line("lora")))
    assert rule_of(most, "full trains the embeddings too: modules-to-save=embeddings") is EMBEDDING
    every = gap_sentences(compared(line("lora:modules-to-save=embeddings")))
    assert [reason.rule for reason in every] == [DATA]


def test_a_rate_at_the_edge_and_one_that_was_given_ask_for_a_search() -> None:
    assert rule_of(gap_sentences(compared(line("lora", at_edge=True))), "a wider search") is EDGE
    assert rule_of(gap_sentences(compared(line("lora", tried=()))), "leave --learning-rate out") is NOT_SEARCHED
    found = [reason.rule for reason in gap_sentences(compared(line("lora")))]
    assert EDGE not in found
    assert NOT_SEARCHED not in found


@pytest.mark.parametrize(("last", "falling"), [(0.0199, False), (0.0201, True)])
def test_a_loss_that_fell_by_a_fiftieth_of_the_gain_in_the_last_third_of_the_steps_asks_for_more(
    last: float, falling: bool
) -> None:
    curve = Curve(seed=0, train=(), eval_losses=((0, 2.0), (60, 1.0 + 1.5 * last), (120, 1.0)))
    lora = line("lora", curves=(curve,))
    assert still_falling(lora) == pytest.approx(last)
    found = gap_sentences(compared(lora))
    assert (FALLING in [reason.rule for reason in found]) == falling


@pytest.mark.parametrize("rule", ALL, ids=lambda rule: rule.name)
def test_a_rule_names_a_measurement_that_is_here_or_says_that_it_is_none(rule: Rule) -> None:
    files = re.findall(r"\]\(\.\./(bench/results/[a-z-]+\.md)[^)]*\)", rule.measurement)
    assert files or any(word in rule.measurement for word in ("arithmetic", "a choice"))
    for file in files:
        assert (ROOT / file).is_file()


def test_every_rule_of_the_module_is_in_the_list_once_and_the_page_has_them() -> None:
    own = [value for value in vars(module).values() if isinstance(value, Rule)]
    assert list(ALL) == own
    assert table(ALL) in (ROOT / "docs" / "comparing.md").read_text(encoding="utf-8")
