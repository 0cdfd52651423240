"""What goes into a pipe is plain, whichever command wrote it; on a narrow terminal no name and no digest is broken."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import test_compare
import tiny_run
from test_cli import flags
from typer.testing import CliRunner

from graftlm.adapters.store import Store
from graftlm.cli import COMMANDS, app
from graftlm.commands.train import train
from graftlm.config import TrainConfig
from graftlm.experiments.compare import run as compare_runs
from graftlm.training.view import View

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))

import stores

DRAWN = re.compile("[\u2500-\u257f\u2800-\u28ff\x1b\r\u2588\u2026]")
"""Lines and corners of frames, dots of spinners, codes of colours and movements, bars, and what stands for what was cut off."""


def piped(*words: object, columns: int | None = None, status: int = 0) -> str:
    """What a command writes where neither of its outputs is a terminal."""
    env = {"COLUMNS": "" if columns is None else str(columns), "FORCE_COLOR": ""}
    found = CliRunner().invoke(app, [str(word) for word in words], env=env, input="3 old: \n")
    assert found.exit_code == status, found.output
    return found.stdout + found.stderr


def plain(text: str, but: str = "") -> str:
    drawn = set(DRAWN.findall(text)) - set(but)
    assert not drawn, text
    assert all(line == line.rstrip(" ") for line in text.split("\n")), "no blanks at a line's end"
    return text


@pytest.mark.parametrize("command", ["", *(module.__name__.rpartition(".")[2] for module in COMMANDS), "sweep show"])
def test_help_is_plain(command: str) -> None:
    assert "Usage: " in plain(piped(*command.split(), "--help"))


def test_errors_of_the_command_line_are_plain() -> None:
    assert "No such option: --bogus" in plain(piped("plan", "--bogus", status=2))
    assert "required" in plain(piped("merge", status=2))


def test_a_run_and_all_that_reads_it_are_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = str(tiny_run.folder())
    said = plain(piped("train", *flags(tmp_path)))
    assert re.search(r"step +6  eval loss", said)
    assert "adapter" in said
    plain(piped("adapters", "publish", "run", "--name", "formal", "--note", "the first"))
    plain(piped("adapters", "alias", "formal", "prod", 1))
    for words in ("list", "list formal", "show formal", "diff formal formal@1", "verify"):
        plain(piped("adapters", *words.split()))
    ask = ["--model", base, "--adapter", "formal", "--max-tokens", 3, "--base-precision", "float32"]
    plain(piped("generate", *ask, "--prompt", "3 old: "))
    plain(piped("chat", *ask, "--beside", "base"))
    plain(piped("merge", "--model", base, "--adapter", "formal", "--out", "merged", "--max-drift", 1))
    assert "in a pipe" not in plain(piped("check", "train.jsonl", "--model", base), but="\u2588")
    plain(piped("plan", "llama-2-7b", "--gpu", "h100"))


def test_a_comparison_and_its_table_are_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(config: TrainConfig, on_event: Any, worker: Any) -> dict[str, Any]:
        for step in (1, 2):
            on_event({"event": "step", "step": step, "steps": 2, "loss": 2.0})
        return train(config, View(quiet=True))

    monkeypatch.setattr(compare_runs, "train_in_subprocess", here)
    said = plain(piped("compare", *test_compare.flags(tmp_path, methods="full,lora")))
    for row in ("Comparing full, lora", "eval loss after", "share of full's gain", "Cannot tell", "report.html"):
        assert row in said
    found = CliRunner().invoke(app, ["compare", *test_compare.flags(tmp_path, methods="full,lora"), "--json"])
    assert [line["name"] for line in json.loads(found.stdout)["lines"]] == ["full", "lora"], "on standard output alone"


def test_a_sweep_and_what_shows_it_are_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    words = ["sweep", *flags(tmp_path, out=tmp_path / "swept", learning_rate=None)]
    search = ["--search", "learning-rate=0.001|0.01", "--sampler", "grid"]
    said = " ".join(plain(piped(*words, *search)).split())
    for row in ("2 trials at once", "trial 1 learning-rate 0.0", "swept: 2 complete", "report.html"):
        assert row in said
    shown = plain(piped("sweep", "show", "swept"))
    assert [line.split()[1] for line in shown.splitlines() if re.match(r" *\d+ ", line)] == ["complete", "complete"]
    assert len(json.loads(piped("sweep", "show", "swept", "--json"))["trials"]) == 2


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store as one has after some weeks: long names, two bases, several aliases, notes."""
    monkeypatch.chdir(tmp_path)
    store = Store(Path("adapters"))
    names = ("formal", "support-answers-german-2026", "sql")
    for i, (name, base) in enumerate(zip(names, (stores.BASE, stores.OTHER, stores.BASE))):
        for j in (1, 2):
            source = stores.adapter(tmp_path / f"{name}{j}", 10 * i + j, base=base)
            store.publish(source, name, note="trained again with the rows that were missing before" if j == 2 else "")
        store.alias(name, "prod", 1)
        store.alias(name, "release-candidate", 2)
    return store


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_lists_fit_and_break_no_name_no_digest_and_no_figure(columns: int, place: Store) -> None:
    versions = place.versions()
    listed = plain(piped("adapters", "list", columns=columns))
    assert max(map(len, listed.splitlines())) <= columns
    for name in {v.name for v in versions}:
        assert re.search(rf"^{name}@2 ", listed, re.MULTILINE), "a line begins with each name"
    for alias in ("prod -> 1", "release-candidate -> 2"):
        assert alias in listed
    assert "3.0000 -> 2.0000" in listed or "left out" in listed
    one = plain(piped("adapters", "list", "support-answers-german-2026", columns=columns))
    assert max(map(len, one.splitlines())) <= columns
    for v in versions:
        if v.name == "support-answers-german-2026":
            assert v.label in one
            assert v.digest[:12] in one
    shown = plain(piped("adapters", "show", "formal", columns=columns))
    assert place.find("formal").digest in shown
    assert str(place.find("formal").folder) in shown
    whole = [line for line in shown.splitlines() if "/" not in line and not re.search("[0-9a-f]{64}", line)]
    assert max(map(len, whole)) <= columns
    differ = plain(piped("adapters", "diff", "formal@1", "formal@2", columns=columns))
    assert "model.layers.0.self_attn.q_proj" in differ
    assert max(map(len, differ.splitlines())) <= columns


def test_json_holds_what_a_narrow_table_left_out(place: Store) -> None:
    found = json.loads(piped("adapters", "list", "--json", columns=60))
    assert len(found["versions"]) == 6
