"""Packing examples, and reading a packed batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftlm.errors import ModelError
from graftlm.segments import Segments, pack

batches = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), max_size=30)


@given(batches, st.integers(1, 90), st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_example_is_packed_once_within_the_budget(
    examples: list[tuple[int, int]], budget: int, equal: bool
) -> None:
    lengths, slots = [n for n, _ in examples], [s for _, s in examples]
    micro_batches = pack(lengths, slots, budget, equal_lengths=equal)
    assert sorted(i for group in micro_batches for i in group) == list(range(len(examples)))
    for group in micro_batches:
        assert len(group) == 1 or sum(lengths[i] for i in group) <= budget
        assert [(slots[i], lengths[i]) for i in group] == sorted((slots[i], lengths[i]) for i in group)
        assert not equal or len({lengths[i] for i in group}) == 1


@given(batches, st.integers(40, 90))
@settings(max_examples=100, deadline=None)
def test_first_fit_leaves_no_two_passes_that_one_could_hold(examples: list[tuple[int, int]], budget: int) -> None:
    lengths = [n for n, _ in examples]
    micro_batches = pack(lengths, [s for _, s in examples], budget)
    sums = sorted(sum(lengths[i] for i in group) for group in micro_batches)
    assert len(sums) < 2 or sums[0] + sums[1] > budget


@given(batches.filter(bool))
@settings(max_examples=100, deadline=None)
def test_a_layout_covers_every_token_once(examples: list[tuple[int, int]]) -> None:
    lengths, slots = tuple(n for n, _ in examples), tuple(s for _, s in examples)
    segments = Segments(lengths=lengths, slots=slots, streams=tuple((7, i) for i in range(len(lengths))))
    assert segments.tokens == sum(lengths)
    assert segments.positions.tolist() == [p for n in lengths for p in range(n)]
    assert list(segments.starts) == [sum(lengths[:i]) for i in range(len(lengths))]
    of_runs = [n for _, count, n in segments.equal_runs for _ in range(count)]
    assert tuple(of_runs) == lengths
    of_ranges = [slot for slot, first, last in segments.slot_ranges for _ in range(first, last)]
    assert of_ranges == [slot for slot, n in zip(slots, lengths, strict=True) for _ in range(n)]
    for slot in set(slots):
        assert sum(last - first for first, last in segments.rows(slot)) == of_ranges.count(slot)


def test_a_tokens_key_depends_on_its_trial_draw_and_position_alone() -> None:
    long = Segments(lengths=(4, 6, 2), slots=(1, 1, 2), streams=((5, 0), (5, 3), (8, 3)))
    alone = Segments(lengths=(6,), slots=(4,), streams=((5, 3),))
    assert torch.equal(long.token_keys[4:10], alone.token_keys)
    assert len(set(long.token_keys.tolist())) == 12
    cached = Segments(lengths=(2,), slots=(4,), cached=(4,), streams=((5, 3),))
    assert torch.equal(cached.token_keys, alone.token_keys[4:])
    assert cached.positions.tolist() == [4, 5]


def test_a_layer_with_other_rows_than_tokens_divides_them_by_example() -> None:
    stack = Segments(lengths=(3, 3, 3, 3), slots=(1, 1, 0, 2), streams=((5, 0), (5, 1), (5, 2), (5, 3)), stacked=True)
    assert stack.of_rows(12) is stack
    assert stack.of_rows(20).slot_ranges == ((1, 0, 10), (0, 10, 15), (2, 15, 20))
    assert stack.of_rows(4).slot_ranges == ((1, 0, 2), (0, 2, 3), (2, 3, 4))
    assert len(set(stack.of_rows(20).token_keys.tolist())) == 20
    packed = Segments(lengths=(3, 5), slots=(1, 2))
    for segments, rows in ((stack, 13), (stack, 0), (packed, 16)):
        with pytest.raises(ModelError, match=rf"gets {rows} rows in a micro-batch of {segments.tokens} tokens"):
            segments.of_rows(rows)
