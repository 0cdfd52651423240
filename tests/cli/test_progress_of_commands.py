"""Every command that may take more than a few seconds says what it is at, on standard error and through one home."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_run
from test_cli import flags, graft

from graftlm import progress

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_progress import Recorder

BYTES_TO_THE_END = {"writing the merged model"}


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """What a command would draw in a terminal."""
    recorder = Recorder()
    monkeypatch.setattr(progress, "_Bars", lambda: recorder)
    monkeypatch.setattr(progress, "_Lines", lambda: recorder)
    yield recorder
    assert recorder.open == [], "every task ends"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model."""
    return Path(tiny_run.train(tmp_path_factory.mktemp("trained"), steps=1)["adapter_folder"])


def said(display: Recorder, *arguments: object) -> list[str]:
    """The tasks of a command that succeeds, in order, each once."""
    display.begun.clear()
    found = graft(*arguments)
    assert found.exit_code == 0, found.stderr
    for task in display.begun:
        if task.what in BYTES_TO_THE_END:
            assert task.done == task.total
    return list(dict.fromkeys(task.what for task in display.begun))


def test_check(display: Recorder, tmp_path: Path) -> None:
    data = tiny_run.write_rows(tmp_path / "a.jsonl", tiny_run.rows(20))
    assert said(display, "check", data, "--model", tiny_run.folder()) == ["starting", "reading data", "tokenizing"]


def test_train(display: Recorder, tmp_path: Path) -> None:
    found = said(display, "train", *flags(tmp_path, steps=2))
    wanted = [
        "starting", "loading base", "reading data", "tokenizing", "trying the longest batch", "training",
        "measuring eval rows", "saving",
    ]  # fmt: skip
    assert [what for what in found if what in wanted] == wanted
    (training,) = [task for task in display.begun if task.what == "training"]
    assert (training.done, training.total) == (2, 2)
    assert "loss" in training.note


def test_plan_reads_the_data_and_measures_the_base(display: Recorder, tmp_path: Path) -> None:
    data = tiny_run.write_rows(tmp_path / "a.jsonl", tiny_run.rows(20))
    found = said(display, "plan", tiny_run.folder(), "--data", data, "--ask-base", "yes")
    assert found[-4:] == ["reading data", "tokenizing", "loading base", "measuring the domain shift"]
    asked = display.begun[-1]
    assert asked.done == asked.total
    assert asked.unit == "tokens"


@pytest.mark.parametrize("json", [[], ["--json"]])
def test_generate(json: list[str], display: Recorder, adapter: Path) -> None:
    found = said(
        display, "generate", "--model", tiny_run.folder(), "--adapter", adapter, "--prompt", "x", "--max-tokens", 3, *json
    )  # fmt: skip
    assert found[0] == "starting"
    assert found[-1] == "answering"
    assert "loading base" in found


def test_generate_draws_nothing_any_more_once_its_answer_comes(
    display: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    write = sys.stdout.write

    class Out:
        def write(self, text: str) -> int:
            seen.append([task.what for task in display.open])
            return write(text)

        def flush(self) -> None: ...

    from graftlm.commands.generate import generate
    from graftlm.config import GenerateConfig

    config = GenerateConfig(model=str(tiny_run.folder()), prompt="x", max_tokens=3)
    with progress.shown(display):
        generate(config, lambda text: Out().write(text) and None)
    assert seen
    assert all(tasks == [] for tasks in seen)


def test_merge(display: Recorder, adapter: Path, tmp_path: Path) -> None:
    data = tiny_run.write_rows(tmp_path / "held.jsonl", tiny_run.rows(4))
    found = said(
        display, "merge", "--model", tiny_run.folder(), "--adapter", adapter, "--out", tmp_path / "merged", "--eval-data", data
    )  # fmt: skip
    wanted = ["starting", "loading base", "measuring the live model", "writing the merged model"]
    assert [what for what in found if what in wanted] == wanted
    assert any(what.startswith("measuring the model merged onto ") for what in found)


def test_a_base_that_is_fingerprinted_for_the_first_time(
    display: Recorder, graft_cache: Path, adapter: Path, tmp_path: Path
) -> None:
    found = said(
        display, "merge", "--model", tiny_run.folder(), "--adapter", adapter, "--out", tmp_path / "m", "--unmeasured"
    )
    assert "fingerprinting the base" in found


def test_sweep(display: Recorder, tmp_path: Path) -> None:
    given = [f for f in flags(tmp_path, steps=2, learning_rate=None) if f]
    found = said(display, "sweep", *given, "--search", "learning-rate=1e-3..1e-2", "--trials", 2)
    wanted = ["starting", "loading base", "reading data", "tokenizing", "sweep"]
    assert [what for what in found if what in wanted] == wanted
    assert {"trial   0", "trial   1"} <= set(found)
    (sweep,) = [task for task in display.begun if task.what == "sweep"]
    assert (sweep.done, sweep.total) == (2, 2)


def test_stores(display: Recorder, adapter: Path, tmp_path: Path) -> None:
    store = ("--store", tmp_path / "store")
    said(display, "adapters", "publish", adapter, "--name", "x", *store)
    assert any(what.startswith("verifying base ") for what in said(display, "adapters", "verify", *store))
    there = tmp_path / "there"
    there.mkdir()
    assert "pushing x@1" in said(display, "adapters", "push", there, *store)
    pushed = next(task for task in display.begun if task.what == "pushing x@1")
    assert pushed.done == pushed.total
    found = said(display, "adapters", "pull", there, "--store", tmp_path / "other")
    assert found == [f"listing {there}", "pulling x@1"] or "pulling x@1" in found


def test_a_server_says_what_it_is_at_until_it_is_ready(display: Recorder) -> None:
    from graftlm.config import ServeConfig
    from graftlm.serving.http.server import build

    with progress.shown(display):
        build(ServeConfig(model=str(tiny_run.folder())))
    assert [task.what for task in display.begun][-1] == "preparing to answer"
    assert "loading base" in [task.what for task in display.begun]


def test_compare_says_what_each_run_is_at(display: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from graftlm.experiments.compare.view import CompareView

    with progress.shown(display), CompareView(Console(quiet=True)).running("lora, seed 0", 5) as stepped:
        (task,) = display.open
        assert (task.what, task.note, task.total) == ("lora, seed 0", "loading", 5)
        stepped({"event": "step", "step": 3, "loss": 1.5})
        assert (task.done, task.note) == (3, "loss 1.500")


def test_what_takes_no_weights_says_what_it_is_at_too(display: Recorder, adapter: Path, tmp_path: Path) -> None:
    store = ("--store", tmp_path / "store")
    assert "publishing x" in said(display, "adapters", "publish", adapter, "--name", "x", *store)
    export = ("adapters", "export", "x@1", tmp_path / "out", "--for", "vllm", "--model", tiny_run.folder(), *store)
    assert "exporting x@1" in said(display, *export)
    assert "looking at this machine" in said(display, "plan", "llama-2-7b")
