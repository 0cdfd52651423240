"""`graft.compare`, `graft.sweep` and `graft.plan` on a loaded model and on rows in memory."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest

import graftlm as graft
from graftlm.commands import compare as compare_command
from graftlm.commands import sweep as sweep_command
from graftlm.commands.train import train as train_command
from graftlm.config import TrainConfig
from graftlm.errors import ConfigError, DataError, ModelError, RunError
from graftlm.experiments.compare import run as compare_runs
from graftlm.training.view import View

ROWS = [{"prompt": f"{i} and ", "completion": f"{'more ' * (1 + i % 3)}then"} for i in range(12)]
EVAL_ROWS = [{"prompt": f"{i} or ", "completion": f"{'less ' * (1 + i % 4)}now"} for i in range(32)]
SWEEP: dict[str, Any] = {"steps": 2, "batch_size": 4, "trials": 2, "at_once": 2, "rank": 3, "quiet": True}


@pytest.fixture(scope="module")
def model() -> graft.Model:
    return graft.load("demo", base_precision="nf4")


# ---- a loaded model ----------------------------------------------------------------------------------------------------


def test_a_sweep_on_a_loaded_model_gives_the_adapters_of_a_sweep_that_loads_its_own(
    model: graft.Model, tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    options = {**SWEEP, "search": {"learning-rate": "1e-3|1e-2"}, "sampler": "grid", "eval_data": EVAL_ROWS}
    model.new_adapter(rank=2)  # it has a slot of its own, and stays there
    before, answer = model.fingerprint, model.generate("3 and ", max_tokens=6)
    shared = graft.sweep(model, ROWS, out=tmp_path / "shared", **options)
    alone = graft.sweep("demo", ROWS, out=tmp_path / "alone", method="qlora", **options)
    assert {t.params["learning_rate"]: t.loss for t in shared.tried} == {
        t.params["learning_rate"]: t.loss for t in alone.tried
    }
    tensors = [
        {(Path(t.folder or "") / "adapter/adapter_model.safetensors").read_bytes() for t in found.tried}
        for found in (shared, alone)
    ]
    assert tensors[0] == tensors[1]
    assert len(tensors[0]) == 2
    assert model.generate("3 and ", max_tokens=6) == answer
    assert model.forward_backward(model.encode(ROWS)) > 0, "the adapter of new_adapter is still attached"
    model.remove_adapter()
    assert model.fingerprint == before
    assert all(module.bank is None for module in model.base.stored().values())
    trial = json.loads((tmp_path / "shared/trials/0000/config.json").read_text())
    assert Path(trial["data"][0]).is_file(), "`graft train` can run a trial again"


def test_a_sweep_refuses_what_the_model_was_not_loaded_with(model: graft.Model) -> None:
    with pytest.raises(ConfigError, match=r"base_precision is 'int8', and the model was loaded with 'nf4'"):
        graft.sweep(model, ROWS, base_precision="int8", **SWEEP)
    with pytest.raises(ConfigError, match="method full trains"):
        graft.sweep(model, ROWS, method="full", **SWEEP)


def test_a_comparison_of_a_loaded_model_loads_its_base_for_every_run_and_leaves_the_model_as_it_is(
    model: graft.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[TrainConfig] = []

    def here(config: TrainConfig, on_event: Any, worker: Any) -> dict[str, Any]:
        trained.append(config)
        return train_command(config, View(quiet=True))

    monkeypatch.setattr(compare_runs, "train_in_subprocess", here)
    answer = model.generate("3 and ", max_tokens=6)
    found = graft.compare(
        model, ROWS, eval_data=EVAL_ROWS, out=tmp_path / "which", methods=["full", "qlora"], learning_rate=1e-3,
        seeds=1, steps=2, batch_size=4, rank=3, general_data="none", quiet=True,
    )  # fmt: skip
    assert [line.name for line in found.lines] == ["full", "qlora"]
    assert {(config.model, config.method) for config in trained} == {("demo", "full"), ("demo", "qlora")}
    assert model.generate("3 and ", max_tokens=6) == answer


def test_a_model_whose_full_training_broke_off_is_compared_and_swept_no_more(tmp_path: Path) -> None:
    broken = graft.load("demo")
    broken.spoiled(tmp_path)
    for call in (graft.compare, graft.sweep):
        with pytest.raises(ModelError, match=r"load it again with graft\.load"):
            call(broken, ROWS, out=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


# ---- rows in memory ----------------------------------------------------------------------------------------------------


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[Path, str]]]:
    """The config and the files that the commands are called with, instead of calling them."""
    calls: list[tuple[Any, dict[Path, str]]] = []
    monkeypatch.setattr(compare_command, "compare", lambda config, view, rows: calls.append((config, rows)))
    monkeypatch.setattr(sweep_command, "sweep", lambda config, view, base, rows: calls.append((config, rows)))
    return calls


@pytest.mark.parametrize("call", [graft.compare, graft.sweep])
def test_rows_are_one_file_whatever_holds_them(
    call: Callable[..., Any], tmp_path: Path, handed_over: list[tuple[Any, dict[Path, str]]]
) -> None:
    held = (ROWS, tuple(ROWS), iter(ROWS), datasets.Dataset.from_list(ROWS), pandas.DataFrame(ROWS))
    for rows in held:
        call("demo", rows, eval_data=rows if rows is not held[2] else ROWS, out=tmp_path / "out", quiet=True)
    assert len({config.data for config, _ in handed_over}) == 1
    for config, files in handed_over:
        (file,) = map(Path, config.data)
        assert file.parent == tmp_path / "out" / "rows"
        assert set(files) == {file, Path(config.eval_data)}
        assert [json.loads(line) for line in files[file].splitlines()] == ROWS


def test_other_rows_are_another_file_so_those_of_finished_runs_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(config: TrainConfig, on_event: Any, worker: Any) -> dict[str, Any]:
        return train_command(config, View(quiet=True))

    monkeypatch.setattr(compare_runs, "train_in_subprocess", here)
    options: dict[str, Any] = {
        "eval_data": EVAL_ROWS, "out": tmp_path / "which", "methods": ["qlora"], "learning_rate": 1e-3, "seeds": 1,
        "steps": 1, "batch_size": 2, "rank": 2, "general_data": "none", "quiet": True,
    }  # fmt: skip
    graft.compare("demo", ROWS, **options)
    (first,) = (tmp_path / "which/rows").glob("rows-*.jsonl")
    before = first.read_bytes()
    with pytest.raises(RunError, match="was run with other options: data was"):
        graft.compare("demo", ROWS[1:], **options)
    assert first.read_bytes() == before
    graft.compare("demo", ROWS, **options)


def test_a_row_that_is_no_json_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "when? ", "completion": datetime.date(2024, 1, 1)}]
    for call in (graft.compare, graft.sweep):
        with pytest.raises(DataError, match=r"rows\[12\]: Object of type date is not JSON serializable"):
            call("demo", rows, out=tmp_path / "out", quiet=True)
    assert not list(tmp_path.iterdir())


# ---- plan ----------------------------------------------------------------------------------------------------------------


def test_a_plan_for_rows_in_memory_is_that_for_their_file(model: graft.Model, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = {"gpu": "rtx-4090", "batch_size": 4, "max_length": 0, "ask_base": "no"}
    of_file = graft.plan("demo", data=file, **options).to_json()
    for rows in (ROWS, datasets.Dataset.from_list(ROWS), pandas.DataFrame(ROWS)):
        assert graft.plan(model, data=rows, **options).to_json() == of_file
    assert of_file["plans"][0]["data"]["rows"] == len(ROWS)
    with pytest.raises(DataError, match=r"rows\[1\]"):
        graft.plan("demo", data=[ROWS[0], {"prompt": "a", "completon": "b"}], **options)
    with pytest.raises(DataError, match="rows holds no row"):
        graft.plan("demo", data=[], **options)
