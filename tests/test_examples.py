"""The files of examples/ do what they say: training files train (for two steps), the others are read into their config."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from graftlm.commands.train import train
from graftlm.config import CompareConfig, Config, ServeConfig, SweepConfig, TrainConfig
from graftlm.serving.http.api_keys import read_api_keys
from graftlm.training.view import View

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TRAINED = ("lora", "qlora", "full")
READ: dict[str, type[Config]] = {"compare": CompareConfig, "sweep": SweepConfig, "serve": ServeConfig}


def test_every_example_is_tried_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == {*TRAINED, *READ, "api-keys"}


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_example_trains(name: str, tmp_path: Path) -> None:
    rows = (ROOT / "graftlm" / "demo" / "data" / "terse-train.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[:16]) + "\n", encoding="utf-8")
    (tmp_path / "eval.jsonl").write_text("\n".join(rows[16:]) + "\n", encoding="utf-8")
    config = TrainConfig.read(
        EXAMPLES / f"{name}.yaml",
        {
            "steps": 2, "batch_size": 4, "out": tmp_path / "run", "data": (str(tmp_path / "rows.jsonl"),),
            "eval_data": str(tmp_path / "eval.jsonl"), "device": "cpu",
        },
    )  # fmt: skip
    summary = train(config, View(Console(file=io.StringIO())))
    assert summary["steps"] == 2
    result = tmp_path / "run" / ("model" if name == "full" else "adapter")
    assert list(result.glob("*.safetensors"))


@pytest.mark.parametrize("name", READ)
def test_another_example_is_read_into_its_config(name: str) -> None:
    path = EXAMPLES / f"{name}.yaml"
    config = READ[name].read(path, {})
    written = {key.replace("-", "_") for key in yaml.safe_load(path.read_text(encoding="utf-8"))}
    assert written == config.model_fields_set


def test_the_keys_of_the_example_are_read() -> None:
    team, operations = read_api_keys(EXAMPLES / "api-keys.yaml").tenants
    assert team.may_use("house-formal")
    assert not team.may_use("other")
    assert operations.may_use("other")
