"""Run folders, checkpoints, adapters and sweeps that were written under the names of before are read, and gone on with.

tests/data/written_by_0_1 was written by Graft 0.1 before options, figures and values were renamed: `finished` is a run of
four steps, `stopped` the same run with its checkpoint of step 2, `options.yaml` what both were asked.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from safetensors.torch import load_file
from tiny_run import lines

from graftlm.adapters.manifest import read_manifest, trained_compute_dtype
from graftlm.commands.generate import generate
from graftlm.commands.train import train
from graftlm.config import GenerateConfig, SweepConfig, TrainConfig
from graftlm.errors import RunError
from graftlm.experiments.compare.run import run_once
from graftlm.experiments.sweep.results import read
from graftlm.experiments.sweep.study import Study
from graftlm.experiments.workers import Worker
from graftlm.training.run_files import read_evaluation, read_metrics
from graftlm.training.view import View

BEFORE = Path(__file__).parents[1] / "data" / "written_by_0_1"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in; paths in its files are relative to it."""
    place = Path(shutil.copytree(BEFORE, tmp_path / "before"))
    monkeypatch.chdir(place)
    return place


def tensors(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "adapter" / "adapter_model.safetensors")


def far(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("options", ["stopped/config.json", "options.yaml"])
def test_a_run_of_before_goes_on_from_its_checkpoint_to_the_same_end(options: str) -> None:
    summary = train(TrainConfig.read(options, {"out": "stopped", "resume": True}), View(quiet=True))
    assert (summary["steps"], summary["num_tokens"], summary["target_tokens"]) == (4, 235, 143)
    assert far(tensors("stopped"), tensors("finished")) < 1e-5
    found = lines(Path("stopped/metrics.jsonl"))
    assert [(line["step"], line["kind"]) for line in found] == [
        (0, "eval"), (1, "train"), (2, "train"), (2, "eval"), (3, "train"), (4, "train"), (4, "eval"),
    ]  # fmt: skip
    assert all(("eval_loss" if line["kind"] == "eval" else "target_tokens") in line for line in found)


def test_going_on_with_another_option_is_refused_under_its_name_of_today() -> None:
    with pytest.raises(RunError, match=r"lora-dropout was 0\.1, now 0\.2.*--allow-change lora-dropout"):
        train(
            TrainConfig.read("stopped/config.json", {"out": "stopped", "resume": True, "lora_dropout": 0.2}),
            View(quiet=True),
        )


@pytest.mark.parametrize("name", ["dropout", "lora-dropout"])
def test_a_change_may_be_allowed_under_either_name(name: str) -> None:
    given = {"out": "stopped", "resume": True, "lora_dropout": 0.2, "allow_change": [name]}
    train(TrainConfig.read("stopped/config.json", given), View(quiet=True))
    changed = [line for line in lines(Path("stopped/metrics.jsonl")) if line.get("event") == "changed"]
    assert [(line["key"], line["was"], line["now"]) for line in changed] == [("lora-dropout", 0.1, 0.2)]


def test_an_adapter_of_before_answers() -> None:
    given: dict[str, Any] = {"model": "base", "adapter": "finished/adapter", "prompt": "0 the: ", "max_tokens": 5}
    found = generate(GenerateConfig.build({**given, "base_precision": "float32", "compute_dtype": "float32"}))
    assert found["text"] is not None
    manifest = read_manifest(Path("finished/adapter"))
    assert manifest is not None
    assert trained_compute_dtype(manifest["base"]) == "float32"


def test_training_goes_on_from_an_adapter_of_before() -> None:
    Path("more").mkdir()
    given = {k: v for k, v in tiny_run.options(Path("more")).items() if k not in ("rank", "alpha")}
    more = {"model": "base", "from_adapter": "finished/adapter", "steps": 1, "eval_every": 1}
    config = TrainConfig.build({**given, **more})
    assert train(config, View(quiet=True))["steps"] == 1


def test_figures_of_before_are_read_under_todays_names() -> None:
    metrics = read_metrics(Path("finished/metrics.jsonl"))
    assert metrics[0]["eval_loss"] == pytest.approx(6.16363, abs=1e-4)
    assert all(line["eval_examples"] == 3 for line in metrics if line["kind"] == "eval")
    assert sum(line["target_tokens"] for line in metrics if line["kind"] == "train") == 143
    assert [line["target_tokens"] for line in read_evaluation(Path("finished/evaluation.jsonl"))] == [11, 12, 12]


def test_a_comparison_of_before_is_not_trained_again() -> None:
    summary = run_once(TrainConfig.read("options.yaml", {}), lambda *_: pytest.fail("it was trained again"), Worker())
    assert (summary["target_tokens"], summary["num_tokens"], summary["trainable_parameters"]) == (143, 235, 1820)
    with pytest.raises(RunError, match=r"was run with other options: lora-dropout was 0\.1, now 0\.3"):
        run_once(TrainConfig.read("options.yaml", {"lora_dropout": 0.3}), lambda *_: None, Worker())


def sweep(out: str, **search: str) -> SweepConfig:
    given = TrainConfig.named({
        "model": "base", "data": ["train.jsonl"], "eval_data": "valid.jsonl", "precision": "float32", "compute": "float32",
        "device": "cpu", "steps": 2, "batch_size": 3, "learning_rate": 0.01, "warmup": 0.25, "dropout": 0.1,
        "train_on": "last", "too_long": "cut", "max_tokens_per_document": 20, "tokens_per_pass": 48, "seed": 11,
    })  # fmt: skip
    return SweepConfig.build({**given, "out": out, "search": search, "trials": 2})


def test_a_sweep_of_before_is_shown_under_todays_names() -> None:
    found = read(Path("sweep_renamed"))
    assert found.space == {"lr_scheduler": "linear|constant"}
    assert all(trial.params["lr_scheduler"] in ("linear", "constant") for trial in found.tried)
    assert all(trial.state == "complete" and trial.eval_losses for trial in found.tried)
    assert found.options["base_precision"] == "float32"


def test_a_sweep_of_before_goes_on_unless_it_searches_an_option_that_was_renamed() -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for out, search in (("sweep", {"rank": "2|3"}), ("sweep_renamed", {"lr_scheduler": "linear|constant"})):
        config = sweep(out, **search)
        study = Study(config)
        known = study.study.user_attrs["sweep"]
        content = {name: known[name] for name in ("model", "data", "eval_data") if name in known}
        if out == "sweep":
            study.identify({**content, "compute_dtype": "float32"})
        else:
            with pytest.raises(RunError, match=r"searches 'schedule', which is called 'lr-scheduler' now"):
                study.identify(content)
