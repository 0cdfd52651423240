"""The Triton kernels without a GPU: their answers in Triton's interpreter.

The interpreter is chosen by an environment variable that triton reads when it is imported: hence a process of its own.
"""

import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def test_triton_kernels_give_the_reference_s_answers_in_the_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "all agree" in done.stdout


def test_on_a_gpu_training_and_serving_go_to_the_kernels_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from graftlm import kernels
    from graftlm.base.modules import stored_matmul
    from graftlm.kernels import native, reference, reference_adamw, triton

    called: list[str] = []

    def stand_in(name: str, truth: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            called.append(name)
            return truth(*arguments)

        return call

    monkeypatch.setattr(native, "usable", lambda operation, tensor: False)
    monkeypatch.setattr(native, "has_fast_matmul", lambda x, bf16_matmul=False: False)
    monkeypatch.setattr(native, "takes", lambda x, bf16_matmul=False: False)
    monkeypatch.setattr(triton, "usable", lambda operation, tensor: True)
    for name in (
        "nf4_dequantize",
        "int8_dequantize",
        "matmul",
        "matmul_t",
        "low_rank_routed",
        "low_rank_routed_backward",
    ):
        monkeypatch.setattr(triton, name, stand_in(name, getattr(reference, name)))
    monkeypatch.setattr(triton, "adamw_step", stand_in("adamw_step", reference_adamw.adamw))
    weight = reference.nf4_quantize(randn(13, 70))
    x, dy = randn(9, 70).requires_grad_(), randn(9, 13)
    with torch.no_grad():
        stored_matmul(x, weight)
    stored_matmul(x, weight).backward(dy)
    assert called == ["matmul", "matmul", "matmul_t"]
    called.clear()
    A, B = [randn(3, 70), randn(5, 70), None], [randn(13, 3), randn(13, 5), None]
    for ranges, expected in (
        ([(0, 0, 4), (1, 4, 8), (2, 8, 9)], ["matmul", "low_rank_routed", "matmul_t", "low_rank_routed_backward"]),
        ([(1, 0, 9)], ["matmul", "matmul_t"]),  # one adapter alone: two plain products
    ):
        with torch.no_grad():
            routing = kernels.Routing(ranges, A, B, [2.0, 0.5, 1.0])
            _, hidden = kernels.lora_linear(x, weight, routing)
            kernels.lora_linear_backward(dy, x, weight, hidden, routing, True)
        assert called == expected
        called.clear()
    for eight_bit in (True, False):
        moments = kernels.zero_moments(13, eight_bit=eight_bit, device=dy.device)
        update = kernels.update_of(1, 0.1, beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.1, key=(1,))
        kernels.adamw_step(dy[0].clone(), dy[1], moments, update)
    kernels.nf4_dequantize(weight)
    assert called == ["adamw_step", "adamw_step", "nf4_dequantize"]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(a: torch.Tensor, b: torch.Tensor, what: object) -> None:
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[a.dtype]
    assert a.shape == b.shape
    assert float((a.float() - b.float()).norm()) <= tolerance * float(b.float().norm()) + 1e-6, (what, a.dtype)


def stored_weights() -> None:
    from graftlm.kernels import reference, triton
    from graftlm.kernels.triton.device import agree

    pick = random.Random(1)
    for round_ in range(6):
        outer, inner = pick.randint(2, 70), [64, 320, 1, 65, 576, pick.randint(1, 300)][round_]
        whole = reference.nf4_quantize(randn(outer, inner, seed=round_))
        weight = whole.narrow(1, outer - 1)
        small = reference.int8_quantize(randn(outer, inner, seed=round_))
        for dtype in FLOATS:
            assert agree(triton.nf4_dequantize(weight, dtype), reference.nf4_dequantize(weight, dtype))
            assert agree(triton.int8_dequantize(small, dtype), reference.int8_dequantize(small, dtype))
        rows, dtype = pick.randint(1, 18), FLOATS[round_ % 3]
        x, dy = randn(rows, 2 * inner, dtype=dtype)[:, ::2], randn(rows, outer - 1, dtype=dtype)
        dense = reference.nf4_dequantize(weight, dtype).float()
        assert_close(triton.matmul(x, weight), (x.float() @ dense.T).to(dtype), (rows, outer, inner))
        assert_close(triton.matmul_t(dy, weight), (dy.float() @ dense).to(dtype), (rows, outer, inner))
        assert_close(triton.matmul(randn(rows, inner), small), reference.matmul(randn(rows, inner), small), "int8")


def stored_blocks() -> None:
    from graftlm.kernels import reference, triton
    from graftlm.kernels.reference_blocks import sample_blocks
    from graftlm.kernels.stored import BLOCK_SIZES
    from graftlm.kernels.triton.device import agree

    pick = random.Random(4)
    for round_, kind in enumerate(BLOCK_SIZES):
        outer, inner = pick.randint(2, 40), 256 * pick.randint(1, 2)
        weight = sample_blocks(kind, outer, inner).narrow(1, outer - 1)
        for dtype in FLOATS:
            assert agree(triton.blocks_dequantize(weight, dtype), reference.dequantize(weight, dtype)), (kind, dtype)
        rows, dtype = pick.randint(1, 18), FLOATS[round_ % 3]
        x, dy = randn(rows, 2 * inner, dtype=dtype)[:, ::2], randn(rows, outer - 1, dtype=dtype)
        dense = reference.dequantize(weight, dtype).float()
        assert_close(triton.matmul(x, weight), (x.float() @ dense.T).to(dtype), (kind, rows, outer, inner))
        assert_close(triton.matmul_t(dy, weight), (dy.float() @ dense).to(dtype), (kind, rows, outer, inner))


def routed() -> None:
    from graftlm.kernels import reference, triton
    from graftlm.kernels.routing import Routing

    pick = random.Random(2)
    Routed = Callable[..., Sequence[torch.Tensor | None]]
    for round_ in range(4):
        dtype = FLOATS[round_ % 3]
        inner, outer, pairs = pick.randint(1, 150), pick.randint(1, 150), 5
        ranks = [pick.choice([1, 3, 16, 17, 40]) for _ in range(pairs)]
        A = [None, *(randn(r, inner, dtype=dtype, seed=r) for r in ranks)]
        B = [None, *(randn(outer, r, dtype=dtype, seed=r + 1) for r in ranks)]
        scale = [1.0] + [0.5 + i for i in range(pairs)]
        cuts = sorted(pick.randint(0, 90) for _ in range(12))
        ranges = [(pick.randint(0, pairs), cuts[i], cuts[i + 1]) for i in range(11)]
        x, dy = randn(95, inner, dtype=dtype, seed=3), randn(95, outer, dtype=dtype, seed=4)
        outcomes: list[list[torch.Tensor | None]] = []
        forwards: list[Routed] = [triton.low_rank_routed, reference.low_rank_routed]
        for forward, backward, as_type in zip(
            forwards, [triton.low_rank_routed_backward, reference.low_rank_routed_backward], [dtype, torch.float32]
        ):
            y, dx = randn(95, outer, seed=5).to(as_type), randn(95, inner, seed=6).to(as_type)
            routing = Routing(ranges, A, B, scale)
            hidden = forward(y, x.to(as_type), routing)
            dA, dB = backward(dy.to(as_type), x.to(as_type), hidden, routing, dx)
            if forward is reference.low_rank_routed:  # the GPU's h has the scale in it
                hidden = [
                    h if h is None else h * scale[factor_index] for h, (factor_index, _, _) in zip(hidden, ranges)
                ]
            outcomes.append([y, dx, *hidden, *dA, *dB])
        for ours, truth in zip(*outcomes, strict=True):
            assert (ours is None) == (truth is None)
            if ours is not None and truth is not None:
                assert_close(ours, truth.to(ours.dtype), (round_, ours.shape))


def attention_over_blocks() -> None:
    """Heads of any number and width, pasts in any number of parts, tokens anywhere in q."""
    from graftlm.kernels import reference, triton
    from graftlm.kernels.native.rows import DecodeAttention

    pick = random.Random(7)
    for round_ in range(6):
        dtype, K = FLOATS[round_ % 3], pick.randint(1, 3)
        H, D, V, block = (
            K * pick.choice([1, 3, 17]),
            pick.choice([1, 40, 64]),
            pick.choice([7, 64]),
            pick.choice([1, 16]),
        )
        n, T, most = pick.randint(1, 3), 5, 300 // block
        visible = torch.tensor([pick.choice([1, most * block, pick.randint(1, most * block)]) for _ in range(n)])
        table = torch.randperm(n * most, generator=torch.Generator().manual_seed(round_)).view(n, most)
        keys, values = randn(n * most * block, K, D, dtype=dtype), randn(n * most * block, K, V, dtype=dtype, seed=1)
        q, chosen = randn(H, T, D, dtype=dtype, seed=2).transpose(0, 1), torch.randperm(T)[:n]
        out = torch.full((T, H, V), 7.0, dtype=dtype)
        expected = out.float()
        options = {"scale": 0.37, "window": pick.choice([0, 9, 200]), "softcap": pick.choice([0.0, 1.5])}
        of = DecodeAttention(chosen, visible, table, block)
        triton.paged.attend_rows(q, keys, values, out, of, splits=pick.choice([1, 2, 8]), **options)
        reference.attend_rows(
            q.float(),
            keys.float(),
            values.float(),
            expected,
            rows=chosen,
            visible=visible,
            table=table,
            block=block,
            **options,
        )
        assert_close(out, expected.to(dtype), (round_, H, K, D, V, block, options))
    assert triton.paged.splits_of(1, 8) == 16
    assert triton.paged.splits_of(128, 8) == 1


def optimizer() -> None:
    from graftlm.kernels import reference_adamw as reference
    from graftlm.kernels import triton
    from graftlm.kernels.moments import Moments, zero_moments

    pick = random.Random(3)
    for round_ in range(12):
        count, dtype = pick.choice([1, 255, 256, 257, pick.randint(258, 4000)]), FLOATS[round_ % 2]
        kind, eight_bit = pick.choice(FLOATS), round_ % 4 > 1
        ours = randn(count, seed=round_).to(dtype)
        truth = ours.clone()
        mine, theirs = (zero_moments(count, eight_bit=eight_bit, device=ours.device) for _ in range(2))
        for number in range(1, 4):
            wild = randn(count, seed=number) * 10 ** (2 * randn(count, seed=number + 1))
            slope = wild.masked_fill_(randn(count, seed=number + 2) < -0.4, 0)
            slope = slope.clamp_(-3e4, 3e4).to(kind)  # float16 ends at 65504
            gradient = torch.stack([slope, slope], dim=1)[:, 0] if round_ % 3 else slope  # with gaps, or without
            update = reference.update_of(
                number, 0.01, beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.1, factor=0.37, key=(round_, "w", number)
            )  # fmt: skip
            if round_ % 2:
                triton.adamw_step(ours, gradient, mine, update)
            else:  # a slab at a time, as moments on the host come
                for first in range(0, count, 512):
                    part = reference.moments_of(mine, first, min(first + 512, count))
                    own = slice(first, first + 512)
                    triton.adamw._launch(ours[own], gradient[own], Moments(**part.tensors()), update, first)
            reference.adamw(truth, gradient, theirs, update)
            pairs = [(ours, truth), *((t, theirs.tensors()[name]) for name, t in mine.tensors().items())]
            for a, b in pairs:
                assert torch.equal(a, b), (round_, count, dtype, kind, eight_bit, number)


def dropped() -> None:
    from graftlm.kernels import counter_rng, triton
    from graftlm.kernels.triton.device import agree

    pick = random.Random(5)
    for round_ in range(6):
        rows, features, dropout = (
            pick.randint(1, 40),
            pick.choice([1, 1024, 1025, pick.randint(2, 3000)]),
            pick.random(),
        )
        x = randn(rows, 2 * features, dtype=FLOATS[round_ % 3], seed=round_)[:, : features * 2 : 1 + round_ % 2]
        keys = torch.randint(-(1 << 31), 1 << 31, (rows,), dtype=torch.int32)
        given = keys, pick.randint(0, 1 << 31), dropout
        assert agree(triton.dropped(x, *given), counter_rng.dropped(x, *given)), (round_, rows, features)


def cross_entropy() -> None:
    from graftlm.kernels import reference_fused as reference
    from graftlm.kernels import triton

    pick = random.Random(6)
    for round_ in range(6):
        rows, columns = pick.randint(1, 9), pick.choice([1, 2, 100, 8192, pick.randint(8193, 17000)])
        x = (
            5
            * randn(rows, 2 * columns, seed=round_)[:, : columns * 2 : 1 + round_ % 2].to(FLOATS[round_ % 3])[
                :, :columns
            ]
        )
        x[0, columns // 2 :] = float("-inf")  # a grammar's mask
        labels, weights = torch.randint(0, (columns + 1) // 2, (rows,)), randn(rows, seed=round_ + 1)
        ours, theirs, before = x.clone(), x.clone(), x.clone()
        losses = triton.cross_entropy_in_place(ours, labels, weights)
        assert_close(losses, reference.cross_entropy_in_place(theirs, labels, weights), (round_, columns))
        assert_close(ours, theirs, (round_, rows, columns))
        assert torch.equal(triton.cross_entropy_in_place(x, labels, None), losses)
        assert torch.equal(x, before)
    bad = randn(3, 20)
    bad[1, 3] = float("nan")
    assert triton.cross_entropy_in_place(bad, torch.tensor([0, 1, 2]), None).isfinite().tolist() == [True, False, True]


def fused_operations() -> None:
    """Shapes that the check before first use has not: a program with several rows after each other, one row, wide rows."""
    from graftlm.kernels import reference_fused as reference
    from graftlm.kernels import triton

    before = triton.fused.NORM_PROGRAMS
    for rows, features, most in ((70, 64, 2), (5, 2500, 2), (1, 3, 9)):
        triton.fused.NORM_PROGRAMS = most
        x, dy, w = randn(rows, features), randn(rows, features, seed=1), randn(features, seed=2)
        y, r = triton.fused.rms_norm(x, w, 1e-6, 1.0)
        wanted_y, wanted_r = reference.rms_norm(x, w, 1e-6, 1.0)
        assert_close(y, wanted_y, (rows, features))
        assert_close(r, wanted_r, (rows, features))
        dx, dw = triton.fused.rms_norm_backward(dy, x, w, r, 1.0, True)
        alone, none = triton.fused.rms_norm_backward(dy, x, w, r, 1.0, False)
        wanted_dx, wanted_dw = reference.rms_norm_backward(dy, x, w, r, 1.0, True)
        assert dw is not None
        assert wanted_dw is not None
        assert none is None
        assert torch.equal(dx, alone)
        assert_close(dx, wanted_dx, (rows, features))
        assert_close(dw, wanted_dw, (rows, features))
    triton.fused.NORM_PROGRAMS = before
    given = randn(3, 8)
    dgate, dup = triton.fused.gated_backward(randn(3, 4, seed=1), *given.chunk(2, dim=1), "silu")
    assert dgate._base is dup._base is not None  # halves of one tensor, as gate and up are
    (alone,) = triton.fused.rotary([randn(7, 3, 10)], *(randn(7, 10, seed=s) for s in (1, 2)), False)
    assert_close(alone, reference.rotary(randn(7, 3, 10), *(randn(7, 10, seed=s) for s in (1, 2))), "one part")


def own_checks() -> None:
    from graftlm.kernels import triton

    for operation in triton.self_check.operations:
        assert triton.self_check.allows(operation, torch.device("cpu")), triton.self_check.reason


if __name__ == "__main__":
    own_checks()
    stored_weights()
    stored_blocks()
    routed()
    attention_over_blocks()
    optimizer()
    dropped()
    cross_entropy()
    fused_operations()
    print("all agree")
