"""The fused elementwise operations: the reference against autograd, the C kernels against the reference."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm import kernels
from graftlm.kernels import native
from graftlm.kernels import reference_fused as reference
from graftlm.kernels.reference_fused import GATES, Gate

TYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}  # of the result's norm

needs_library = pytest.mark.skipif(
    "without" in native.status(), reason="the C kernels are not compiled (pip install -e . with a C compiler)"
)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(3.0).to(dtype)


def odd_view(tensor: Tensor) -> Tensor:
    """The same values one element after an aligned address."""
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)


def spread(tensor: Tensor) -> Tensor:
    """The same values as a view with gaps in its last dimension."""
    wide = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] * 2)
    wide[..., ::2] = tensor
    return wide[..., ::2]


LAYOUTS: list[Callable[[Tensor], Tensor]] = [lambda t: t, odd_view, spread]


def close(found: Any, wanted: Any) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).norm() <= TOLERANCE[a.dtype] * b.double().norm() + 1e-30


def plain_norm(x: Tensor, w: Tensor, epsilon: float, offset: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * (w + offset)


# ---- the reference ---------------------------------------------------------------------------------------------------


def test_the_references_norm_and_its_gradients_are_autograds() -> None:
    x, w, dy = randn(7, 19).requires_grad_(), randn(19, seed=1).requires_grad_(), randn(7, 19, seed=2)
    y, r = reference.rms_norm(x, w, 0.3, 1.0)
    truth = plain_norm(x, w, 0.3, 1.0)
    dx, dw = reference.rms_norm_backward(dy, x.detach(), w.detach(), r.detach(), 1.0, True)
    close([y, dx, dw], [truth, *torch.autograd.grad(truth, (x, w), dy)])
    assert reference.rms_norm_backward(dy, x, w, r, 1.0, False)[1] is None


@pytest.mark.parametrize("kind", GATES)
def test_the_references_gated_activation_and_its_gradients_are_autograds(kind: Gate) -> None:
    g, u, dy = randn(7, 19).requires_grad_(), randn(7, 19, seed=1).requires_grad_(), randn(7, 19, seed=2)
    truth = (F.silu(g) if kind == "silu" else F.gelu(g, approximate="tanh")) * u
    found = [reference.gated(g, u, kind), *reference.gated_backward(dy, g.detach(), u.detach(), kind)]
    close(found, [truth, *torch.autograd.grad(truth, (g, u), dy)])


@pytest.mark.parametrize("turned", [12, 8])
def test_the_references_rotation_and_its_gradient_are_autograds(turned: int) -> None:
    x, c, s = randn(6, 3, 12).requires_grad_(), randn(3, turned, seed=1), randn(3, turned, seed=2)
    half, dy = turned // 2, randn(6, 3, 12, seed=3)
    rows = torch.arange(6) % 3
    cos, sin = c[rows][:, None], s[rows][:, None]
    a, b, rest = x[..., :half], x[..., half:turned], x[..., turned:]
    truth = torch.cat(
        (a * cos[..., :half] - b * sin[..., :half], b * cos[..., half:] + a * sin[..., half:], rest), dim=-1
    )
    close(
        [reference.rotary(x, c, s), reference.rotary_backward(dy, c, s)], [truth, *torch.autograd.grad(truth, (x,), dy)]
    )


def test_a_rotation_by_angles_is_undone_by_its_backward() -> None:
    x, angle = randn(5, 2, 8), randn(5, 4, seed=1).repeat(1, 2)
    turned = reference.rotary(x, angle.cos(), angle.sin())
    close([reference.rotary_backward(turned, angle.cos(), angle.sin())], [x])


def test_the_references_cross_entropy_and_its_gradient_are_pytorchs() -> None:
    logits, labels, weights = randn(7, 19), torch.arange(7) * 2, randn(7, seed=1)
    own = logits.clone().requires_grad_()
    truth = F.cross_entropy(own, labels, reduction="none")
    (gradient,) = torch.autograd.grad((truth * weights).sum(), own)
    losses = reference.cross_entropy_in_place(logits, labels, weights)
    close([losses, logits], [truth, gradient])


# ---- the C kernels ---------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("dtype", TYPES)
def test_norms_equal_the_reference(instructions: str, dtype: torch.dtype) -> None:
    for i, (rows, n) in enumerate(((1, 1), (3, 15), (65, 64), (130, 97), (2, 1030))):
        x, dy = (LAYOUTS[(i + seed) % 3](randn(rows, n, dtype=dtype, seed=seed)) for seed in (1, 2))
        w = randn(n, dtype=dtype if i % 2 else torch.float32, seed=3)
        y, r = kernels.rms_norm(x, w, 1e-3, float(i % 2))
        truth, own = reference.rms_norm(x, w, 1e-3, float(i % 2))
        close([y, r], [truth, own])
        found = kernels.rms_norm_backward(dy, x, w, r, float(i % 2), True)
        close(found, reference.rms_norm_backward(dy, x, w, own, float(i % 2), True))
        dx, none = kernels.rms_norm_backward(dy, x, w, r, float(i % 2), False)
        assert none is None
        assert torch.equal(dx, found[0])


@needs_library
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", GATES)
def test_gated_activations_equal_the_reference(instructions: str, dtype: torch.dtype, kind: Gate) -> None:
    for i, (rows, n) in enumerate(((1, 1), (3, 15), (65, 64), (7, 97), (2, 1030))):
        g, u, dy = (LAYOUTS[(i + seed) % 3](randn(rows, n, dtype=dtype, seed=seed)) for seed in (1, 2, 3))
        close([kernels.gated(g, u, kind)], [reference.gated(g, u, kind)])
        close(kernels.gated_backward(dy, g, u, kind), reference.gated_backward(dy, g, u, kind))


@needs_library
def test_halves_of_one_tensor_are_read_in_place_and_their_gradient_is_one_tensor(instructions: str) -> None:
    g, u = randn(5, 46).chunk(2, dim=1)
    dy = randn(5, 23, seed=1)
    close([kernels.gated(g, u)], [reference.gated(g, u)])
    dg, du = kernels.gated_backward(dy, g, u)
    close([dg, du], reference.gated_backward(dy, g, u))
    assert du.data_ptr() - dg.data_ptr() == 23 * 4
    assert dg.stride() == du.stride() == (46, 1)


@needs_library
@pytest.mark.parametrize("dtype", TYPES)
def test_rotations_equal_the_reference(instructions: str, dtype: torch.dtype) -> None:
    for i, (period, times, turned, d) in enumerate(((1, 1, 2, 2), (5, 1, 10, 10), (3, 2, 64, 64), (4, 3, 22, 31))):
        q = LAYOUTS[i % 3](randn(period * times, 3, d, dtype=dtype, seed=1))
        k = randn(2, period * times, d, dtype=dtype, seed=2).transpose(0, 1)
        c, s = randn(period, turned, dtype=dtype, seed=3), randn(period, turned, seed=4)
        close(kernels.rotary((q, k), c, s), [reference.rotary(x, c, s) for x in (q, k)])
        close(kernels.rotary_backward((q, k), c, s), [reference.rotary_backward(x, c, s) for x in (q, k)])


@needs_library
@pytest.mark.parametrize("dtype", TYPES)
def test_cross_entropies_equal_the_reference(instructions: str, dtype: torch.dtype) -> None:
    for i, (rows, n) in enumerate(((1, 1), (3, 15), (65, 64), (7, 97), (2, 5030))):
        logits = LAYOUTS[i % 3](randn(rows, n, dtype=dtype, seed=1))
        labels, weights = torch.arange(rows) * 7 % n, randn(rows, seed=2)
        theirs = logits.clone()
        before = logits.clone()
        alone = kernels.cross_entropy_in_place(logits, labels)
        assert torch.equal(logits, before)
        losses = kernels.cross_entropy_in_place(logits, labels, weights)
        close([losses, logits], [reference.cross_entropy_in_place(theirs, labels, weights), theirs])
        close([alone], [losses])


@needs_library
def test_cross_entropy_holds_at_extreme_logits(instructions: str) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e38, 3e38, 0.0], [-float("inf"), 0.0, 1.0], [100.0, 100.0, -100.0]])
    labels, weights = torch.tensor([0, 0, 1, 2]), torch.full((4,), 0.5)
    theirs = logits.clone()
    losses = kernels.cross_entropy_in_place(logits, labels, weights)
    torch.testing.assert_close(losses, reference.cross_entropy_in_place(theirs, labels, weights))
    torch.testing.assert_close(logits, theirs)


@needs_library
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_never_hidden(instructions: str, bad: float) -> None:
    for place in (0, 17, 40):
        values = randn(2, 41)
        values[1, place] = bad
        losses = kernels.cross_entropy_in_place(values.clone(), torch.tensor([3, 3]))
        assert losses.isfinite().tolist() == [True, False]
        assert kernels.rms_norm(values, torch.ones(41), 1e-5)[0].isfinite().all(1).tolist() == [True, False]
        assert kernels.gated(values, torch.ones(2, 41)).isfinite().all(1).tolist() == [True, False]


@needs_library
def test_a_label_outside_of_the_vocabulary_is_refused_and_nothing_is_changed(instructions: str) -> None:
    logits = randn(3, 11)
    before = logits.clone()
    for function in (kernels.cross_entropy_in_place, reference.cross_entropy_in_place):
        for label in (-1, 11):
            with pytest.raises(IndexError, match=r"0 \.\. 10"):
                function(logits, torch.tensor([0, label, 2]), torch.ones(3))
    assert torch.equal(logits, before)


@needs_library
def test_empty_inputs_give_empty_results() -> None:
    x, w = torch.empty(0, 7), torch.ones(7)
    y, r = kernels.rms_norm(x, w, 1e-5)
    assert y.shape == (0, 7)
    dx, dw = kernels.rms_norm_backward(x, x, w, r, 0.0, True)
    assert dx.shape == (0, 7)
    assert dw is not None
    assert torch.equal(dw, torch.zeros(7))
    assert kernels.gated(x, x).shape == (0, 7)
    assert kernels.rotary((torch.empty(0, 2, 4),), torch.empty(0, 4), torch.empty(0, 4))[0].shape == (0, 2, 4)
    assert kernels.cross_entropy_in_place(x, torch.empty(0, dtype=torch.long), torch.empty(0)).shape == (0,)


@needs_library
def test_no_number_depends_on_the_number_of_threads() -> None:
    x, dy, w = randn(333, 130), randn(333, 130, seed=1), randn(130, seed=2)
    labels, weights = torch.arange(333) % 130, randn(333, seed=3)
    threads, found = torch.get_num_threads(), list[list[Tensor]]()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y, r = kernels.rms_norm(x, w, 1e-5)
            dx, dw = kernels.rms_norm_backward(dy, x, w, r, 0.0, True)
            assert dw is not None
            logits = x.clone()
            losses = kernels.cross_entropy_in_place(logits, labels, weights)
            found.append([y, dx, dw, losses, logits, kernels.gated(x, dy), *kernels.gated_backward(dy, x, y)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_without_the_library_the_reference_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "usable", lambda operation, tensor: False)
    assert not kernels.has_fused_ops(torch.device("cpu"), torch.float32)
    x, w = randn(3, 5), randn(5, seed=1)
    assert torch.equal(kernels.rms_norm(x, w, 1e-5)[0], reference.rms_norm(x, w, 1e-5)[0])
    assert torch.equal(kernels.gated(x, x), reference.gated(x, x))


def test_sixteen_bit_floats_that_c_does_not_know_are_left_to_the_reference() -> None:
    x = randn(3, 5, dtype=torch.float16)
    assert not kernels.has_fused_ops(torch.device("cpu"), torch.float16)
    assert torch.equal(kernels.gated(x, x), reference.gated(x, x))


def test_the_exponential_is_within_two_units_in_the_last_place(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    sources = Path(native.__file__).parent
    program = str(tmp_path / "exp")
    flags = ["-std=c11", "-O2", "-ffp-contract=off", f"-I{sources}"]
    given = [str(Path(__file__).with_name("exp.c")), str(sources / "threads.c")]
    subprocess.run([compiler, *flags, *given, "-o", program, "-lm", "-pthread"], check=True, capture_output=True)
    worst = subprocess.run([program, "256"], check=True, capture_output=True, text=True).stdout.split()
    assert worst
    assert all(float(units) <= 2 for units in worst), worst
