"""Choosing tokens: transformers' processors, made to draw by a counter."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from graftlm.config.fields import LEAST_TEMPERATURE
from graftlm.serving.engine import sampling
from graftlm.serving.engine.request import SamplingParams


def logits_of(rows: int, vocabulary: int = 1999, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2.5


def expected(row: torch.Tensor, s: SamplingParams) -> torch.Tensor:
    """What transformers would draw from, (V,)."""
    steps = LogitsProcessorList([TemperatureLogitsWarper(float(s.temperature))])
    steps += [TopKLogitsWarper(s.top_k)] if s.top_k else []
    steps += [TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    steps += [MinPLogitsWarper(s.min_p)] if s.min_p else []
    return torch.softmax(steps(None, row[None]), -1)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "s",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.9, top_k=7),
        SamplingParams(temperature=1.1, top_p=0.6),
        SamplingParams(temperature=3.0, top_p=0.97),  # more than the likeliest 512 are needed
        SamplingParams(temperature=1.4, min_p=0.05),
        SamplingParams(temperature=1.4, top_k=900, top_p=0.8, min_p=0.02),
    ],
    ids=repr,
)
def test_tokens_are_drawn_from_what_transformers_would_draw_from(s: SamplingParams) -> None:
    row = logits_of(1)[0]
    want = expected(row, s)
    draws = 4000
    numbers = [(i + 0.5) / draws for i in range(draws)]  # evenly over (0, 1): shares are exact to 1 / draws
    tokens = torch.tensor(sampling.sample(row.expand(draws, -1), [s] * draws, numbers))
    share = torch.bincount(tokens, minlength=len(row)) / draws
    assert set(tokens.tolist()) <= set(want.nonzero()[:, 0].tolist())
    assert float((share - want).abs().max()) <= 1.5 / draws


def test_a_row_is_reported_alike_alone_and_among_others_that_want_more() -> None:
    rows, tokens, counts = logits_of(4, 50), [3, 0, 49, 7], [2, 0, 60, 20]
    found = sampling.logprobs_of(rows, tokens, counts)
    assert [len(one.top) for one in found] == [2, 0, 50, 20]
    for i, one in enumerate(found):
        assert sampling.logprobs_of(rows[i : i + 1], tokens[i : i + 1], counts[i : i + 1]) == [one]
        own = torch.log_softmax(rows[i], -1)
        assert (one.token, one.logprob) == (tokens[i], own[tokens[i]].item())
        assert list(one.top) == [(int(j), own[j].item()) for j in own.argsort(descending=True)[: counts[i]]]


def test_a_row_is_drawn_alike_alone_and_among_others() -> None:
    rows = logits_of(9)
    kinds = [SamplingParams(temperature=0.5 + i / 4, top_k=[0, 5, 0][i % 3], top_p=[1.0, 0.9][i % 2]) for i in range(9)]
    numbers = [sampling.uniform(7, 0, i) for i in range(9)]
    together = sampling.sample(rows, kinds, numbers)
    assert together == [sampling.sample(rows[i : i + 1], [kinds[i]], [numbers[i]])[0] for i in range(9)]


def test_the_ends_of_the_interval_draw_tokens_that_may_be_drawn() -> None:
    row = torch.full((1, 700), float("-inf"))
    row[0, [3, 300, 699]] = torch.tensor([1.0, 2.0, 0.5])
    for s in (SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.999999)):
        found = sampling.sample(row.expand(3, -1), [s] * 3, [1e-12, 0.5, 1 - 1e-12])
        assert set(found) <= {3, 300, 699}
        assert len(set(found)) > 1


def test_equally_likely_tokens_stay_or_go_together() -> None:
    row = torch.zeros(1, 20)
    numbers = [(i + 0.5) / 100 for i in range(100)]
    found = sampling.sample(row.expand(100, -1), [SamplingParams(temperature=1.0, top_p=0.5)] * 100, numbers)
    assert set(found) == set(range(20))


def test_penalties_are_those_of_transformers_and_openai() -> None:
    row = logits_of(1)[0]
    prompt, answer = [4, 9, 9], [11, 4, 11]
    found = row.clone()
    sampling.apply_penalties(found, SamplingParams(repetition_penalty=1.7), prompt, answer)
    want = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + answer]), row[None].clone())[0]
    torch.testing.assert_close(found, want)
    found = row.clone()
    sampling.apply_penalties(
        found, SamplingParams(presence_penalty=0.4, frequency_penalty=0.3, bias={5: 2.0, 99999: 1.0}), prompt, answer
    )
    want = row.clone()
    want[11] -= 0.4 + 0.3 * 2
    want[4] -= 0.4 + 0.3
    want[5] += 2.0
    torch.testing.assert_close(found, want)


def test_a_temperature_next_to_nothing_takes_the_likeliest_and_the_least_that_draws_does_not_overflow() -> None:
    for tiny in (0.0, -0.0, 5e-324, 1e-45, 1e-40, 1e-37, 1e-30, 9.9e-6):
        assert SamplingParams(temperature=tiny).greedy, tiny
    row = logits_of(1)[0] * 100
    best = int(row.argmax())
    least = SamplingParams(temperature=LEAST_TEMPERATURE)
    assert not least.greedy
    row[best] = 3e4  # as large as a logit of a float16 model can be
    assert sampling.sample(row[None], [least], [0.7]) == [best]


@pytest.mark.parametrize(
    "s",
    [
        SamplingParams(temperature=1.0, top_p=5e-324),
        SamplingParams(temperature=1.0, top_p=1e-38),
        SamplingParams(temperature=100.0, min_p=1.0),
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=1e-5),
        SamplingParams(temperature=100.0, top_k=1, min_p=5e-324),
    ],
    ids=repr,
)
def test_the_narrowest_choices_leave_the_likeliest(s: SamplingParams) -> None:
    row = logits_of(1)[0]
    assert sampling.sample(row.expand(5, -1), [s] * 5, [1e-12, 0.2, 0.5, 0.8, 1 - 1e-12]) == [int(row.argmax())] * 5


def test_the_widest_choices_draw_from_all() -> None:
    row = logits_of(1, vocabulary=7)[0]
    numbers = [(i + 0.5) / 500 for i in range(500)]
    for s in (
        SamplingParams(temperature=100.0, min_p=5e-324),
        SamplingParams(temperature=100.0, top_p=1.0, top_k=1 << 30),
    ):
        assert set(sampling.sample(row.expand(500, -1), [s] * 500, numbers)) == set(range(7))


def test_the_strongest_penalties_and_biases_leave_numbers() -> None:
    for penalty in (0.01, 100.0):
        row = logits_of(1)[0] * 1000
        sampling.apply_penalties(
            row,
            SamplingParams(
                repetition_penalty=penalty, presence_penalty=2.0, frequency_penalty=-2.0, bias={3: 100.0, 4: -100.0}
            ),
            [1, 2, 3],
            [5] * 10_000,
        )
        assert bool(row.isfinite().all())


def test_the_numbers_of_a_seed_are_even_and_no_two_places_share_one() -> None:
    numbers = [sampling.uniform(seed, index, at) for seed in range(5) for index in range(4) for at in range(200)]
    assert len(set(numbers)) == len(numbers)
    assert 0 < min(numbers) < max(numbers) < 1
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.02


def test_the_share_of_min_p_is_compared_in_double_precision() -> None:
    """The second of two tokens stays or goes as its share says, which float32 would round to either side of the cut."""
    for i in range(1, 30):
        row = torch.tensor([[0.0, -i / 16]])
        first, second = torch.softmax(row, -1).double()[0].tolist()
        for factor, token in ((1 - 1e-12, 1), (1 + 1e-12, 0)):
            s = SamplingParams(temperature=1.0, min_p=second / first * factor)
            assert sampling.sample(row, [s], [0.9999]) == [token]
