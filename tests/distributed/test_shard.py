"""A model that is split over ranks trains as the model of one rank: the same losses and weights, a part of it on each rank.

Also what is saved of it: any number of ranks goes on from it, and what is missing or damaged is refused.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_gguf
import tiny_run
import torch
from forked import Forks
from safetensors.torch import save_file
from test_ranks import FULL, alone, assert_same, lines_of, over
from transformers import AutoModelForCausalLM

from graftlm.adapters.gguf import write_gguf
from graftlm.base.modules import StoredLinear
from graftlm.commands.ranks import train_over_ranks
from graftlm.config import TrainConfig
from graftlm.distributed.group import Ranks
from graftlm.distributed.shard import rows_of
from graftlm.errors import ConfigError, RunError
from graftlm.files import find_damage
from graftlm.planning.hardware import card
from graftlm.training import memory
from graftlm.training.saved_tensors import SavedTensors

SPLIT = {"layout": "shard"}


def of_first(ended: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary of a run whose other ranks came to their end."""
    assert [found.get("found") for found in ended[1:]] == [{}] * (len(ended) - 1), ended
    return ended[0]["found"]


QLORA = {
    "method": "qlora",
    "base_precision": "nf4",
    "dora": True,
    "activation_checkpointing": True,
    "lora_dropout": 0.2,
}
IN_BACKWARD = {**FULL, "optimizer_in_backward": True, "max_grad_norm": 0}


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, {**QLORA, "modules_to_save": ["embeddings"], "steps": 4, "eval_every": 4}),
        (2, {**IN_BACKWARD, "batch_size": 3, "steps": 4, "eval_data": None}),
        pytest.param(2, {"base_precision": "int8", "lora_dropout": 0.2}, marks=pytest.mark.prove),
        pytest.param(3, {**IN_BACKWARD, "batch_size": 4}, marks=pytest.mark.prove),
        pytest.param(3, {**FULL, "activation_checkpointing": True, "batch_size": 4}, marks=pytest.mark.prove),
        pytest.param(3, {**FULL, "micro_batch_tokens": 20}, marks=pytest.mark.prove),
    ],
    ids=["qlora", "in backward", "int8", "in backward on three", "checkpointing", "uneven passes"],
)
def test_a_split_run_has_the_losses_and_weights_of_one_rank(
    forks: Forks, count: int, options: dict[str, Any], tmp_path: Path
) -> None:
    before = alone(tmp_path, **options)
    summary = of_first(over(forks, count, tmp_path, **SPLIT, **options))
    for key in ("num_tokens", "base_bytes", "base_parameters", "trainable_parameters"):
        assert summary[key] == before[key]
    assert_same(tmp_path / "alone", tmp_path / "ranks")


@pytest.mark.prove
@pytest.mark.parametrize("precision", ["gguf", "nf4"])
def test_a_model_of_a_gguf_file_is_split_and_trains_as_on_one_rank(
    forks: Forks, precision: str, tmp_path: Path
) -> None:
    write_gguf(tiny_gguf.folder(tmp_path / "model", "llama", **tiny_gguf.MODELS["llama"]), tmp_path / "m.gguf", "q8_0")
    options = {"model": str(tmp_path / "m.gguf"), "base_precision": precision, "eval_data": None, "steps": 3}
    alone(tmp_path, **options)
    of_first(over(forks, 2, tmp_path, **SPLIT, **options, offload_layers=1))
    assert_same(tmp_path / "alone", tmp_path / "ranks")


# mixtral: experts; qwen3: tied; gemma2: capped logits; gpt2: transposed weights; opt, falcon: layers that return views
FAMILIES = ("qwen3", "gemma2", "gpt2", "opt", "falcon", "phi3")


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("mixtral", "full"),
        *(pytest.param(family, method, marks=pytest.mark.prove) for family in FAMILIES for method in ("lora", "full")),
    ],
)
def test_a_split_model_of_any_family_trains_as_on_one_rank(
    forks: Forks, family: str, method: str, tmp_path: Path
) -> None:
    options = {"model": str(tiny.folder(family)), "batch_size": 2, "eval_data": None, "epsilon": 1e-3, "steps": 4}
    options |= FULL if method == "full" else {}
    alone(tmp_path, **options)
    of_first(over(forks, 2, tmp_path, **SPLIT, **options))
    assert_same(tmp_path / "alone", tmp_path / "ranks")
    if method == "full":
        AutoModelForCausalLM.from_pretrained(tmp_path / "ranks" / "model")


def test_a_split_run_goes_on_with_other_ranks_and_layouts_from_the_newest_whole_checkpoint(
    forks: Forks, tmp_path: Path
) -> None:
    options = {**FULL, "save_every": 1, "keep_checkpoints": 9, "eval_data": None}
    alone(tmp_path, **options)
    ended = over(forks, 2, tmp_path, stop_after=4, **SPLIT, **options)
    assert [found["kind"] for found in ended] == ["Stopped", "Stopped"], ended
    damaged = tmp_path / "damaged"
    shutil.copytree(tmp_path / "ranks", damaged)
    of_first(over(forks, 3, tmp_path, resume=True, **SPLIT, **options))
    assert_same(tmp_path / "alone", tmp_path / "ranks")

    (damaged / "checkpoints" / "000004" / "rows-00002-of-00002.safetensors").unlink()
    changed = damaged / "checkpoints" / "000003" / "rows-00001-of-00002.safetensors"
    changed.write_bytes(changed.read_bytes()[:-1] + b"?")
    _, said = tiny_run.heard(
        tmp_path, **{**options, "out": str(damaged), "resume": True}
    )  # one rank reads the rows of two
    assert "passed over the damaged checkpoint 000004: rows-00002-of-00002.safetensors is missing" in " ".join(
        said.split()
    )
    assert "going on from" in said
    assert_same(tmp_path / "alone", damaged)


@pytest.mark.prove
@pytest.mark.parametrize("bug", ["averages", "leaves_vectors_apart", "steps_whole_tensors", "makes_no_blank_pass"])
def test_a_bug_put_in_on_purpose_is_noticed(forks: Forks, bug: str, tmp_path: Path) -> None:
    options = {**FULL, "batch_size": 3, "micro_batch_tokens": 20, "eval_data": None, "steps": 3}
    alone(tmp_path, **options)
    of_first(over(forks, 2, tmp_path, **SPLIT, **options))
    assert_same(tmp_path / "alone", tmp_path / "ranks")

    def wrong() -> None:
        of_first(over(forks, 2, tmp_path, "wrong", bug=bug, **SPLIT, **options))
        assert_same(tmp_path / "alone", tmp_path / "wrong")

    with pytest.raises(AssertionError):
        wrong()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("fills_the_disk_of_the_last_rank", ("rank 1 of 2: ", "No space left")),
        pytest.param("cannot_rename_its_folder", ("rank 0 of 2: ", "Input/output error"), marks=pytest.mark.prove),
    ],
)
def test_a_rank_that_cannot_write_is_said_by_all_and_leaves_the_checkpoint_before(
    forks: Forks, fault: str, said: tuple[str, str], tmp_path: Path
) -> None:
    options = {**FULL, "save_every": 1, "eval_data": None, "steps": 3}
    ended = over(forks, 2, tmp_path, bug=fault, **SPLIT, **options)
    assert {found["kind"] for found in ended} == {"RunError"}, ended
    assert all(part in found["error"] for found in ended for part in said), ended
    left = [path.name for path in (tmp_path / "ranks" / "checkpoints").iterdir()]
    assert left == ["000001"]
    assert find_damage(tmp_path / "ranks" / "checkpoints" / "000001") is None


@pytest.mark.parametrize("fault", ["missing", "cut", "other rows", "more ranks"])
def test_rows_that_are_not_all_there_are_refused(fault: str, tmp_path: Path) -> None:
    def write(rank: int, **tensors: torch.Tensor) -> None:
        save_file(tensors, tmp_path / f"rows-{rank:05d}-of-00002.safetensors")

    save_file({"norm": torch.ones(3)}, tmp_path / "trainable.safetensors")
    save_file({}, tmp_path / "optimizer.safetensors")
    weight = torch.arange(35.0).view(5, 7)
    moments = {"mean.w": weight.reshape(-1), "square.w": weight.reshape(-1) + 1}
    write(1, **{"value.w": weight[:3].clone()}, **{key: t[:21].clone() for key, t in moments.items()})
    write(2, **{"value.w": weight[3:].clone()}, **{key: t[21:].clone() for key, t in moments.items()})
    saved = SavedTensors(tmp_path, 2)
    assert (saved.names, saved.kind("w"), saved.with_moments) == ({"norm", "w"}, ((5, 7), "float32"), {"w"})
    assert torch.equal(saved.own_rows("w", weight), weight)
    assert torch.equal(saved.own_moments("w", weight)["square"], moments["square.w"])
    second = tmp_path / "rows-00002-of-00002.safetensors"
    if fault == "missing":
        second.unlink()
    elif fault == "cut":
        second.write_bytes(second.read_bytes()[:-4])
    elif fault == "other rows":
        write(2, **{"value.w": weight[3:, :6].clone()})
    with pytest.raises(RunError):
        SavedTensors(tmp_path, 3 if fault == "more ranks" else 2)


def test_each_rank_steps_its_rows_with_the_bits_of_the_whole_parameter(forks: Forks, tmp_path: Path) -> None:
    ended = forks.run("optimizer_of_rows", 3, tmp_path / "steps")
    assert [found["found"]["same"] for found in ended] == [["wide", "odd", "few"]] * 3, ended
    # also of "few", of which the last rank has no row: a checkpoint asks all ranks about all states
    assert [found["found"]["states"] for found in ended] == [["few", "odd", "wide"]] * 3
    forgotten = forks.run("optimizer_of_rows", 3, tmp_path / "forgotten", forgets_the_place=True)
    assert "wide" not in forgotten[2]["found"]["same"]  # else the test above could not fail


def test_what_goes_over_the_wire_is_the_bound_and_a_rank_holds_its_part(forks: Forks, tmp_path: Path) -> None:
    found = forks.run("traffic_of_a_pass", 2, tmp_path / "wire", model=str(tiny_run.folder()))[0]["found"]
    # two gathers of each layer, one of the embedding and of the head; each layer's gradient once, in float32
    assert found["gathered"] == 2 * found["layers"] + found["outer"]
    assert found["scattered"] == found["layers"] + found["outer"]
    assert found["kept"] == pytest.approx((found["layers"] + found["outer"]) / 2, rel=0.02)


def test_an_error_is_said_once_if_all_ranks_meet_it_and_ends_a_rank_that_meets_it_alone(
    forks: Forks, tmp_path: Path
) -> None:
    bad = tiny_run.write_rows(tmp_path / "bad.jsonl", [{"prompt": "a"}])
    ended = over(forks, 2, tmp_path, data=[str(bad)], **SPLIT)  # found when weights are split already
    assert [(found["kind"], found["everywhere"]) for found in ended] == [("DataError", True)] * 2
    assert ended[0]["error"] == ended[1]["error"]
    ended = forks.run("one_fails_while_passes_are_made", 2, tmp_path / "one", all_fail=False)
    assert (ended[0], ended[1]["error"], ended[1]["everywhere"]) == ({"found": None}, "a file is gone", False)
    ended = forks.run("one_fails_while_passes_are_made", 2, tmp_path / "all", all_fail=True)
    assert [found["everywhere"] for found in ended] == [True, True]


def test_a_loss_that_is_not_finite_ends_every_rank_of_a_split_run_alike(forks: Forks, tmp_path: Path) -> None:
    ended = over(forks, 2, tmp_path, **{**FULL, **SPLIT, "learning_rate": 1e30, "max_grad_norm": 0, "eval_data": None})
    assert [found["kind"] for found in ended] == ["Diverged", "Diverged"], ended
    assert ended[1]["error"] in ended[0]["error"]


def test_a_stored_weight_keeps_a_rank_s_rows_alone_once_it_is_split() -> None:
    for precision in ("bfloat16", "int8", "nf4"):
        rows = []
        for rank in range(3):
            module = StoredLinear((7, 64), precision)
            module.set_weight(torch.arange(448.0).view(7, 64))
            value = module.value
            whole = {"weight": value} if isinstance(value, torch.Tensor) else value.tensors()
            module.split(Ranks(rank, 3))
            rows.append({piece.name: piece.own for piece in module.pieces})
            assert module.nbytes == sum(t.nbytes for t in whole.values())
            assert all(parameter.is_meta for parameter in module.parameters())
            assert module.dense is not None or all(t.is_meta or not t.ndim for t in module._form.tensors().values())
        for name in rows[0]:
            assert torch.equal(torch.cat([own[name] for own in rows]), whole[name])


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, {"bug": "samples_other_tokens_on_the_last_rank"}),
        pytest.param(4, {**FULL, "layout": "hybrid", "nodes": 2}, marks=pytest.mark.prove),
        pytest.param(2, {**QLORA, "model": "qwen3", "epsilon": 1e-3}, marks=pytest.mark.prove),
    ],
    ids=["lora", "full over nodes", "tied"],
)
def test_a_split_model_is_scored_by_the_answers_of_the_whole_one(
    forks: Forks, count: int, options: dict[str, Any], tmp_path: Path
) -> None:
    points = "def points(answers, references):\n    return 1 + sum(map(ord, ''.join(answers))) % 997\n"
    (tmp_path / "points.py").write_text(points)
    options = {"score": f"{tmp_path}/points.py:points", "score_max_tokens": 6, "batch_size": 4, "steps": 3, **options}
    if "model" in options:
        options["model"] = str(tiny.folder(options["model"]))
    own = {key: options.pop(key) for key in ("bug", "layout", "nodes") if key in options}
    alone(tmp_path, **options)
    of_first(over(forks, count, tmp_path, **{**SPLIT, **own}, **options))
    scores = [line["eval_score"] for line in lines_of(tmp_path / "ranks") if line["kind"] == "eval"]
    assert len(set(scores)) > 1 < min(scores)
    assert scores == [line["eval_score"] for line in lines_of(tmp_path / "alone") if line["kind"] == "eval"]
    assert_same(tmp_path / "alone", tmp_path / "ranks")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 1}, "--layout shard splits a model over ranks, and there is one"),
    ],
)
def test_what_a_split_run_cannot_do_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train_over_ranks(TrainConfig.build(tiny_run.options(tmp_path, **SPLIT, **options)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "gpu", "whole"),
    [("lora", "A100 80GB", True), ("lora", "T4", False), ("qlora", "T4", True), ("full", "A100 80GB", False)],
)
def test_auto_splits_a_model_that_a_rank_has_no_room_for(
    method: str, gpu: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "local", lambda device: card(gpu))
    options = {"model": "llama-3.1-8b", "method": method, "compute_dtype": "bfloat16", "base_precision": None}
    config = TrainConfig.build({k: v for k, v in tiny_run.options(tmp_path, **options).items() if v is not None})
    assert memory.fits(config, config.stored_precision, torch.device("cuda"), 2) == whole


def test_auto_is_the_same_on_every_rank(forks: Forks, tmp_path: Path) -> None:
    options = {**FULL, "steps": 2, "eval_data": None, "bug": "has_no_room_on_the_last_rank"}
    of_first(over(forks, 2, tmp_path, **options))
    assert json.loads((tmp_path / "ranks" / "config.json").read_text())["layout"] == "shard"


@pytest.mark.parametrize("count", [0, 1, 2, 5, 7, 8])
def test_rows_go_to_ranks_in_order_as_fsdp_splits_them(count: int) -> None:
    for size in (1, 2, 3, 4):
        bounds = [rows_of(count, Ranks(rank, size)) for rank in range(size)]
        chunks = [len(chunk) for chunk in torch.arange(count).chunk(size)] if count else []
        assert [b - a for a, b in bounds] == chunks + [0] * (size - len(chunks))
        assert [i for a, b in bounds for i in range(a, b)] == list(range(count))
