"""The demonstration: only what a demonstration wrote is ever removed, and it plans, compares and answers in three voices."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from graftlm.commands import demo as demonstration
from graftlm.commands.demo import MARK, VOICES, compare_config, voice_config
from graftlm.commands.train import train as train_command
from graftlm.config import CompareConfig, TrainConfig
from graftlm.errors import RunError
from graftlm.experiments.compare import run as compare_module
from graftlm.experiments.compare import scoring
from graftlm.training.run_folder import locked
from graftlm.training.view import View


def clear(out: Path) -> None:
    with locked(out):
        demonstration._clear(out)


def filled(out: Path, names: tuple[str, ...] = ("compare", "voices")) -> list[Path]:
    """Files under a demonstration's names."""
    kept = [out / name / "config.json" for name in names]
    for file in kept:
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    return kept


def test_folders_that_have_the_names_of_a_demonstration_are_not_removed(tmp_path: Path) -> None:
    kept = filled(tmp_path / "runs")
    with pytest.raises(RunError, match="holds 'compare', which no demonstration wrote; take another folder"):
        clear(tmp_path / "runs")
    assert all(file.exists() for file in kept)
    assert not (tmp_path / "runs" / MARK).exists()


@pytest.mark.parametrize("names", [("compare", "voices"), ("full", "lora", "qlora")])
def test_an_earlier_demonstration_is_removed_and_its_mark_stays(tmp_path: Path, names: tuple[str, ...]) -> None:
    clear(tmp_path / "runs")
    (tmp_path / "runs" / MARK).write_text(json.dumps({"written_by": "graft demo", "runs": list(names)}))
    filled(tmp_path / "runs", names)
    clear(tmp_path / "runs")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [MARK]


def test_a_file_of_somebody_elses_beside_the_mark_stops_it(tmp_path: Path) -> None:
    clear(tmp_path / "runs")
    kept = filled(tmp_path / "runs")
    (tmp_path / "runs" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds 'notes\.txt'"):
        clear(tmp_path / "runs")
    assert all(file.exists() for file in kept)


def test_a_demonstration_that_is_running_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    clear(out)
    kept = filled(out)
    with locked(out), pytest.raises(RunError, match="is in use by process"):
        demonstration.demonstrate(1, out, Console(quiet=True))
    with locked(out / "compare"), pytest.raises(RunError, match="is in use by process"):
        clear(out)  # its comparison goes on by itself
    assert all(file.exists() for file in kept)


def test_the_configs_read_back_from_json(tmp_path: Path) -> None:
    config = compare_config(2, tmp_path)
    assert CompareConfig.build(config.to_json()) == config
    voice = voice_config("terse", 2, tmp_path)
    assert TrainConfig.build(voice.to_json()) == voice


def test_a_demonstration_plans_compares_and_answers_in_every_voice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: TrainConfig, on_event: Any, worker: Any = None) -> dict[str, Any]:
        return train_command(config, View(quiet=True))

    monkeypatch.setattr(compare_module, "train_in_subprocess", train)
    monkeypatch.setattr(demonstration, "train_in_subprocess", train)
    monkeypatch.setattr(
        compare_module, "score_in_subprocess", lambda request, *told: scoring.measure(request, lambda out: None)
    )
    monkeypatch.setattr(demonstration, "BATCH", 2)
    text = StringIO()
    found = demonstration.demonstrate(1, tmp_path / "demo", Console(file=text, width=120))
    assert [line["name"] for line in found["comparison"]["lines"]] == ["full", "lora", "qlora"]
    assert [answer["voice"] for answer in found["answers"]] == ["base", *VOICES]
    json.dumps(found)
    for words in ("planned for", "eval loss after", "Cannot tell: with one seed", "one base in memory"):
        assert words in text.getvalue()
    assert (tmp_path / "demo" / "compare" / "report.html").is_file()
