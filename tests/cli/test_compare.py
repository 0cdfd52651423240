"""`graft compare` on the command line: names are checked with the nearest, nothing is written for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from click.testing import Result
from typer.testing import CliRunner

from graftlm.cli import app


def graft(*arguments: object) -> Result:
    """Run a command; an exception that is not an exit is a failure of the test."""
    found = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert "Traceback" not in found.stderr
    return found


def flags(place: Path, **changes: Any) -> list[str]:
    """A small comparison as flags."""
    if not (place / "train.jsonl").exists():
        tiny_run.write_rows(place / "train.jsonl", tiny_run.rows(60))
        tiny_run.write_rows(place / "valid.jsonl", tiny_run.rows(32, seed=1))
    given = {
        "model": tiny_run.folder(), "data": place / "train.jsonl", "eval-data": place / "valid.jsonl", "methods": "lora",
        "seeds": 1, "steps": 2, "batch-size": 4, "rank": 3, "learning-rate": "5e-3", "general-data": "none",
        "out": place / "out", **{name.replace("_", "-"): value for name, value in changes.items()},
    }  # fmt: skip
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


def refused(*arguments: object) -> str:
    """Run a command that must fail; returns its message on one line."""
    found = graft(*arguments)
    assert found.exit_code == 2, found.stderr
    assert found.stdout == ""
    return " ".join(found.stderr.split())


def test_a_comparison_in_processes_of_its_own_prints_one_json_object(tmp_path: Path) -> None:
    found = graft("compare", *flags(tmp_path), "--json")
    assert found.exit_code == 0, found.stderr
    assert found.stdout.count("\n") == 1
    summary = json.loads(found.stdout)
    assert [line["name"] for line in summary["lines"]] == ["lora"]
    assert "eval loss" in found.stderr
    for name in ("compare.json", "report.md", "report.html", "runs/lora/seed-0/adapter/adapter_model.safetensors"):
        assert (tmp_path / "out" / name).is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"methods": "full,lorra"},
            "ConfigError: unknown method 'lorra', did you mean 'lora'? known: full, lora, qlora",
        ),
        ({"methods": "lora,lora"}, "methods names 'lora' twice"),
        ({"methods": "lora:rnk=8"}, "option 'rnk' is unknown, did you mean 'rank'?"),
        ({"methods": "lora:steps=8"}, "option 'steps' belongs to the whole comparison"),
        ({"methods": "lora:rank"}, "expected OPTION=VALUE after the colon, found 'rank'"),
        ({"methods": "full:rank=8"}, "methods 'full:rank=8': --rank is for an adapter"),
        ({"methods": "qlora:precision=int8"}, "qlora is lora on an nf4 base, found base-precision int8"),
        ({"metric": "blue"}, "metric: unknown metric 'blue', did you mean 'bleu'? known: exact-match, bleu, rouge-l"),
        ({"cost": "memry"}, "cost: unknown cost 'memry', did you mean 'memory'?"),
        ({"learning_rate": "lor=1e-4"}, "learning-rate names 'lor', did you mean 'lora'? compared: lora"),
        ({"learning_rate": "lora=0"}, "learning-rate of 'lora' must be above 0, found 0"),
        ({"seeds": 0}, "seeds: must be greater than or equal to 1, found 0"),
        ({"margin": 0}, "margin: must be greater than 0, found 0"),
        ({"eval_data": "10%"}, "and a bootstrap needs at least 30"),
        ({"eval_data": "valid.jsonl:2"}, "has a weight, and every eval row counts once"),
        ({"data": "gone.jsonl"}, "DataError: "),
        ({"general_data": "gone.jsonl"}, "--general-data 'gone.jsonl' is no file"),
        ({"model": "./nowhere"}, "ModelError: no such model: './nowhere'"),
    ],
)
def test_bad_input_is_refused_with_the_way_out_before_anything_is_trained(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    assert message in refused("compare", *flags(tmp_path, **change))
    assert not (tmp_path / "out" / "runs").exists()


def test_a_metric_that_does_not_fit_and_a_broken_file_are_refused(tmp_path: Path) -> None:
    options = flags(tmp_path, metric="exact-match")
    long = [{"prompt": f"{i}?", "completion": "word " * 40} for i in range(40)]
    text = refused("compare", *options, "--eval-data", tiny_run.write_rows(tmp_path / "long.jsonl", long))
    assert "--metric exact-match is for short answers" in text
    assert "take --metric rouge-l or bleu" in text
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "complet')
    assert "bad.jsonl:2: line: broken JSON" in refused("compare", *flags(tmp_path, data=tmp_path / "bad.jsonl"))


def test_options_may_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "compare.yaml"
    file.write_text("model: demo\ndata: demo\nmethods: [lora, lorra]\n")
    assert "unknown method 'lorra'" in refused("compare", file)


def test_help_names_compare_with_examples() -> None:
    assert "compare" in graft("--help").stdout
    assert "graft compare " in graft("compare", "--help").stdout.partition("Examples")[2]
