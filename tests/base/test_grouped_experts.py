"""All experts of a mixture in one launch: on the CPU, where PyTorch has the grouped matmul too, the answers of the loop."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from graftlm import kernels
from graftlm.adapters.attach import AdapterPlan, attach, new_adapter, select_layers
from graftlm.base.context import ForwardContext
from graftlm.base.loading import Base, random_base
from graftlm.kernels import gpu_grouped
from graftlm.segments import Segments

WIDE = {"hidden_size": 24, "intermediate_size": 40, "moe_intermediate_size": 40}


def mixture(architecture: str) -> Base:
    known = tiny.config(architecture).to_dict()
    config = tiny.config(architecture, **{name: size for name, size in WIDE.items() if name in known})
    return random_base(
        config, tiny.tokenizer(), device="cpu", precision="float32", compute_dtype="float32", training=True
    )


def outcome(base: Base, segments: Segments, trained: Sequence[Tensor]) -> list[Tensor]:
    """The logits of a forward pass, and the gradient of each trained tensor."""
    context = ForwardContext(segments)
    logits = base.logits(base.hidden(torch.arange(segments.tokens) * 7 % tiny.VOCABULARY, context), context)
    gradients = torch.autograd.grad(logits.square().sum(), trained)
    return [logits.detach(), *gradients]


def test_the_grouped_matmul_passes_its_check() -> None:
    assert gpu_grouped.check(torch.device("cpu"))


@pytest.mark.parametrize(("capability", "usable"), [((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)])
def test_experts_are_grouped_on_cards_where_pytorch_does_not_read_their_bounds(
    capability: tuple[int, int], usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an RTX 5090 (12.0) it does, as before an H100: the host would wait, and no step could be captured."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(gpu_grouped.self_check, "allows", lambda operation, device: True)
    x: Any = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda"))
    assert gpu_grouped.usable(x) is usable


@pytest.mark.parametrize("architecture", tiny.MIXTURES)
@pytest.mark.parametrize("trained", ["weights", "lora"])
def test_experts_in_one_launch_give_what_they_give_one_by_one(
    architecture: str, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = mixture(architecture)
    if trained == "weights":
        parameters = [p.requires_grad_() for p in base.model.parameters()]
    else:
        adapter = new_adapter(base, select_layers(base, ("mlp",)), AdapterPlan(rank=8, alpha=12.0), 5)
        parameters = [torch.nn.init.normal_(p, std=0.3) for p in adapter.parameters().values()]
        attach(base, adapter, slot=1)
    segments = Segments(lengths=(9, 14), slots=(1, 1))
    expected, taken = outcome(base, segments, parameters), list[int]()

    def counted(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        taken.append(len(ends))
        return gpu_grouped.grouped_matmul(x, weight, ends)

    monkeypatch.setattr(gpu_grouped, "usable", lambda x: True)
    monkeypatch.setattr(kernels, "grouped_matmul", counted)
    found = outcome(base, segments, parameters)
    assert taken
    assert len(found) == len(expected) > 2
    for ours, truth in zip(found, expected):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()))


def test_what_the_grouped_matmul_does_not_know_is_left_to_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> Tensor:
        raise AssertionError("not for these")

    for plan, slots in ((AdapterPlan(rank=3, alpha=12.0), (1, 1)), (AdapterPlan(rank=8, alpha=12.0), (0, 1))):
        base = mixture("mixtral")
        adapter = new_adapter(base, select_layers(base, ("mlp",)), plan, 5)
        attach(base, adapter, slot=1)
        with monkeypatch.context() as patch:
            patch.setattr(gpu_grouped, "usable", lambda x: True)
            patch.setattr(kernels, "grouped_matmul", refuse)
            outcome(base, Segments(lengths=(9, 14), slots=slots), list(adapter.parameters().values()))
