"""The attention of serving on a GPU, run on the CPU: the reference's answers, in whatever groups sequences are taken."""

from __future__ import annotations

import inspect
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from graftlm import kernels
from graftlm.base.attention import causal
from graftlm.kernels import gpu_attention, gpu_paged, reference


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


def test_with_block_tables_single_tokens_are_read_from_their_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in that does what PyTorch's page says of `varlen_attn`: no CPU has it."""
    assert "block_table" in inspect.signature(varlen_attn).parameters

    def stand_in(
        q: Tensor, k: Tensor, v: Tensor, ends: Tensor, ends_k: None, max_q: int, max_k: int, *, scale: float,
        window_size: tuple[int, int], enable_gqa: bool, seqused_k: Tensor, block_table: Tensor,
    ) -> Tensor:  # fmt: skip
        assert ends.dtype == seqused_k.dtype == block_table.dtype == torch.int32
        assert ends.tolist() == list(range(len(q) + 1))
        assert max_k == max(seqused_k.tolist())
        assert enable_gqa == (q.shape[1] != k.shape[2])
        answers: list[Tensor] = []
        for query, used, blocks in zip(q, seqused_k.tolist(), block_table.tolist()):
            first = 0 if window_size[0] < 0 else max(0, used - 1 - window_size[0])
            keys, values = (t[blocks].flatten(0, 1)[first:used].transpose(0, 1)[None] for t in (k, v))  # (1, K, M, D)
            answers.append(
                F.scaled_dot_product_attention(query[None, :, None], keys, values, scale=scale, enable_gqa=True)[0]
            )
        return torch.cat([answer.transpose(0, 1) for answer in answers])

    monkeypatch.setattr(gpu_paged, "_call", lambda: stand_in)
    assert gpu_paged.check(torch.device("cpu"))
    q, keys, out = randn(2, 4, 8).bfloat16(), randn(32, 2, 8, seed=1).bfloat16(), torch.zeros(2, 4, 8).bfloat16()
    assert not gpu_paged.usable(q, keys, keys, 0.0)  # nothing is activated
    monkeypatch.setattr(gpu_paged, "_activated", lambda: "FA3")
    assert not gpu_paged.usable(q.float(), keys, keys, 0.0)
    assert not gpu_paged.usable(q, keys, keys, 2.0)
    rows, visible, table = torch.tensor([0, 1]), torch.tensor([9, 3]), torch.tensor([[1, 0], [0, 1]])
    of = kernels.DecodeAttention(rows, visible, table, 16, (9, 3))
    gpu_attention.attend_rows(q, keys, keys, out, of, scale=0.3)
    assert "paged" in of.kept


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(1, 120))
def test_groups_take_every_sequence_once_and_stay_within_the_bound(lengths: list[int], most: int) -> None:
    groups = gpu_attention.group_bounds(lengths, most)
    assert [i for first, last in groups for i in range(first, last)] == list(range(len(lengths)))
    for first, last in groups:
        assert last - first == 1 or max(lengths[first:last]) * (last - first) <= most
