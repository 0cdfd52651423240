"""From options to a run folder: what is written, what is kept, and that a run can stop anywhere and go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
import torch
from safetensors.torch import load_file
from tiny_run import adapter_bytes, lines, train, without

from graftlm.base.loading import load_tokenizer
from graftlm.base.structure import ModelStructure
from graftlm.config import TrainConfig
from graftlm.errors import ConfigError, DataError, ModelError, RunError
from graftlm.files import find_damage, sha256

# ---- the run folder -----------------------------------------------------------------------------------------------


def test_a_run_leaves_every_file_with_its_fields(tmp_path: Path) -> None:
    summary = train(tmp_path)
    out = tmp_path / "run"
    config = json.loads((out / "config.json").read_text())
    assert set(config) == set(TrainConfig.model_fields)
    assert (config["rank"], config["alpha"], config["steps"], config["epochs"]) == (3, 7.0, 6, None)
    assert config["micro_batch_tokens"] == 4096
    data = json.loads((out / "data.json").read_text())
    assert data["template_date"] == "2026-01-01"
    assert data["train"]["rows"] == 12
    assert data["eval"]["rows"] == 5
    assert {"digest", "tokens", "target_tokens"} <= set(data["train"])
    environment = json.loads((out / "environment.json").read_text())
    assert {"versions", "machine", "cpus", "started"} <= set(environment)
    measured = json.loads((out / "plan.json").read_text())["measured"]
    assert measured["peak_memory_bytes"] > 0
    assert json.loads((out / "best.json").read_text())["step"] == summary["saved_step"]
    manifest = json.loads((out / "adapter" / "graft.json").read_text())
    assert {
        "base",
        "data",
        "evaluation",
        "method",
        "seed",
        "template",
        "tensors",
        "tokenizer_digest",
        "versions",
    } <= set(manifest)
    assert manifest["evaluation"]["after"] == summary["eval_loss_after"]
    assert (out / "adapter" / "adapter_config.json").is_file()
    assert not list(out.rglob(".*")), "nothing half-written and no lock is left"


def test_metrics_have_a_line_for_each_step_and_evaluation(tmp_path: Path) -> None:
    summary = train(tmp_path)
    found = lines(tmp_path / "run" / "metrics.jsonl")
    steps = [line for line in found if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        assert {
            "loss",
            "learning_rate",
            "grad_norm",
            "tokens",
            "target_tokens",
            "seconds",
            "num_tokens",
            "epoch",
        } <= set(line)
    assert [line["step"] for line in found if line["kind"] == "eval"] == [0, 2, 4, 6]
    assert sum(line["tokens"] for line in steps) == summary["num_tokens"]
    assert sum(line["target_tokens"] for line in steps) == summary["target_tokens"]


def test_evaluation_rows_add_up_to_the_losses_in_the_metrics(tmp_path: Path) -> None:
    summary = train(tmp_path)
    out = tmp_path / "run"
    rows = lines(out / "evaluation.jsonl")
    assert [row["row"].rpartition("/")[2] for row in rows] == [f"valid.jsonl:{i}" for i in range(1, 6)]
    evaluated = {line["step"]: line["eval_loss"] for line in lines(out / "metrics.jsonl") if line["kind"] == "eval"}
    tokens = sum(row["target_tokens"] for row in rows)
    assert sum(row["loss_before"] for row in rows) / tokens == pytest.approx(evaluated[0], rel=1e-12)
    assert sum(row["loss_after"] for row in rows) / tokens == pytest.approx(evaluated[summary["saved_step"]], rel=1e-12)


def test_the_saved_adapter_is_the_best_steps(tmp_path: Path) -> None:
    summary = train(tmp_path, **tiny_run.contrary(tmp_path))
    out = tmp_path / "run"
    evaluated = {line["step"]: line["eval_loss"] for line in lines(out / "metrics.jsonl") if line["kind"] == "eval"}
    best = min((loss, step) for step, loss in evaluated.items() if step > 0)[1]
    assert best < 6, "otherwise this test shows nothing"
    assert summary["saved_step"] == best
    assert summary["eval_loss_after"] == evaluated[best]
    assert json.loads((out / "best.json").read_text()) == {"step": best, "eval_loss": evaluated[best]}
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    kept = load_file(out / "checkpoints" / f"{best:06d}" / "trainable.safetensors")
    assert all(torch.equal(saved[f"base_model.model.{name}"], tensor) for name, tensor in kept.items())


def test_training_that_only_makes_it_worse_saves_what_was_trained_and_says_so(tmp_path: Path) -> None:
    summary = train(tmp_path, **{**tiny_run.contrary(tmp_path), "learning_rate": 3.0, "eval_every": 3})
    assert summary["eval_loss_after"] > summary["eval_loss_before"]
    assert summary["saved_step"] > 0
    rows = lines(tmp_path / "run" / "evaluation.jsonl")
    total = sum(row["loss_after"] for row in rows) / sum(row["target_tokens"] for row in rows)
    assert total == pytest.approx(summary["eval_loss_after"])


def test_without_held_out_rows_the_last_step_is_saved(tmp_path: Path) -> None:
    summary = train(tmp_path, eval_data=None)
    assert (summary["saved_step"], summary["eval_loss_before"], summary["eval_loss_after"]) == (6, None, None)
    assert not (tmp_path / "run" / "evaluation.jsonl").exists()
    assert not (tmp_path / "run" / "best.json").exists()


def test_full_training_writes_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    summary = train(tmp_path, method="full", learning_rate=1e-3)
    folder = tmp_path / "run" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tiny_run.rows(5, seed=1)[2]
    ids = tokenizer(text["prompt"] + text["completion"] + "</s>", return_tensors="pt").input_ids
    prompt = len(tokenizer(text["prompt"]).input_ids)
    loss = torch.nn.functional.cross_entropy(
        model(ids).logits[0, prompt - 1 : -1], ids[0, prompt:], reduction="sum"
    ).item()
    row = lines(tmp_path / "run" / "evaluation.jsonl")[2]
    assert row["loss_after"] == pytest.approx(loss, rel=1e-4)
    assert summary["trainable_parameters"] == summary["base_parameters"]


# ---- the same result, however it is computed ------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_command_twice_gives_the_same_adapter_bytes(tmp_path: Path, dropout: float) -> None:
    train(tmp_path, out=str(tmp_path / "a"), lora_dropout=dropout)
    train(tmp_path, out=str(tmp_path / "b"), lora_dropout=dropout)
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")
    metrics = [without(lines(tmp_path / name / "metrics.jsonl"), "seconds") for name in "ab"]
    assert metrics[0] == metrics[1]


def test_the_config_a_run_saved_is_the_same_run_again(tmp_path: Path) -> None:
    train(tmp_path, learning_rate=None, alpha=None, steps=None)
    again = TrainConfig.read(tmp_path / "run" / "config.json", {"out": str(tmp_path / "again")})
    from graftlm.commands.train import train as train_command
    from graftlm.training.view import View

    train_command(again, View(quiet=True))
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "again")


def test_the_config_a_full_run_saved_is_the_same_run_again(tmp_path: Path) -> None:
    train(tmp_path, method="full", eval_data=None)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert [saved[name] for name in ("rank", "alpha", "targets", "lora_dropout", "eval_every")] == [None] * 5
    again = TrainConfig.read(tmp_path / "run" / "config.json", {"out": str(tmp_path / "again")})
    from graftlm.commands.train import train as train_command
    from graftlm.training.view import View

    train_command(again, View(quiet=True))
    name = "model/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_activation_checkpointing_that_would_do_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelStructure, "checkpoint_layers", lambda self, on, offload: 0)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM has no layers.*use a smaller --micro-batch-tokens"):
        train(tmp_path, activation_checkpointing=True)
    train(tmp_path, eval_data=None, steps=1)


def test_a_new_token_is_shown_when_it_is_generated(tmp_path: Path) -> None:
    place = tmp_path / "base"
    tiny.random_model("llama", vocab_size=tiny_run.VOCABULARY + 3, max_position_embeddings=256).save_pretrained(place)
    tiny_run.byte_tokenizer().save_pretrained(place)
    token = "<Old, mill>"
    train(tmp_path, model=str(place), trainable_tokens=[token, "a"], eval_data=None, steps=1)
    tokenizer = load_tokenizer(tmp_path / "run" / "adapter")
    ids = tokenizer(f"by {token} a</s>").input_ids
    assert ids[3] == tiny_run.VOCABULARY
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"by {token} a"
    rows = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["trainable_token_indices"]
    assert rows == [tiny_run.VOCABULARY, ids[-2]]


@pytest.mark.parametrize("change", [{"seed": 12}, {"lora_dropout": 0.2}, {"loraplus_lr_ratio": 4}, {"weight_decay": 0.5},
                                    {"warmup_ratio": 0.5}, {"lr_scheduler": "linear"}, {"rank_stabilized": True}])  # fmt: skip
def test_an_option_that_decides_the_result_changes_it(tmp_path: Path, change: dict[str, Any]) -> None:
    train(tmp_path, out=str(tmp_path / "a"), eval_data=None, steps=3)
    train(tmp_path, out=str(tmp_path / "b"), eval_data=None, steps=3, **change)
    assert adapter_bytes(tmp_path / "a") != adapter_bytes(tmp_path / "b")


def test_lora_plus_gives_b_its_own_learning_rate(tmp_path: Path) -> None:
    train(tmp_path, out=str(tmp_path / "a"), eval_data=None, steps=1, warmup_ratio=0)
    train(tmp_path, out=str(tmp_path / "b"), eval_data=None, steps=1, warmup_ratio=0, loraplus_lr_ratio=4)
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "ab")
    for name, tensor in one.items():
        ratio = 4.0 if "lora_B" in name else 1.0
        torch.testing.assert_close(other[name], tensor * ratio)


def test_a_share_of_the_training_rows_may_be_held_out(tmp_path: Path) -> None:
    tiny_run.write_rows(tmp_path / "train.jsonl", tiny_run.rows(40))
    tiny_run.write_rows(tmp_path / "valid.jsonl", [])
    train(tmp_path, eval_data="20%", steps=2)
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert data["train"]["rows"] + data["eval"]["rows"] == 40
    assert 2 <= data["eval"]["rows"] <= 16


def test_several_sources_are_mixed_by_weight(tmp_path: Path) -> None:
    more = tiny_run.write_rows(tmp_path / "more.jsonl", tiny_run.rows(8, seed=4))
    options = tiny_run.options(tmp_path)
    train(tmp_path, data=[*options["data"], f"{more}:0.5"], steps=None, epochs=2, batch_size=16, eval_data=None)
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert [(s["rows"], s["weight"]) for s in data["train"]["sources"]] == [(12, 1.0), (8, 0.5)]
    assert sum(line["kind"] == "train" for line in lines(tmp_path / "run" / "metrics.jsonl")) == 2  # 2 x (12 + 4) rows


# ---- the output folder ----------------------------------------------------------------------------------------------


def test_a_folder_with_a_run_in_it_is_refused(tmp_path: Path) -> None:
    train(tmp_path, eval_data=None, steps=1)
    with pytest.raises(RunError, match="already holds a run; it has ended"):
        train(tmp_path, eval_data=None, steps=1)
    shutil.rmtree(tmp_path / "run" / "adapter")  # as if it had been stopped
    with pytest.raises(RunError, match="already holds a run; take another folder, or --resume"):
        train(tmp_path, eval_data=None, steps=1)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="already holds other files"):
        train(tmp_path)
    with pytest.raises(RunError, match="holds files and no run"):
        train(tmp_path, resume=True)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunError, match="is a file; name a folder"):
        train(tmp_path)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="cannot be written to: Not a directory"):
        train(tmp_path, out=str(tmp_path / "file" / "run"))


def test_a_folder_that_another_living_process_holds_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    code = (
        "import sys, time; from pathlib import Path; from graftlm.training.run_folder import locked\n"
        f"with locked(Path({str(out)!r})):\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        try:
            with pytest.raises(RunError, match=f"in use by process {other.pid}; wait for it"):
                train(tmp_path, eval_data=None, steps=1)
        finally:
            other.kill()
    # The killed process could not tidy up, and the folder is free all the same.
    assert (out / ".running").exists()
    train(tmp_path, eval_data=None, steps=1)


def test_data_that_cannot_be_trained_on_leaves_the_folder_free(tmp_path: Path) -> None:
    bad = tiny_run.write_rows(tmp_path / "bad.jsonl", [{"prompt": "a"}])
    with pytest.raises(DataError):
        train(tmp_path, data=[str(bad)])
    train(tmp_path, eval_data=None, steps=1)


# ---- trackers -------------------------------------------------------------------------------------------------------


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    for name in ("wandb", "mlflow"):
        try:
            __import__(name)
        except ImportError:
            with pytest.raises(ConfigError, match=f"--track {name} needs its package: pip install {name}"):
                train(tmp_path, track=name, model="/nowhere")


def test_tensorboard_gets_every_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, track="tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in events.Scalars("eval/loss")] == [0, 2, 4, 6]
    losses = [line["loss"] for line in lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses)


# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_says_how_to_go_on(tmp_path: Path, number: int) -> None:
    options = tiny_run.options(tmp_path, steps=100_000, eval_every=100_000)
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(options))
    out = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-m", "graftlm.cli", "train", str(config), "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (out / "metrics.jsonl").is_file() and '"train"' in (out / "metrics.jsonl").read_text():
                break
            time.sleep(0.1)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert output == ""
    assert "Traceback" not in errors
    assert "--resume" in errors
    assert [find_damage(path) for path in (out / "checkpoints").iterdir()] == [None]
    assert lines(out / "metrics.jsonl")[-1]["event"] == "stopped"


def test_one_process_may_use_the_same_base_folder_unchanged(tmp_path: Path) -> None:
    before = {path.name: sha256(path) for path in tiny_run.folder().iterdir()}
    train(tmp_path, method="full", steps=1, eval_data=None)
    assert before == {path.name: sha256(path) for path in tiny_run.folder().iterdir()}
    assert tiny.VOCABULARY < tiny_run.VOCABULARY
