"""Activations on the host: the same gradients, the layer before on its way in time, nothing kept longer than needed."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import tiny
import tiny_run
import torch
from torch import Tensor

from graftlm.base.activation_offload import ActivationOffload
from graftlm.base.loading import load_base
from graftlm.config import TrainConfig
from graftlm.errors import ConfigError
from graftlm.training.micro_batch import BatchItem, collate, forward


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mixtral"])
def test_gradients_are_the_same_bits_with_activations_on_the_host(architecture: str) -> None:
    rows = tiny.examples((7, 9), seed=4)
    found: list[dict[str, Tensor]] = []
    offload = ActivationOffload(least_bytes=0)
    for given in (None, offload):
        base = load_base(str(tiny.folder(architecture)), compute_dtype="float32", device="cpu")
        adapter = tiny.adapted(base, **({} if architecture in tiny.MIXTURES else {"dropout": 0.3}))
        base.model.requires_grad_(True)
        base.structure.checkpoint_layers(True, given)
        micro_batch = collate(base, [BatchItem(row, 1, (3, i), 0.1) for i, row in enumerate(rows)])
        for _ in range(2):  # of two micro-batches gradients add up
            forward(base, micro_batch)[0].backward()
        trained = {**dict(base.model.named_parameters()), **adapter.parameters()}
        found.append({name: p.grad for name, p in trained.items() if p.grad is not None})
    plain, offloaded = found
    assert plain.keys() == offloaded.keys()
    assert [name for name, gradient in plain.items() if not torch.equal(gradient, offloaded[name])] == []
    width = base.structure.embedding.weight.shape[1]
    assert (
        offload.saved_bytes == 2 * len(base.structure.layers) * 16 * width * 4
    )  # the inputs of the layers, and no more


def test_the_layer_before_is_fetched_while_one_runs_back() -> None:
    offload = ActivationOffload(least_bytes=0)
    values = [torch.full((3,), float(i)) for i in range(3)]
    first, second, third = (offload._pack(value) for value in values)
    assert torch.equal(offload._unpack(third), values[2])
    assert second.fetched is not None
    assert first.fetched is third.fetched is None
    assert torch.equal(offload._unpack(second), values[1])
    assert first.fetched is not None


def test_what_has_come_back_is_kept_by_nobody() -> None:
    offload = ActivationOffload(least_bytes=0)
    saved = [offload._pack(torch.ones(3)) for _ in range(3)]
    last = weakref.ref(saved[-1])
    del saved[-1]
    gc.collect()
    assert last() is None
    assert saved[-1].before() is saved[-2]


def test_small_tensors_and_parameters_stay_where_they_are() -> None:
    offload = ActivationOffload()
    for tensor in (torch.ones(3), torch.nn.Parameter(torch.ones(1 << 16))):
        assert offload._pack(tensor) is tensor
    assert offload.saved_bytes == 0


@pytest.mark.parametrize("device", ["cpu", None])
def test_without_a_gpu_it_is_refused(tmp_path: Path, device: str | None) -> None:
    options = {"activation_checkpointing": True, "offload_activations": True, "device": device}
    with pytest.raises(ConfigError, match=r"--offload-activations .* already are there; leave it out"):
        tiny_run.train(tmp_path, **options)


def test_without_activation_checkpointing_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--offload-activations .* --activation-checkpointing saves .* give both"):
        TrainConfig.build({"model": "demo", "data": ["demo"], "out": "run", "offload_activations": True})
