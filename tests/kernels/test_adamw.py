"""AdamW's step in C against the reference bit for bit, the 8-bit codes against their definition, and sums of squares."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from graftlm import kernels
from graftlm.kernels import native
from graftlm.kernels import reference_adamw as reference
from graftlm.kernels.moments import MOMENT_BLOCK, Moments, zero_moments
from graftlm.kernels.reference import dynamic_code

CPU = torch.device("cpu")
FLOATS = [torch.float32, torch.bfloat16]

needs_library = pytest.mark.skipif(
    "without" in native.status(), reason="the C kernels are not compiled (pip install -e . with a C compiler)"
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradient(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Values over many orders of magnitude, a third of them zero."""
    values = randn(count, seed=seed) * 10 ** (2 * randn(count, seed=seed + 1))
    return values.masked_fill_(randn(count, seed=seed + 2) < -0.4, 0).to(dtype)


def update(step: int, **changes: float) -> reference.Update:
    numbers = {"beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "weight_decay": 0.1, "factor": 0.37, **changes}
    return reference.update_of(step, 0.01, key=(3, "name", step), **numbers)  # pyright: ignore[reportArgumentType]


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[tensor.element_size()])


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def odd_view(tensor: Tensor) -> Tensor:
    """The same values one element after an aligned address."""
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)


@needs_library
@pytest.mark.parametrize("level", range(len(native.instruction_sets())))
@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_step_in_c_gives_the_references_bits(dtype: torch.dtype, eight_bit: bool, level: int) -> None:
    pick = random.Random(level)
    for count in (1, 7, 255, 256, 257, pick.randint(258, 4000), 20_011):
        kind = pick.choice(FLOATS)
        ours = odd_view(randn(count).to(dtype))
        truth = ours.clone()
        mine, theirs = (zero_moments(count, eight_bit=eight_bit, device=CPU) for _ in range(2))
        for step in range(1, 5):
            given = odd_view(gradient(count, kind, step))
            native.adamw.step(ours, given, mine, update(step), level)
            reference.adamw(truth, given, theirs, update(step))
            assert same(ours, truth), (count, step)
            for name, tensor in mine.tensors().items():
                assert same(tensor, theirs.tensors()[name]), (name, count, step)


@needs_library
def test_the_number_of_threads_changes_no_bit() -> None:
    count = 70_001
    found: list[list[Tensor]] = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            parameter, moments = randn(count).bfloat16(), zero_moments(count, eight_bit=True, device=CPU)
            for step in (1, 2):
                kernels.adamw_step(parameter, gradient(count, torch.float32, step), moments, update(step))
            total = kernels.sum_of_squares(gradient(count, torch.float32, 9))
            found.append([parameter, total, *moments.tensors().values()])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others))


def test_any_strides_of_parameter_and_gradient_are_the_same_step() -> None:
    values, slope = randn(40, 33), randn(40, 33, seed=5)
    plain, transposed, with_gaps = values.clone(), values.T.contiguous().T, torch.zeros(40, 66)[:, ::2].copy_(values)
    for parameter in (plain, transposed, with_gaps):
        moments = zero_moments(values.numel(), eight_bit=True, device=CPU)
        for step in (1, 2):
            kernels.adamw_step(parameter, slope if step == 1 else slope.T.contiguous().T, moments, update(step))
    assert torch.equal(plain, transposed)
    assert torch.equal(plain, with_gaps)


def test_the_reference_is_the_same_whatever_its_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[Tensor, Moments]] = []
    for slab in (1 << 22, 512):
        monkeypatch.setattr(reference, "SLAB", slab)
        parameter, moments = randn(3000).bfloat16(), zero_moments(3000, eight_bit=True, device=CPU)
        for step in (1, 2, 3):
            reference.adamw(parameter, gradient(3000, torch.float32, step), moments, update(step))
        found.append((parameter, moments))
    assert torch.equal(found[0][0], found[1][0])
    for name, tensor in found[0][1].tensors().items():
        assert torch.equal(tensor, found[1][1].tensors()[name])


@pytest.mark.parametrize("step_of", [kernels.adamw_step, reference.adamw], ids=["fastest", "reference"])
def test_a_parameter_in_parts_gets_the_bits_of_the_whole_where_each_part_says_where_it_begins(
    step_of: Callable[..., None],
) -> None:
    whole, slope = randn(3000).bfloat16(), gradient(3000, torch.float32, 1)
    parts = [whole[first:last].clone() for first, last in ((0, 1024), (1024, 3000))]
    moments = [zero_moments(len(part), eight_bit=True, device=CPU) for part in parts]
    of_whole = zero_moments(3000, eight_bit=True, device=CPU)
    for step in (1, 2):
        step_of(whole, slope, of_whole, update(step))
        for part, own, first in zip(parts, moments, (0, 1024)):
            step_of(part, slope[first : first + len(part)], own, replace(update(step), first=first))
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(torch.cat([own.mean for own in moments]), of_whole.mean)
    forgotten = randn(3000).bfloat16()[1024:].clone()
    step_of(forgotten, slope[1024:], zero_moments(1976, eight_bit=True, device=CPU), update(1))
    truth = randn(3000).bfloat16()
    step_of(truth, slope, zero_moments(3000, eight_bit=True, device=CPU), update(1))
    assert not torch.equal(forgotten, truth[1024:])


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_sum_of_squares_is_that_of_float64(dtype: torch.dtype) -> None:
    for count in (0, 1, 7, 8, 9, 16_384, 50_003):
        values = odd_view((randn(count) * 10 ** (5 * randn(count, seed=1))).to(dtype))
        truth = math.fsum(x * x for x in values.tolist())
        assert float(kernels.sum_of_squares(values)) == pytest.approx(truth, rel=1e-12)
        assert float(reference.sum_of_squares(values)) == pytest.approx(truth, rel=1e-12)
    for bad in (math.inf, math.nan):
        assert not math.isfinite(float(kernels.sum_of_squares(torch.tensor([1.0, bad, 2.0], dtype=dtype))))


@needs_library
def test_the_sum_of_squares_has_the_same_bits_on_every_instruction_set() -> None:
    values = randn(50_003)
    sums = [float(native.adamw.sum_of_squares(values, i)) for i in range(len(native.instruction_sets()))]
    assert len(set(sums)) == 1


# ---- the 8-bit codes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_the_codes_are_those_that_bitsandbytes_publishes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_code(signed), functional.create_dynamic_map(signed))


@pytest.mark.parametrize("code", [reference.MEAN, reference.SQUARE], ids=["signed", "unsigned"])
def test_a_value_that_has_a_code_keeps_it_whatever_the_random_bits(code: reference.Code) -> None:
    sizes = code.values[code.values >= 0]
    numbers = torch.arange(len(sizes), dtype=torch.int32)
    for word in (0, 1, 12_345, 32_766, 32_767):
        assert torch.equal(code.pick(sizes, torch.full_like(numbers, word)), numbers)


@pytest.mark.parametrize("code", [reference.MEAN, reference.SQUARE], ids=["signed", "unsigned"])
def test_rounding_to_a_code_is_to_a_neighbour_and_right_on_average(code: reference.Code) -> None:
    sizes = code.values[code.values >= 0].double()
    shares = 10 ** (-8 * torch.rand(4000, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    shares = shares.float()
    low = torch.bucketize(shares.double(), sizes, right=True) - 1
    words = torch.arange(16, 32768, 32, dtype=torch.int32)
    mean = torch.zeros(4000, dtype=torch.float64)
    for word in words.tolist():
        index = code.pick(shares, torch.full((4000,), word, dtype=torch.int32))
        assert bool(((index == low) | (index == low + 1)).all())
        mean += sizes[index]
    mean /= len(words)
    gap = sizes[low + 1] - sizes[low]
    assert bool(((mean - shares).abs() <= 2e-3 * gap).all())


def test_a_square_above_zero_never_becomes_zero_and_a_zero_stays_zero() -> None:
    square = torch.tensor([1.0, 1e-3, 1e-9, 1e-30, 0.0] * 60)
    for seed in range(5):
        codes, scale = reference.quantize_square(square, torch.full((300,), seed * 7_000_000, dtype=torch.int32))
        back = reference.dequantized(codes, scale, reference.SQUARE)
        assert torch.equal(back > 0, square > 0)


def test_blocks_of_zeros_and_the_extremes_of_a_block_keep_their_values() -> None:
    mean = torch.cat([torch.zeros(MOMENT_BLOCK), torch.tensor([3.0, -2.9, 0.0]), torch.zeros(300)])
    words = torch.arange(len(mean), dtype=torch.int32) * 77_777
    codes, scale = reference.quantize_mean(mean, words)
    back = reference.dequantized(codes, scale, reference.MEAN)
    assert scale.tolist() == [0.0, 3.0, 0.0]
    assert back[MOMENT_BLOCK] == 3.0
    assert back[MOMENT_BLOCK + 1] == pytest.approx(-2.9, rel=0.01)
    assert torch.count_nonzero(back) == 2


def test_moments_go_to_8_bits_and_back_within_their_codes_spacing() -> None:
    exact = Moments(randn(1000), randn(1000, seed=1).square())
    small = kernels.moments_in(exact, True, key=(1, "x"))
    assert small.nbytes == 2 * 1000 + 2 * 4 * 4
    back = kernels.moments_in(small, False, key=())
    for name, tensor in exact.tensors().items():
        large = tensor.abs() > 0.1 * tensor.abs().max()
        torch.testing.assert_close(back.tensors()[name][large], tensor[large], rtol=0.15, atol=0)
    again = kernels.moments_in(back, True, key=(9, "other bits"))
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in small.tensors().items())


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"mean": torch.zeros(9), "square": torch.zeros(10)}, "mean"),
        ({"mean": torch.zeros(10), "square": torch.zeros(10), "mean_scale": torch.zeros(1)}, "uint8"),
        ({"mean": torch.zeros(10, dtype=torch.uint8), "square": torch.zeros(10)}, "mean"),
        ({"mean": torch.zeros(10), "square": torch.zeros(10), "square_scale": torch.zeros(1)}, "square_scale"),
    ],
)
def test_moments_that_fit_no_parameter_are_refused(tensors: dict[str, Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Moments(**tensors).check(10)
