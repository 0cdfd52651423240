"""Layers whose rows wait in the host's memory: the same bits with them and without, and as many as the plan says."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tiny_run
import torch
from forked import Forks
from test_ranks import FULL, lines_of, over
from test_shard import IN_BACKWARD, QLORA, of_first
from transformers import AutoModelForCausalLM, LlamaConfig

from graftlm.base.splitting import modules_on_host
from graftlm.commands import rank
from graftlm.commands.ranks import train_over_ranks
from graftlm.config import TrainConfig
from graftlm.distributed.group import Ranks
from graftlm.distributed.shard import Piece
from graftlm.errors import ConfigError, ModelError
from graftlm.planning.activations import Workload
from graftlm.planning.fitting import PlanCase
from graftlm.planning.hardware import card
from graftlm.planning.layouts import Cluster, layout_of
from graftlm.planning.models import find
from graftlm.training import layout
from graftlm.training.memory import setting_of

SPLIT = {"layout": "shard"}


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, QLORA),
        (2, {**IN_BACKWARD, "batch_size": 3}),
        pytest.param(3, {**FULL, "batch_size": 4, "micro_batch_tokens": 20}, marks=pytest.mark.prove),
        pytest.param(4, {**FULL, "batch_size": 4, "layout": "hybrid", "nodes": 2}, marks=pytest.mark.prove),
        pytest.param(2, {"base_precision": "int8"}, marks=pytest.mark.prove),
    ],
    ids=["qlora", "in backward", "full", "hybrid", "int8"],
)
def test_a_run_with_layers_on_the_host_has_the_bits_of_one_without(
    forks: Forks, count: int, options: dict[str, Any], tmp_path: Path
) -> None:
    options = {**SPLIT, "steps": 3, **options}
    places: list[Path] = []
    for layers in (0, 1):
        of_first(over(forks, count, tmp_path, str(layers), offload_layers=layers, **options))
        places.append(tmp_path / str(layers))
    without, with_one = ([{**line, "seconds": 0} for line in lines_of(place)] for place in places)
    assert without == with_one
    (file,) = [*places[0].glob("adapter/adapter_model.safetensors"), *places[0].glob("model/model.safetensors")]
    assert file.read_bytes() == (places[1] / file.relative_to(places[0])).read_bytes()


@pytest.mark.parametrize(("count", "found"), [(0, []), (1, [4]), (2, [2, 4]), (3, [1, 3, 4]), (5, [0, 1, 2, 3, 4])])
def test_layers_on_the_host_are_spread_evenly(count: int, found: list[int]) -> None:
    config = LlamaConfig(
        vocab_size=7, hidden_size=8, intermediate_size=12, num_hidden_layers=5, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    waiting = modules_on_host(model, count)
    layers = list(model.model.layers)
    assert [i for i, layer in enumerate(layers) if layer in waiting] == found
    assert waiting == {module for i in found for module in layers[i].modules()}
    with pytest.raises(ModelError, match="--offload-layers 6 is more than LlamaForCausalLM has, 5; give at most 5"):
        modules_on_host(model, 6)


def test_more_layers_than_there_are_are_refused_by_all_ranks_in_the_same_words(forks: Forks, tmp_path: Path) -> None:
    ended = over(forks, 2, tmp_path, offload_layers=3, **SPLIT)
    assert {(found["kind"], found["everywhere"]) for found in ended} == {("ModelError", True)}, ended
    assert ended[0]["error"].startswith("--offload-layers 3 is more than LlamaForCausalLM has, 2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 1, "offload_layers": 2}, "is for weights that ranks share, and there is one rank"),
        ({"ranks": 2, "offload_layers": 2, "layout": "replicate"}, "with --layout replicate each has all of them"),
        (
            {"ranks": 2, "offload_layers": -1, **SPLIT},
            "offload-layers: expected a whole number, from 0 on, or auto, found -1",
        ),
        ({"ranks": 2, "offload_layers": "many", **SPLIT}, "offload-layers: expected .* or auto, found 'many'"),
    ],
)
def test_layers_on_the_host_where_nothing_is_gathered_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train_over_ranks(TrainConfig.build(tiny_run.options(tmp_path, **options)))


def test_auto_takes_as_many_layers_as_the_plan_of_so_many_cards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "model": "llama-2-70b", "method": "qlora", "compute_dtype": "bfloat16", "activation_checkpointing": True,
        "max_length": 1024, "batch_size": 2, "ranks": 2, "data": ["rows.jsonl"], "out": str(tmp_path / "out"), **SPLIT,
    }  # fmt: skip
    config = TrainConfig.build(options)
    assert layout.planned_host_layers(config, "nf4", torch.device("cpu"), Ranks(size=2)) == 0
    monkeypatch.setattr(layout, "local", lambda device: card("rtx-4090"))
    gpu = torch.device("cuda")
    found = layout.planned_host_layers(config, "nf4", gpu, Ranks(size=2))
    load = Workload(tokens=1024, target_tokens=1023, longest=1024, micro_batches=2, small=True)
    shape = find("llama-2-70b").shape
    fused = find_spec("triton") is not None
    case = PlanCase(shape=shape, targets=config.targets, rank=16, load=load, card=card("rtx-4090"), fused=fused)
    planned = layout_of(case, setting_of(config, "nf4", "bfloat16"), Cluster(gpus=2))
    assert planned is not None
    assert (found, planned.name) == (planned.offloaded, "shard")
    assert 0 < found < 80
    assert layout.planned_host_layers(config, "nf4", gpu, Ranks(size=8)) == 0  # their rows fit
    assert layout.planned_host_layers(config, "nf4", gpu, Ranks(size=1)) == 80  # nothing fits
    asked = TrainConfig.build({**options, "offload_layers": "7"})
    assert layout.planned_host_layers(asked, "nf4", gpu, Ranks(size=2)) == 7


def test_rows_on_the_host_are_there_once_when_fsdp2_has_them() -> None:
    module = torch.nn.Linear(3, 5, bias=False)
    values = module.weight.detach().clone()
    piece = Piece.of([module], "weight", module.weight, Ranks(), on_host=True)
    piece.fill(cast(Any, SimpleNamespace(device_type="cuda")))
    assert piece.own is None
    assert torch.equal(module.weight, values)


def test_a_rank_with_a_gpu_takes_its_part_of_the_processor_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(rank, "default_device", lambda asked: torch.device(asked or "cuda"))
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setenv("LOCAL_RANK", "1")
    config = TrainConfig.build(tiny_run.options(tmp_path, ranks=4, device="cuda"))
    of_rank: Any = rank._of_rank  # pyright: ignore[reportPrivateUsage]
    assert of_rank(config, Ranks(1, 4, 4)).device == "cuda:1"
    assert taken == [3]
