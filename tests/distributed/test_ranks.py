"""A run over several ranks is the run of one rank: the same losses and weights, and every rank ends it in the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
import torch
from forked import Forks
from safetensors.torch import load_file

from graftlm.files import atomic_folder
from graftlm.training.run_files import read_metrics

FULL = {"method": "full", "base_precision": "float32", "learning_rate": 1e-3}


def over(forks: Forks, count: int, place: Path, name: str = "ranks", **changes: Any) -> list[dict[str, Any]]:
    """What each rank of a tiny run in `place`/`name` returned or raised."""
    how = {key: changes.pop(key) for key in ("stop_after", "other", "bug", "fault", "nodes") if key in changes}
    config = {**tiny_run.options(place, **changes), "out": str(place / name)}
    return forks.run("run", count, place / f"{name}-ended-{len(list(place.iterdir()))}", config=config, **how)


def alone(place: Path, name: str = "alone", **changes: Any) -> dict[str, Any]:
    return tiny_run.train(place, **{**changes, "out": str(place / name)})


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] != "event"]


def assert_same(one: Path, other: Path, rel: float = 2e-5) -> None:
    """Losses, norms and weights of two runs are equal up to the order of sums."""
    for a, b in zip(lines_of(one), lines_of(other), strict=True):
        assert (a["step"], a["kind"], a["num_tokens"]) == (b["step"], b["kind"], b["num_tokens"])
        for key in {"loss", "eval_loss", "grad_norm", "eval_score"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=rel), (a, b)
    (file,) = [*one.glob("adapter/adapter_model.safetensors"), *one.glob("model/model.safetensors")]
    weights, others = load_file(file), load_file(other / file.relative_to(one))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, {"lora_dropout": 0.2}),
        (2, {"method": "qlora", "base_precision": "nf4", "dora": True}),
        (2, {"activation_checkpointing": True, "modules_to_save": ["embeddings"]}),
        (3, FULL),
        (2, {**FULL, "optimizer": "adamw-8bit"}),
        (2, {"batch_size": 2, "score": "exact-match", "score_max_tokens": 4}),
    ],
    ids=["dropout", "qlora with dora", "checkpointing", "full", "full in 8 bits", "scored"],
)
def test_a_run_over_ranks_has_the_losses_and_weights_of_one_rank(
    forks: Forks, count: int, options: dict[str, Any], tmp_path: Path
) -> None:
    before = alone(tmp_path, **options)
    ended = over(forks, count, tmp_path, **options)
    assert [found.get("found") for found in ended[1:]] == [{}] * (count - 1), ended
    assert ended[0]["found"]["num_tokens"] == before["num_tokens"]
    assert ended[0]["found"]["eval_loss_after"] == pytest.approx(before["eval_loss_after"], rel=2e-5)
    assert_same(tmp_path / "alone", tmp_path / "ranks")


def test_experts_that_no_token_of_a_rank_chose_are_trained_by_the_others(forks: Forks, tmp_path: Path) -> None:
    options = {"model": str(tiny.folder("mixtral")), "batch_size": 2, "eval_data": None}
    options["epsilon"] = 1e-3  # else the step of a gradient that is all but 0 is its rounding, made large
    alone(tmp_path, **options)
    over(forks, 2, tmp_path, **options)
    assert_same(tmp_path / "alone", tmp_path / "ranks")


def test_a_step_with_fewer_examples_than_ranks_is_taken_by_some_of_them(forks: Forks, tmp_path: Path) -> None:
    options = {"steps": None, "epochs": 1, "batch_size": 11, "eval_data": None}  # 12 rows: 11 and 1
    alone(tmp_path, **options)
    over(forks, 3, tmp_path, **options)
    assert_same(tmp_path / "alone", tmp_path / "ranks")


def test_a_run_goes_on_with_another_number_of_ranks(forks: Forks, tmp_path: Path) -> None:
    alone(tmp_path)
    ended = over(forks, 2, tmp_path, stop_after=2)
    assert [found["kind"] for found in ended] == ["Stopped", "Stopped"], ended
    assert "stopped after step 2 of 6" in ended[0]["error"]
    over(forks, 3, tmp_path, resume=True)
    assert_same(tmp_path / "alone", tmp_path / "ranks")


def test_each_rank_reads_a_share_of_a_checkpoint_and_all_find_the_same(forks: Forks, tmp_path: Path) -> None:
    for step in ("000001", "000002"):
        with atomic_folder(tmp_path / "checkpoints" / step, manifest=True) as folder:
            for i in range(5):
                (folder / f"{i}.bin").write_bytes(bytes(1000 + 300 * i))
    (tmp_path / "checkpoints" / "000002" / "3.bin").write_bytes(b"?" * 1900)
    ended = [one["found"] for one in forks.run("look_for_the_newest", 3, tmp_path / "look", run=str(tmp_path))]
    problems = ["000002: 3.bin has changed since it was written"]
    assert [(one["found"], one["problems"]) for one in ended] == [("000001", problems)] * 3
    read = [name for one in ended for name in one["read"]]
    assert sorted(read) == sorted(set(read))  # none twice
    assert {name for name in read if name.startswith("000001")} == {f"000001/{i}.bin" for i in range(5)}
    assert all(sum(name.startswith("000001") for name in one["read"]) < 3 for one in ended)

    (tmp_path / "checkpoints" / "000001" / "0.bin").unlink()
    ended = forks.run("look_for_the_newest", 3, tmp_path / "again", run=str(tmp_path))
    assert {(one["kind"], one["everywhere"]) for one in ended} == {("RunError", True)}
    assert "000001: 0.bin is missing" in ended[2]["error"]


def test_ranks_of_a_run_that_is_stopped_leave_once_the_first_has_saved(forks: Forks, tmp_path: Path) -> None:
    config = {**tiny_run.options(tmp_path), "out": str(tmp_path / "ranks")}
    ended = forks.run("stop_while_the_first_saves_slowly", 2, tmp_path / "ended", config=config)
    assert [found["found"] for found in ended] == [["000002"]] * 2, ended


def test_a_loss_that_is_not_finite_on_one_rank_ends_all_with_the_same_words(forks: Forks, tmp_path: Path) -> None:
    ended = over(forks, 2, tmp_path, learning_rate=1e30, max_grad_norm=0, eval_data=None)
    assert [found["kind"] for found in ended] == ["Diverged", "Diverged"]
    assert ended[1]["error"] in ended[0]["error"]  # the first adds the checkpoint to go on from
    assert "loss nan at step 2" in ended[1]["error"]


def test_what_every_rank_finds_is_said_once_and_what_one_finds_has_its_number(forks: Forks, tmp_path: Path) -> None:
    bad = tiny_run.write_rows(tmp_path / "bad.jsonl", [{"prompt": "a"}])
    ended = over(forks, 2, tmp_path, data=[str(bad)])
    assert [found["kind"] for found in ended] == ["DataError"] * 2
    assert ended[0]["error"] == ended[1]["error"]
    assert not ended[0]["error"].startswith("rank")
    ended = forks.run("one_fails", 3, tmp_path / "one")
    assert {(found["kind"], found["error"], found["everywhere"]) for found in ended} == {
        ("DataError", "rank 1 of 3: a file is gone", True)
    }


def test_an_output_folder_that_is_taken_is_refused_on_every_rank(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "notes.txt").write_text("mine")
    ended = over(forks, 2, tmp_path)
    assert {found["error"] for found in ended} == {found["error"] for found in ended[:1]}
    assert "already holds other files" in ended[1]["error"]
    assert (tmp_path / "ranks" / "notes.txt").read_text() == "mine"


def test_a_rank_with_other_rows_is_named_before_anything_is_written(forks: Forks, tmp_path: Path) -> None:
    other = str(tiny_run.write_rows(tmp_path / "other.jsonl", tiny_run.rows(12, seed=5)))
    ended = over(forks, 2, tmp_path, other={"data": [other]})
    assert {found["kind"] for found in ended} == {"RunError"}, ended
    assert all(found["error"].startswith("rank 1 of 2: data is '") for found in ended)
    assert "every rank needs the same options, the same files" in ended[0]["error"]
    assert not (tmp_path / "ranks" / "config.json").exists()
