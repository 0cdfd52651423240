"""The search finds the best rung of smooth losses from any start, survives rates that diverge, and prefers lower rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from graftlm.experiments.compare.learning_rate import (
    MOST_RUNS,
    TriedRate,
    first_rate,
    rate_of,
    search_learning_rate,
    search_steps,
)


def valley(best: float, *, width: float = 1.0, diverges: float = math.inf) -> tuple[list[float], object]:
    """A loss that rises with the squared distance of log rate from `best`'s; remembers the rates it was asked for."""
    asked: list[float] = []

    def losses_at(rates: Sequence[float]) -> list[TriedRate]:
        asked.extend(rates)
        return [loss_at(rate) for rate in rates]

    def loss_at(rate: float) -> TriedRate:
        away = math.log10(rate / best) / width
        return TriedRate(rate, math.inf) if rate >= diverges else TriedRate(rate, min(1 + away**2, 9.0), 10.0)

    return asked, losses_at


@pytest.mark.parametrize("best", [2e-6, 2e-5, 6.3e-5, 2e-4, 2e-3, 6.3e-3])
@pytest.mark.parametrize("blind", [True, False])
def test_the_best_rung_is_found_within_a_half_step_from_afar(best: float, blind: bool) -> None:
    asked, losses_at = valley(best)
    found = search_learning_rate(2e-5 if blind else best * 3, losses_at, blind=blind)  # type: ignore[arg-type]
    assert found is not None
    assert abs(math.log10(found.rate / best)) <= 0.26
    assert len(asked) == len(set(asked)) <= MOST_RUNS
    assert not found.at_edge
    assert [t.rate for t in found.tried] == sorted(asked)


def test_a_near_start_needs_three_runs() -> None:
    asked, losses_at = valley(2e-4)
    search_learning_rate(2e-4, losses_at, blind=False)  # type: ignore[arg-type]
    assert sorted(asked) == [6.3e-5, 2e-4, 6.3e-4]


def test_rates_that_diverge_are_infinitely_bad_and_the_search_turns_back() -> None:
    asked, losses_at = valley(1e-5, diverges=1e-3)
    found = search_learning_rate(1e-2, losses_at, blind=False)  # type: ignore[arg-type]
    assert found is None, "the start and both its neighbours diverged"
    found = search_learning_rate(1e-3, losses_at, blind=True)  # type: ignore[arg-type]
    assert found is not None
    assert found.rate <= 3.2e-5
    assert any(math.isinf(t.loss) for t in found.tried)
    assert asked


def test_of_rates_that_gain_the_same_the_lowest_is_taken() -> None:
    losses = {1e-4: 1.0, 3.2e-4: 0.998, 1e-3: 1.3, 3.2e-5: 2.0}
    found = search_learning_rate(
        1e-4, lambda rates: [TriedRate(rate, losses[rate], 5.0) for rate in rates], blind=False
    )
    assert found is not None
    assert found.rate == 1e-4, "0.002 of a gain of 4 is nothing"
    losses[1e-4] = 1.2
    found = search_learning_rate(
        1e-4, lambda rates: [TriedRate(rate, losses[rate], 5.0) for rate in rates], blind=False
    )
    assert found is not None
    assert found.rate == 3.2e-4


def test_a_search_that_never_turns_says_that_it_ended_at_an_edge() -> None:
    found = search_learning_rate(
        1e-5, lambda rates: [TriedRate(rate, 9 - math.log10(rate), 20.0) for rate in rates], blind=False
    )
    assert found is not None
    assert len(found.tried) == MOST_RUNS
    assert found.at_edge


def test_rates_have_two_digits() -> None:
    assert [rate_of(2e-4, rung) for rung in (-1, 0, 1, 2)] == [6.3e-5, 2e-4, 6.3e-4, 2e-3]


def test_the_start_is_what_another_method_found() -> None:
    assert first_rate(True, {}, 2e-4) == (2e-4, True)
    assert first_rate(True, {False: 1e-3}, 2e-4) == (1e-2, False)
    assert first_rate(False, {True: 1e-2}, 2e-5) == (1e-3, False)
    assert first_rate(True, {False: 1e-3, True: 6e-3}, 2e-4) == (6e-3, False)


def test_a_search_run_is_a_quarter_of_a_run_within_limits() -> None:
    assert [search_steps(None, steps) for steps in (8, 60, 200, 5000)] == [8, 20, 50, 100]
    assert search_steps(7, 200) == 7
