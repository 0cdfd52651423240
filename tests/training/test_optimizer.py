"""AdamW against torch's, rounding against the two neighbours, and the schedule at the points that matter."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graftlm.kernels.counter import uniform_words
from graftlm.training.optimizer import AdamW, Schedule, clip, gradient_norm, stochastic_round

SHAPES = {"matrix": (5, 7), "vector": (11,), "stack": (2, 3, 4)}


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {n: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in SHAPES.items()}


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {n: torch.randn(s, generator=generator) * (1 + step) for n, s in SHAPES.items()}


def optimizer(own: dict[str, nn.Parameter], **changes: float) -> AdamW:
    return AdamW(own, **{"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-6, "weight_decay": 0.3, **changes})  # pyright: ignore


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_is_torchs_adamw_with_weight_decay_on_matrices_only(weight_decay: float) -> None:
    own, theirs = parameters(), parameters()
    mine = optimizer(own, weight_decay=weight_decay)
    matrices = [p for p in theirs.values() if p.ndim >= 2]
    vectors = [p for p in theirs.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.95), eps=1e-6, foreach=False)
    for step in range(6):
        rate = 0.05 / (step + 1)
        for name, gradient in gradients(step).items():
            own[name].grad, theirs[name].grad = gradient.clone(), gradient.clone()
        mine.step(rate)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
    for name in SHAPES:
        torch.testing.assert_close(own[name], theirs[name], rtol=1e-6, atol=1e-7)


def test_a_ratio_multiplies_the_learning_rate_of_its_parameter_alone() -> None:
    plain, tuned = parameters(), parameters()
    before = parameters()
    optimizers = (optimizer(plain, weight_decay=0.0), AdamW(tuned, beta1=0.8, beta2=0.95, epsilon=1e-6,
                  weight_decay=0.0, ratios={"matrix": 4.0}))  # fmt: skip
    for own, mine in zip((plain, tuned), optimizers):
        for name, gradient in gradients(0).items():
            own[name].grad = gradient
        mine.step(0.01)
    moved, plainly = tuned["matrix"] - before["matrix"], plain["matrix"] - before["matrix"]
    torch.testing.assert_close(moved, 4 * plainly, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(tuned["stack"], plain["stack"], rtol=0, atol=0)


def test_a_parameter_without_a_gradient_stays_as_it_is() -> None:
    own = parameters()
    before = own["vector"].detach().clone()
    own["matrix"].grad = gradients(0)["matrix"]
    optimizer(own).step(0.1)
    assert torch.equal(own["vector"], before)


def test_the_states_of_an_optimizer_go_into_another_that_then_does_the_same() -> None:
    own, other = parameters(), parameters()
    first, second = optimizer(own), optimizer(other)
    for step in range(5):
        if step == 3:
            with torch.no_grad():
                for name in SHAPES:
                    other[name].copy_(own[name])
            second.load({k: v.clone() for k, v in first.state().items()}, first.steps)
        for name, gradient in gradients(step).items():
            own[name].grad, other[name].grad = gradient, gradient
        first.step(0.01)
        if step >= 3:
            second.step(0.01)
    assert all(torch.equal(own[name], other[name]) for name in SHAPES)


@given(st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False))
def test_a_value_is_rounded_to_itself_or_to_one_of_its_two_neighbours(value: float) -> None:
    exact = torch.full((64,), value, dtype=torch.float32)
    rounded = stochastic_round(exact, uniform_words(64, "test", str(value))).float()
    cut = (exact.view(torch.int32) & -65536).view(torch.float32)[0]  # towards zero
    away = ((exact.view(torch.int32) & -65536) + 65536).view(torch.float32)[0]
    assert set(rounded.tolist()) <= ({value} if cut == value else {cut.item(), away.item()})


def test_rounding_is_right_on_average() -> None:
    count = 200_000
    for value in (1.0 + 2**-9, -1.0 - 2**-11, 3.14159, -0.0123456):
        mean = stochastic_round(torch.full((count,), value), uniform_words(count, 5, str(value))).double().mean().item()
        gap = 2.0 ** (math.floor(math.log2(abs(value))) - 7)  # between two neighbours in bfloat16
        assert abs(mean - value) < 4 * 0.5 * gap / math.sqrt(count)


def test_bfloat16_weights_move_by_updates_far_below_their_spacing() -> None:
    weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    mine = AdamW({"w": weight}, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0, seed=1)
    for _ in range(50):  # Adam moves by the learning rate when the gradient stays the same
        weight.grad = torch.ones_like(weight)
        mine.step(1e-4)  # 1/39 of the spacing below one, 2^-8
    assert weight.float().mean().item() == pytest.approx(1 - 50 * 1e-4, abs=2e-4)
    plainly = torch.ones((), dtype=torch.bfloat16)
    assert plainly - torch.tensor(1e-4, dtype=torch.bfloat16) == plainly  # what rounding to the nearest would do


def test_the_gradient_norm_is_that_of_all_gradients_laid_end_to_end() -> None:
    own = parameters()
    for name, gradient in gradients(1).items():
        own[name].grad = gradient
    flat = torch.cat([g.flatten() for g in gradients(1).values()])
    assert gradient_norm(own.values()) == pytest.approx(flat.norm().item(), rel=1e-6)


def test_clipping_shortens_a_long_gradient_and_leaves_a_short_one() -> None:
    for limit, factor in ((1.5, None), (1e6, 1.0), (0.0, 1.0)):
        own = parameters()
        for name, gradient in gradients(1).items():
            own[name].grad = gradient.clone()
        norm = gradient_norm(own.values())
        clip(own.values(), norm, limit)
        expected = limit / norm if factor is None else factor
        for name, gradient in gradients(1).items():
            torch.testing.assert_close(own[name].grad, gradient * expected)


def test_the_learning_rate_rises_in_a_line_to_its_peak() -> None:
    schedule = Schedule(peak=0.5, kind="cosine", warmup_steps=4, steps=20)
    assert [schedule(step) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_learning_rate_falls_towards_zero_and_never_reaches_it_within_the_run(kind: str) -> None:
    schedule = Schedule(peak=0.5, kind=kind, warmup_steps=3, steps=23)  # pyright: ignore
    rates = [schedule(step) for step in range(3, 23)]
    assert rates[0] == 0.5
    assert all(later < earlier for earlier, later in pairwise(rates))
    assert 0 < rates[-1] < 0.05 * 0.5 * 1.2
    assert schedule(13) == pytest.approx(0.25)  # half of the way down, for both
    assert schedule(23) == pytest.approx(0.0, abs=1e-12)


def test_a_constant_learning_rate_stays_at_its_peak() -> None:
    schedule = Schedule(peak=0.5, kind="constant", warmup_steps=1, steps=9)
    assert [schedule(step) for step in range(1, 9)] == [0.5] * 8
    assert schedule(0) == 0.25
