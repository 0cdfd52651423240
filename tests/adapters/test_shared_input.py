"""What runs on a GPU alone, on a CPU: layers with the same input together, copies of A and B, products with their scale.

A CPU takes none of it; here it is told that it does.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny
import torch
from torch import Tensor, nn

from graftlm import kernels
from graftlm.adapters.bank import LayerBank
from graftlm.adapters.factor_copies import FactorCopies
from graftlm.base.context import ForwardContext
from graftlm.base.loading import Base, load_base
from graftlm.kernels import gpu_low_rank, reference
from graftlm.segments import Segments


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a GPU; the numbers of layers that were computed together."""
    sizes: list[int] = []
    real = kernels.lora_group

    def counted(x: Tensor, weights: list[Tensor], *rest: object) -> object:
        sizes.append(len(weights))
        return real(x, weights, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "groups_lora", lambda device: True)
    monkeypatch.setattr(kernels, "lora_group", counted)
    return sizes


def _gradients(
    base: Base, targets: tuple[str, ...] = ("all-linear",), **plan: object
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states, and the gradient to every A and B, of two examples through one adapter with a B that is not 0."""
    adapter = tiny.adapted(base, targets=targets, **plan)  # type: ignore[arg-type]
    ids = torch.arange(3, 14)
    with torch.enable_grad():
        segments = Segments(lengths=(7, 4), slots=(1, 1), rng_keys=((3, 0), (3, 1)))
        hidden = base.hidden(ids, ForwardContext(segments))
        hidden.mul(torch.arange(hidden.numel()).sin().view(hidden.shape)).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in adapter.parameters().items() if p.grad is not None}


@pytest.mark.parametrize(
    ("architecture", "dora"), [("llama", False), ("llama", True), ("qwen2", False), ("phi3", False)]
)  # plain, with biases, with nothing to share
def test_layers_that_run_together_give_the_states_and_gradients_that_they_give_alone(
    architecture: str, dora: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    folder = str(tiny.folder(architecture))
    truth, expected = _gradients(load_base(folder, precision="nf4", compute_dtype="float32", device="cpu"), dora=dora)
    sizes = request.getfixturevalue("grouped")
    found, gradients = _gradients(load_base(folder, precision="nf4", compute_dtype="float32", device="cpu"), dora=dora)
    assert sizes == ([] if architecture == "phi3" else [3, 2] * 2)
    tiny.close(found, truth)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        tiny.close(gradient, expected[name])


def test_dropout_and_a_target_that_leaves_one_out_keep_layers_apart(grouped: list[int]) -> None:
    for given in ({"dropout": 0.5}, {"targets": ("q_proj", "v_proj", "up_proj")}):
        base = load_base(str(tiny.folder("llama")), precision="float32", compute_dtype="float32", device="cpu")
        _gradients(base, **given)  # type: ignore[arg-type]
    assert not grouped


def test_layers_whose_other_calls_do_not_come_are_soon_computed_alone(grouped: list[int]) -> None:
    base = load_base(str(tiny.folder("llama")), precision="float32", compute_dtype="float32", device="cpu")
    tiny.adapted(base)
    layer = base.model.model.layers[0].self_attn.q_proj
    with ForwardContext(Segments(lengths=(4,), slots=(1,))):
        outputs = [layer(x) for x in [torch.randn(4, 28)] * 2 + [torch.randn(4, 28) for _ in range(5)]]
    assert len(grouped) < 5
    tiny.close(outputs[0], outputs[1])
    assert all(isinstance(m.bank, LayerBank) for m in base.model.model.layers[0].self_attn.children())


class _Pair:
    def __init__(self, rank: int, inner: int, outer: int) -> None:
        self.A, self.B = nn.Parameter(torch.randn(rank, inner)), nn.Parameter(torch.randn(outer, rank))


def test_copies_follow_their_factors_and_lie_below_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    real: Callable[..., None] = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: (copied.append(len(to)), real(to, of)))
    q, k, o = _Pair(2, 7, 11), _Pair(3, 7, 5), _Pair(4, 11, 7)
    copies = FactorCopies([[q, k], [o]])

    def agree() -> None:
        joined = copies.joined([q, k], torch.bfloat16)
        assert joined is not None
        assert torch.equal(joined, torch.cat([q.A, k.A]).bfloat16())
        for pair in (q, k, o):
            A, B = copies.of(pair, torch.bfloat16)
            assert torch.equal(A, pair.A.bfloat16())
            assert torch.equal(B, pair.B.bfloat16())
            assert A.is_contiguous()
            assert B.is_contiguous()

    agree()
    agree()
    assert copied == [6]
    with torch.no_grad():
        k.B.add_(1)
        o.A.detach().view(-1).mul_(2)  # as the optimizer does
    agree()
    assert copied == [6, 4]
    q.A.data.mul_(3)  # unseen by PyTorch, as other optimizers' kernels write
    with ForwardContext(Segments(lengths=(4,), slots=(1,))):
        agree()
        agree()
    assert copied == [6, 4, 6]
    assert copies.joined([k, q], torch.bfloat16) is None
    assert copies.joined([q, _Pair(1, 1, 1)], torch.bfloat16) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_their_scale_are_the_references(dtype: torch.dtype) -> None:
    x, dy, A, B = (torch.randn(s).to(dtype) for s in ((9, 7), (9, 5), (2, 7), (5, 2)))
    outcomes: list[list[Tensor]] = []
    for of in (gpu_low_rank, reference):
        y, dx = torch.ones(9, 5, dtype=dtype), torch.ones(9, 7, dtype=dtype)
        h = of.low_rank(y, x, A, B, 1.7)
        last = (torch.float32,) if of is gpu_low_rank else ()
        outcomes.append([y, *of.low_rank_backward(dy, x, h, A, B, 1.7, dx, *last), dx])
    for ours, truth in zip(*outcomes):
        torch.testing.assert_close(
            ours.float(), truth.float(), rtol=2e-2, atol=0.1 if dtype == torch.bfloat16 else 1e-5
        )
    assert outcomes[0][1].dtype == outcomes[0][2].dtype == torch.float32
