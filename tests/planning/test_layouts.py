"""How a training lies on several cards: the first layout that fits, what each card holds, and what it sends."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import graftlm as graft
from graftlm.cli import app
from graftlm.config import PlanConfig
from graftlm.errors import ConfigError
from graftlm.planning.activations import Workload
from graftlm.planning.answers import AnswerLoad
from graftlm.planning.fitting import PlanCase
from graftlm.planning.hardware import NCCL_BYTES, card
from graftlm.planning.layouts import (
    Cluster,
    Layout,
    cards_needed,
    laid_out,
    layout_names,
    layout_of,
    loads_of_one,
)
from graftlm.planning.memory import requirement
from graftlm.planning.method import METHODS, TrainingSetting
from graftlm.planning.models import find
from graftlm.planning.rank_memory import Split, SplitSizes, of_one_rank

sys.path.append(str(Path(__file__).parents[2] / "bench"))
bench: Any = importlib.import_module("ranks")
BY_KEY = {m.key: m for m in METHODS}
SIMULATED = Path(__file__).parents[2] / "bench" / "results" / "ranks.json"


LLAMA_2_7B = {
    "q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096), "gate": (11008, 4096), "up": (11008, 4096),
    "down": (4096, 11008),
}  # fmt: skip
"""The matrices of a layer."""
PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def case(model: str, tokens: int, on: str, micro_batches: int = 1, examples: int = 1) -> PlanCase:
    load = Workload(
        tokens=tokens * examples, target_tokens=(tokens - 1) * examples, longest=tokens, examples=examples,
        micro_batches=micro_batches,
    )  # fmt: skip
    return PlanCase(shape=find(model).shape, targets=("all-linear",), rank=16, load=load, card=card(on), fused=True)


def how(key: str) -> TrainingSetting:
    return replace(BY_KEY[key].checkpointed(), compute_dtype="bfloat16")


def sharded(here: PlanCase, setting: TrainingSetting, cards: int, offloaded: int = 0) -> Layout:
    return laid_out(here, setting, Cluster(gpus=cards), "shard", offloaded)


@pytest.mark.parametrize(
    ("model", "key", "tokens", "on", "cards", "found"),
    [
        ("llama-2-7b", "full-bfloat16", 2048, "a100-80gb", 2, "replicate"),
        ("llama-2-7b", "full", 2048, "a100-80gb", 2, "shard"),
        (
            "llama-2-7b",
            "full-in-backward",
            2048,
            "a100-80gb",
            2,
            "shard",
        ),  # frees gradients before they could be summed
        ("llama-2-70b", "full-8bit", 2048, "a100-80gb", 8, "shard"),
        ("llama-2-70b", "full-8bit", 2048, "a100-80gb", 4, None),
        ("llama-2-70b", "lora", 1024, "a100-80gb", 2, "shard"),
        ("llama-2-70b", "lora", 1024, "a100-80gb", 1, None),
        ("llama-2-70b", "qlora", 2048, "a100-80gb", 1, "replicate"),
        ("llama-2-70b", "qlora", 1024, "rtx-4090", 4, "shard"),
    ],
)
def test_the_layout_that_moves_least_is_the_first_that_fits(
    model: str, key: str, tokens: int, on: str, cards: int, found: str | None
) -> None:
    here = case(model, tokens, on)
    layout = layout_of(here, how(key), Cluster(gpus=cards))
    if found is None:
        assert layout is None or layout.offloaded
        return
    assert layout is not None
    assert (layout.name, layout.offloaded) == (found, 0)
    assert layout.bytes <= here.card.usable


@pytest.mark.parametrize(
    ("key", "gpus", "nodes", "found"),
    [
        ("lora", 8, 1, "shard"),
        ("lora", 8, 2, "hybrid"),
        ("lora", 1, 8, "shard"),  # a node's GPU alone has no room
        ("qlora", 8, 2, "replicate"),
        ("full-8bit", 8, 2, "shard"),  # no room beside the sums over nodes, in float32; without these 8 are enough
        ("full-in-backward", 8, 2, "hybrid"),
    ],
)
def test_over_nodes_a_model_that_fits_the_gpus_of_one_is_split_within_each(
    key: str, gpus: int, nodes: int, found: str
) -> None:
    layout = layout_of(case("llama-2-70b", 1024, "a100-80gb"), how(key), Cluster(gpus=gpus, nodes=nodes))
    assert layout is not None
    assert (layout.name, layout.offloaded) == (found, 0)


@pytest.mark.parametrize("key", ["full", "full-bfloat16", "lora", "qlora"])
@pytest.mark.parametrize("nodes", [2, 8])
def test_each_layout_sends_more_to_other_nodes_than_the_one_that_is_tried_before_it(key: str, nodes: int) -> None:
    here, cluster = case("llama-2-70b", 2048, "h100", 4), Cluster(gpus=8, nodes=nodes)
    names = layout_names(how(key), cluster)
    assert names == ["replicate", "hybrid", "shard"]
    layouts = [laid_out(here, how(key), cluster, name) for name in names]
    if key in ("lora", "qlora"):
        assert layouts[0].between == layouts[1].between < layouts[2].between / 20  # the adapter alone
        assert layouts[0].sent < layouts[1].sent
    else:
        assert layouts[0].sent < layouts[1].sent
        assert layouts[1].between < layouts[2].between
    assert layouts[1].bytes > layouts[2].bytes


def test_on_one_node_nothing_is_sent_to_another_and_over_nodes_of_one_gpu_all_is() -> None:
    here = case("llama-2-7b", 1024, "h100", 4)
    one, apart = (
        laid_out(here, how("lora"), cluster, "shard") for cluster in (Cluster(gpus=4), Cluster(gpus=1, nodes=4))
    )
    assert (one.between, apart.within) == (0, 0)
    assert (one.within, one.bytes) == (apart.between, apart.bytes)
    two = laid_out(here, how("lora"), Cluster(gpus=2, nodes=2), "shard")
    assert two.between == pytest.approx(one.within / 2, abs=4)  # one of a node's two GPUs sends to the other node
    assert two.sent == one.sent


def test_the_sum_over_nodes_keeps_each_layer_s_rows_in_float32_until_the_backward_pass_ends() -> None:
    here, setting = case("llama-2-70b", 2048, "h100"), how("full-8bit")
    shape, alone = here.shape, here.of(setting)
    sizes = SplitSizes.of(shape, setting)
    one, two = (of_one_rank(alone, shape, here.load, Split(shards=8, copies=n)) for n in (1, 2))
    kept = 4 * sizes.layer_values * (sizes.layers - 2) // 8
    assert two.moments["end"].total - one.moments["end"].total == pytest.approx(kept, abs=sizes.layers)
    wide = how("full")  # gradients in float32 are the sums themselves
    alone = here.of(wide)
    assert of_one_rank(alone, shape, here.load, Split(shards=8, copies=2)).training == (
        of_one_rank(alone, shape, here.load, Split(shards=8)).training
    )


def test_a_rank_s_micro_batches_are_halves_of_the_step_s_and_cover_its_part() -> None:
    load = case("llama-2-7b", 512, "h100", 8, 8).load  # 64 examples in a step
    found = [(part.examples, part.micro_batches, part.tokens) for part in loads_of_one(load, how("lora"), 4)]
    assert found == [(8, 2, 4096), (4, 4, 2048), (2, 8, 1024), (1, 16, 512)]
    assert [(p.examples, p.micro_batches) for p in loads_of_one(load, how("lora"), 32)] == [(2, 1), (1, 2)]
    assert [(p.examples, p.micro_batches) for p in loads_of_one(load, how("lora"), 100)] == [(1, 1)]
    # its step is in the backward pass, of which there is one
    assert [(p.examples, p.micro_batches) for p in loads_of_one(load, how("full-in-backward"), 4)] == [(16, 1)]


def test_a_micro_batch_is_halved_before_a_layout_that_sends_more_is_taken() -> None:
    here = case("llama-2-7b", 2048, "rtx-4090", 1, 64)  # 64 examples in a step
    layout = layout_of(here, how("lora"), Cluster(gpus=2))
    assert layout is not None
    assert layout.name == "replicate"
    count = layout.load.examples
    assert 1 < count < 32
    assert count * layout.load.micro_batches == 32
    more = replace(
        here, load=next(load for load in loads_of_one(here.load, how("lora"), 2) if load.examples == 2 * count)
    )
    assert laid_out(more, how("lora"), Cluster(gpus=2), "replicate").bytes > here.card.usable >= layout.bytes


def test_qlora_of_70b_fits_two_cards_of_24_gb_only_with_layers_on_the_host_and_with_as_few_as_that_takes() -> None:
    here, setting = case("llama-2-70b", 1024, "rtx-4090"), how("qlora")
    found = layout_of(here, setting, Cluster(gpus=2))
    assert found is not None
    assert found.offloaded > 0
    assert found.bytes <= here.card.usable < sharded(here, setting, 2, found.offloaded - 1).bytes
    part = here.of(setting).parts.weights / here.shape.layers / 2
    assert found.copied == pytest.approx(2 * found.offloaded * part, rel=0.05)
    assert found.copied / 2 < found.host < found.copied
    assert found.words == f"shard, {found.offloaded} layers on the host (--offload-layers {found.offloaded})"
    assert cards_needed(here, setting) == 4


@pytest.mark.parametrize("key", ["full-bfloat16", "full-in-backward", "lora", "qlora"])
def test_each_further_card_holds_less_and_none_less_than_its_part(key: str) -> None:
    here, setting = case("llama-2-70b", 2048, "h100"), how(key)
    before = here.of(setting).peak
    weights = here.of(setting).parts.weights
    for count in (2, 4, 8, 64):
        found = sharded(here, setting, count)
        assert weights / count < found.bytes < before
        before = found.bytes


def test_what_is_sent_follows_from_what_is_gathered_and_summed() -> None:
    here = case("llama-2-7b", 2048, "h100")
    trained = here.of(how("lora")).trained
    whole = [laid_out(here, how("lora"), Cluster(gpus=n), "replicate") for n in (1, 4)]
    assert [found.within for found in whole] == [0, 2 * 3 * 4 * trained // 4]
    assert [found.bytes - here.of(how("lora")).peak for found in whole] == [0, NCCL_BYTES]
    one, four = (sharded(case("llama-2-7b", 2048, "h100", n), how("lora"), 2) for n in (1, 4))
    adapter = 2 * 4 * trained // 2
    assert four.within - adapter == pytest.approx(4 * (one.within - adapter), abs=4)


def test_a_rank_alone_takes_what_the_plan_of_one_card_says() -> None:
    here = case("llama-2-7b", 2048, "h100")
    for key in ("full-bfloat16", "qlora"):
        alone = here.of(how(key))
        assert of_one_rank(alone, here.shape, here.load, Split(shards=1)) is alone


def test_plans_are_within_five_percent_of_simulated_steps() -> None:
    simulated = json.loads(SIMULATED.read_text(encoding="utf-8"))
    assert {row.name for row in bench.rows()} == set(simulated)
    for row in bench.rows():
        plan, figures = bench.planned(row), simulated[row.name]
        assert plan["planned"] == pytest.approx(figures["peak"], rel=0.05), row.name
        for where in ("within", "between"):
            assert plan[f"planned_{where}"] == pytest.approx(figures[where], rel=0.001), row.name
        assert {name: figures[name] for name in plan} == plan, f"{row.name}: run python bench/ranks.py --plan"


def test_the_page_has_the_plans_of_what_the_field_trains() -> None:
    page = PAGE.read_text(encoding="utf-8")
    simulated = json.loads(SIMULATED.read_text(encoding="utf-8"))
    for begin, end, written in (
        (bench.LAYOUTS, bench.LAYOUTS_END, bench.layouts()), (bench.BEGIN, bench.END, bench.table(simulated)),
    ):  # fmt: skip
        assert page.split(begin)[1].split(end)[0].strip() == written.strip(), "run python bench/ranks.py --plan"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


def test_a_plan_over_cards_says_layout_bytes_and_what_is_sent() -> None:
    asked = ("llama-2-70b", "--gpu", "a100-80gb", "--gpus", "8", "--max-length", "1024", "--activation-checkpointing")
    found = run(*asked)
    assert found.exit_code == 0, found.output
    assert "on 8 x NVIDIA A100" in found.output
    rows = [line for line in found.output.splitlines() if "shard" in line or "does not fit" in line]
    assert len(rows) >= 4, found.output
    (plan,) = json.loads(run(*asked, "--json").stdout)["plans"]
    lora = next(row for row in plan["methods"] if row["method"] == "lora")
    assert lora["layout"]["layout"] == "shard"
    assert lora["layout"]["cards"] == 8
    assert lora["layout"]["bytes_per_card"] > 0
    assert lora["layout"]["sent_between_nodes_bytes_per_step"] == 0


def test_a_plan_over_nodes_says_what_goes_between_them_and_python_says_the_same() -> None:
    asked = ("llama-2-70b", "--gpu", "a100-80gb", "--gpus", "8", "--nodes", "2", "--max-length", "1024")
    found = run(*asked, "--activation-checkpointing", "--batch-size", "64")
    assert found.exit_code == 0, found.output
    assert "on 2 nodes of 8 x NVIDIA A100" in found.output
    assert "hybrid" in found.output
    assert "to other" in found.output  # a narrow terminal has "nodes" in the next line
    # torchrun's names mean the same
    asked = ("llama-2-70b", "--gpu", "a100-80gb", "--nproc-per-node", "8", "--nnodes", "2", "--max-length", "1024")
    said = json.loads(run(*asked, "--activation-checkpointing", "--batch-size", "64", "--json").stdout)
    assert (said["gpus"], said["nodes"]) == (8, 2)
    lora = next(row for row in said["plans"][0]["methods"] if row["method"] == "lora")["layout"]
    assert (lora["layout"], lora["cards"]) == ("hybrid", 16)
    assert 0 < lora["sent_between_nodes_bytes_per_step"] < lora["sent_within_node_bytes_per_step"] / 100
    assert lora["micro_batch_tokens"] * lora["micro_batches_per_card"] == 4 * 1024  # a sixteenth of the step's examples
    python = graft.plan(
        "llama-2-70b", gpu="a100-80gb", gpus=8, nodes=2, max_length=1024, activation_checkpointing=True, batch_size=64
    )
    assert python.to_json() == said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 0}, "nodes"),
        ({"nodes": 600, "gpus": 8}, "--nodes 600 with --gpus 8 on each are 4,800 GPUs, and a plan takes at most 4,096"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PlanConfig.build({"models": ["llama-2-7b"], "gpu": "h100", **options})


def test_several_cards_that_are_no_gpus_are_refused() -> None:
    from graftlm.commands.plan import plan

    with pytest.raises(ConfigError, match="--gpus 2 is for GPUs, found this machine's processor"):
        plan(PlanConfig.build({"models": ["llama-2-7b"], "gpu": "cpu", "gpus": 2}))


def test_nodes_without_gpus_are_refused() -> None:
    from graftlm.commands.plan import plan

    with pytest.raises(ConfigError, match="--nodes 2 is for GPUs, found this machine's processor"):
        plan(PlanConfig.build({"models": ["llama-2-7b"], "gpu": "cpu", "nodes": 2}))


def test_a_head_is_gathered_in_its_own_type_beside_the_last_layer_s_buffer() -> None:
    here = case("llama-3.1-8b", 512, "h100")
    shape = here.shape
    head = shape.vocabulary * shape.width * 2  # 16 bits beside NF4
    found = of_one_rank(here.of(how("qlora")), shape, here.load, Split(shards=2))
    layer = SplitSizes.of(shape, found.setting).layer
    assert found.moments["head"].gathered == 2 * head + layer
    assert found.moments["loss"].gathered == head + layer


def test_rows_on_the_host_take_pinned_blocks_of_powers_of_two() -> None:
    here, setting = case("llama-2-7b", 2048, "h100"), how("lora")
    layer = {name: 2 * out * inner // 2 for name, (out, inner) in LLAMA_2_7B.items()}  # bytes of a rank's rows of two
    blocks = sum(1 << (size - 1).bit_length() for size in layer.values())
    assert sharded(here, setting, 2, 3).host == 3 * blocks
    assert blocks > sum(layer.values())
    full = replace(
        how("full-8bit"), compute_dtype="bfloat16"
    )  # gradients in 16 bits, and moments, which are not pinned
    states = 2 * (1 + 4 / 256) * sum(layer.values()) / 2
    assert sharded(here, full, 2, 3).host == pytest.approx(3 * (2 * blocks + states), abs=3)


def test_offloaded_states_of_an_adapter_are_whole_on_each_rank_and_those_of_full_training_are_split() -> None:
    for key, shards in (("lora", 1), ("full-bfloat16", 2)):
        here, setting = case("llama-2-7b", 2048, "h100"), replace(how(key), offload_optimizer=True)
        alone = here.of(setting)
        assert alone.host == 2 * 4 * alone.trained
        assert of_one_rank(alone, here.shape, here.load, Split(shards=2)).host == alone.host // shards


@pytest.mark.parametrize("key", ["qlora", "full-8bit"])
def test_answers_gather_layers_as_a_forward_pass_does_and_leave_no_gradients(key: str) -> None:
    here, setting = case("llama-2-70b", 2048, "h100"), how(key)
    answers = AnswerLoad(prompts=16, longest=4096)
    adapter = here.adapter_shape(setting)
    alone = requirement(here.shape, setting, adapter, here.load, "cuda", fused=True, answers=answers)
    found = of_one_rank(alone, here.shape, here.load, Split(shards=8))
    sizes, while_answering = SplitSizes.of(here.shape, setting), found.moments["answers"]
    assert while_answering.gathered == max(3 * sizes.layer, sizes.layer + 2 * sizes.head, 2 * sizes.embedding)
    assert (while_answering.weights, while_answering.gradients) == (found.moments["loss"].weights, 0)
    assert while_answering.optimizer == found.moments["update"].optimizer
    assert while_answering.kv_cache == alone.moments["answers"].kv_cache > 0
    without = requirement(here.shape, setting, adapter, here.load, "cuda", fused=True)
    assert "answers" not in of_one_rank(without, here.shape, here.load, Split(shards=8)).moments


def test_a_gguf_file_s_layers_are_split_and_its_embedding_and_head_are_whole_on_each_rank() -> None:
    here, setting = case("llama-2-70b", 1024, "rtx-4090"), replace(how("lora"), precision="gguf")
    here = replace(here, shape=replace(here.shape, gguf_bytes=39_000_000_000))
    sizes = SplitSizes.of(here.shape, setting)
    outer = 39_000_000_000 * (here.shape.embedding + here.shape.head) / here.shape.parameters
    assert (sizes.embedding, sizes.head) == (0, 0)
    assert outer < sizes.whole < 1.1 * outer
    assert sizes.layers * sizes.layer + sizes.whole == pytest.approx(39_000_000_000, abs=100)
    found = of_one_rank(here.of(setting), here.shape, here.load, Split(shards=4))
    assert found.loading < 39_000_000_000 / 3
    assert layout_names(setting, Cluster(gpus=2, nodes=2)) == ["replicate", "hybrid", "shard"]
    layout = layout_of(here, setting, Cluster(gpus=4))
    assert layout is not None
    assert (layout.name, layout.offloaded) == ("shard", 0)
