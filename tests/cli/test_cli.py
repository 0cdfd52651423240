"""The command line: results on standard output, all else on standard error, exit status 2 for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from click.testing import Result
from typer.testing import CliRunner

from graftlm import __version__
from graftlm.cli import app
from graftlm.config import TrainConfig


def graft(*arguments: object, input: str | None = None) -> Result:
    """Run a command; an exception that is not an exit is a failure of the test."""
    found = CliRunner().invoke(app, [str(a) for a in arguments], input=input, env={"COLUMNS": "200"})
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert "Traceback" not in found.stderr
    return found


def flags(place: Path, **changes: Any) -> list[str]:
    """The options of a tiny run, as flags."""
    given: list[str] = []
    for name, value in tiny_run.options(place, **changes).items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                given += [f"--{name.replace('_', '-')}", str(one)]
    return given


def refused(*arguments: object) -> str:
    """Run a command that must fail; returns its message, with the line breaks of the terminal taken out."""
    found = graft(*arguments)
    assert found.exit_code == 2, found.stderr
    assert found.stdout == ""
    return " ".join(found.stderr.split())


# ---- help and version -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "generate", "check", "demo"])
def test_help_names_every_command_with_an_example(command: str) -> None:
    assert command in graft("--help").stdout
    found = graft(command, "--help")
    assert found.exit_code == 0
    assert f"graft {command} " in found.stdout.partition("Example")[2], "an example"


def test_help_names_every_option_of_train() -> None:
    text = graft("train", "--help").stdout
    for name in TrainConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in text
    for group in ("base", "data", "adapter", "optimization", "memory and speed", "run"):
        assert f"\n{group}\n" in text


def test_the_version_is_printed() -> None:
    found = graft("--version")
    assert (found.exit_code, found.stdout) == (0, f"graft {__version__}\n")


def test_help_needs_no_torch_and_little_time() -> None:
    code = (
        "import sys, time\nfrom graftlm.cli import app\n"
        "try:\n    app(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = [m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules]\n"
        "print(heavy, time.process_time(), file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, _, seconds = found.stderr.strip().splitlines()[-1].rpartition(" ")
    assert heavy == "[]"
    assert float(seconds) < 1.5


# ---- train ----------------------------------------------------------------------------------------------------------


def test_json_is_one_object_on_standard_output_and_nothing_else(tmp_path: Path) -> None:
    found = graft("train", *flags(tmp_path), "--json")
    assert found.exit_code == 0, found.stderr
    assert found.stdout.count("\n") == 1
    summary = json.loads(found.stdout)
    assert summary["steps"] == 6
    assert summary["adapter_folder"] == str(tmp_path / "run" / "adapter")
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert "eval loss" in found.stderr


def test_without_json_standard_output_stays_empty(tmp_path: Path) -> None:
    found = graft("train", *flags(tmp_path, steps=1))
    assert (found.exit_code, found.stdout) == (0, "")


def test_a_config_file_trains_what_the_flags_train_and_flags_win_over_it(tmp_path: Path) -> None:
    graft("train", *flags(tmp_path, out=str(tmp_path / "a"), targets="attention"))
    options = {**tiny_run.options(tmp_path, targets=["attention"]), "seed": 99, "learning_rate": "1e-2"}
    file = tmp_path / "run.yaml"
    file.write_text("".join(f"{name.replace('_', '-')}: {json.dumps(value)}\n" for name, value in options.items()))
    found = graft("train", file, "--out", tmp_path / "b", "--seed", 11)
    assert found.exit_code == 0, found.stderr
    assert tiny_run.adapter_bytes(tmp_path / "a") == tiny_run.adapter_bytes(tmp_path / "b")


def test_data_may_be_given_several_times_with_weights(tmp_path: Path) -> None:
    more = tiny_run.write_rows(tmp_path / "more.jsonl", tiny_run.rows(8, seed=4))
    found = graft("train", *flags(tmp_path, steps=1), "--data", f"{more}:0.5", "--json")
    assert found.exit_code == 0, found.stderr
    sources = json.loads((tmp_path / "run" / "data.json").read_text())["train"]["sources"]
    assert [(s["rows"], s["weight"]) for s in sources] == [(12, 1.0), (8, 0.5)]


# ---- bad input ------------------------------------------------------------------------------------------------------


def chat(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "hello"} for role in roles]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "bad.jsonl is empty (0 bytes); expected one row a line"),
        (['{"text": "a b"}', '{"text": "a'], "bad.jsonl:2: line: broken JSON at column"),
        (['{"txt": "a b"}'], "bad.jsonl:1: columns: has 'txt'; expected messages"),
        (['{"prompt": "a", "completon": "b"}'], "Rename 'completon' to 'completion'"),
        (
            [json.dumps(chat("user", "asistant"))],
            'messages[1].role: "asistant"; expected system, developer, user, assistant, tool',
        ),
        ([json.dumps(chat("user"))], "bad.jsonl:1: messages: only user; expected at least one assistant message"),
        (['["a"]'], "bad.jsonl:1: line: list"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named_with_its_line(tmp_path: Path, lines: list[str], message: str) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(f"{line}\n" for line in lines))
    text = refused("train", *flags(tmp_path, data=[str(bad)]))
    assert "DataError: " in text
    assert message in text
    assert not (tmp_path / "run" / "config.json").exists()
    if lines:  # `check` finds the same
        found = graft("check", bad, "--model", tiny_run.folder())
        assert found.exit_code == 2
        assert message in " ".join(found.stdout.split())


def test_many_bad_rows_are_reported_at_once_and_counted(tmp_path: Path) -> None:
    bad = tiny_run.write_rows(tmp_path / "bad.jsonl", [{"text": "good"}] + [{"text": i} for i in range(30)])
    text = refused("train", *flags(tmp_path, data=[str(bad)]))
    assert "DataError: 30 rows cannot be trained on; nothing was trained:" in text
    assert text.count("bad.jsonl:") == 20
    assert text.endswith("and 10 more")


def test_a_missing_or_empty_file_is_found_before_the_base_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    for change in ({"data": ["gone.jsonl"]}, {"eval_data": "gone.csv"}, {"data": [str(tmp_path / "empty.jsonl")]}):
        assert refused("train", *flags(tmp_path, **change)).startswith("DataError: ")


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    options = flags(tmp_path)
    assert "there is no file" in refused("train", *options, "--data", tmp_path / "trian.jsonl")
    assert "did you mean 'train.jsonl'" in refused("train", *options, "--data", tmp_path / "trian.jsonl")
    assert "there is no file" in refused("train", *flags(tmp_path, eval_data=str(tmp_path / "gone.jsonl")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "ConfigError: rank: must be greater than or equal to 1, found 0"),
        ({"targets": "q_porj"}, "ConfigError: target 'q_porj' matches no layer of this model, did you mean 'q_proj'?"),
        ({"rank_pattern": "q_porj=4"}, "rank-pattern 'q_porj' matches no adapted layer, did you mean 'q_proj'?"),
        (
            {"modules_to_save": "heads"},
            "modules-to-save 'heads' is neither the embeddings nor the head, did you mean 'head'?",
        ),
        ({"trainable_tokens": "<new>"}, "token '<new>' is new, and the model's 259 embedding rows are all taken"),
        ({"eval_data": "0%"}, "the eval share is 0; expected a number between 0 and 1"),
        ({"eval_data": "x%"}, "eval-data 'x%' is not a share; give one such as 5%, or a file"),
        ({"max_length": 4}, "tokens; expected at most 4. Raise --max-length"),
        ({"max_length": 999}, "this model's longest position is 256"),
        ({"method": "qlora", "base_precision": "int8"}, "qlora is lora on an nf4 base, found base-precision int8"),
        ({"device": "cuda:7"}, "cuda"),
        ({"model": "./nowhere"}, "ModelError: no such model: './nowhere' is neither a directory nor a hub id"),
    ],
)
def test_a_wrong_option_is_refused_with_the_way_out(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    assert message in refused("train", *flags(tmp_path, **change))


def test_an_unknown_key_in_a_config_file_is_refused_with_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({**tiny_run.options(tmp_path), "learning_rte": 1}))
    assert "unknown option 'learning_rte', did you mean 'learning-rate'?" in refused("train", file)


def test_an_unknown_flag_is_refused(tmp_path: Path) -> None:
    found = graft("train", *flags(tmp_path), "--learning-rte", 1)
    assert found.exit_code == 2
    assert "--learning-rate" in found.stderr


def test_a_model_folder_without_weights_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "base"
    empty.mkdir()
    assert "has no config.json" in refused("train", *flags(tmp_path, model=str(empty)))
    (empty / "config.json").write_text((tiny_run.folder() / "config.json").read_text())
    assert "holds no *.safetensors file" in refused("train", *flags(tmp_path, model=str(empty)))
    (empty / "pytorch_model.bin").write_bytes(b"x")
    assert "only pickle weights (pytorch_model.bin)" in refused("train", *flags(tmp_path, model=str(empty)))


def test_an_output_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert "RunError: --out" in refused("train", *flags(tmp_path))
    assert "already holds other files; take another folder" in refused("train", *flags(tmp_path))


def test_with_json_an_error_leaves_standard_output_empty(tmp_path: Path) -> None:
    assert "rank" in refused("train", *flags(tmp_path, rank=0), "--json")


# ---- check ----------------------------------------------------------------------------------------------------------


def test_check_reports_good_data_and_exits_0(tmp_path: Path) -> None:
    train = tiny_run.write_rows(tmp_path / "train.jsonl", [*tiny_run.rows(12), tiny_run.rows(1)[0]])
    valid = tiny_run.write_rows(tmp_path / "valid.jsonl", tiny_run.rows(2))
    found = graft("check", train, "--model", tiny_run.folder(), "--eval-data", valid)
    assert found.exit_code == 0, found.stderr
    assert "13 (13 completion)" in found.stdout
    assert "target tokens (between {+ and +})" in found.stdout
    report = json.loads(graft("check", train, "--model", tiny_run.folder(), "--eval-data", valid, "--json").stdout)
    assert (report["rows"], report["duplicates"], report["overlap"], report["good"]) == (13, 1, 2, True)
    data = ["--data", str(train), "--eval-data", str(valid)]
    given = flags(tmp_path, data=[], eval_data=None, steps=1)
    graft("train", *given, *data)
    counted = json.loads((tmp_path / "run" / "data.json").read_text())["train"]
    assert (counted["tokens"], counted["target_tokens"]) == (report["tokens"], report["target_tokens"])


def test_check_finds_rows_that_are_too_long_and_exits_2(tmp_path: Path) -> None:
    train = tiny_run.write_rows(tmp_path / "train.jsonl", tiny_run.rows(12))
    found = graft("check", train, "--model", tiny_run.folder(), "--max-length", 15)
    assert found.exit_code == 2
    assert "train.jsonl:12 (" in found.stdout
    found = graft("check", train, "--model", tiny_run.folder(), "--max-length", 15, "--json")
    assert found.exit_code == 2
    assert json.loads(found.stdout)["overlong"] > 0


def test_check_needs_no_weights(tmp_path: Path) -> None:
    train = tiny_run.write_rows(tmp_path / "train.jsonl", tiny_run.rows(3))
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_run.folder().iterdir():
        if file.suffix != ".safetensors":
            (base / file.name).write_bytes(file.read_bytes())
    assert graft("check", train, "--model", base).exit_code == 0


# ---- generate -------------------------------------------------------------------------------------------------------


def test_generate_answers_with_what_was_trained(tmp_path: Path) -> None:
    rows = [{"prompt": "say: ", "completion": "mill boat"}] * 4
    data = tiny_run.write_rows(tmp_path / "train.jsonl", rows)
    given = flags(tmp_path, data=[str(data)], eval_data=None, steps=80, batch_size=4, learning_rate=0.03, rank=8)
    assert graft("train", *given).exit_code == 0
    ask = ["generate", "--model", tiny_run.folder(), "--prompt", "say: ", "--max-tokens", 20]
    tuned = graft(*ask, "--adapter", tmp_path / "run" / "adapter")
    assert (tuned.exit_code, tuned.stdout) == (0, "mill boat\n"), tuned.stderr
    answer = json.loads(graft(*ask, "--adapter", tmp_path / "run" / "adapter", "--json").stdout)
    assert (answer["text"], answer["finish_reason"], answer["format"]) == ("mill boat", "stop", "text")
    piped = graft(*[a if a != "say: " else "-" for a in ask], "--adapter", tmp_path / "run" / "adapter", input="say: ")
    assert piped.stdout == "mill boat\n"
    base = json.loads(graft(*ask, "--json").stdout)
    assert base["text"] != "mill boat"


def test_generate_with_a_folder_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    ask = ["generate", "--model", tiny_run.folder(), "--prompt", "a", "--adapter"]
    assert "no adapter folder at" in refused(*ask, tmp_path / "gone")
    assert "has no adapter_config.json" in refused(*ask, tmp_path / "x")
