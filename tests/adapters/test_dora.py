"""DoRA's factor: its norm for every stored form, its gradients, and what is computed once."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from graftlm import kernels
from graftlm.adapters import bank
from graftlm.adapters.attach import detach
from graftlm.adapters.bank import LayerBank
from graftlm.adapters.dora import combined_norm, rescaled, row_norms
from graftlm.base.context import ForwardContext
from graftlm.base.loading import load_base
from graftlm.base.precision import Weight, dequantize
from graftlm.base.requantizing import requantize
from graftlm.kernels.reference_blocks import sample_blocks

OUT, IN, RANK, SCALE = 39, 512, 5, 1.7


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(form: str) -> Weight:
    dense = randn(OUT, IN)
    if form in kernels.BLOCK_SIZES:
        return sample_blocks(form, OUT, IN)
    made = {
        "float32": lambda w: w,
        "bfloat16": Tensor.bfloat16,
        "nf4": kernels.nf4_quantize,
        "int8": kernels.int8_quantize,
    }
    return made[form](dense)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "nf4", "int8", *kernels.BLOCK_SIZES])
def test_the_norm_of_a_row_is_that_of_the_merged_weight(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = stored(form)
    monkeypatch.setattr("graftlm.adapters.dora._PANEL", 10 * IN)
    W, A, B = dequantize(weight, torch.float32).double(), randn(RANK, IN, seed=1), randn(OUT, RANK, seed=2)
    norms = row_norms(weight)
    torch.testing.assert_close(norms.double(), W.norm(dim=1), rtol=1e-6, atol=0)
    found = combined_norm(norms.square(), weight, A, B, SCALE)
    torch.testing.assert_close(found.double(), (W + SCALE * B.double() @ A.double()).norm(dim=1), rtol=2e-6, atol=0)
    assert torch.equal(combined_norm(norms.square(), weight, A, torch.zeros_like(B), SCALE), norms)


def test_the_norm_of_a_row_that_the_adapter_takes_away_is_not_below_zero() -> None:
    A = randn(1, IN, seed=1)
    W = -3.0 * A.repeat(OUT, 1)
    found = combined_norm(row_norms(W).square(), W, A, torch.full((OUT, 1), 1.5), 2.0)
    assert (found >= 0).all()
    assert (found < 0.01 * row_norms(W)).all()


def test_ranges_are_rescaled_with_the_gradients_of_a_constant_norm() -> None:
    """Two adapters, the first with two ranges; tokens before, between and behind them have none."""
    ranges = [(0, 1, 3), (1, 3, 7), (0, 8, 9)]
    y = randn(11, OUT).double().requires_grad_()
    magnitudes = [randn(OUT, seed=3 + i).double().requires_grad_() for i in range(2)]
    norms = [randn(OUT, seed=5 + i).double().abs() + 1 for i in range(2)]
    dy = randn(11, OUT, seed=9).double()
    parts = [y[:1]]
    for index, first, last in ranges:
        parts.append(y[first:last] * (magnitudes[index] / norms[index]))
    expected = torch.cat([*parts[:3], y[7:8], parts[3], y[9:]])
    found = rescaled(y, ranges, norms, magnitudes)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected, [y, *magnitudes], dy)
    for one, other in zip(torch.autograd.grad(found, [y, *magnitudes], dy), wanted):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # sums of magnitudes' gradients are float32
    frozen = [m.detach() for m in magnitudes]
    torch.testing.assert_close(torch.autograd.grad(rescaled(y, ranges, norms, frozen), y, dy)[0], wanted[0])


def test_what_is_in_bfloat16_is_multiplied_in_float32() -> None:
    y, ratio = randn(7, OUT).bfloat16(), 1 + 0.01 * randn(OUT, seed=4)
    found = rescaled(y, [(0, 0, 7)], [torch.ones(OUT)], [ratio])
    assert torch.equal(found, (y.float() * ratio).bfloat16())


@pytest.mark.parametrize("precision", ["float32", "nf4", "int8"])
def test_an_untrained_adapter_with_dora_changes_no_bit_of_what_one_without_gives(precision: str) -> None:
    base = load_base(str(tiny.folder("llama")), precision=precision, compute_dtype="float32", device="cpu")  # type: ignore[arg-type]
    found: list[Tensor] = []
    for dora in (False, True):
        adapter = tiny.adapted(base, dora=dora)
        for name, parameter in adapter.parameters().items():
            if "lora_B" in name:
                parameter.data.zero_()
        found.append(tiny.base_logits(base, tiny.ids()))
        detach(base)
    assert torch.equal(*found)


def test_the_norms_of_the_base_are_computed_once_and_anew_for_another_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = load_base(str(tiny.folder("llama")), precision="float32", compute_dtype="float32", device="cpu")
    made: list[Weight] = []
    monkeypatch.setattr(bank, "row_norms", lambda weight: made.append(weight) or row_norms(weight))
    tiny.adapted(base, dora=True)
    layers = sum(isinstance(module.bank, LayerBank) for module in base.stored().values())
    with torch.inference_mode():
        tiny.base_logits(base, tiny.ids())
    for _ in range(2):
        tiny.adapted(base, dora=True, slot=2, seed=1)
        hidden = base.hidden(tiny.ids(), ForwardContext(tiny.layout((11,), (2,))))
        hidden.sum().backward()  # what inference mode computed serves training too
    assert len(made) == layers
    detach(base, slot=1)
    detach(base, slot=2)
    requantize(base, "int8")
    tiny.adapted(base, dora=True)
    found = tiny.base_logits(base, tiny.ids())
    assert len(made) == 2 * layers
    again = load_base(str(tiny.folder("llama")), precision="float32", compute_dtype="float32", device="cpu")
    requantize(again, "int8")
    tiny.adapted(again, dora=True)
    assert torch.equal(found, tiny.base_logits(again, tiny.ids()))
