"""Our own matrix product: equal to PyTorch's in float64, whatever the weight is stored as, and whatever the threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graftlm import kernels
from graftlm.kernels import reference
from graftlm.kernels.native import gemm, library

pytestmark = pytest.mark.skipif(
    library.get().calls is None or not library.calls().graft_gemm_level(),
    reason="this processor has no matrix product of our own, so PyTorch's is used",
)
KINDS = ("float32", "bfloat16", "nf4", "int8")


def stored(weight: Tensor, kind: str) -> kernels.Weight:
    if kind == "nf4":
        return reference.nf4_quantize(weight)
    return reference.int8_quantize(weight) if kind == "int8" else weight.to(getattr(torch, kind))


def wide(weight: kernels.Weight) -> Tensor:
    return (weight if isinstance(weight, Tensor) else reference.dequantize(weight)).double()


def near(found: Tensor, truth: Tensor, size: Tensor) -> bool:
    """Every element within 1e-6 of the sum of its products' magnitudes."""
    return bool(((found - truth).abs() <= 1e-6 * size + 1e-30).all())


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 150), k=st.integers(1, 700), n=st.integers(1, 200), kind=st.sampled_from(KINDS), transposed=st.booleans(),
    seed=st.integers(0, 99), gap=st.integers(0, 3), by_columns=st.booleans(),
)  # fmt: skip
def test_a_matmul_equals_float64_for_every_shape_stride_and_stored_form(
    m: int, k: int, n: int, kind: str, transposed: bool, seed: int, gap: int, by_columns: bool
) -> None:
    random = torch.Generator().manual_seed(seed)
    weight = stored(torch.randn((n, k) if transposed else (k, n), generator=random), kind)
    whole = torch.randn((k, m + gap) if by_columns else (m, k + gap), generator=random)
    x = whole[:, :m].T if by_columns else whole[:, :k]
    W = wide(weight).T if transposed else wide(weight)
    found = gemm.multiply([(x, weight, transposed)])
    assert near(found.double(), x.double() @ W, x.double().abs() @ W.abs())


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 90), k=st.integers(1, 600), n=st.integers(65, 200), kind=st.sampled_from(KINDS), transposed=st.booleans(),
    seed=st.integers(0, 99), by_columns=st.booleans(),
)  # fmt: skip
def test_a_bf16_matmul_rounds_both_inputs_to_bfloat16_and_nothing_else(
    m: int, k: int, n: int, kind: str, transposed: bool, seed: int, by_columns: bool
) -> None:
    if not kernels.has_bf16_matmul():
        pytest.skip("this processor has no bfloat16 instructions")
    random = torch.Generator().manual_seed(seed)
    weight = stored(torch.randn((n, k) if transposed else (k, n), generator=random), kind)
    x = torch.randn(k, m, generator=random).T if by_columns else torch.randn(m, k, generator=random)
    W = (wide(weight).T if transposed else wide(weight)).bfloat16().double()
    rounded = x.bfloat16().double()
    found = gemm.multiply([(x, weight, transposed)], bf16_matmul=True)
    assert near(found.double(), rounded @ W, rounded.abs() @ W.abs())


def test_a_row_of_a_bf16_matmul_does_not_depend_on_the_other_rows() -> None:
    if not kernels.has_bf16_matmul():
        pytest.skip("this processor has no bfloat16 instructions")
    random = torch.Generator().manual_seed(0)
    x = torch.randn(60, 300, generator=random)
    for kind in KINDS:
        weight = stored(torch.randn(300, 300, generator=random), kind)
        for product in (kernels.matmul, kernels.matmul_t):
            whole = product(x, weight, True)
            assert all(torch.equal(product(x[a:b], weight, True), whole[a:b]) for a, b in ((0, 1), (1, 14), (14, 60)))


def test_a_bf16_matmul_leaves_the_low_rank_term_in_float32() -> None:
    if not kernels.has_bf16_matmul():
        pytest.skip("this processor has no bfloat16 instructions")
    random = torch.Generator().manual_seed(0)
    h, B = torch.randn(50, 9, generator=random), torch.randn(70, 9, generator=random)
    x, W = torch.zeros(50, 300), torch.randn(70, 300, generator=random)
    found = gemm.multiply([(x, W, True), (h, B, True)], bf16_matmul=True)
    assert near(found.double(), h.double() @ B.double().T, h.double().abs() @ B.double().abs().T)


def test_a_second_term_and_an_old_result_are_added_in_the_same_pass() -> None:
    random = torch.Generator().manual_seed(0)
    x, W, h, B, old = (torch.randn(s, generator=random) for s in ((50, 300), (70, 300), (50, 9), (70, 9), (50, 80)))
    found = gemm.multiply([(x, W, True), (h, B, True)], out=old[:, :70].clone(), alpha=0.5, add=True)
    assert torch.allclose(found, old[:, :70] + 0.5 * (x @ W.T + h @ B.T), rtol=1e-5, atol=1e-4)


def test_the_number_of_threads_changes_no_bit() -> None:
    random = torch.Generator().manual_seed(0)
    x, W = torch.randn(77, 513, generator=random), torch.randn(333, 513, generator=random)
    weight = reference.nf4_quantize(W)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            products = [gemm.multiply([(x, weight, True)], bf16_matmul=n) for n in (False, kernels.has_bf16_matmul())]
            found.append((*products, gemm.multiply([(x.T, x, False)])))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_a_matmul_of_empty_matrices_is_zero_or_empty() -> None:
    empty = torch.zeros(40, 0)
    assert torch.equal(gemm.multiply([(empty, torch.zeros(30, 0), True)], add=True, out=torch.ones(40, 30)),
                       torch.ones(40, 30))  # fmt: skip
    assert kernels.matmul(torch.zeros(0, 30), torch.zeros(7, 30)).shape == (0, 7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranges", [[(0, 90, 0)], [(0, 40, 1), (40, 90, 0)], [(3, 40, 2), (40, 41, 1)]])
def test_lora_linear_and_its_gradients_equal_the_references(kind: str, ranges: list[tuple[int, int, int]]) -> None:
    random = torch.Generator().manual_seed(0)
    x, dy = torch.randn(90, 130, generator=random), torch.randn(90, 75, generator=random)
    weight = stored(torch.randn(75, 130, generator=random), kind)
    A = [torch.randn(r, 130, generator=random) for r in (8, 33)] + [None]
    B = [torch.randn(75, r, generator=random) for r in (8, 33)] + [None]
    routing = kernels.Routing(ranges, A, B, [2.0, 0.5, 0.0])
    y, hidden = kernels.lora_linear(x, weight, routing)
    dx, dA, dB = kernels.lora_linear_backward(dy, x, weight, hidden, routing, True)
    expected = reference.matmul(x, weight)
    kept = reference.low_rank_routed(expected, x, routing)
    truth = reference.matmul_t(dy, weight)
    tA, tB = reference.low_rank_routed_backward(dy, x, kept, routing, truth)
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-3)
    assert dx is not None
    assert torch.allclose(dx, truth, rtol=1e-4, atol=1e-3)
    for ours, theirs in zip([*dA, *dB], [*tA, *tB]):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-2)


def test_a_16_bit_weight_is_never_upcast_in_full_for_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    if not library.get().has_fast_matmul:
        pytest.skip("PyTorch's products are faster here")
    random = torch.Generator().manual_seed(0)
    dy, weight = torch.randn(2, 333, generator=random), torch.randn(333, 70, generator=random).bfloat16()
    monkeypatch.setattr(reference, "matmul_t", lambda *_: pytest.fail("the whole weight is upcast"))
    assert near(kernels.matmul_t(dy, weight), dy.double() @ wide(weight), dy.double().abs() @ wide(weight).abs())


def test_a_smaller_instruction_set_leaves_matmuls_to_pytorch() -> None:
    library.choose(library.instruction_sets()[0])
    try:
        assert not kernels.has_fast_matmul(torch.zeros(100, 8))
    finally:
        library.choose(None)
