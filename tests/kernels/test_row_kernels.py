"""What decoding runs on, against the reference, on every instruction set: and no row knows its neighbours."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from graftlm import kernels
from graftlm.kernels import native, reference
from graftlm.kernels.native import rows

pytestmark = pytest.mark.skipif(
    "without" in native.status(), reason="the C kernels are not compiled (pip install -e . with a C compiler)"
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= 1e-5 * b.norm() + 1e-30)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_few_rows_times_a_dense_weight(instructions: str, kind: torch.dtype) -> None:
    pick = random.Random(2)
    for round_ in range(40):
        outer, inner, count = (
            pick.randint(1, 70),
            pick.choice([1, 15, 16, 576, pick.randint(1, 3000)]),
            pick.randint(1, 16),
        )
        W = randn(outer, inner, seed=round_).to(kind)
        wide = randn(count, inner + 3, seed=round_ + 1)
        x = pick.choice([wide[:, :inner].contiguous(), wide[:, 3:]])
        y = native.matmul(x, W)
        assert close(y, x @ W.float().T), (outer, inner, count)
        for i in range(count):
            assert torch.equal(native.matmul(x[i : i + 1], W)[0], y[i]), "a row's bits do not depend on its neighbours"


def test_each_range_its_own_adapter(instructions: str) -> None:
    pick = random.Random(3)
    for round_ in range(40):
        inner, outer = pick.randint(1, 90), pick.randint(1, 90)
        ranges: list[tuple[int, int]] = []
        factors: list[kernels.Factors] = []
        at = 0
        for i in range(pick.randint(1, 6)):
            at += pick.randint(0, 2)
            last = at + pick.randint(1, 20)
            kind = pick.choice([torch.float32, torch.bfloat16])
            r = pick.choice([1, 3, 16, 33, 70])
            A, B = randn(r, inner, seed=i).to(kind), randn(r, outer, seed=i + 9).to(kind).T
            ranges.append((at, last))
            factors.append(kernels.Factors(A, B, 0.3 + i))
            at = last
        x, y = randn(at + 1, inner, seed=round_), randn(at + 1, outer, seed=round_ + 1)
        expected = y.clone()
        A, B = ([getattr(f, side).float() for f in factors] for side in "AB")
        routed = [(i, a, b) for i, (a, b) in enumerate(ranges)]
        reference.low_rank_routed(expected, x, kernels.Routing(routed, A, B, [f.scale for f in factors]))
        assert all(f.ready for f in factors)
        before = y.clone()
        kernels.add_routed(y, x, kernels.DecodeRouting(ranges, factors))
        assert close(y, expected)
        (first, last), one = ranges[0], factors[0]
        alone = before[first : first + 1].clone()
        kernels.add_routed(alone, x[first : first + 1], kernels.DecodeRouting([(0, 1)], [one]))
        assert torch.equal(alone[0], y[first])


def test_factors_that_lie_otherwise_go_to_the_reference() -> None:
    A, B = randn(3, 20), randn(11, 3)
    assert not kernels.Factors(A, B, 1.5).ready
    assert not kernels.Factors(A.half(), B.half().T.contiguous().T, 1.5).ready
    assert kernels.Factors(A, B.T.contiguous().T, 1.5).ready


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 0.0), (0, 2.0), (7, 1.5)])
def test_attention_of_single_tokens_over_blocks(instructions: str, window: int, softcap: float) -> None:
    pick = random.Random(4)
    for round_ in range(15):
        K = pick.randint(1, 4)
        H, D, V, block = (
            K * pick.choice([1, 3, 9]),
            pick.choice([1, 10, 64]),
            pick.choice([7, 64]),
            pick.choice([1, 4, 16]),
        )
        n, T = pick.randint(1, 6), 9
        most = 5
        visible = torch.tensor([pick.randint(1, most * block) for _ in range(n)])
        table = torch.randperm(40, generator=torch.Generator().manual_seed(round_))[: n * most].view(n, most)
        keys, values = randn(40 * block, K, D), randn(40 * block, K, V, seed=1)
        q = randn(H, T, D, seed=2).transpose(0, 1)  # as a model hands it over: heads apart
        chosen = torch.randperm(T)[:n]
        out, expected = torch.full((T, H, V), 7.0), torch.full((T, H, V), 7.0)
        options = {"scale": 0.37, "window": window, "softcap": softcap}
        kernels.attend_rows(q, keys, values, out, kernels.DecodeAttention(chosen, visible, table, block), **options)
        reference.attend_rows(
            q, keys, values, expected, rows=chosen, visible=visible, table=table, block=block, **options
        )
        assert close(out, expected)


def test_large_scores_do_not_overflow(instructions: str) -> None:
    keys, values = randn(32, 1, 16) * 40, randn(32, 1, 16, seed=1)
    q = randn(2, 1, 16, seed=2) * 40
    of = kernels.DecodeAttention(torch.tensor([0, 1]), torch.tensor([32, 20]), torch.tensor([[0, 1], [0, 1]]), 16)
    out, expected = torch.empty(2, 1, 16), torch.empty(2, 1, 16)
    kernels.attend_rows(q, keys, values, out, of, scale=1.0)
    reference.attend_rows(
        q, keys, values, expected, rows=of.rows, visible=of.visible, table=of.table, block=16, scale=1.0
    )
    assert close(out, expected)


def test_without_the_library_the_reference_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "self_check", native.new_self_check())
    monkeypatch.setitem(native.self_check._checks, "rows", lambda _: False)  # type: ignore[index]
    with pytest.warns(RuntimeWarning, match="rows does not give the reference's answer"):
        assert not kernels.is_few_rows(randn(2, 5))
    x, y = randn(4, 20), torch.zeros(4, 11)
    f = kernels.Factors(randn(3, 20, seed=1), randn(3, 11, seed=2).T, 0.5)
    kernels.add_routed(y, x, kernels.DecodeRouting([(1, 3)], [f]))
    assert close(y[1:3], 0.5 * x[1:3] @ f.A.T @ f.B.T)


def test_the_check_before_first_use_passes_and_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows.check()

    class Wrong:
        graft_dense_rows = staticmethod(lambda *a: None)
        graft_routed_rows = staticmethod(lambda *a: 0)
        graft_attend_rows = staticmethod(lambda *a: 0)

    monkeypatch.setattr(rows, "calls", Wrong)
    assert not rows.check()
