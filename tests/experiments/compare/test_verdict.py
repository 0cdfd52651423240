"""The verdict says what the figures allow: a choice, "cannot tell" with what would decide, or that nothing is better."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graftlm.config import CompareConfig
from graftlm.experiments.compare.statistics import PairedBootstrap
from graftlm.experiments.compare.verdict import Verdict, judge

CHEAP: dict[str, tuple[float, ...]] = {
    "full": (900.0, 90.0, 9.0),
    "lora": (400.0, 4.0, 6.0),
    "qlora": (200.0, 4.0, 8.0),
}


def verdict(
    losses: dict[str, float], *, seeds: int = 3, rows: int = 200, noise: float = 0.05, between: float = 0.001,
    costs: dict[str, tuple[float, ...]] = CHEAP, **options: Any,
) -> Verdict:  # fmt: skip
    """A verdict on methods with these mean losses a token, base 3.0, ten tokens a row."""
    generator = np.random.default_rng(1)
    found = {
        name: 10 * (mean + generator.normal(0, between, (seeds, 1)) + generator.normal(0, noise, (seeds, rows)))
        for name, mean in losses.items()
    }
    tokens = np.full(rows, 10)
    bootstrap = PairedBootstrap(found, 30.0 * np.ones(rows), tokens, np.arange(rows), resamples=1500)
    config = CompareConfig.build({"model": "demo", "data": "demo", "methods": list(losses), "seeds": seeds, **options})
    return judge(bootstrap, {name: costs[name] for name in losses}, config)


def said(found: Verdict) -> str:
    return "\n".join(found.sentences)


def test_the_cheapest_within_the_margin_is_taken() -> None:
    found = verdict({"full": 1.0, "lora": 1.01, "qlora": 1.02})
    assert (found.best, found.choice, found.certain) == ("full", "qlora", True)
    assert {s.name: s.place for s in found.standings} == {"full": "best", "lora": "within", "qlora": "within"}
    assert "Take qlora: of all shown to be within 2 % of full's gain it has the least peak memory." in said(found)


def test_a_method_behind_the_margin_is_not_taken_however_cheap() -> None:
    found = verdict({"full": 1.0, "lora": 1.02, "qlora": 1.3})
    assert (found.choice, found.certain) == ("lora", True)
    assert {s.name: s.place for s in found.standings}["qlora"] == "behind"
    assert "full is better than qlora by 0.3" in said(found)


def test_full_is_taken_where_no_other_is_near() -> None:
    found = verdict({"full": 1.0, "lora": 1.2, "qlora": 1.3})
    assert (found.choice, found.certain) == ("full", True)
    assert "Take full: no other is shown to be within 2 % of full's gain." in said(found)


def test_a_wider_margin_takes_the_cheaper() -> None:
    assert verdict({"full": 1.0, "lora": 1.2, "qlora": 1.3}, margin=12).choice == "lora"
    assert verdict({"full": 1.0, "lora": 1.2, "qlora": 1.3}, margin=17).choice == "qlora"


def test_the_cost_that_was_asked_for_decides_and_equals_fall_to_the_next() -> None:
    equal = {"full": 1.0, "lora": 1.01, "qlora": 1.01}
    size = {name: (s, m, t) for name, (m, s, t) in CHEAP.items()}
    assert verdict(equal, cost="size", costs=size).choice == "qlora", "the same size: least memory"
    time = {name: (t, m, s) for name, (m, s, t) in CHEAP.items()}
    assert verdict(equal, cost="time", costs=time).choice == "lora"
    near = {"full": (100.0, 9.0, 9.0), "lora": (101.0, 4.0, 6.0)}  # 1 % of memory is no reason
    assert verdict({"full": 1.0, "lora": 1.01}, costs=near).choice == "lora"


def test_a_cheaper_one_that_might_be_near_makes_it_cannot_tell_with_the_n_that_would_decide() -> None:
    found = verdict({"full": 1.0, "lora": 1.03}, rows=60, noise=0.25, between=0.002)
    assert (found.choice, found.certain) == ("full", False)
    standing = found.standings[1]
    assert standing.place == "open"
    assert standing.needed is not None
    text = said(found)
    assert "Cannot tell whether lora, which is cheaper, is within 2 % of full's gain" in text
    assert "(now 60)" in text or "(now 3)" in text
    assert "Until then full is the safe choice." in text


def test_equals_are_called_indistinguishable_with_the_n_that_would_decide() -> None:
    found = verdict({"full": 1.0, "lora": 1.004}, rows=60, noise=0.2, between=0.0005)
    text = said(found)
    assert "indistinguishable at this n" in text
    assert "would show it, four times of five" in text or "would take more than 1,000,000 eval rows" in text


def test_equals_within_the_margin_are_called_equal_for_the_choice() -> None:
    found = verdict({"full": 1.0, "lora": 1.0005}, noise=0.02)
    assert "for the choice they are equal" in said(found)
    assert found.choice == "lora"


def test_one_seed_is_never_certain() -> None:
    found = verdict({"full": 1.0, "lora": 1.01, "qlora": 2.0}, seeds=1)
    assert not found.certain
    assert found.choice == "lora"
    assert "Cannot tell: with one seed" in said(found)
    assert "--seeds 3" in said(found)


def test_nothing_is_chosen_where_no_method_beats_the_base() -> None:
    found = verdict({"full": 3.2, "lora": 3.1})
    assert (found.choice, found.certain) == (None, False)
    assert "No method is better than the untrained base (3.000)" in said(found)


def test_a_single_method_is_its_own_choice() -> None:
    found = verdict({"lora": 1.0})
    assert (found.choice, found.certain, found.differences) == ("lora", True, ())


@pytest.mark.parametrize("rate", [100, 0.001])
def test_small_differences_are_written_with_their_digits(rate: float) -> None:
    text = said(verdict({"full": 1.0, "lora": 1.0 + 0.0001 * rate}, noise=0.0001, between=0.00001))
    assert "0.010" in text if rate == 100 else "e-0" in text
