"""The reference kernels against bitsandbytes (bits) and against dense PyTorch (products)."""

import pytest
import torch

from graftlm import kernels
from graftlm.kernels import reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64,), (1,), (63,), (65,), (3, 33), (7, 129), (128, 64), (37, 1001), (300, 64), (257, 64 * 5 + 2)]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0))


def weights(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 10 ** torch.randn(shape[0], *[1] * (len(shape) - 1))
    return weight.to(dtype)


def assert_same_as_bitsandbytes(weight: torch.Tensor, dense_in: list[torch.dtype] = FLOATS) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = reference.nf4_quantize(weight)
    assert same(ours.packed, packed.view(-1))
    assert same(ours.absmax, state.absmax)
    assert same(ours.absmax_scale, state.state2.absmax)
    assert same(ours.offset, state.offset)
    for dtype in dense_in:
        state.dtype = dtype
        dense = functional.dequantize_4bit(packed, state).reshape(weight.shape)
        assert same(reference.nf4_dequantize(ours, dtype), dense)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_equals_bitsandbytes_bit_for_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_same_as_bitsandbytes(weights(shape, dtype, seed=len(shape) + shape[0]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_nf4_equals_bitsandbytes_on_values_at_the_edges(dtype: torch.dtype) -> None:
    code = reference.NF4_CODE
    ties = torch.cat([reference.NF4_MIDPOINTS, code, torch.zeros(33)])  # 64 values, among them every tie
    assert_same_as_bitsandbytes(torch.cat([ties, -ties, torch.zeros(70), ties * 1e-3]).to(dtype))
    assert_same_as_bitsandbytes(torch.full((64 * 3 + 5,), 0.25, dtype=dtype))
    assert_same_as_bitsandbytes(torch.zeros(200, dtype=dtype))
    # AVX-512's own conversion to bfloat16, which bitsandbytes uses where it can, flushes subnormal numbers to zero.
    assert_same_as_bitsandbytes(torch.randn(640).mul_(1e-39).to(dtype), dense_in=[torch.float32])
    assert_same_as_bitsandbytes(torch.randn(64 * 300 + 7).mul_(30000).to(dtype))


def test_nf4_of_a_large_tensor_equals_bitsandbytes_across_slabs() -> None:
    assert_same_as_bitsandbytes(
        torch.randn(reference.SLAB * 2 + 64 * 7 + 3, generator=torch.Generator().manual_seed(1))
    )


def test_the_dynamic_code_equals_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert same(reference.DYNAMIC_CODE, functional.create_dynamic_map())
    assert same(reference.NF4_CODE, functional.get_4bit_type("nf4", device="cpu"))


def test_nf4_takes_the_published_number_of_bits() -> None:
    weight = reference.nf4_quantize(torch.randn(256, 1024, generator=torch.Generator().manual_seed(1)))
    bits = 8 * (weight.nbytes - 4) / weight.numel
    assert bits == 4 + 8 / 64 + 32 / (64 * 256)


def test_a_slice_of_an_nf4_stack_is_the_slice_of_its_values() -> None:
    stack = reference.nf4_quantize(weights((5, 3, 67), torch.float32, seed=3))
    dense = reference.nf4_dequantize(stack)
    assert same(reference.nf4_dequantize(stack[2]), dense[2])
    assert same(reference.nf4_dequantize(stack.narrow(1, 3)), dense[1:4])
    assert same(reference.nf4_dequantize(stack[4].narrow(1, 2)), dense[4, 1:])
    assert same(reference.nf4_dequantize(stack.view(15, 67)), dense.view(15, 67))
    assert stack[2].packed.data_ptr() == stack.packed.data_ptr()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_a_weight_without_values_survives_both_ways(shape: tuple[int, ...]) -> None:
    empty = torch.empty(shape)
    assert reference.nf4_dequantize(reference.nf4_quantize(empty)).shape == shape
    if len(shape) == 2:
        assert reference.int8_dequantize(reference.int8_quantize(empty)).shape == shape


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_is_within_half_a_step_of_each_row(dtype: torch.dtype) -> None:
    weight = weights((37, 1001), dtype, seed=5)
    weight[7] = 0
    small = reference.int8_quantize(weight)
    step = weight.float().abs().amax(dim=1, keepdim=True) / 127
    error = (reference.int8_dequantize(small) - weight.float()).abs()
    assert bool((error <= step * 0.5001).all())
    assert bool((small.values[7] == 0).all())


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_matmuls_are_those_of_the_dense_weight_and_its_gradient(form: str) -> None:
    dense = weights((13, 77), torch.float32, seed=6)
    stored = reference.nf4_quantize(dense) if form == "nf4" else reference.int8_quantize(dense)
    dense = reference.dequantize(stored)
    x = torch.randn(2, 5, 77, generator=torch.Generator().manual_seed(2)).requires_grad_()
    y = torch.nn.functional.linear(x, dense)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    y.backward(dy)
    assert x.grad is not None
    torch.testing.assert_close(reference.matmul(x.detach(), stored), y.detach())
    torch.testing.assert_close(reference.matmul_t(dy, stored), x.grad)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_references_answers_do_not_depend_on_strides(dtype: torch.dtype) -> None:
    dense, x = weights((13, 77), dtype, seed=9), weights((5, 77), dtype, seed=10)
    transposed = dense.T.contiguous().T
    gaps = torch.zeros(5, 154, dtype=dtype)[:, ::2].copy_(x)
    pairs = (
        (reference.nf4_quantize(dense), reference.nf4_quantize(transposed)),
        (reference.int8_quantize(dense), reference.int8_quantize(transposed)),
    )
    for one, other in pairs:
        assert all(same(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())
        torch.testing.assert_close(reference.matmul(gaps, one), x @ reference.dequantize(other, dtype).T)
        torch.testing.assert_close(
            reference.matmul_t(gaps[:, :13], one), x[:, :13] @ reference.dequantize(other, dtype)
        )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_one_adapters_low_rank_term_and_gradients_are_those_of_float64(dtype: torch.dtype, tokens: int) -> None:
    generator = torch.Generator().manual_seed(11)
    x, y, dy, dx = (torch.randn(tokens, 2 * n, generator=generator)[:, ::2].to(dtype) for n in (23, 19, 19, 23))
    A, B = torch.randn(5, 23, generator=generator), torch.randn(19, 5, generator=generator)
    wide = [t.double().requires_grad_() for t in (x, A, B)]
    expected = y.double() + 0.7 * (wide[0] @ wide[1].T @ wide[2].T)
    slopes = torch.autograd.grad(expected, wide, dy.double())
    before = dx.double()
    h = kernels.low_rank(y, x, A, B, 0.7)
    dA, dB = kernels.low_rank_backward(dy, x, h, A, B, 0.7, dx)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for found, truth in zip((y, dx, dA, dB), (expected.detach(), before + slopes[0], *slopes[1:]), strict=True):
        assert float((found.double() - truth).norm()) <= tolerance * float(truth.norm())
    assert dA.dtype == dB.dtype == torch.float32


RANGES = [(0, 4, 1), (4, 5, 0), (5, 11, 2), (11, 11, 1), (11, 14, 1), (15, 17, 3)]  # token 14 belongs to no range
RANKS = {1: 3, 2: 8, 3: 1, 4: 2}  # slot 0 is the bare base; no token uses slot 4


def bank() -> tuple[list[torch.Tensor | None], list[torch.Tensor | None], list[float]]:
    generator = torch.Generator().manual_seed(7)
    A: list[torch.Tensor | None] = [None]
    B: list[torch.Tensor | None] = [None]
    for r in RANKS.values():
        A.append(torch.randn(r, 23, generator=generator, dtype=torch.float64).requires_grad_())
        B.append(torch.randn(19, r, generator=generator, dtype=torch.float64).requires_grad_())
    return A, B, [1.0, 0.5, 2.0, 1.5, 3.0]


def test_a_routed_low_rank_term_has_the_values_and_gradients_of_autograd() -> None:
    generator = torch.Generator().manual_seed(8)
    A, B, scale = bank()
    x = torch.randn(17, 23, generator=generator, dtype=torch.float64).requires_grad_()
    y = torch.randn(17, 19, generator=generator, dtype=torch.float64)
    dy = torch.randn(17, 19, generator=generator, dtype=torch.float64)
    expected = y.clone()
    for first, last, slot in RANGES:
        a, b = A[slot], B[slot]
        if a is not None and b is not None:
            expected[first:last] += scale[slot] * (x[first:last] @ a.T @ b.T)
    expected.backward(dy)
    with torch.no_grad():
        routing = kernels.Routing(RANGES, A, B, scale)
        hidden = reference.low_rank_routed(y, x, routing)
        already = torch.randn(17, 23, generator=generator, dtype=torch.float64)
        dx = already.clone()
        dA, dB = reference.low_rank_routed_backward(dy, x, hidden, routing, dx)
    torch.testing.assert_close(y, expected.detach())
    assert x.grad is not None
    torch.testing.assert_close(dx - already, x.grad)
    for slot in (1, 2, 3):
        for ours, parameter in ((dA[slot], A[slot]), (dB[slot], B[slot])):
            assert ours is not None
            assert parameter is not None
            torch.testing.assert_close(ours, parameter.grad)
    assert dA[0] is dB[0] is dA[4] is dB[4] is None
