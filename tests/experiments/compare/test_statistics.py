"""The bootstrap says what is true: equals are rarely told apart, different ones mostly are, and the needed n is enough."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from graftlm.experiments.compare.statistics import (
    Difference,
    PairedBootstrap,
    findable,
    half_width,
    holm,
    needed,
    student_quantile,
    sum_quantile,
)


def bootstrap(losses: dict[str, Any], tokens: Any = None, groups: Any = None, **options: Any) -> PairedBootstrap:
    """A bootstrap over arrays (S, n); by default rows of five tokens, each a group of its own."""
    rows = next(iter(losses.values())).shape[1]
    tokens = np.full(rows, 5) if tokens is None else tokens
    groups = np.arange(rows) if groups is None else groups
    return PairedBootstrap(losses, 3.0 * tokens, tokens, groups, **{"resamples": 1500, **options})


def simulated(
    seed: int, *, rows: int = 150, seeds: int = 3, apart: float = 0.0, between_seeds: float = 0.01, noise: float = 0.05,
    taste: float = 0.0, prompts: int | None = None,
) -> PairedBootstrap:  # fmt: skip
    """Two methods as real ones look: rows differ in length and difficulty, noise has heavy tails, seeds shift everything.

    `apart`: nats a token that `b` is worse on average. `between_seeds`: standard deviation of a run's shift, `noise` of one
    row in one run, `taste` of what a prompt holds for one method against the other; all as shares of a row's loss.
    """
    generator = np.random.default_rng(seed)
    tokens = np.clip(generator.lognormal(np.log(60), 0.4, rows), 5, 300).round().astype(np.int64)
    groups = np.arange(rows) if prompts is None else generator.integers(0, prompts, rows)
    difficulty = generator.lognormal(-0.8, 0.5, rows)  # nats a token
    liked = generator.standard_t(4, rows)[groups] * taste / np.sqrt(2)

    def method(shift: float, likes: Any) -> Any:
        runs = generator.normal(0, between_seeds, (seeds, 1))
        each = generator.standard_t(4, (seeds, rows)) * noise / np.sqrt(2)
        return (difficulty * (1 + runs + each + likes) + shift) * tokens

    losses = {"a": method(0.0, 0.0), "b": method(apart, liked)}
    return PairedBootstrap(losses, (difficulty + 3) * tokens, tokens, groups, resamples=600)


def only(found: PairedBootstrap) -> Difference:
    return found.differences(["b", "a"])[0]


# ---- equals and others ----------------------------------------------------------------------------------------------


def test_the_same_configuration_twice_is_indistinguishable_in_95_of_100_comparisons() -> None:
    assert sum(not only(simulated(seed)).distinguishable for seed in range(100)) >= 95


def test_methods_that_differ_by_row_and_not_on_average_are_indistinguishable_in_95_of_100() -> None:
    assert sum(not only(simulated(seed, taste=0.1)).distinguishable for seed in range(100)) >= 95


def test_a_different_pair_is_told_apart_in_95_of_100_comparisons() -> None:
    """By 0.05 nats, a tenth of the loss: full against LoRA far from the base."""
    found = [only(simulated(seed, apart=0.05)) for seed in range(100)]
    assert sum(d.distinguishable for d in found) >= 95
    assert all(d.mean > 0 for d in found)


def test_one_seed_tells_nothing_apart_and_has_no_seed_error() -> None:
    found = only(simulated(0, seeds=1, apart=0.5))
    assert found.seed_error is None
    assert not found.distinguishable
    assert found.needed is None


@pytest.mark.prove
@pytest.mark.parametrize(
    "world",
    [
        {},
        {"between_seeds": 0.03, "noise": 0.02},
        {"between_seeds": 0.0, "taste": 0.2, "rows": 300, "prompts": 30},
        {"rows": 40, "taste": 0.1},
        {"seeds": 5},
        {"seeds": 2},
    ],
    ids=str,
)
def test_in_every_world_at_most_five_of_a_hundred_equals_are_told_apart(world: dict[str, Any]) -> None:
    count = 1500
    false = sum(only(simulated(10_000 + seed, **world)).distinguishable for seed in range(count))
    assert false / count <= 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / count)


@pytest.mark.prove
def test_drawing_three_seeds_with_replacement_would_tell_equals_apart_too_often() -> None:
    """Why seeds are not resampled: the usual two-way bootstrap, on the same simulations."""
    false = 0
    for seed in range(400):
        found = simulated(seed, between_seeds=0.03, noise=0.02)
        generator = np.random.default_rng(seed)
        between = found.by_seed["b"] - found.by_seed["a"]
        rows = found._means["b"] - found._means["a"] - between.mean()
        drawn = rows + generator.choice(between, (len(rows), 3)).mean(1)
        low, high = np.quantile(drawn, (0.025, 0.975))
        false += not low <= 0 <= high
    assert false / 400 > 0.15


# ---- what an interval is made of ------------------------------------------------------------------------------------


def test_a_loss_is_the_mean_of_a_token_and_not_of_a_row() -> None:
    tokens = np.array([1, 3, 6] * 20)
    losses = {"a": np.array([[4.0, 3.0, 2.0] * 20, [6.0, 3.0, 4.0] * 20])}
    found = bootstrap(losses, tokens)
    assert found.by_seed["a"].tolist() == pytest.approx([9 / 10, 13 / 10])
    assert found.loss("a") == pytest.approx(1.1)
    assert found.gain("a") == pytest.approx(3.0 - 1.1)
    assert found.std("a") == pytest.approx(np.std([0.9, 1.3], ddof=1))


def test_the_error_of_rows_is_that_of_the_textbook() -> None:
    generator = np.random.default_rng(1)
    losses = {"a": generator.normal(5, 1, (2, 400)), "b": generator.normal(6, 2, (2, 400))}
    found = only(bootstrap(losses, resamples=6000))
    expected = (losses["b"] - losses["a"]).mean(0).std(ddof=1) / np.sqrt(400) / 5
    assert found.row_error == pytest.approx(expected, rel=0.04)


def test_what_is_hard_for_both_methods_widens_nothing() -> None:
    generator = np.random.default_rng(2)
    losses = {name: generator.normal(5, 1, (3, 90)) for name in "ab"}
    hard = generator.exponential(40, 90)
    one, other = only(bootstrap(losses)), only(bootstrap({name: found + hard for name, found in losses.items()}))
    assert other.mean == pytest.approx(one.mean)
    assert (other.interval.low, other.interval.high) == pytest.approx((one.interval.low, one.interval.high))


def test_rows_of_one_prompt_are_no_independent_witnesses() -> None:
    generator = np.random.default_rng(3)
    by_prompt = np.repeat(generator.normal(0, 1, 40), 5)  # five answers to each prompt, alike
    losses = {"a": np.full((3, 200), 5.0), "b": 5.0 + by_prompt + generator.normal(0, 0.1, (3, 200))}
    apart = only(bootstrap(losses))
    together = only(bootstrap(losses, groups=np.repeat(np.arange(40), 5)))
    assert together.row_error == pytest.approx(np.sqrt(5) * apart.row_error, rel=0.15)


def test_runs_that_are_the_same_to_the_bit_are_not_told_apart() -> None:
    losses = np.random.default_rng(4).normal(5, 1, (3, 60))
    found = only(bootstrap({"a": losses, "b": losses.copy()}))
    assert (found.mean, found.interval.low, found.interval.high, found.p) == (0.0, 0.0, 0.0, 1.0)
    assert not found.distinguishable


def test_the_share_of_a_gain_has_an_interval_around_it_and_the_reference_has_none() -> None:
    found = simulated(5, apart=0.05)
    share = found.share("b", "a")
    assert share is not None
    value, interval = share
    assert value == pytest.approx(found.gain("b") / found.gain("a"))
    assert interval.low < value < interval.high
    whole = found.share("a", "a")
    assert whole is not None
    assert (whole[0], whole[1].low, whole[1].high) == (1.0, 1.0, 1.0)


def test_there_is_no_share_of_no_gain() -> None:
    losses = {"a": np.full((2, 40), 20.0), "b": np.full((2, 40), 10.0)}
    assert bootstrap(losses).share("b", "a") is None


def test_the_same_figures_give_the_same_interval_every_time() -> None:
    assert only(simulated(6)) == only(simulated(6))


def test_many_rows_are_drawn_in_parts_with_the_same_result_as_few() -> None:
    generator = np.random.default_rng(7)
    losses = {name: generator.normal(5, 1, (2, 60_000)) for name in "ab"}
    found = only(bootstrap(losses, resamples=200))
    assert found.row_error == pytest.approx((losses["b"] - losses["a"]).mean(0).std() / np.sqrt(60_000) / 5, rel=0.2)


# ---- several pairs, and the n that would decide ---------------------------------------------------------------------


def test_holm_steps_p_values_down_as_r_does() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # p.adjust(c(.01, .04, .03), "holm")
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_half_an_interval_is_students_for_seeds_alone_and_normal_for_rows_alone() -> None:
    assert half_width(0.0, 1.0, 3) == pytest.approx(4.302652729911275)  # t, 2 degrees, 97.5 %
    assert half_width(0.0, 1.0, 6) == pytest.approx(2.5705818366147395)
    assert half_width(1.0, 0.0, 3) == pytest.approx(1.959963984540054)
    both = half_width(1.0, 1.0, 6)
    assert max(1.960, 2.571) < both < 1.960 + 2.571


@pytest.mark.parametrize("p", [0.5, 0.6, 0.9, 0.975, 0.999])
def test_quantiles_of_students_t_are_those_of_the_closed_forms(p: float) -> None:
    """For 1, 2 and 4 degrees of freedom the quantile is elementary (Shaw 2006)."""
    alpha = 4 * p * (1 - p)
    four = 2 * math.sqrt(max(0.0, math.cos(math.acos(math.sqrt(alpha)) / 3) / math.sqrt(alpha) - 1))
    closed = {1: math.tan(math.pi * (p - 0.5)), 2: (2 * p - 1) / math.sqrt(2 * p * (1 - p)), 4: four}
    for degrees, expected in closed.items():
        assert student_quantile(p, degrees) == pytest.approx(expected, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize(
    ("p", "degrees", "expected"),
    [
        (0.975, 3, 3.1824463052837078),
        (0.975, 5, 2.5705818356363146),
        (0.9, 29, 1.311433647301551),
        (0.975, 149, 1.976013177689192),
        (0.999, 7, 4.785289628638333),
        (0.975, 10**7, 1.959964221767205),
    ],
)
def test_quantiles_of_students_t_are_scipys(p: float, degrees: int, expected: float) -> None:
    """`scipy.stats.t.ppf(p, degrees)`; for many degrees the normal distribution's."""
    assert student_quantile(p, degrees) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    ("rows", "seeds", "degrees", "expected"),
    [
        (1.0, 1.0, 5, 3.20440156834),
        (1.0, 0.3, 2, 2.34993558649),
        (0.2, 1.0, 2, 4.31526040750),
        (1.0, 2.0, 1, 25.45157752),
    ],
)
def test_the_sum_of_both_errors_has_the_quantile_of_its_integral(
    rows: float, seeds: float, degrees: int, expected: float
) -> None:
    """The root of `integrate.quad(lambda t: norm.cdf((x - seeds * t) / rows) * stats.t.pdf(t, degrees))` - 0.975, by scipy."""
    assert sum_quantile(0.975, rows, seeds, degrees) == pytest.approx(expected, rel=1e-8)


def test_the_needed_rows_find_the_difference_about_four_times_of_five() -> None:
    found = needed(0.012, 0.006, 0.0005, rows=100, seeds=5)
    assert found is not None
    assert found.rows is not None
    assert 100 < found.rows < 400
    assert found.seeds is None, "more seeds cannot mend an error of rows"
    generator = np.random.default_rng(8)
    row_error = 0.006 * np.sqrt(100 / found.rows)
    hits = 0
    for _ in range(2000):
        seeds = generator.normal(0, 0.0005 * np.sqrt(5), 5)
        measured = 0.012 + generator.normal(0, row_error) + seeds.mean()
        hits += measured > half_width(row_error, float(seeds.std(ddof=1)) / np.sqrt(5), 5)
    assert 0.74 < hits / 2000 < 0.86


def test_the_needed_seeds_are_enough_and_one_fewer_is_not() -> None:
    found = needed(0.02, 0.001, 0.006, rows=500, seeds=3)
    assert found is not None
    assert found.rows is None, "more rows cannot mend an error of seeds"
    assert found.seeds is not None
    assert findable(0.001, 0.006 * np.sqrt(3 / found.seeds), found.seeds) <= 0.02
    fewer = found.seeds - 1
    assert findable(0.001, 0.006 * np.sqrt(3 / fewer), fewer) > 0.02


def test_rows_and_seeds_are_asked_for_together_where_neither_alone_would_do() -> None:
    found = needed(0.01, 0.006, 0.006, rows=100, seeds=3)
    assert found is not None
    assert (found.rows, found.seeds) == (None, None)
    assert found.both is not None
    rows, seeds = found.both
    assert findable(0.006 * np.sqrt(100 / rows), 0.006 * np.sqrt(3 / seeds), seeds) <= 0.01


def test_no_number_is_needed_for_what_nothing_can_show() -> None:
    assert needed(1e-9, 0.01, 0.01, rows=100, seeds=3) is None
