"""The demonstration's folder: only what a demonstration wrote is ever removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftlm.config import TrainConfig
from graftlm.errors import RunError
from graftlm.experiments import demonstration
from graftlm.experiments.demonstration import LEARNING_RATES, MARK, demo_config
from graftlm.training.runfolder import locked


def clear(out: Path) -> None:
    with locked(out):
        demonstration._clear(out)


def filled(out: Path) -> list[Path]:
    """Trainings under a demonstration's names."""
    kept = [out / method / "config.json" for method in LEARNING_RATES]
    for file in kept:
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    return kept


def test_trainings_that_have_the_names_of_the_methods_are_not_removed(tmp_path: Path) -> None:
    kept = filled(tmp_path / "runs")
    with pytest.raises(RunError, match="holds 'full', which no demonstration wrote; take another folder"):
        clear(tmp_path / "runs")
    assert all(file.exists() for file in kept)
    assert not (tmp_path / "runs" / MARK).exists()


def test_an_earlier_demonstration_is_removed_and_its_mark_stays(tmp_path: Path) -> None:
    clear(tmp_path / "runs")
    filled(tmp_path / "runs")
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
    from rich.console import Console

    out = tmp_path / "runs"
    clear(out)
    kept = filled(out)
    with locked(out), pytest.raises(RunError, match="is in use by process"):
        demonstration.demonstrate(1, out, Console(quiet=True))
    with locked(out / "full"), pytest.raises(RunError, match="is in use by process"):
        clear(out)  # one of its runs goes on by itself
    assert all(file.exists() for file in kept)


@pytest.mark.parametrize("method", LEARNING_RATES)
def test_the_config_of_each_training_reads_back_from_json(method: str, tmp_path: Path) -> None:
    config = demo_config(method, 1e-3, 2, tmp_path)  # type: ignore[arg-type]
    again = TrainConfig.build(config.to_json())
    assert again == config
    assert config.to_json()["rank"] == (None if method == "full" else demonstration.RANK)
