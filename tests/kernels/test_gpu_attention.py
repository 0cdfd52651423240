"""The attention of serving on a GPU, run on the CPU: the reference's answers, in whatever groups sequences are taken."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graftlm import kernels
from graftlm.base.attention import causal
from graftlm.kernels import gpu_attention, reference


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 0.0), (0, 2.0), (7, 1.5)])
@pytest.mark.parametrize("most_values", [1, 3000, 1 << 26])
def test_single_tokens_get_the_reference_s_attention_in_any_groups(
    window: int, softcap: float, most_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_attention, "MOST_VALUES", most_values)
    pick = random.Random(4)
    for round_ in range(6):
        K = pick.randint(1, 4)
        H, D, V, block = K * pick.choice([1, 3, 9]), pick.choice([1, 10]), pick.choice([7, 64]), pick.choice([1, 4, 16])
        n, T, most = pick.randint(1, 6), 9, 5
        lengths = [pick.randint(1, most * block) for _ in range(n)]
        visible = torch.tensor(lengths)
        table = torch.randperm(40, generator=torch.Generator().manual_seed(round_))[: n * most].view(n, most)
        keys, values = randn(40 * block, K, D), randn(40 * block, K, V, seed=1)
        q = randn(H, T, D, seed=2).transpose(0, 1)
        chosen = torch.randperm(T)[:n]
        out, expected = torch.full((T, H, V), 7.0), torch.full((T, H, V), 7.0)
        options = {"scale": 0.37, "window": window, "softcap": softcap}
        of = kernels.DecodeAttention(chosen, visible, table, block, lengths)
        for _ in range(2):  # a second layer uses what the first has made
            gpu_attention.attend_rows(q, keys, values, out, of, **options)
            reference.attend_rows(
                q, keys, values, expected, rows=chosen, visible=visible, table=table, block=block, **options
            )
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("most_values", [1, 500, 1 << 26])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 2.0), (4, 1.5)])
@pytest.mark.parametrize(("length", "total"), [(7, 7), (1, 7), (1, 1), (4, 11)])
@pytest.mark.parametrize("scale", [None, 0.37])
def test_the_last_queries_of_a_text_get_causal_attention(
    length: int, total: int, window: int | None, softcap: float | None, scale: float | None, most_values: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(gpu_attention, "MOST_VALUES", most_values)
    q, k, v = randn(2, 6, length, 10), randn(2, 2, total, 10, seed=1), randn(2, 2, total, 14, seed=2)
    for dtype in (torch.float32, torch.float64):  # in the second, heads are shared by PyTorch where nothing is masked
        found = gpu_attention.causal(q.to(dtype), k.to(dtype), v.to(dtype), scale, window, softcap)
        expected = causal(q, k, v, 3, scale, window, softcap)
        torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-5)


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(1, 120))
def test_groups_take_every_sequence_once_and_stay_within_the_bound(lengths: list[int], most: int) -> None:
    groups = gpu_attention.group_bounds(lengths, most)
    assert [i for first, last in groups for i in range(first, last)] == list(range(len(lengths)))
    for first, last in groups:
        assert last - first == 1 or max(lengths[first:last]) * (last - first) <= most
