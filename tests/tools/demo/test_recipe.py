"""The recipe: its command is one that the command line accepts, and the card's figures are the run's own."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftlm.config import TrainConfig
from graftlm.errors import RunError
from tools.demo import recipe
from tools.demo.recipe import SHIPPED, eval_losses, main, publish, train_command

EVALUATION = [
    {"row": "heldout.jsonl:1", "target_tokens": 3, "loss_before": 24.0, "loss_after": 9.0},
    {"row": "heldout.jsonl:2", "target_tokens": 1, "loss_before": 8.0, "loss_after": 3.0},
    {"row": "heldout.jsonl:3", "target_tokens": 5, "loss_before": 40.0, "loss_after": 5.0},
]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A folder as it is after training, with one small tensor for a model."""
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    for name in SHIPPED:
        (model / name).write_text("{}")
    save_file({"w": torch.linspace(-1, 1, 35).reshape(5, 7)}, model / "model.safetensors")
    names = {"t0.jsonl": 20, "plain.jsonl": 30, "heldout-t0.jsonl": 2, "heldout-plain.jsonl": 1}
    counts = {name: {"rows": rows, "tokens": 4321, "longest": 9} for name, rows in names.items()}
    (tmp_path / "counts.json").write_text(json.dumps(counts))
    config = TrainConfig.build(dict(_options(tmp_path)))
    (tmp_path / "run" / "config.json").write_text(json.dumps(config.to_json()))
    manifest = {"format": 1, "data": {"train": {"formats": {"text": 3}, "sources": []}}}
    (tmp_path / "run" / "model" / "graft.json").write_text(json.dumps(manifest))
    (tmp_path / "run" / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in EVALUATION))
    return tmp_path


def _options(out: Path) -> dict[str, object]:
    command = train_command(out)[4:]
    options: dict[str, object] = {"data": []}
    for option, value in zip(command[::2], command[1::2], strict=True):
        if option == "--data":
            options["data"] = [*options["data"], value]  # type: ignore[misc]
        else:
            options[option.removeprefix("--")] = value
    return options


def test_the_command_is_one_that_graft_train_accepts(tmp_path: Path) -> None:
    config = TrainConfig.build(_options(tmp_path))
    assert (config.method, config.init, config.stored_precision) == ("full", "random", "float32")
    assert len(config.data) == len(recipe.SOURCES)


def test_losses_are_per_token_and_by_kind_of_text() -> None:
    tasks, plain = eval_losses(EVALUATION[::-1], [2, 1])
    assert (tasks.rows, tasks.tokens, tasks.before, tasks.after) == (2, 4, 8.0, 3.0)
    assert (plain.rows, plain.tokens, plain.before, plain.after) == (1, 5, 8.0, 1.0)
    with pytest.raises(RunError, match="evaluated 3 rows, the corpus holds out 4"):
        eval_losses(EVALUATION, [2, 2])


def test_publishing_writes_sixteen_bits_and_a_card_without_gaps(finished: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "old").write_text("")
    publish(finished, base)
    assert {path.name for path in base.iterdir()} == {*SHIPPED, "model.safetensors", "graft.json", "README.md"}
    assert json.loads((base / "graft.json").read_text())["data"]["train"]["formats"] == {"text": 3}
    tensor = load_file(base / "model.safetensors")["w"]
    assert tensor.dtype == torch.bfloat16
    assert torch.equal(tensor, torch.linspace(-1, 1, 35).reshape(5, 7).to(torch.bfloat16))
    assert json.loads((base / "config.json").read_text())["dtype"] == "bfloat16"
    card = (base / "README.md").read_text()
    assert "| tasks and answers | 2 | 4 | 8.000 | 3.000 |" in card
    assert "| product descriptions | 1 | 5 | 8.000 | 1.000 |" in card
    assert "3,221,952 parameters" in card
    assert "$" not in card


def test_publishing_an_unfinished_run_is_refused_and_leaves_the_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "kept").write_text("")
    with pytest.raises(RunError, match="not finished"):
        publish(tmp_path, base)
    assert (base / "kept").is_file()


def test_the_command_line_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path)])
    assert "--t0 is needed" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path), "--stage", "publish"])
    assert "RunError" in capsys.readouterr().err
