"""Attention over segments against the formula, written out for each example."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graftlm.base.attention import may_pack, segment_attention
from graftlm.base.context import ForwardContext
from graftlm.segments import Segments

H, K, D = 6, 2, 5  # heads, key-value heads, head width


def by_the_formula(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """q (H, L, D), k and v (K, L, D) of one example -> (L, H, D), token by token."""
    out = torch.zeros(q.shape[1], H, D, dtype=q.dtype)
    for head in range(H):
        for t in range(q.shape[1]):
            first = 0 if window is None else max(0, t - window + 1)
            keys, values = (x[head // (H // K), first : t + 1] for x in (k, v))  # (seen, D)
            scores = keys @ q[head, t] * scale  # (seen,)
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            out[t, head] = torch.softmax(scores, 0) @ values
    return out


def random(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, tokens, D, generator=generator, dtype=torch.float64) for heads in (H, K, K))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from([None, 1, 3, 8, 50]),
    st.sampled_from([None, 0.7]), st.sampled_from([None, 0.3]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_each_example_attends_to_its_own_past(
    lengths: list[int], window: int | None, softcap: float | None, scaling: float | None
) -> None:
    q, k, v = random(sum(lengths))
    segments = Segments(lengths=tuple(lengths), slots=(0,) * len(lengths))
    scale = 1 / math.sqrt(D) if scaling is None else scaling
    with ForwardContext(segments):
        found, weights = segment_attention(None, q, k, v, None, scaling, 0.0, window, softcap)
    assert weights is None
    parts = [
        by_the_formula(q[0, :, a : a + n], k[0, :, a : a + n], v[0, :, a : a + n], scale, window, softcap)
        for a, n in zip(segments.starts, lengths, strict=True)
    ]
    expected = torch.cat(parts)[None]  # (1, T, H, D)
    tolerance = 1e-6 if softcap is not None else 1e-12  # a soft cap's softmax runs in float32
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    back = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((y * back).sum(), (q, k, v), retain_graph=True) for y in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=100 * tolerance, atol=100 * tolerance)


def test_no_gradient_crosses_from_one_example_into_another_or_into_the_past() -> None:
    q, k, v = random(12)
    with ForwardContext(Segments(lengths=(4, 4, 4), slots=(0, 0, 0))):
        y, _ = segment_attention(None, q, k, v, None)
    for gradient in torch.autograd.grad(y[0, 6].sum(), (k, v)):
        touched = gradient.abs().sum((0, 1, 3)) > 0  # (T,)
        assert touched.nonzero().flatten().tolist() == [4, 5, 6]


def model(leak: str = "") -> tuple[object, object]:
    """A one-layer stand-in: a running mean of embeddings over each example, with one fault of choice."""
    table = torch.randn(19, 7, generator=torch.Generator().manual_seed(3))

    def mean(ids: Tensor) -> Tensor:
        rows = table[ids]
        return rows.cumsum(0) / torch.arange(1, len(rows) + 1)[:, None]

    def own(ids: Tensor) -> Tensor:
        return mean(ids[0])

    def packed(ids: Tensor, segments: Segments) -> Tensor:
        parts = ids[0].split(segments.lengths)
        if leak == "neighbour":
            return mean(ids[0])
        if leak == "future":
            return torch.cat([mean(p) + 0.01 * table[p.roll(-1)] for p in parts])
        if leak == "scale":
            return torch.cat([1.01 * mean(p) for p in parts])
        if leak == "error":
            raise KeyError("graft_segments")
        if leak == "nan":
            return torch.cat([mean(p) for p in parts]) * float("nan")
        return torch.cat([mean(p) for p in parts])

    return own, packed


@pytest.mark.parametrize(
    ("leak", "words"),
    [("neighbour", "neighbour"), ("future", "change"), ("scale", "change"), ("error", "KeyError"), ("nan", "change")],
)
def test_a_model_that_fails_a_check_may_not_pack(leak: str, words: str) -> None:
    passed, why = may_pack(*model(leak), 19)  # type: ignore[arg-type]
    assert not passed
    assert words in why


def test_a_model_that_passes_the_checks_may_pack() -> None:
    assert may_pack(*model(), 19) == (True, "")  # type: ignore[arg-type]
