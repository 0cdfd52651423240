"""Many trials on one base: each the same as alone, each with its own end, and none lost or run twice."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from rich.console import Console

from graftlm.adapters.store import Store
from graftlm.cli import app
from graftlm.commands import subprocess_main
from graftlm.commands import sweep as command
from graftlm.commands.sweep import sweep
from graftlm.commands.train import train as train_alone
from graftlm.config import SweepConfig, TrainConfig
from graftlm.dashboard.contents import Contents
from graftlm.dashboard.folders import Folders
from graftlm.distributed.group import Ranks
from graftlm.errors import ConfigError, DataError, Diverged, RunError, Stopped, TrainingError
from graftlm.experiments.sweep import concurrency, study, trial_scheduler
from graftlm.experiments.sweep.results import SweepResult, read
from graftlm.experiments.sweep.view import SweepView, WorkersView
from graftlm.experiments.workers import Worker
from graftlm.planning.hardware import Card
from graftlm.training import memory as memory_estimate
from graftlm.training.view import View

OURS = {"rank", "alpha", "learning_rate", "batch_size", "steps", "seed", "data"}


def options(place: Path, **changes: Any) -> dict[str, Any]:
    """A sweep over two learning rates of 6 steps in `place`/sweep, on tiny_run's base and rows."""
    place.mkdir(exist_ok=True)
    given = {**tiny_run.options(place), "out": str(place / "sweep")}
    search = changes.get("search", {"learning-rate": "0.003|0.02"})
    given = {k: v for k, v in given.items() if k not in {n.replace("-", "_") for n in search}}
    return {**given, "search": search, "sampler": "grid", **changes}


def swept(place: Path, **changes: Any) -> SweepResult:
    return heard(place, **changes)[0]


def heard(place: Path, **changes: Any) -> tuple[SweepResult, str]:
    """Sweep; returns what was found and what a person would have read."""
    text = StringIO()
    given = {k: v for k, v in options(place, **changes).items() if v is not None}
    return sweep(SweepConfig.build(given), SweepView(Console(file=text, width=120))), text.getvalue()


def alone(folder: str | Path, out: Path) -> list[dict[str, Any]]:
    """`graft train` with a trial's own config.json; its metrics."""
    config = TrainConfig.read(Path(folder) / "config.json", {"out": str(out)})
    train_alone(config, View(quiet=True))
    return tiny_run.lines(out / "metrics.jsonl")


def losses(metrics: list[dict[str, Any]], kind: str = "train") -> list[float]:
    key = "eval_loss" if kind == "eval" else "loss"
    return [line[key] for line in metrics if line["kind"] == kind]


# ---- equal to alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "tolerance", "steps"), [("float32", 1e-5, 30), ("nf4", 1e-4, 22)])
def test_each_of_many_trials_has_the_losses_that_it_has_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, tolerance: float, steps: int
) -> None:
    report = study.ClaimedTrial.report

    def pruning(self: study.ClaimedTrial, examples: int, loss: float) -> bool:
        report(self, examples, loss)
        return self.params["rank"] == 16 and examples >= 90

    monkeypatch.setattr(study.ClaimedTrial, "report", pruning)
    space = {"rank": "1|4|16|64"}
    found = swept(
        tmp_path,
        search=space,
        steps=steps,
        eval_every=10,
        lora_dropout=0.2,
        base_precision=precision,
        alpha=None,
        learning_rate=0.003,
    )
    assert sorted(t.params["rank"] for t in found.tried) == [1, 4, 16, 64]
    assert [t.state for t in found.tried if t.params["rank"] == 16] == ["pruned"]
    for tried in found.tried:
        together = tiny_run.lines(Path(tried.folder or "") / "metrics.jsonl")
        by_itself = alone(tried.folder or "", tmp_path / f"alone-{tried.number}")
        taken = 20 if tried.state == "pruned" else steps
        assert len(losses(together)) == taken
        assert losses(together) == pytest.approx(losses(by_itself)[:taken], rel=tolerance)
        evaluations = losses(together, "eval")
        assert evaluations == pytest.approx(losses(by_itself, "eval")[: len(evaluations)], rel=tolerance)


def test_trials_of_other_batches_data_schedules_and_lengths_train_together(tmp_path: Path) -> None:
    first = tiny_run.write_rows(tmp_path / "a.jsonl", tiny_run.rows(9, seed=4))
    second = tiny_run.write_rows(tmp_path / "b.jsonl", tiny_run.rows(14, seed=5))
    space = {
        "batch-size": "2|5", "data": f"{first}|{first}+{second}:0.5", "lr_scheduler": "linear|constant", "steps": "4|7",
        "seed": "1|2", "targets": "attention|all-linear|q_proj+mlp", "weight-decay": "0|0.1",
    }  # fmt: skip
    found = swept(tmp_path, search=space, sampler="random", trials=7, at_once=4, data=None)
    assert [t.state for t in found.tried] == ["complete"] * 7
    assert len({json.dumps(t.params, sort_keys=True) for t in found.tried}) > 4
    for tried in found.tried[:5]:
        together = tiny_run.lines(Path(tried.folder or "") / "metrics.jsonl")
        by_itself = alone(tried.folder or "", tmp_path / f"alone-{tried.number}")
        assert losses(together) == pytest.approx(losses(by_itself), rel=1e-5)


def test_a_trial_that_diverges_ends_alone_and_changes_nothing_for_the_others(tmp_path: Path) -> None:
    found = swept(tmp_path, search={"learning-rate": "0.003|1e30|0.02"}, steps=8, max_grad_norm=0)
    states = {t.params["learning_rate"]: t for t in found.tried}
    assert [states[rate].state for rate in (0.003, 1e30, 0.02)] == ["complete", "diverged", "complete"]
    assert "not finite" in str(states[1e30].why) or "nan" in str(states[1e30].why)
    shown = Contents(Folders([tmp_path / "sweep"]))
    overview = shown.overview()
    of_board = shown.sweep(overview["sweeps"][0]["id"])
    assert of_board is not None
    assert (found.wanted, of_board["wanted"], of_board["state"]) == (3, 3, "finished")
    assert {(run["state"], run["how"]) for run in overview["runs"]} == {
        ("finished", "its result is saved"),
        ("failed", states[1e30].why),
    }
    for rate in (0.003, 0.02):
        by_itself = alone(states[rate].folder or "", tmp_path / f"alone-{rate}")
        together = tiny_run.lines(Path(states[rate].folder or "") / "metrics.jsonl")
        assert losses(together) == pytest.approx(losses(by_itself), rel=1e-5)


def test_a_trials_folder_is_an_ordinary_run(tmp_path: Path) -> None:
    found = swept(tmp_path, search={"rank": "2|5"}, publish="tuned", store=str(tmp_path / "store"))
    best = found.best
    assert best is not None
    assert best.folder is not None
    alone(best.folder, tmp_path / "alone")
    run_files = {p.name for p in (tmp_path / "alone").iterdir()}
    assert run_files <= {p.name for p in Path(best.folder).iterdir()}
    published = Store(tmp_path / "store").find("tuned@1")
    assert published.digest == best.digest
    again = tiny_run.options(tmp_path, out=str(tmp_path / "further"), from_adapter=str(Path(best.folder) / "adapter"))
    again = {k: v for k, v in again.items() if k not in ("rank", "alpha")}
    train_alone(TrainConfig.build(again), View(quiet=True))


# ---- concurrency ----------------------------------------------------------------------------------------------------------


def test_a_place_that_is_left_goes_to_the_next_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[list[int]] = []
    on_iteration_end = trial_scheduler.TrialScheduler.on_iteration_end

    def counting(self: trial_scheduler.TrialScheduler, trials: Any) -> bool:
        together.append(sorted(t.slot for t in trials))
        return on_iteration_end(self, trials)

    monkeypatch.setattr(trial_scheduler.TrialScheduler, "on_iteration_end", counting)
    swept(tmp_path, search={"steps": "2|3|4|6|7"}, at_once=2)
    assert max(map(len, together)) == 2
    assert sum(map(len, together)) == 2 + 3 + 4 + 6 + 7
    assert all(set(slots) <= {1, 2} for slots in together)


def test_how_many_fit_is_planned_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Planned(Exception):
        """Nothing is to be trained once it is known how many fit."""

    seen: list[concurrency.Concurrency] = []

    def planned(*given: Any) -> concurrency.Concurrency:
        seen.append(concurrency.plan_concurrency(*given))
        raise Planned

    monkeypatch.setattr(command, "plan_concurrency", planned)
    with pytest.raises(Planned):
        swept(tmp_path / "a", search={"rank": "4..64"}, sampler="random", trials=20, steps=1)
    plenty = seen[0]
    assert plenty.count == concurrency.AT_ONCE
    assert plenty.bytes is not None
    one_adapter = plenty.largest_adapter * (4 + 4 + 8)  # A and B, gradients, two moments
    less = plenty.bytes - 3 * one_adapter

    def smaller(device: str | None = None) -> Card:
        return Card(
            key="cpu", name="a small machine", kind="cpu", memory=less + 850_000_000 + one_adapter // 2, here=True
        )

    monkeypatch.setattr(memory_estimate, "local", smaller)
    with pytest.raises(Planned):
        swept(tmp_path / "b", search={"rank": "4..64"}, sampler="random", trials=5, at_once=None, steps=1)
    assert seen[1].count == 5
    with pytest.raises(ConfigError, match=r"--at-once 60: 60 trials would take .* fit\. Give --at-once \d+"):
        swept(tmp_path / "c", search={"rank": "4..64"}, sampler="random", trials=60, at_once=60, steps=1)


def test_without_room_for_one_trial_nothing_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_machine = Card(key="cpu", name="a tiny machine", kind="cpu", memory=851_000_000, here=True)
    monkeypatch.setattr(memory_estimate, "local", lambda device=None: tiny_machine)
    with pytest.raises(TrainingError, match=r"this run would take .* a tiny machine has .* nothing was started"):
        swept(tmp_path)
    assert read(tmp_path / "sweep").tried == ()


# ---- going on --------------------------------------------------------------------------------------------------------


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = swept(tmp_path / "whole", search={"learning-rate": "0.003|0.02|0.01"}, at_once=2)
    on_iteration_end = trial_scheduler.TrialScheduler.on_iteration_end
    count = 0

    def stopping(self: trial_scheduler.TrialScheduler, trials: Any) -> bool:
        nonlocal count
        count += 1
        if count == 9:  # two trials have ended, the third has taken three steps
            self.stopped = 15
        return on_iteration_end(self, trials)

    with monkeypatch.context() as patch:
        patch.setattr(trial_scheduler.TrialScheduler, "on_iteration_end", stopping)
        with pytest.raises(Stopped, match="Go on with the same command"):
            swept(tmp_path / "b", search={"learning-rate": "0.003|0.02|0.01"}, at_once=2)
    states = sorted(t.state for t in read(tmp_path / "b" / "sweep").tried)
    assert states == ["complete", "complete", "running"]
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "b").rglob("adapter_model.safetensors")}
    found, said = heard(tmp_path / "b", search={"learning-rate": "0.003|0.02|0.01"}, at_once=2)
    assert "going on from" in said
    assert all(p.stat().st_mtime_ns == time for p, time in finished.items())
    assert {t.params["learning_rate"]: t.loss for t in found.tried} == pytest.approx(
        {t.params["learning_rate"]: t.loss for t in whole.tried}, rel=1e-5
    )


def test_a_trial_whose_result_was_written_and_not_told_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(self: study.ClaimedTrial, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study.ClaimedTrial, "report_result", dying)
        with pytest.raises(KeyboardInterrupt):
            swept(tmp_path, at_once=1)
    assert [t.state for t in read(tmp_path / "sweep").tried] == ["running"]
    written = next((tmp_path / "sweep").rglob("adapter_model.safetensors")).stat().st_mtime_ns
    found = swept(tmp_path, at_once=1)
    assert [t.state for t in found.tried] == ["complete", "complete"]
    first = tmp_path / "sweep" / "trials" / "0000" / "adapter" / "adapter_model.safetensors"
    assert first.stat().st_mtime_ns == written


def workers(given: dict[str, Any], count: int, kill: bool) -> dict[str, Any]:
    """See sweep_workers.py."""
    question = json.dumps(
        {"options": {k: v for k, v in given.items() if v is not None}, "workers": count, "kill": kill}
    )
    script = Path(__file__).parent / "sweep_workers.py"
    done = subprocess.run([sys.executable, str(script), question], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "said": done.stderr}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks with the libraries loaded")
@pytest.mark.parametrize("storage", ["journal", pytest.param("sqlite", marks=pytest.mark.prove)])
def test_four_workers_share_a_sweep_one_is_killed_and_no_trial_is_lost_or_run_twice(
    tmp_path: Path, storage: str
) -> None:
    where = None if storage == "journal" else f"sqlite:///{tmp_path / 'sweep.db'}"
    space = {"learning-rate": "0.001..0.02", "rank": "1..8"}
    given = options(
        tmp_path,
        search=space,
        sampler="random",
        trials=10,
        at_once=2,
        steps=30,
        eval_every=5,
        save_every=3,
        storage=where,
    )
    seen = workers(given, 4, kill=True)
    assert seen["killed"] is not None, seen["said"]
    assert sorted(seen["statuses"]) == [-9, 0, 0, 0], seen["said"]
    found = swept(tmp_path, **{k: v for k, v in given.items() if k not in ("model",)})  # whatever was left over
    assert [t.state for t in found.tried] == ["complete"] * 10
    assert len({json.dumps(t.params) for t in found.tried}) == 10  # no two workers drew the same
    for tried in found.tried:
        steps = [m["step"] for m in tiny_run.lines(Path(tried.folder or "") / "metrics.jsonl") if m["kind"] == "train"]
        assert steps == list(range(1, 31))
    lost = found.tried[seen["killed"]["trials"][0]]
    by_itself = alone(lost.folder or "", tmp_path / "alone")
    together = tiny_run.lines(Path(lost.folder or "") / "metrics.jsonl")
    assert losses(together) == pytest.approx(losses(by_itself), rel=1e-5)


@pytest.mark.prove
@pytest.mark.timeout(1200)  # each worker imports everything, on a machine that does other work as well
def test_two_workers_of_one_command_come_to_what_one_process_does(tmp_path: Path) -> None:
    space = {"rank": "1|2|4|8"}
    threads = torch.get_num_threads()
    Ranks(on_machine=2).take_threads()  # a worker's: with more, sums are taken in another order
    try:
        one = swept(tmp_path, search=space, out=str(tmp_path / "one"), rank=None)
    finally:
        torch.set_num_threads(threads)
    two, text = heard(
        tmp_path, search=space, workers=2, at_once=1, rank=None, publish="best", store=str(tmp_path / "store")
    )
    by_rank = {tried.params["rank"]: tried for tried in two.tried}
    assert [tried.state for tried in two.tried] == ["complete"] * 4
    for tried in one.tried:
        other = by_rank[tried.params["rank"]]
        assert other.loss == pytest.approx(tried.loss, rel=1e-5)
        assert [loss for _, loss in other.eval_losses] == pytest.approx(
            [loss for _, loss in tried.eval_losses], rel=1e-5
        )
    assert text.count("matmuls in float32 on cpu") == 1  # facts of one worker
    assert (tmp_path / "sweep" / "report.md").is_file()
    assert two.best is not None
    assert Store(tmp_path / "store").find("best@1").digest == two.best.digest


def test_a_worker_tells_its_facts_its_trials_and_their_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child of a sweep with several workers, in this process, and its parent's view."""
    monkeypatch.setattr(Ranks, "take_threads", lambda ranks: None)
    asked = SweepConfig.build({k: v for k, v in options(tmp_path, workers=2).items() if v is not None})
    told = StringIO()
    subprocess_main.main(StringIO(json.dumps(asked.model_dump(mode="json", exclude_unset=True))), told, "sweep")
    events = [json.loads(line) for line in told.getvalue().splitlines()]
    assert events[-1] == {"event": "done", "summary": {}}
    ended = [event["name"] for event in events if event["event"] == "trial-ended"]
    assert sorted(ended) == ["0000", "0001"]
    steps = [event["step"] for event in events if event["event"] == "trial" and event["name"] == "0000"]
    assert steps == list(range(1, 7))
    text = StringIO()
    with WorkersView(SweepView(Console(file=text, width=120)), 2) as seen:
        for event in events:
            seen.of(0)(event)
            seen.of(1)(event)
    assert text.getvalue().count("matmuls in float32 on cpu") == 1
    assert text.getvalue().count("eval loss") == 2


def test_a_worker_that_dies_leaves_its_trials_to_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(asked: SweepConfig, on_event: Any, worker: Worker) -> None:
        if worker.name == "worker 1":
            raise TrainingError("the training process ended with status -9: no message")
        on_event({"event": "note", "text": "one of several"})
        on_event({"event": "note", "text": "one of several"})
        if finishes:
            command.search(asked, SweepView(Console(quiet=True)))
        else:
            study.Study(asked).identify({})

    monkeypatch.setattr(Ranks, "take_threads", lambda ranks: None)
    monkeypatch.setattr(command, "sweep_in_subprocess", work)
    finishes = True
    found, text = heard(tmp_path, workers=2)
    assert [tried.state for tried in found.tried] == ["complete"] * 2
    assert "worker 1: the training process ended with status -9" in text
    assert text.count("one of several") == 1
    finishes = False
    with pytest.raises(TrainingError, match=r"worker 1: .* 2 trials are left, which the same command goes on with"):
        heard(tmp_path, workers=2, out=str(tmp_path / "left"))


def test_a_loaded_model_and_several_workers_are_refused(tmp_path: Path) -> None:
    given = {k: v for k, v in options(tmp_path, workers=2).items() if v is not None}
    with pytest.raises(
        ConfigError, match="workers=2 starts processes of their own, which do not have the loaded model"
    ):
        sweep(SweepConfig.build(given), SweepView(Console(quiet=True)), base=object())  # type: ignore[arg-type]


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"learning-rate": "1e-2..1e-5"}, r"reversed, 0.01 to 1e-05; write 1e-5..1e-2"),
        ({"rank": "8..8"}, r"'rank=8..8' holds one value alone; give it as --rank 8"),
        ({"rank": ""}, r"'rank' has no values; give rank=LOW..HIGH or rank=A\|B"),
        ({"rank": "4"}, r"'rank=4' leaves nothing to search"),
        ({"rank": "4|4"}, r"names '4' twice"),
        ({"rank": "0..8"}, r"rank must be greater than or equal to 1, found '0'"),
        ({"rank": "4..x"}, r"rank must be a valid integer.*found 'x'"),
        ({"lora_dropout": "0..0.5:0"}, r"step of 'lora-dropout=0..0.5:0' must be above 0"),
        ({"learning_rte": "1e-5..1e-2"}, r"unknown option 'learning_rte', did you mean 'learning-rate'\?"),
        ({"base_precision": "nf4|int8"}, r"'base-precision' is the same for all trials of a sweep"),
        ({"lr_scheduler": "cosine|lineer"}, r"lr-scheduler must be 'cosine', 'linear' or 'constant', found 'lineer'"),
        ({"steps": "4|8", "epochs": "1|2"}, r"steps or epochs, not both"),
        ({}, r"search is empty"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_anything_is_read(
    tmp_path: Path, search: dict[str, str], said: str
) -> None:
    changes: dict[str, Any] = {"sampler": "tpe", "steps": None} if "steps" in search else {"sampler": "tpe"}
    with pytest.raises(ConfigError, match=said):
        swept(tmp_path, search=search, **changes)
    assert not (tmp_path / "sweep").exists()


def test_contradictions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="method full trains the base itself"):
        swept(tmp_path, method="full", rank=None, alpha=None)
    with pytest.raises(ConfigError, match="--rank is given and searched"):
        SweepConfig.build({**options(tmp_path), "rank": 3, "search": "rank=2|3"})
    with pytest.raises(ConfigError, match="judged by different rows; give --eval-data FILE"):
        swept(tmp_path, search={"data": "a.jsonl|b.jsonl"}, eval_data="10%")
    with pytest.raises(ConfigError, match="'learning-rate' is a range; name its values"):
        swept(tmp_path, search={"learning-rate": "0.001..0.1"})
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        swept(tmp_path, search={"data": f"{tmp_path}/train.jsonl|{tmp_path}/missing.jsonl"}, data=None)
    with pytest.raises(ConfigError, match=r"target 'q_prj' matches no layer of this model, did you mean 'q_proj'"):
        swept(tmp_path, search={"targets": "q_prj|mlp"})
    assert read(tmp_path / "sweep").tried == ()


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("sqlite:////nowhere/at/all/sweep.db", "sqlite:////nowhere/at/all/sweep.db cannot be reached"),
        ("postgresql://me:secret@127.0.0.1:1/sweeps", r"postgresql://me:\*\*\*@127.0.0.1:1/sweeps"),
        ("nosuch://host/db", "nosuch://host/db cannot be reached"),
        ("/nowhere/at/all/sweep.journal", "/nowhere/at/all/sweep.journal cannot be reached"),
    ],
)
def test_a_storage_that_cannot_be_reached_is_said_without_its_password(tmp_path: Path, storage: str, said: str) -> None:
    with pytest.raises(RunError, match=said) as caught:
        swept(tmp_path, storage=storage)
    assert "secret" not in str(caught.value)


def test_a_folder_that_has_kept_a_password_before_is_still_its_sweeps(tmp_path: Path) -> None:
    url = "postgresql://me:se/cret@host/sweeps"
    given = {"search": {"rank": "2|5"}, "model": "demo", "data": ["a.jsonl"], "out": str(tmp_path / "sweep")}
    config = SweepConfig.build({**given, "storage": url})
    home = study.claim_folder(config)
    mark = json.loads((config.out / "sweep.json").read_text())
    assert mark["storage"] is None
    (config.out / "sweep.json").write_text(json.dumps({**mark, "storage": url}))  # as it was written without seeing it
    assert study.claim_folder(config) == home


def test_a_storage_or_folder_of_another_sweep_is_refused_with_both_values(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'sweep.db'}"
    swept(tmp_path, storage=storage, name="mine")
    with pytest.raises(RunError, match=r"is another sweep: .*batch-size was 5, now 4.*another --name"):
        swept(tmp_path, storage=storage, name="mine", batch_size=4)
    with pytest.raises(RunError, match=r"is another sweep: .*search was"):
        swept(tmp_path, storage=storage, name="mine", search={"learning-rate": "0.003|0.03"})
    (tmp_path / "train.jsonl").write_text((tmp_path / "train.jsonl").read_text().replace("mill", "barn"))
    with pytest.raises(RunError, match="data was"):
        swept(tmp_path, storage=storage, name="mine")
    with pytest.raises(RunError, match="belongs to a sweep with name 'mine', now 'yours'"):
        swept(tmp_path, storage=storage, name="yours")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match=r"holds 'letter.txt', which no sweep wrote"):
        swept(tmp_path, storage=storage, out=str(tmp_path / "full"))
    assert (tmp_path / "full" / "letter.txt").read_text() == "dear"


def test_a_study_of_another_program_is_left_alone(tmp_path: Path) -> None:
    import optuna

    storage = f"sqlite:///{tmp_path / 'other.db'}"
    other = optuna.create_study(storage=storage, study_name="sweep", direction="minimize")
    other.tell(other.ask(), 1.0)
    with pytest.raises(RunError, match="is a study of another program"):
        swept(tmp_path, storage=storage)
    assert len(other.trials) == 1


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_show_prints_what_was_found_and_writes_the_report(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    found = swept(tmp_path, search={"learning-rate": "0.003|0.02", "targets": "attention|mlp"})
    (tmp_path / "sweep" / "report.html").unlink()
    shown = CliRunner().invoke(app, ["sweep", "show", str(tmp_path / "sweep"), "--json"])
    assert shown.exit_code == 0, shown.output
    said = json.loads(shown.stdout)
    assert [t["state"] for t in said["trials"]] == ["complete"] * 4
    best = min(found.tried, key=lambda t: t.loss or math.inf)
    assert said["best"] == best.number
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert page.count("<svg") == 4  # by trial, by each option, as they fell
    assert "http" not in page.replace("http://www.w3.org", "")
    assert f"Trial {best.number}:" in (tmp_path / "sweep" / "report.md").read_text()
    missing = CliRunner().invoke(app, ["sweep", "show", str(tmp_path)])
    assert missing.exit_code == 2


def test_asha_ends_poor_trials_early_and_hyperband_runs(tmp_path: Path) -> None:
    space = {"learning-rate": "0.03|0.02|0.01|0.000001|0.000002|0.000003|0.000004"}
    found = swept(tmp_path, search=space, steps=9, eval_every=1, pruner="asha", at_once=7)
    states = {t.params["learning_rate"]: t.state for t in found.tried}
    assert "pruned" in states.values()
    assert states[min(states)] == "pruned"
    best = found.best
    assert best is not None
    assert best.params["learning_rate"] >= 0.01
    shutil.rmtree(tmp_path / "sweep")
    found = swept(tmp_path, search=space, steps=9, eval_every=3, pruner="hyperband", at_once=4, trials=4)
    assert {t.state for t in found.tried} <= {"complete", "pruned"}
    assert len(found.tried) == 4


def test_the_same_sweep_twice_tries_the_same(tmp_path: Path) -> None:
    space = {"learning-rate": "0.0001..0.1", "rank": "1..16"}
    first = swept(tmp_path / "a", search=space, sampler="tpe", trials=6, at_once=2, steps=2, eval_every=2)
    second = swept(tmp_path / "b", search=space, sampler="tpe", trials=6, at_once=2, steps=2, eval_every=2)
    assert [(t.params, t.loss) for t in first.tried] == [(t.params, t.loss) for t in second.tried]


def test_an_error_that_is_not_one_trials_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise TrainingError("a frozen tensor has changed")

    monkeypatch.setattr("graftlm.training.trainer.check_gradients_reach_every_tensor", broken)
    with pytest.raises(TrainingError, match="frozen tensor") as caught:
        swept(tmp_path)
    assert not isinstance(caught.value, Diverged)
