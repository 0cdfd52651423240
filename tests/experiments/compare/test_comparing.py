"""A comparison from end to end on a tiny base: the same rows for all, going on after a stop, reports, and bad input.

Runs are made in this process, which is what their own process does (`tests/experiments/test_subprocess_run.py`), only sooner.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import threading
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from rich.console import Console

from graftlm.base.chat import Encoder
from graftlm.base.loading import load_tokenizer
from graftlm.commands.compare import compare
from graftlm.commands.train import train
from graftlm.config import CompareConfig, TrainConfig
from graftlm.data.dataset import load
from graftlm.data.sources import Source
from graftlm.distributed.group import Ranks
from graftlm.errors import ConfigError, DataError, Diverged, ModelError, RunError, Stopped, TrainingError
from graftlm.experiments.compare import run as module
from graftlm.experiments.compare import scoring
from graftlm.experiments.compare.data import load_comparison_data, write_search_rows
from graftlm.experiments.compare.results import Comparison
from graftlm.experiments.compare.view import CompareView
from graftlm.experiments.reports.comparison import command_of
from graftlm.experiments.workers import Worker, workers_for
from graftlm.training.view import View


def options(place: Path, **changes: Any) -> dict[str, Any]:
    """Options of a comparison of two methods with two seeds of three steps."""
    if not (place / "train.jsonl").exists():
        tiny_run.write_rows(place / "train.jsonl", tiny_run.rows(60))
        tiny_run.write_rows(place / "valid.jsonl", tiny_run.rows(32, seed=1))
    return {
        "model": str(tiny_run.folder()), "data": [str(place / "train.jsonl")], "eval_data": str(place / "valid.jsonl"),
        "methods": ["full", "lora"], "seeds": 2, "steps": 3, "batch_size": 4, "rank": 3, "device": "cpu",
        "compute_dtype": "float32", "learning_rate": "5e-3", "general_data": "none", "out": str(place / "out"),
        **changes,
    }  # fmt: skip


def config(place: Path, **changes: Any) -> CompareConfig:
    return CompareConfig.build(options(place, **changes))


class Runs:
    """Stands for the processes: runs at once, remembers what was run, and can be told to fail."""

    def __init__(self) -> None:
        self.done: list[TrainConfig] = []
        self.before: Callable[[TrainConfig], None] = lambda config: None

    def train(self, config: TrainConfig, on_event: Any, worker: Worker) -> dict[str, Any]:
        self.before(config)
        self.done.append(config)
        return train(config, View(quiet=True))

    def score(self, request: scoring.ScoringRequest, on_event: Any, worker: Worker) -> None:
        scoring.measure(request, lambda out: on_event({"event": "scored", "out": out}))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    found = Runs()
    monkeypatch.setattr(module, "train_in_subprocess", found.train)
    monkeypatch.setattr(module, "score_in_subprocess", found.score)
    return found


def compared(config: CompareConfig) -> tuple[Comparison, str]:
    """A comparison, and what a person would have read."""
    text = StringIO()
    view = CompareView(Console(file=text, width=110))
    found = compare(config, view)
    view.comparison(found)
    return found, text.getvalue()


# ---- the whole way --------------------------------------------------------------------------------------------------


def test_a_comparison_measures_every_method_with_every_seed_and_writes_its_reports(tmp_path: Path, runs: Runs) -> None:
    general = tiny_run.write_rows(tmp_path / "general.jsonl", [{"text": "the old mill by a river"}] * 3)
    asked = config(tmp_path, metric="rouge-l", metric_prompts=10, general_data=str(general))
    found, text = compared(asked)
    assert [(c.method, c.seed) for c in runs.done] == [("full", 0), ("lora", 0), ("full", 1), ("lora", 1)]
    full, lora = found.lines
    assert (full.name, lora.name, found.reference) == ("full", "lora", "full")
    assert full.share == 1.0
    assert full.trainable_parameters == full.base_parameters > lora.trainable_parameters
    assert (full.shares_base, lora.shares_base) == (False, True)
    assert len(full.losses) == len(lora.losses) == 2
    assert full.task_score is not None
    assert lora.general_before is not None
    assert lora.general_after != lora.general_before
    assert lora.capacity is not None
    assert (lora.capacity.rank, full.capacity) == (3, None)
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [line["name"] for line in written["lines"]] == ["full", "lora"]
    for label in ("what is trained", "the same, planned", "peak memory, measured", "saved adapter or model",
                  "eval loss after", "share of full's gain", "rouge-l after", "loss on general text", "tokens/s",
                  "training time of a run", "many adapters on one base", "when to use it"):  # fmt: skip
        for page in ((tmp_path / "out" / "report.md").read_text(), (tmp_path / "out" / "report.html").read_text()):
            assert label in page.replace("&#39;", "'"), label
    assert "eval loss" in text


def test_all_methods_see_the_same_rows_in_the_same_order(tmp_path: Path, runs: Runs) -> None:
    compared(config(tmp_path))
    for seed in (0, 1):
        folders = [tmp_path / "out" / "runs" / name / f"seed-{seed}" for name in ("full", "lora")]
        one, other = (
            [(m["tokens"], m["target_tokens"]) for m in tiny_run.lines(f / "metrics.jsonl") if m["kind"] == "train"]
            for f in folders
        )
        assert one == other
        rows = [[(r["row"], r["target_tokens"]) for r in tiny_run.lines(f / "evaluation.jsonl")] for f in folders]
        assert rows[0] == rows[1]
        digests = [json.loads((f / "data.json").read_text())["train"]["digest"] for f in folders]
        assert digests[0] == digests[1]


def test_a_loss_of_the_table_is_that_of_the_rows(tmp_path: Path, runs: Runs) -> None:
    found, _ = compared(config(tmp_path, methods=["lora"], seeds=1))
    rows = tiny_run.lines(tmp_path / "out" / "runs" / "lora" / "seed-0" / "evaluation.jsonl")
    expected = sum(r["loss_after"] for r in rows) / sum(r["target_tokens"] for r in rows)
    assert found.lines[0].loss == pytest.approx(expected)


def test_variants_of_a_method_stand_beside_each_other(tmp_path: Path, runs: Runs) -> None:
    found, _ = compared(config(tmp_path, methods=["lora", "lora:rank=5:targets=attention"], seeds=1))
    assert [line.trained for line in found.lines] == ["A, B of rank 3 on all-linear", "A, B of rank 5 on attention"]
    assert found.reference == found.verdict.best


# ---- going on -------------------------------------------------------------------------------------------------------


def test_a_finished_comparison_runs_nothing_again_and_says_the_same(tmp_path: Path, runs: Runs) -> None:
    first, _ = compared(config(tmp_path))
    count = len(runs.done)
    again, _ = compared(config(tmp_path))
    assert len(runs.done) == count
    assert again.to_json() == first.to_json()


def test_a_comparison_that_was_stopped_goes_on_with_the_runs_that_are_left(tmp_path: Path, runs: Runs) -> None:
    def stop(config: TrainConfig) -> None:
        if len(runs.done) == 2:
            raise Stopped(15, "stopped after step 1")

    runs.before = stop
    with pytest.raises(Stopped, match=r"finished runs are kept.*Go on with the same command") as stopped:
        compared(config(tmp_path))
    assert stopped.value.signal_number == 15
    runs.before = lambda config: None
    compared(config(tmp_path))
    assert [(c.method, c.seed) for c in runs.done] == [("full", 0), ("lora", 0), ("full", 1), ("lora", 1)]


def test_a_run_in_the_middle_is_resumed_and_ends_as_if_it_had_never_stopped(
    tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftlm.training.logging import Recorder

    whole, _ = compared(config(tmp_path, methods=["lora"], seeds=1, out=str(tmp_path / "whole")))
    stepped = Recorder.on_iteration_end

    def stop_after_two(self: Any, trials: Any) -> bool:
        if self.trial.step == 2:
            self.stopped = 15
        return stepped(self, trials)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_iteration_end", stop_after_two)
        with pytest.raises(Stopped):
            compared(config(tmp_path, methods=["lora"], seeds=1))
    found, _ = compared(config(tmp_path, methods=["lora"], seeds=1))
    assert runs.done[-1].resume
    assert found.lines[0].loss == whole.lines[0].loss
    assert [step for step, _ in found.lines[0].curves[0].train] == [1, 2, 3]


def test_a_run_that_was_killed_before_its_figures_were_written_is_run_again(tmp_path: Path, runs: Runs) -> None:
    compared(config(tmp_path, methods=["lora"], seeds=1))
    (tmp_path / "out" / "runs" / "lora" / "seed-0" / "result.json").unlink()
    compared(config(tmp_path, methods=["lora"], seeds=1))
    assert len(runs.done) == 2
    assert not runs.done[-1].resume


def test_more_seeds_and_methods_are_added_to_what_is_there(tmp_path: Path, runs: Runs) -> None:
    compared(config(tmp_path, methods=["lora"], seeds=1))
    compared(config(tmp_path, methods=["lora", "full"], seeds=2))
    assert [(c.method, c.seed) for c in runs.done] == [("lora", 0), ("full", 0), ("lora", 1), ("full", 1)]


def test_other_options_in_the_same_folder_are_refused_by_name_and_nothing_is_lost(tmp_path: Path, runs: Runs) -> None:
    compared(config(tmp_path, methods=["lora"], seeds=1))
    before = (tmp_path / "out" / "compare.json").read_bytes()
    with pytest.raises(RunError, match=r"was run with other options: batch-size was 4, now 5. Take the same"):
        compared(config(tmp_path, methods=["lora"], seeds=1, batch_size=5))
    assert (tmp_path / "out" / "compare.json").read_bytes() == before


def test_other_rows_in_the_same_files_are_refused(tmp_path: Path, runs: Runs) -> None:
    compared(config(tmp_path, methods=["lora"], seeds=1))
    tiny_run.write_rows(tmp_path / "valid.jsonl", tiny_run.rows(32, seed=9))
    with pytest.raises(RunError, match="the eval data have changed since"):
        compared(config(tmp_path, methods=["lora"], seeds=1))


def test_files_that_moved_are_the_same_data(tmp_path: Path, runs: Runs) -> None:
    """Rows are known by content and place, so the names of files may change."""
    first, _ = compared(config(tmp_path, methods=["lora"], seeds=1))
    material = load_comparison_data(config(tmp_path))
    shutil.copy(tmp_path / "valid.jsonl", tmp_path / "other.jsonl")
    moved = load_comparison_data(config(tmp_path, eval_data=str(tmp_path / "other.jsonl")))
    assert material.eval_dataset.digest == moved.eval_dataset.digest
    assert first.data["eval_digest"] == moved.eval_dataset.digest


# ---- methods that cannot be trained ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ModelError("out of memory"), Diverged("the loss is not finite")])
def test_a_method_that_cannot_be_trained_is_left_out_and_the_others_go_on(
    tmp_path: Path, runs: Runs, error: Exception
) -> None:
    def fail(config: TrainConfig) -> None:
        if config.method == "full":
            raise error

    runs.before = fail
    found, text = compared(config(tmp_path))
    assert [line.name for line in found.lines] == ["lora"]
    assert str(error) in found.failed["full"]
    assert "left out" in text
    assert "<strong>full</strong> is missing" in (tmp_path / "out" / "report.html").read_text()
    assert [c.method for c in runs.done] == ["lora", "lora"]


def test_nothing_is_reported_where_no_method_could_be_trained(tmp_path: Path, runs: Runs) -> None:
    def fail(config: TrainConfig) -> None:
        raise TrainingError("it died")

    runs.before = fail
    with pytest.raises(TrainingError, match="no method could be trained: full: seed 0: it died"):
        compared(config(tmp_path))


# ---- the search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blind", [True, False])
def test_rates_that_are_searched_by_several_workers_are_those_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blind: bool
) -> None:
    together: list[int] = []

    def search(place: Path, workers: int) -> dict[str, module.RateSearch]:
        place.mkdir()
        together.clear()
        asked = config(place, learning_rate="" if blind else "full=1e-3", search_steps=2, workers=workers)
        at_once = 0

        def train(run: TrainConfig, on_event: Any, worker: Worker) -> dict[str, Any]:
            nonlocal at_once
            at_once += 1
            together.append(at_once)
            run.out.mkdir(parents=True, exist_ok=True)
            time.sleep(0.05)
            at_once -= 1
            away = math.log10(run.peak_learning_rate / 3e-3)
            return {"eval_loss_after": min(1 + away**2, 3.0), "eval_loss_before": 4.0}

        monkeypatch.setattr(module, "train_in_subprocess", train)
        done, view = module.Progress(), CompareView(Console(quiet=True))
        found = workers_for(asked.workers, asked.device)
        module.search_learning_rates(asked, load_comparison_data(asked), done, view, found)
        return done.learning_rates

    alone = search(tmp_path / "one", 1)
    assert max(together) == 1
    assert search(tmp_path / "three", 3) == alone
    assert max(together) == 2
    assert len(alone["lora"].tried) >= 3


@pytest.mark.prove
@pytest.mark.timeout(1200)  # each worker imports everything, on a machine that does other work as well
def test_two_workers_train_what_one_does(tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = {"methods": ["lora", "qlora"], "seeds": 1, "eval_every": 2}
    threads = torch.get_num_threads()
    Ranks(on_machine=2).take_threads()  # a worker's: with more, sums are taken in another order
    try:
        compared(config(tmp_path, **shared, out=str(tmp_path / "one")))
    finally:
        torch.set_num_threads(threads)
    monkeypatch.undo()
    found, _ = compared(config(tmp_path, **shared, workers=2))
    assert [len(line.losses) for line in found.lines] == [1, 1]
    for method in ("lora", "qlora"):
        one, two = (
            tiny_run.lines(tmp_path / place / "runs" / method / "seed-0" / "metrics.jsonl") for place in ("one", "out")
        )
        assert [line["kind"] for line in one] == [line["kind"] for line in two]
        for key in ("loss", "eval_loss", "grad_norm"):
            figures, others = ([line[key] for line in lines if key in line] for lines in (one, two))
            assert figures == pytest.approx(others, rel=1e-6)


def test_a_method_that_fails_with_several_workers_is_left_out_once(tmp_path: Path, runs: Runs) -> None:
    def fail(asked: TrainConfig) -> None:
        if asked.method == "full":
            raise TrainingError("memory runs out")

    def train(asked: TrainConfig, on_event: Any, worker: Worker) -> dict[str, Any]:
        with one_at_a_time:  # PyTorch's switches are those of the process
            return Runs.train(runs, asked, on_event, worker)

    one_at_a_time = threading.Lock()
    runs.before = fail
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "train_in_subprocess", train)
        found, text = compared(config(tmp_path, workers=2))
    assert text.count("left out: memory runs out") == 1
    assert [line.name for line in found.lines] == ["lora"]


def test_rates_are_searched_on_training_rows_alone_and_the_runs_take_what_was_found(tmp_path: Path, runs: Runs) -> None:
    found, text = compared(config(tmp_path, methods=["lora"], seeds=1, learning_rate={}, search_steps=2))
    searched = [c for c in runs.done if "search" in c.out.parts]
    assert len(searched) >= 3
    eval_dataset = (tmp_path / "valid.jsonl").read_text().splitlines()
    used = [
        row for c in searched for file in (*c.data, str(c.eval_data)) for row in Path(file).read_text().splitlines()
    ]
    assert not set(used) & set(eval_dataset)
    assert not set(Path(searched[0].data[0]).read_text().splitlines()) & set(
        Path(str(searched[0].eval_data)).read_text().splitlines()
    )
    final = next(c for c in runs.done if "runs" in c.out.parts)
    assert final.learning_rate == found.lines[0].learning_rate
    assert found.lines[0].tried
    assert "learning rate" in text
    assert not (searched[0].out / "adapter").exists(), "only the loss was wanted"
    count = len(runs.done)
    compared(config(tmp_path, methods=["lora"], seeds=1, learning_rate={}, search_steps=2))
    assert len(runs.done) == count, "the search is not run again either"


def test_the_rows_of_the_search_keep_the_form_of_the_data(tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}]}
        for i in range(60)
    ]
    tiny_run.write_rows(tmp_path / "chat.jsonl", chats)
    asked = config(tmp_path, data=[str(tmp_path / "chat.jsonl")], eval_data="60%")
    files, judges = write_search_rows(load_comparison_data(config(tmp_path)), 4, 2, tmp_path / "rows")
    assert json.loads(Path(judges).read_text().splitlines()[0]).keys() == {"prompt", "completion"}
    assert len(Path(files[0]).read_text().splitlines()) == 8
    with pytest.raises(ConfigError, match=r"training rows are too few to search.*--learning-rate lora=2e-4"):
        write_search_rows(load_comparison_data(asked), 4, 2, tmp_path / "rows")
    material = load_comparison_data(config(tmp_path, data=[str(tmp_path / "chat.jsonl")]))
    files, _ = write_search_rows(material, 4, 2, tmp_path / "chats")
    assert json.loads(Path(files[0]).read_text().splitlines()[0]) in chats


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_fewer_held_out_rows_than_the_bootstrap_needs_are_refused_before_anything_is_trained(
    tmp_path: Path, runs: Runs
) -> None:
    few = tiny_run.write_rows(tmp_path / "few.jsonl", tiny_run.rows(29, seed=1))
    with pytest.raises(DataError, match=r"gives 29 eval rows, and a bootstrap needs at least 30"):
        compared(config(tmp_path, eval_data=str(few)))
    with pytest.raises(DataError, match=r"eval rows, and a bootstrap needs at least 30.*larger share, such as 20%"):
        compared(config(tmp_path, eval_data="10%"))
    assert not runs.done


def test_data_that_fail_their_check_are_refused_by_row(tmp_path: Path, runs: Runs) -> None:
    bad = tiny_run.write_rows(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    for change in ({"data": [str(bad)]}, {"eval_data": str(bad)}):
        with pytest.raises(DataError, match=r"bad\.jsonl:2: columns"):
            compared(config(tmp_path, **change))
    with pytest.raises(DataError, match=r"bad\.jsonl:2"):
        compared(config(tmp_path, general_data=str(bad)))
    with pytest.raises(DataError, match=r"--general-data 'gone\.jsonl' is no file"):
        compared(config(tmp_path, general_data="gone.jsonl"))
    assert not runs.done


def test_a_metric_that_does_not_fit_the_data_is_refused(tmp_path: Path, runs: Runs) -> None:
    texts = tiny_run.write_rows(tmp_path / "texts.jsonl", [{"text": f"mill number {i}"} for i in range(40)])
    with pytest.raises(ConfigError, match="none of the 40 eval rows has a prompt"):
        compared(config(tmp_path, eval_data=str(texts), metric="rouge-l"))
    short = tiny_run.write_rows(tmp_path / "short.jsonl", [{"prompt": f"{i}?", "completion": "yes"} for i in range(40)])
    with pytest.raises(ConfigError, match="take --metric exact-match"):
        compared(config(tmp_path, eval_data=str(short), metric="bleu"))
    assert not runs.done


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path, runs: Runs) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds 'notes\.txt', which no comparison wrote"):
        compared(config(tmp_path))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]


# ---- rows and prompts -----------------------------------------------------------------------------------------------


def test_rows_of_one_prompt_are_one_group_where_there_are_prompts_enough(tmp_path: Path) -> None:
    many = [{"prompt": f"{i // 2}? ", "completion": f"answer {i}"} for i in range(80)]
    found = load_comparison_data(config(tmp_path, eval_data=str(tiny_run.write_rows(tmp_path / "a.jsonl", many))))
    assert found.groups.tolist() == [i // 2 for i in range(80)]
    assert "80 eval rows have 40 prompts" in found.notes[-1]
    few = [{"prompt": f"{i % 4}? ", "completion": f"answer {i}"} for i in range(80)]
    found = load_comparison_data(config(tmp_path, eval_data=str(tiny_run.write_rows(tmp_path / "b.jsonl", few))))
    assert len(set(found.groups.tolist())) == 80
    assert "only 4 prompts" in found.notes[-1]


def test_rows_of_one_prompt_stay_one_group_where_everything_is_trained(tmp_path: Path) -> None:
    rows = [{**row, "prompt": f"{i // 2}: "} for i, row in enumerate(tiny_run.rows(64, seed=1))]
    tiny_run.write_rows(tmp_path / "pairs.jsonl", rows)
    found = [
        load_comparison_data(config(tmp_path, eval_data=str(tmp_path / "pairs.jsonl"), train_on=how))
        for how in ("all-assistant", "everything")
    ]
    assert found[0].groups.tolist() == found[1].groups.tolist() == [i // 2 for i in range(64)]
    assert found[1].eval_dataset.target_tokens > found[0].eval_dataset.target_tokens


def test_the_rows_of_the_search_train_a_prompt_of_messages_where_everything_is_trained(tmp_path: Path) -> None:
    turns = [("user", "say"), ("assistant", "yes"), ("user", "go on")]
    rows = [
        {"prompt": [{"role": r, "content": f"{text} {i}"} for r, text in turns],
         "completion": [{"role": "assistant", "content": f"it is {i}"}]}
        for i in range(60)
    ]  # fmt: skip
    tiny_run.write_rows(tmp_path / "lists.jsonl", rows)
    counts: dict[str, int] = {}
    for how in ("all-assistant", "everything"):
        material = load_comparison_data(config(tmp_path, data=[str(tmp_path / "lists.jsonl")], train_on=how))
        _, judges = write_search_rows(material, 4, 2, tmp_path / how)
        known = {example.digest for example in material.train.examples}
        encoder = Encoder(load_tokenizer(tiny_run.folder()), train_on=material.train_on)
        judged = load([Source(path=judges)], encoder)
        assert {example.digest for example in judged.examples} <= known
        counts[how] = judged.target_tokens
    assert counts["everything"] > 2 * counts["all-assistant"]


def test_a_prompt_is_answered_once_against_all_its_references(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i % 15}? ", "completion": f"some answer number {i}"} for i in range(45)]
    eval_dataset = tiny_run.write_rows(tmp_path / "many.jsonl", rows)
    found = load_comparison_data(config(tmp_path, eval_data=str(eval_dataset), metric="rouge-l", metric_prompts=12))
    assert len(found.prompts) == 12
    assert all(len(q.references) == 3 for q in found.prompts)


def test_held_out_rows_that_are_trained_on_are_counted(tmp_path: Path) -> None:
    options(tmp_path)
    both = [*tiny_run.rows(3), *tiny_run.rows(32, seed=1)]
    found = load_comparison_data(config(tmp_path, eval_data=str(tiny_run.write_rows(tmp_path / "both.jsonl", both))))
    assert any(note.startswith("3 of 35 eval rows are training rows too") for note in found.notes)


# ---- the report -----------------------------------------------------------------------------------------------------


def test_the_page_needs_no_other_file_and_escapes_what_it_is_given(tmp_path: Path, runs: Runs) -> None:
    place = tmp_path / "a<b"
    place.mkdir()
    compared(config(place, methods=["lora", "lora:rank=5"], seeds=2))
    page = (place / "out" / "report.html").read_text()
    assert not re.search(r"""(src|href)=|url\(|@import|<script""", page)
    assert "a<b" not in page
    assert "a&lt;b" in page
    assert page.count("<svg") == page.count("</svg>") == 5
    assert "nan" not in re.sub(r"<style>.*</style>", "", page, flags=re.DOTALL).lower().split()


def test_the_command_of_a_report_is_the_comparison_again(tmp_path: Path) -> None:
    import shlex

    import typer.main

    from graftlm.cli import app

    asked = config(tmp_path, methods=["full", "lora:rank=8"], margin=3.5, overlong="truncate")
    words = shlex.split(command_of(asked))
    command = typer.main.get_command(app).get_command(None, "compare")  # type: ignore[attr-defined, arg-type]
    parsed = command.make_context("compare", words[2:]).params
    given = {k: v for k, v in parsed.items() if k in CompareConfig.model_fields and v not in (None, [], ())}
    assert CompareConfig.build(given) == asked
