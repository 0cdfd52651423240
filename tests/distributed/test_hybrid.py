"""A model that is split over each node trains as that of one rank: four ranks here, as two nodes of two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
from forked import Forks
from test_ranks import FULL, alone, assert_same, over
from test_shard import IN_BACKWARD, QLORA, of_first

from graftlm.commands.ranks import train_over_ranks
from graftlm.config import TrainConfig
from graftlm.distributed.group import Ranks, check_nodes
from graftlm.distributed.shard import rows_of
from graftlm.errors import ConfigError
from graftlm.files import find_damage

NODES = {"layout": "hybrid", "nodes": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"lora_dropout": 0.2, "batch_size": 5},
        {**FULL, "batch_size": 5, "micro_batch_tokens": 40},
        pytest.param({**QLORA, "modules_to_save": ["embeddings"]}, marks=pytest.mark.prove),
        pytest.param({"base_precision": "int8", "batch_size": 4}, marks=pytest.mark.prove),
        pytest.param({**IN_BACKWARD, "batch_size": 5}, marks=pytest.mark.prove),
        pytest.param({**FULL, "activation_checkpointing": True}, marks=pytest.mark.prove),
        pytest.param({**FULL, "model": "mixtral", "eval_data": None, "epsilon": 1e-3}, marks=pytest.mark.prove),
        pytest.param({**FULL, "model": "qwen3", "eval_data": None, "epsilon": 1e-3}, marks=pytest.mark.prove),
    ],
    ids=["lora", "full", "qlora", "int8", "in backward", "checkpointing", "experts", "tied"],
)
def test_a_run_over_nodes_has_the_losses_and_weights_of_one_rank(
    forks: Forks, options: dict[str, Any], tmp_path: Path
) -> None:
    options = {"batch_size": 4, "steps": 4, **options}
    if "model" in options:
        options["model"] = str(tiny.folder(options["model"]))
    before = alone(tmp_path, **options)
    summary = of_first(over(forks, 4, tmp_path, **NODES, **options))
    for key in ("num_tokens", "base_bytes", "base_parameters", "trainable_parameters"):
        assert summary[key] == before[key]
    assert_same(tmp_path / "alone", tmp_path / "ranks", rel=1e-5)


SHARD = {"layout": "shard"}


@pytest.mark.prove
@pytest.mark.parametrize("options", [FULL, IN_BACKWARD], ids=["behind", "in backward"])
def test_moments_in_8_bits_over_nodes_are_those_of_a_split_run(
    forks: Forks, options: dict[str, Any], tmp_path: Path
) -> None:
    options = {**options, "optimizer": "adamw-8bit", "batch_size": 4, "steps": 4}
    of_first(over(forks, 2, tmp_path, "alone", **SHARD, **options))  # which keeps the same matrices in 32 bits
    of_first(over(forks, 4, tmp_path, **NODES, **options))
    assert_same(tmp_path / "alone", tmp_path / "ranks", rel=1e-5)


@pytest.mark.parametrize(
    "ways",
    [
        [(4, NODES), (1, {})],
        pytest.param([(4, NODES), (3, SHARD), (2, {"layout": "replicate"}), (1, {})], marks=pytest.mark.prove),
    ],
    ids=["on one rank", "in every layout"],
)
def test_one_node_writes_its_rows_and_a_run_goes_on_in_other_layouts_and_back(
    forks: Forks, ways: list[tuple[int, dict[str, Any]]], tmp_path: Path
) -> None:
    steps = len(ways) + 1
    options = {**FULL, "batch_size": 4, "save_every": 1, "keep_checkpoints": 9, "eval_data": None, "steps": steps}
    alone(tmp_path, **options)
    for step, (count, how) in enumerate(ways, start=1):
        ended = over(forks, count, tmp_path, stop_after=step, resume=step > 1, **how, **options)
        assert {found["kind"] for found in ended} == {"Stopped"}, ended
    of_first(over(forks, 4, tmp_path, resume=True, **NODES, **options))
    assert_same(tmp_path / "alone", tmp_path / "ranks", rel=1e-5)
    first = tmp_path / "ranks" / "checkpoints" / "000001"
    assert sorted(path.name for path in first.glob("rows-*")) == [
        f"rows-{part:05d}-of-00002.safetensors" for part in (1, 2)
    ]
    assert find_damage(first) is None


def test_weights_are_gathered_within_a_node_and_gradients_go_once_between_them(forks: Forks, tmp_path: Path) -> None:
    ended = forks.run("traffic_of_a_pass", 4, tmp_path / "wire", model=str(tiny_run.folder()), nodes=2)
    found = ended[0]["found"]
    assert all({**other["found"], "kept": found["kept"]} == found for other in ended[1:])
    assert found["gathered"] == 2 * found["layers"] + found["outer"]
    assert found["scattered"] == found["layers"] + found["outer"]
    assert found["summed"] == found["scattered"] / 2  # of a rank's rows, with the one that has them on the other node
    assert found["kept"] == pytest.approx((found["layers"] + found["outer"]) / 2, rel=0.02)
    assert found["among"] == [2]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([4, 4, 4, 4], "all 4 ranks are on one; take --layout shard"),
        ([1, 1], "each of 2 nodes has one; take --layout replicate"),
        (
            [2, 2, 1],
            "needs equally many ranks on each node, with numbers in a row, found 1 on one node, on others 2, 3 in all",
        ),
    ],
)
def test_nodes_that_cannot_each_have_a_model_are_refused(counts: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_nodes(counts, in_order=True)
    check_nodes([2, 2, 2, 2], in_order=True)
    with pytest.raises(ConfigError, match="whose numbers do not follow one another"):
        check_nodes([2, 2, 2, 2], in_order=False)


def test_hybrid_on_one_machine_is_refused_before_anything_starts(forks: Forks, tmp_path: Path) -> None:
    config = TrainConfig.build(tiny_run.options(tmp_path, layout="hybrid", ranks=2))
    with pytest.raises(ConfigError, match="starts ranks on this one; take --layout shard"):
        train_over_ranks(config)
    ended = over(forks, 2, tmp_path, layout="hybrid")  # torchrun has started them
    assert [(found["kind"], found["everywhere"]) for found in ended] == [("ConfigError", True)] * 2, ended


@pytest.mark.parametrize(
    ("nodes", "chosen"), [(2, "hybrid"), pytest.param(1, "shard", marks=pytest.mark.prove)], ids=["hybrid", "shard"]
)
def test_auto_splits_a_model_over_a_node_that_has_room_for_it(
    forks: Forks, nodes: int, chosen: str, tmp_path: Path
) -> None:
    options = {**FULL, "batch_size": 4, "steps": 1, "eval_data": None, "bug": "has_room_for_a_part_alone"}
    of_first(over(forks, 4, tmp_path, nodes=nodes, **options))
    assert json.loads((tmp_path / "ranks" / "config.json").read_text())["layout"] == chosen


def test_ranks_of_a_node_have_all_rows_and_those_of_one_node_count() -> None:
    ranks = [Ranks(rank, 6, 3, node_ranks=3) for rank in range(6)]
    assert [rows_of(7, one) for one in ranks] == [(0, 3), (3, 6), (6, 7)] * 2
    assert [one.counted for one in ranks] == [True] * 3 + [False] * 3
