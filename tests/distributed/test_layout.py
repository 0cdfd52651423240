"""Which layout is chosen, with how many layers on the host, for ranks that are on GPUs which no test has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch

import graftlm
from graftlm.config import TrainConfig
from graftlm.distributed.group import Ranks
from graftlm.errors import ConfigError
from graftlm.planning.hardware import NCCL_BYTES, card
from graftlm.planning.layouts import Cluster, laid_out
from graftlm.planning.models import find
from graftlm.training import layout, memory

FULL = {
    "model": "llama-2-70b", "method": "full", "base_precision": "bfloat16", "optimizer": "adamw-8bit", "max_length": 1024,
    "compute_dtype": "bfloat16", "activation_checkpointing": True, "batch_size": 16,
}  # fmt: skip
GPU = torch.device("cuda")


class Alike(Ranks):
    """Ranks on two nodes, each of which meets what the others meet."""

    def total(self, values: Sequence[float]) -> list[float]:
        return [max(values)] * len(values) if len(values) == self.size else list(values)

    def largest(self, values: Sequence[int]) -> list[int]:
        return list(values)

    def split_in_nodes(self) -> Ranks:
        return replace(self, node_ranks=self.size // 2)

    def _sent(self, message: dict[str, Any], sender: int) -> dict[str, Any]:
        return message


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Say which GPU each rank has, and what memory is free on its machine."""

    def use(gpu: str, free: int = 1 << 50) -> None:
        for module in (layout, memory):
            monkeypatch.setattr(module, "local", lambda device: card(gpu))
        monkeypatch.setattr(layout, "free_machine_memory", lambda: free)

    return use


def choose(tmp_path: Path, ranks: int = 16, **options: Any) -> tuple[TrainConfig, Ranks, str]:
    """What is chosen of 70 billion values, on two nodes, and what is said of it."""
    given = tiny_run.options(tmp_path, **FULL, **options)
    config, notes = TrainConfig.build({**given, "ranks": ranks}), list[str]()
    chosen, found = layout.choose_layout(config, "bfloat16", GPU, Alike(0, ranks, ranks // 2), notes.append)
    return chosen, found, "; ".join(notes)


def test_layers_wait_on_the_host_for_the_sums_over_nodes_of_hybrid(tmp_path: Path, on: Any) -> None:
    on("a100-80gb")
    config, ranks, said = choose(tmp_path, layout="hybrid")
    assert config.host_layers > 0
    assert f"the rows of {config.host_layers} layers wait in the host's memory" in said
    assert choose(tmp_path, layout="shard")[0].host_layers == 0
    setting = memory.setting_of(config, "bfloat16", "bfloat16")
    load = memory.Workload(tokens=1024, target_tokens=1023, longest=1024, small=True)
    case = memory.PlanCase(
        shape=find("llama-2-70b").shape, targets=config.targets, rank=16, load=load, card=card("a100-80gb"),
        fused=find_spec("triton") is not None,
    )  # fmt: skip
    fewer, enough = (
        laid_out(case, setting, Cluster(gpus=8, nodes=2), "hybrid", config.host_layers - n).bytes for n in (1, 0)
    )
    assert fewer > case.card.usable >= enough
    assert ranks.parts == 8


def test_auto_shares_a_model_over_all_nodes_before_layers_wait_on_the_host(
    tmp_path: Path, on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("a100-80gb")
    monkeypatch.setattr(
        layout, "fits", lambda *given: len(given) > 4
    )  # a small micro-batch, and not the one of the plan
    config, ranks, _ = choose(tmp_path)
    assert (config.layout, config.host_layers, ranks.parts) == ("shard", 0, 16)


def test_auto_takes_the_layers_that_are_asked_for_into_account_when_it_looks_at_a_node(tmp_path: Path, on: Any) -> None:
    on("a100-80gb")
    assert choose(tmp_path)[0].layout == "shard"
    config, ranks, _ = choose(tmp_path, offload_layers=40)
    assert (config.layout, config.host_layers, ranks.parts) == ("hybrid", 40, 8)


def test_more_than_the_machine_s_memory_is_refused_before_anything_is_loaded(tmp_path: Path, on: Any) -> None:
    on("a100-80gb", free=100 << 30)
    with pytest.raises(
        ConfigError, match=r"with --offload-layers 60 each rank keeps .* GB in the host's memory, the 8 on"
    ):
        choose(tmp_path, layout="shard", offload_layers=60)
    on("a100-80gb", free=1 << 40)
    assert choose(tmp_path, layout="shard", offload_layers=60)[0].host_layers == 60


def test_several_ranks_leave_room_for_nccl_s_buffers(tmp_path: Path) -> None:
    gpu = card("t4")
    assert gpu.of_one_rank(1).memory == gpu.memory == gpu.of_one_rank(4).memory + NCCL_BYTES
    local = replace(card("cpu"), memory=1 << 34)
    assert local.of_one_rank(4, 2).memory == 1 << 33


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload_layers": 4}, "--offload-layers 4 is for weights that ranks share, and there is one rank"),
        ({"layout": "hybrid"}, "--layout hybrid splits a model over ranks, and there is one"),
        ({"layout": "shard"}, "--layout shard splits a model over ranks, and there is one"),
    ],
)
def test_from_python_too_one_rank_shares_its_weights_with_nobody(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given = tiny_run.options(tmp_path, **options)
    with pytest.raises(ConfigError, match=message):
        graftlm.train(given.pop("model"), given.pop("data"), quiet=True, **given)
    assert not Path(given["out"]).exists()


def test_a_model_that_fits_one_gpu_with_nothing_to_spare_does_not_fit_each_of_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fits(ranks: int, more: int) -> bool:
        monkeypatch.setattr(memory, "local", lambda device: replace(card("t4"), memory=more))
        config = TrainConfig.build({**tiny_run.options(tmp_path, **{**FULL, "model": "llama-2-7b"}), "ranks": ranks})
        return memory.fits(config, "bfloat16", GPU, 1)

    low, high = 0, 1 << 40
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(1, middle) else (middle, high)
    assert not fits(2, high + NCCL_BYTES - 1)
    assert fits(2, high + NCCL_BYTES)
