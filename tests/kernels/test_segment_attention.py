"""Our attention over segments: equal to a softmax written out, forward and backward, for every length, head and window."""

from __future__ import annotations

from itertools import accumulate

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graftlm import kernels
from graftlm.kernels import native, reference


def heads(count: int, tokens: int, width: int, seed: int) -> Tensor:
    """(T, heads, width) as models hand it over: heads outermost in memory."""
    return torch.randn(count, tokens, width, generator=torch.Generator().manual_seed(seed)).transpose(0, 1)


def test_the_reference_equals_pytorchs_attention_and_its_gradients() -> None:
    q, k, v = (heads(n, 37, 16, n).requires_grad_() for n in (4, 2, 2))
    whole = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(0, 1) for t in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(0, 1)
    slope = heads(4, 37, 16, 9)
    whole.backward(slope)
    with torch.no_grad():
        out, sums = reference.attention(q, k, v, (0, 37), 0.25, 0)
        found = reference.attention_backward(slope, q, k, v, out, sums, (0, 37), 0.25, 0)
    torch.testing.assert_close(out, whole.detach(), rtol=1e-5, atol=1e-6)
    for ours, tensor in zip(found, (q, k, v)):
        torch.testing.assert_close(ours, tensor.grad, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5), kv_heads=st.integers(1, 3), group=st.integers(1, 3),
    width=st.sampled_from((16, 48, 64, 128)), window=st.sampled_from((0, 1, 5, 33)), seed=st.integers(0, 9),
)  # fmt: skip
def test_every_instruction_set_gives_the_references_answer(
    lengths: list[int], kv_heads: int, group: int, width: int, window: int, seed: int
) -> None:
    ends = (0, *accumulate(lengths))
    tokens, scale = ends[-1], width**-0.5
    q, k, v, slope = (
        heads(n, tokens, width, seed + n) for n in (kv_heads * group, kv_heads, kv_heads, kv_heads * group)
    )
    truth, kept = reference.attention(q, k, v, ends, scale, window)
    wanted = reference.attention_backward(slope, q, k, v, truth, kept, ends, scale, window)
    try:
        for name in native.instruction_sets():
            native.choose(name)
            out, sums = native.attention(q, k, v, ends, scale, window)
            found = native.attention_backward(slope, q, k, v, out, sums, ends, scale, window)
            for ours, other in zip((out, sums, *found), (truth, kept, *wanted)):
                assert (ours - other).norm() <= 1e-5 * (other.norm() + slope.norm())  # gradients cancel
    finally:
        native.choose(None)


def test_the_number_of_threads_changes_no_bit(instructions: str) -> None:
    ends = (0, 3, 40, 41, 100)
    q, k, v, slope = (heads(n, 100, 32, n) for n in (4, 2, 2, 4))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            out, sums = native.attention(q, k, v, ends, 0.2, 0)
            found.append((out, sums, *native.attention_backward(slope, q, k, v, out, sums, ends, 0.2, 0)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_scores_far_beyond_the_range_of_exponentials_stay_finite(instructions: str) -> None:
    q, k, v = (1e3 * heads(2, 30, 16, n) for n in (1, 2, 3))
    out, sums = native.attention(q, k, v, (0, 30), 1.0, 0)
    truth, _ = reference.attention(q, k, v, (0, 30), 1.0, 0)
    assert bool(torch.isfinite(out).all() and torch.isfinite(sums).all())
    torch.testing.assert_close(out, truth, rtol=1e-4, atol=1e-2)


def test_widths_and_types_that_c_does_not_take_go_to_pytorch() -> None:
    assert not kernels.has_segment_attention(torch.zeros(4, 2, 20))
    assert not kernels.has_segment_attention(torch.zeros(4, 2, 32, dtype=torch.bfloat16))
