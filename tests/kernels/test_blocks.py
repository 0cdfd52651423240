"""Weights in the blocks of GGUF files: the bits of the package gguf, and products that no neighbour changes."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from graftlm import kernels
from graftlm.kernels import BLOCK_SIZES, GgufBlocks, native, reference, reference_blocks
from graftlm.kernels.native import library, stored_matmul, weights

gguf = pytest.importorskip("gguf")
KINDS = tuple(BLOCK_SIZES)
SMALL = tuple(kind for kind in KINDS if not kind.endswith("k"))  # what the package gguf can quantize to
# The bytes at which a block has a float16, where these are not 0 and 2.
SCALES = {"q4_0": (0,), "q5_0": (0,), "q8_0": (0,), "q6_k": (208,)}
FLOATS = [torch.float32, torch.bfloat16, torch.float16]

needs_library = pytest.mark.skipif(
    "without" in native.status(), reason="the C kernels are not compiled (pip install -e . with a C compiler)"
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def any_blocks(kind: str, *shape: int, seed: int = 0, scale: float = 0.01) -> GgufBlocks:
    """Random bytes whose float16 scales are near `scale`, of both signs."""
    values, size = BLOCK_SIZES[kind]
    draw = np.random.default_rng(seed)
    n = int(np.prod(shape)) // values
    data = draw.integers(0, 256, (n, size), dtype=np.uint8)
    for at in SCALES.get(kind, (0, 2)):
        data[:, at : at + 2] = (scale * draw.standard_normal((n, 1))).astype(np.float16).view(np.uint8)
    return GgufBlocks(torch.from_numpy(data).view(*shape[:-1], -1), kind)


def truth(weight: GgufBlocks) -> Tensor:
    """What the package gguf makes of the same bytes, float32."""
    with np.errstate(all="ignore"):
        dense = gguf.quants.dequantize(weight.data.numpy(), gguf.GGMLQuantizationType[weight.kind.upper()])
    return torch.from_numpy(dense)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, the sign of zero too; numbers that are none may differ in theirs."""
    if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a.isnan(), b.isnan()):
        return False
    return torch.equal(a.nan_to_num(0, 7e4, -7e4), b.nan_to_num(0, 7e4, -7e4)) and torch.equal(
        a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan()
    )


def near(found: Tensor, left: Tensor, right: Tensor) -> bool:
    """Every element within 1e-6 of the sum of its products' magnitudes from left @ right in float64."""
    error = (found.double() - left.double() @ right.double()).abs()
    return bool((error <= 1e-6 * (left.double().abs() @ right.double().abs()) + 1e-30).all())


# ---- the stored form ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_those_of_ggml(kind: str) -> None:
    assert BLOCK_SIZES[kind] == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    weight = any_blocks(kind, 3, 5, 512)
    assert weight.shape == (3, 5, 512)
    assert weight.numel == 3 * 5 * 512
    assert weight.nbytes == weight.numel // BLOCK_SIZES[kind][0] * BLOCK_SIZES[kind][1]
    assert kernels.row_bytes(kind, 512) == weight.nbytes // 15


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 48 values in q4_0; a row must be made of whole blocks of 32"):
        kernels.row_bytes("q4_0", 48)
    with pytest.raises(ValueError, match="rows of 128 values in q6_k; a row must be made of whole blocks of 256"):
        kernels.row_bytes("q6_k", 128)
    with pytest.raises(ValueError, match="rows of 145 bytes in q4_k; a block has 144"):
        GgufBlocks(torch.zeros(2, 145, dtype=torch.uint8), "q4_k")
    with pytest.raises(ValueError, match="kind 'iq2_xs'; known are q4_0, "):
        GgufBlocks(torch.zeros(2, 144, dtype=torch.uint8), "iq2_xs")
    with pytest.raises(ValueError, match="expected rows of uint8"):
        GgufBlocks(torch.zeros(2, 144), "q4_k")


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_stack_share_its_memory(kind: str) -> None:
    stack = any_blocks(kind, 3, 7, 256)
    one, rows = stack[1], stack[1].narrow(2, 4)
    assert one.shape == (7, 256)
    assert rows.shape == (4, 256)
    assert rows.data.untyped_storage().data_ptr() == stack.data.untyped_storage().data_ptr()
    dense = kernels.dequantize(stack)
    assert torch.equal(kernels.dequantize(rows), dense[1, 2:6])
    assert torch.equal(stack.to("cpu").tensors()["data"], stack.data)
    assert near(kernels.matmul(randn(3, 256), rows), randn(3, 256), dense[1, 2:6].T)


# ---- dequantize ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SMALL)
def test_what_gguf_quantizes_is_dequantized_to_its_bits(kind: str) -> None:
    dense = (randn(7, 192) * torch.exp(randn(7, 1, seed=1) * 3)).numpy()
    dense[3, 32:64] = 0
    data = torch.from_numpy(gguf.quants.quantize(dense, gguf.GGMLQuantizationType[kind.upper()]))
    weight = GgufBlocks(data, kind)
    assert weight.shape == (7, 192)
    assert same_bits(reference_blocks.blocks_dequantize(weight), truth(weight))
    assert same_bits(kernels.dequantize(weight), truth(weight))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_equals_the_package_gguf_bit_for_bit(kind: str) -> None:
    for seed, scale in enumerate((0.01, 1e-7, 300.0, 0.0, -0.0, float("inf"))):
        weight = any_blocks(kind, 5, 768, seed=seed, scale=scale)
        assert same_bits(reference_blocks.blocks_dequantize(weight), truth(weight)), scale


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_c_kernels_equal_the_package_gguf_bit_for_bit(kind: str, instructions: str) -> None:
    for seed, scale in enumerate((0.01, 1e-7, 300.0, 0.0, -0.0, float("inf"))):  # 1e-7: subnormal float16
        weight = any_blocks(kind, 5, 768, seed=seed, scale=scale)
        expected = truth(weight)
        for dtype in FLOATS:
            assert same_bits(native.blocks_dequantize(weight, dtype), expected.to(dtype)), (scale, dtype)


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_begin_and_end_within_a_block_are_decoded_alone(kind: str, instructions: str) -> None:
    pick = random.Random(1)
    weight = any_blocks(kind, 6, 1280)
    expected = truth(weight)
    for _ in range(25):
        first, row = pick.randrange(1280), pick.randrange(6)
        columns, rows = pick.randint(1, 1280 - first), pick.randint(1, 6 - row)
        out = torch.empty(rows, columns)
        weights.dequantize_into(out, weight, row, first)
        assert same_bits(out, expected[row : row + rows, first : first + columns]), (first, columns)


@pytest.mark.parametrize("kind", KINDS)
def test_a_given_tensor_takes_the_values_in_its_own_type(kind: str) -> None:
    weight = any_blocks(kind, 5, 512)
    for out in (torch.empty(5, 512, dtype=torch.bfloat16), torch.empty(5, 512, dtype=torch.float64)):
        assert kernels.blocks_dequantize(weight, out=out) is out
        assert same_bits(out, truth(weight).to(out.dtype))
    with pytest.raises(ValueError, match="contiguous"):
        kernels.blocks_dequantize(weight, out=torch.empty(512, 5).T)


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_decodes_the_rows_that_are_asked_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = any_blocks(kind, 50, 256)
    asked: list[int] = []
    dequantize = kernels.blocks_dequantize
    monkeypatch.setattr(kernels, "blocks_dequantize", lambda w, dtype: asked.append(w.shape[0]) or dequantize(w, dtype))
    ids = torch.tensor([[3, 49, 0], [3, 7, 7]])
    for dtype in FLOATS:
        assert same_bits(kernels.embedding_rows(weight, ids, dtype), truth(weight)[ids].to(dtype))
    assert asked == [6, 6, 6]
    assert kernels.embedding_rows(weight, ids[:0]).shape == (0, 3, 256)
    with pytest.raises(IndexError):
        kernels.embedding_rows(weight, torch.tensor([50]))


# ---- products -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 17, 200])
def test_products_are_those_with_the_dense_weight(kind: str, rows: int) -> None:
    for outer, inner in ((45, 768), (7, 256), (131, 2560)):
        weight = any_blocks(kind, outer, inner, seed=outer)
        x, dy = randn(rows, inner, seed=1), randn(rows, outer, seed=2)
        assert near(kernels.matmul(x, weight), x, truth(weight).T), (outer, inner)
        assert near(kernels.matmul_t(dy, weight), dy, truth(weight)), (outer, inner)


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_products_without_our_own_matrix_product_are_those_with_the_dense_weight(kind: str, instructions: str) -> None:
    weight = any_blocks(kind, 45, 768)
    wide = randn(20, 780)
    for rows in (1, 2, 9, 16, 20):
        x, dy = wide[:rows, 5:773], randn(rows, 45)  # rows with gaps
        assert near(stored_matmul.matmul(x, weight), x, truth(weight).T), rows
        assert near(stored_matmul.matmul_t(dy, weight), dy, truth(weight)), rows
    x = wide[:3, ::3].repeat(1, 3)[:, :768].bfloat16()
    assert torch.allclose(stored_matmul.matmul(x, weight).float(), x.float() @ truth(weight).T, rtol=2e-2, atol=1e-2)


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_s_bits_do_not_depend_on_its_neighbours(kind: str, instructions: str) -> None:
    for outer, inner in ((43, 1536), (9, 256)):
        weight, x = any_blocks(kind, outer, inner), randn(16, inner)
        whole = stored_matmul.matmul(x, weight)
        for first, last in ((0, 1), (3, 5), (2, 13), (15, 16)):
            assert torch.equal(stored_matmul.matmul(x[first:last], weight), whole[first:last]), (first, last)


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_bfloat16_product_do_not_depend_on_their_neighbours(kind: str) -> None:
    if not kernels.has_bf16_matmul():
        pytest.skip("this processor has no bfloat16 instructions")
    weight, x, dy = any_blocks(kind, 300, 512), randn(40, 512), randn(40, 300)
    dense = truth(weight).bfloat16().float()
    for product, left, right in ((kernels.matmul, x, dense.T), (kernels.matmul_t, dy, dense)):
        whole = product(left, weight, True)
        assert near(whole, left.bfloat16().float(), right)
        assert all(torch.equal(product(left[a:b], weight, True), whole[a:b]) for a, b in ((0, 1), (1, 14), (14, 40)))


@needs_library
def test_the_number_of_threads_changes_no_bit() -> None:
    weight, x, before = any_blocks("q4_k", 150, 1024), randn(40, 1024), torch.get_num_threads()
    results: list[list[Tensor]] = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found = [
                native.blocks_dequantize(weight),
                stored_matmul.matmul(x[:1], weight),
                stored_matmul.matmul(x[:9], weight),
            ]
            results.append([*found, kernels.matmul(x, weight)] if library.get().has_fast_matmul else found)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranges", [[(0, 0, 90)], [(1, 0, 40), (0, 40, 90)]])
def test_adapted_products_and_gradients_are_those_with_the_dense_weight(
    kind: str, ranges: list[tuple[int, int, int]]
) -> None:
    x, dy, weight = randn(90, 256), randn(90, 75, seed=1), any_blocks(kind, 75, 256)
    A, B = [randn(r, 256, seed=r) for r in (8, 33)], [randn(75, r, seed=r + 1) for r in (8, 33)]
    routing = kernels.Routing(ranges, A, B, [2.0, 0.5])
    y, hidden = kernels.lora_linear(x, weight, routing)
    dx, dA, dB = kernels.lora_linear_backward(dy, x, weight, hidden, routing, True)
    expected = x @ truth(weight).T
    kept = reference.low_rank_routed(expected, x, routing)
    slope = dy @ truth(weight)
    tA, tB = reference.low_rank_routed_backward(dy, x, kept, routing, slope)
    assert dx is not None
    for ours, theirs in zip([y, dx, *dA, *dB], [expected, slope, *tA, *tB], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_products_keep_leading_dimensions_and_accept_none(kind: str) -> None:
    weight = any_blocks(kind, 5, 256)
    for lead in ((), (3,), (2, 3), (0,), (2, 0)):
        assert kernels.matmul(torch.ones(*lead, 256), weight).shape == (*lead, 5)
        assert kernels.matmul_t(torch.ones(*lead, 5), weight).shape == (*lead, 256)
    none = GgufBlocks(weight.data[:0], kind)
    assert kernels.dequantize(none).shape == (0, 256)
    assert kernels.matmul(torch.ones(2, 256), none).shape == (2, 0)


@needs_library
def test_a_weight_with_gaps_between_its_rows_is_copied() -> None:
    whole = any_blocks("q6_k", 9, 768)
    part = GgufBlocks(whole.data[:, 210:420], "q6_k")
    dense = truth(whole)[:, 256:512]
    assert same_bits(kernels.dequantize(part), dense)
    for rows in (2, 40):
        x, dy = randn(rows, 256), randn(rows, 9)
        assert near(kernels.matmul(x, part), x, dense.T)
        assert near(kernels.matmul_t(dy, part), dy, dense)
        assert near(stored_matmul.matmul(x, part), x, dense.T)


# ---- without the C kernels, and their checks ----------------------------------------------------------------------


@needs_library
def test_every_kind_is_checked_before_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.usable("blocks_dequantize", torch.zeros(1))
    for kind in KINDS:
        wrong = dict(library.BLOCK_KINDS)
        wrong[kind] = wrong["q4_0" if kind != "q4_0" else "q4_k"]  # as many bytes, or fewer
        monkeypatch.setattr(weights, "BLOCK_KINDS", wrong)
        monkeypatch.setattr(stored_matmul, "BLOCK_KINDS", wrong)
        assert not weights.check_blocks_dequantize(), kind
        assert not stored_matmul.check_matmul(), kind


def test_without_the_library_the_reference_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "usable", lambda operation, tensor: False)
    weight, x = any_blocks("q4_k", 5, 512), randn(3, 512)
    assert same_bits(kernels.dequantize(weight, torch.bfloat16), truth(weight).bfloat16())
    assert near(kernels.matmul(x, weight), x, truth(weight).T)
    assert near(kernels.matmul_t(x[:, :5], weight), x[:, :5], truth(weight))


# ---- all layers of a decoder in one call --------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("kinds", [("q4_k", "q6_k"), ("q4_0", "q8_0"), ("q4_1", "q5_1"), ("q5_0", "q5_k")])
def test_a_decoder_s_layers_give_the_bits_of_the_dense_weights_however_many_rows(
    kinds: tuple[str, str], instructions: str
) -> None:
    """Every sum runs over at most 512 values here: longer ones are cut in other places than those of dense weights."""
    width, inner, heads, rows, positions = 256, 512, 8, 12, 16
    sizes = {"q": (width, width), "k": (64, width), "v": (64, width), "o": (width, width)}
    sizes |= {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    blocks = {n: any_blocks(kinds[i % 2], *s, seed=i, scale=2e-3) for i, (n, s) in enumerate(sizes.items())}
    angles = torch.outer(torch.arange(positions), torch.linspace(1, 0.01, 16)).repeat(1, 2)  # (P, 32)

    def run(weights: dict[str, kernels.Weight], part: slice) -> Tensor:
        keys, values = torch.zeros(rows * positions, 2, 32), torch.zeros(rows * positions, 2, 32)
        layer = kernels.DecoderLayer(
            norm=torch.ones(width), norm_again=torch.ones(width), query_norm=None, key_norm=None,
            linears={name: (weight, None) for name, weight in weights.items()}, keys=keys, values=values, scale=0.2,
        )  # fmt: skip
        stack = kernels.DecoderStack(
            [layer], heads=heads, block=positions, epsilon=1e-6, offset=0.0, gelu=False, last_norm=torch.ones(width),
            cosine=angles.cos(), sine=angles.sin(),
        )  # fmt: skip
        x = randn(rows, width)[part].clone()
        stack.run(x, torch.zeros(len(x), dtype=torch.int64), torch.arange(rows)[part, None].contiguous(), [], [])
        return x

    whole = run(dict(blocks), slice(0, rows))
    assert torch.equal(whole, run({name: truth(weight) for name, weight in blocks.items()}, slice(0, rows)))
    for part in (slice(0, 1), slice(3, 5), slice(2, 11)):
        assert torch.equal(run(dict(blocks), part), whole[part])
