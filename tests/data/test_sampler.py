"""Which example comes when, from sizes, weights and a seed alone."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from graftlm.data.sampler import Sampler, epoch_length, make_sampler


def sampler(sizes: list[int], weights: list[float], **changes: object) -> Sampler:
    return make_sampler(sizes, weights, **{"seed": 3, "batch_size": 4, "epochs": None, "steps": None, **changes})  # pyright: ignore


def shown(found: Sampler) -> list[int]:
    return [example for step in range(found.steps) for _, example in found.step(step)]


def test_an_epoch_has_every_example_once() -> None:
    found = sampler([11], [1.0])
    assert sorted(shown(found)) == list(range(11))
    assert found.steps == 3
    assert [len(found.step(step)) for step in range(3)] == [4, 4, 3]  # the last step takes what is left


def test_every_epoch_is_another_shuffle() -> None:
    examples = shown(sampler([40], [1.0], epochs=3.0))
    epochs = [examples[i : i + 40] for i in (0, 40, 80)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_epochs_may_be_a_fraction() -> None:
    found = sampler([40], [1.0], epochs=0.25)
    assert found.draws == 10
    assert len(set(shown(found))) == 10


def test_steps_are_full_batches_and_cross_the_borders_of_epochs() -> None:
    found = sampler([10], [1.0], steps=6)
    assert [len(found.step(step)) for step in range(6)] == [4] * 6
    assert Counter(shown(found)[:20]) == dict.fromkeys(range(10), 2)


def test_a_draws_number_is_never_used_twice() -> None:
    found = sampler([10], [1.0], steps=6)
    assert [draw for step in range(6) for draw, _ in found.step(step)] == list(range(24))


def test_weight_2_has_each_example_twice_an_epoch() -> None:
    assert Counter(shown(sampler([5, 7], [1.0, 2.0]))) == {
        **dict.fromkeys(range(5), 1),
        **dict.fromkeys(range(5, 12), 2),
    }


def test_weight_a_half_has_half_of_the_examples_and_another_half_each_epoch() -> None:
    examples = shown(sampler([6, 20], [1.0, 0.5], epochs=2.0))
    epochs = [examples[:16], examples[16:]]
    halves = [{example for example in epoch if example >= 6} for epoch in epochs]
    assert [len(half) for half in halves] == [10, 10]
    assert halves[0] != halves[1]
    assert all({0, 1, 2, 3, 4, 5} <= set(epoch) for epoch in epochs)


def test_a_source_without_examples_is_skipped() -> None:
    assert sorted(shown(sampler([3, 0, 2], [1.0, 2.0, 0.5]))) in ([0, 1, 2, 3], [0, 1, 2, 4])


def test_a_source_of_small_weight_still_has_one_example() -> None:
    assert epoch_length([3, 4], [1.0, 0.01]) == 4


def test_another_seed_is_another_order() -> None:
    assert shown(sampler([30], [1.0], seed=1)) != shown(sampler([30], [1.0], seed=2))


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    weight=st.sampled_from([0.3, 1.0, 1.7, 3.0]),
    seed=st.integers(0, 1000),
    batch_size=st.integers(1, 7),
    steps=st.integers(1, 12),
)
def test_a_step_is_the_same_whenever_it_is_asked_for(
    sizes: list[int], weight: float, seed: int, batch_size: int, steps: int
) -> None:
    weights = [weight] * len(sizes)
    found = sampler(sizes, weights, seed=seed, batch_size=batch_size, steps=steps)
    forwards = [found.step(step) for step in range(steps)]
    again = sampler(sizes, weights, seed=seed, batch_size=batch_size, steps=steps)
    assert [again.step(step) for step in reversed(range(steps))] == forwards[::-1]
    assert all(0 <= example < sum(sizes) for step in forwards for _, example in step)
