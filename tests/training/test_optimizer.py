"""AdamW against torch's, its states in 8 bits, rounding to the two neighbours, the schedule at the points that matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graftlm.kernels import stochastic_round
from graftlm.kernels.counter_rng import uniform_words
from graftlm.training.optimizer import AdamW, LRSchedule, clip_coefficient

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
                  weight_decay=0.0, lr_multipliers={"matrix": 4.0}))  # fmt: skip
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
    assert optimizer(own).gradient_norm() == pytest.approx(flat.double().norm().item(), rel=1e-12)


def test_clipping_shortens_a_long_gradient_and_leaves_a_short_one() -> None:
    assert clip_coefficient(3.0, 1.5) == 0.5
    assert clip_coefficient(3.0, 3.0) == clip_coefficient(3.0, 1e6) == clip_coefficient(3.0, 0.0) == 1.0
    clipped, scaled = parameters(), parameters()
    first, second = optimizer(clipped), optimizer(scaled)
    for name, gradient in gradients(1).items():
        clipped[name].grad, scaled[name].grad = gradient, gradient * 0.25
    first.step(0.01, 0.25)
    second.step(0.01)
    assert all(torch.equal(clipped[name], scaled[name]) for name in SHAPES)


# ---- states in 8 bits ---------------------------------------------------------------------------------------------

COUNT = 32 * 256


def moved(gradient: Callable[[int], Tensor], steps: int, *, eight_bit: bool) -> Tensor:
    """What each step moves a parameter of COUNT zeros by, in learning rates: (steps, COUNT)."""
    parameter = nn.Parameter(torch.zeros(COUNT))
    mine = AdamW({"w": parameter}, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0, seed=2, eight_bit=eight_bit)
    found: list[Tensor] = []
    for step in range(steps):
        before = parameter.detach().clone()
        parameter.grad = gradient(step)
        mine.step(1e-3)
        found.append((parameter.detach() - before) / 1e-3)
    return torch.stack(found)


def noise(step: int) -> Tensor:
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(step))


FIRST = torch.arange(COUNT) % 256 == 0
"""One value of each block: the one whose gradients are a thousand times larger than the others'."""


def test_states_in_8_bits_follow_gradients_that_grow() -> None:
    def gradient(step: int) -> Tensor:
        return torch.where(FIRST, noise(step), noise(step) * (2e-2 if step >= 150 else 1e-3))

    exact, small = (moved(gradient, 700, eight_bit=b)[-150:, ~FIRST].square().mean().sqrt() for b in (False, True))
    assert small / exact == pytest.approx(1, abs=0.15)  # rounded to the nearest code, v stands still: 4.5 times too far


def test_a_mean_in_8_bits_fades_when_its_gradients_end() -> None:
    ended = torch.arange(COUNT) % 256 == 2

    def gradient(step: int) -> Tensor:
        return torch.where(FIRST, noise(step), 0.0) + torch.where(ended, 1e-2 if step < 20 else 0.0, 0.0)

    moves = moved(gradient, 250, eight_bit=True)[:, ended].abs()
    assert moves[10].min() > 0.5
    assert moves[-1].max() == 0  # rounded to the nearest code it would go on for ever


def test_no_update_blows_up_where_a_blocks_gradients_differ_a_million_times() -> None:
    rare = torch.arange(COUNT) % 256 == 1

    def gradient(step: int) -> Tensor:
        return torch.where(FIRST, noise(step), 0.0) + torch.where(rare, noise(step) * 1e-6 * (step % 40 == 0), 0.0)

    exact, small = (moved(gradient, 200, eight_bit=b).abs() for b in (False, True))
    assert small.max() <= 1.05 * exact.max()


def test_the_optimum_of_a_quadratic_is_reached_in_8_bits() -> None:
    target = noise(1)
    curvature = 10 ** noise(2).clamp(-1, 1)  # from 0.1 to 10
    parameter = nn.Parameter(torch.zeros(COUNT))
    mine = AdamW({"w": parameter}, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0, eight_bit=True)
    for step in range(1200):
        parameter.grad = curvature * (parameter.detach() - target)
        mine.step(0.02 * 0.5 * (1 + math.cos(math.pi * step / 1200)))
    assert (parameter - target).abs().max() < 2e-2
    assert (parameter - target).abs().mean() < 1e-3


def test_8_bits_train_a_small_network_as_bitsandbytes_and_32_bits_do() -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def network() -> nn.Sequential:
        torch.manual_seed(5)
        return nn.Sequential(nn.Embedding(50, 96), nn.Linear(96, 128), nn.SiLU(), nn.Linear(128, 50))

    def losses(kind: str) -> Tensor:
        net = network()
        named = dict(net.named_parameters())
        mine = AdamW(named, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01, eight_bit=kind == "8 bits")
        matrices, vectors = ([p for p in named.values() if (p.ndim >= 2) == big] for big in (True, False))
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        theirs = bnb.optim.AdamW8bit(groups, lr=3e-3)
        found: list[float] = []
        for step in range(150):
            generator = torch.Generator().manual_seed(step)
            x = torch.randint(50, (64,), generator=generator)
            loss = nn.functional.cross_entropy(net(x), (x * 7 + 3) % 50)
            net.zero_grad()
            loss.backward()
            if kind == "theirs":
                theirs.step()
            else:
                mine.step(3e-3)
            found.append(loss.item())
        return torch.tensor(found)

    exact, small, theirs = (losses(kind) for kind in ("32 bits", "8 bits", "theirs"))
    assert exact[0] > 3.5
    assert exact[-10:].mean() < 0.1
    for other in (small, theirs):
        assert (other - exact).abs().max() < 0.15
        assert (other[-10:].mean() - exact[-10:].mean()).abs() < 0.01


def test_states_in_8_bits_are_two_codes_a_value_and_small_tensors_keep_32_bits() -> None:
    own = {"large": nn.Parameter(torch.randn(64, 64)), "small": nn.Parameter(torch.randn(63, 65))}
    mine = optimizer(own, eight_bit=True)
    for parameter in own.values():
        parameter.grad = torch.randn_like(parameter)
    mine.step(0.1)
    sizes = {name: (tensor.dtype, tensor.numel()) for name, tensor in mine.state().items()}
    assert sizes == {
        "mean.large": (torch.uint8, 4096), "square.large": (torch.uint8, 4096),
        "mean_scale.large": (torch.float32, 16), "square_scale.large": (torch.float32, 16),
        "mean.small": (torch.float32, 4095), "square.small": (torch.float32, 4095),
    }  # fmt: skip
    assert mine.moments["large"].nbytes / 4096 == 2.03125


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_states_go_on_in_8_or_32_bits_from_those_of_either(before: bool, after: bool) -> None:
    def stepped(bits: tuple[bool, bool]) -> Tensor:
        own = {"w": nn.Parameter(torch.zeros(COUNT))}
        mine = optimizer(own, eight_bit=bits[0], weight_decay=0.0)
        for step in range(8):
            if step == 4:
                saved, taken = mine.state(), mine.steps
                mine = optimizer(own, eight_bit=bits[1], weight_decay=0.0)
                mine.load({name: tensor.clone() for name, tensor in saved.items()}, taken)
            own["w"].grad = noise(step)
            mine.step(0.01)
        return own["w"].detach()

    there, straight = stepped((before, after)), stepped((after, after))
    if before == after:
        one = {"w": nn.Parameter(torch.zeros(COUNT))}
        whole = optimizer(one, eight_bit=after, weight_decay=0.0)
        for step in range(8):
            one["w"].grad = noise(step)
            whole.step(0.01)
        assert torch.equal(there, one["w"])
    assert (there - straight).norm() < 0.03 * straight.norm()


def test_states_of_other_parameters_are_refused() -> None:
    own = parameters()
    good = {f"{kind}.matrix": torch.zeros(35) for kind in ("mean", "square")}
    optimizer(own).load(good, 3)
    for wrong, said in (
        ({"mean.other": torch.zeros(35), "square.other": torch.zeros(35)}, "'other', which is not trained"),
        ({**good, "square.matrix": torch.zeros(36)}, "'matrix', which has 35 values"),
        ({"mean.matrix": torch.zeros(35)}, "'matrix'"),
        ({**good, "spin.matrix": torch.zeros(35)}, "'matrix'"),
    ):
        mine = optimizer(own)
        with pytest.raises(ValueError, match=said):
            mine.load(wrong, 3)
        assert mine.moments == {}


def test_the_learning_rate_rises_in_a_line_to_its_peak() -> None:
    schedule = LRSchedule(peak=0.5, kind="cosine", warmup_steps=4, steps=20)
    assert [schedule(step) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_learning_rate_falls_towards_zero_and_never_reaches_it_within_the_run(kind: str) -> None:
    schedule = LRSchedule(peak=0.5, kind=kind, warmup_steps=3, steps=23)  # pyright: ignore
    rates = [schedule(step) for step in range(3, 23)]
    assert rates[0] == 0.5
    assert all(later < earlier for earlier, later in pairwise(rates))
    assert 0 < rates[-1] < 0.05 * 0.5 * 1.2
    assert schedule(13) == pytest.approx(0.25)  # half of the way down, for both
    assert schedule(23) == pytest.approx(0.0, abs=1e-12)


def test_a_constant_learning_rate_stays_at_its_peak() -> None:
    schedule = LRSchedule(peak=0.5, kind="constant", warmup_steps=1, steps=9)
    assert [schedule(step) for step in range(1, 9)] == [0.5] * 8
    assert schedule(0) == 0.25


def test_states_of_weights_that_are_in_the_host_s_memory_are_saved_without_a_gpu_to_wait_for() -> None:
    own = parameters()
    kept = AdamW(
        own, beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=0.0, state_device=torch.device("cpu")
    )  # as --offload-optimizer has it; with --offload-layers some weights are there too
    for name, gradient in gradients(0).items():
        own[name].grad = gradient
    kept.step(0.1)
    assert {key.partition(".")[2] for key in kept.state()} == set(SHAPES)
