"""What the board reads: states of runs, curves that grow, damaged files, and nothing outside its folders."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import board_files as files
import httpx2 as httpx
import numpy as np
import pytest
from typer.testing import CliRunner

import graftlm
from graftlm.adapters.store import Store
from graftlm.cli import app
from graftlm.config import BoardConfig
from graftlm.dashboard import metrics_log, runs
from graftlm.dashboard.contents import Contents
from graftlm.dashboard.folders import Folders
from graftlm.dashboard.metrics_log import MOST_POINTS, MetricsLog
from graftlm.dashboard.page import encode
from graftlm.errors import ConfigError, RunError, StoreError
from graftlm.experiments.sweep.results import read
from graftlm.experiments.sweep.storage import has_password, redacted
from graftlm.experiments.sweep.study import Study
from graftlm.jsonfile import parse_json

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))

import stores


def contents(*folders: Path, **more: Any) -> Contents:
    return Contents(Folders(folders), **more)


def only(board: Contents) -> dict[str, Any]:
    (run,) = board.overview()["runs"]
    return run


# ---- states ----------------------------------------------------------------------------------------------------------


def test_a_run_is_running_while_a_process_holds_its_lock(tmp_path: Path) -> None:
    folder = files.run(tmp_path / "one", 5, total=9, done=False)
    lock = folder / ".running"
    lock.write_text(str(os.getpid()))
    os.utime(folder / "metrics.jsonl", (1e9, 1e9))  # a step that takes hours
    with lock.open():
        assert only(contents(tmp_path))["how"] == f"process {os.getpid()} holds its lock"
    found = only(contents(tmp_path))
    assert found["state"] == "failed", "the process lives, and has another file open"
    assert "no process holds it" in found["how"]
    assert "after step 5" in found["how"]


def went_on(folder: Path) -> None:
    """The run was stopped at step 5 and resumed."""
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "kind": "event", "event": "stopped", "signal": 15}\n')
        stream.write(files.step_line(6) + files.step_line(7))


def lost(folder: Path) -> None:
    """Its process was killed long ago."""
    (folder / ".running").write_text("999999")
    for file in (folder, folder / ".running", folder / "metrics.jsonl"):
        if file.exists():
            os.utime(file, (1e9, 1e9))


def test_a_lock_of_another_users_process_counts_while_the_run_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = files.run(tmp_path / "one", 5, total=9, done=False)
    (folder / ".running").write_text("1")

    def refused(place: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(place))

    monkeypatch.setattr(Path, "iterdir", refused)
    found = only(contents(tmp_path))
    assert found["state"] == "running"
    assert "process 1 is another user's, so whether it holds the lock cannot be seen" in found["how"]
    os.utime(folder / "metrics.jsonl", (1e9, 1e9))  # the number of a killed run may be another process's by now
    found = only(contents(tmp_path))
    assert found["state"] == "failed"
    assert "process 1, another user's, may not hold it" in found["how"]


def test_a_comparison_is_running_between_two_of_its_runs(tmp_path: Path) -> None:
    folder = files.comparison(tmp_path / "methods")
    board = contents(tmp_path)
    id = board.overview()["comparisons"][0]["id"]
    lock = folder / ".running"
    lock.write_text(str(os.getpid()))
    os.utime(lock, (1e9, 1e9))
    for metrics in folder.rglob("metrics.jsonl"):
        os.utime(metrics, (1e9, 1e9))

    def running() -> bool:
        found = board.comparison(id)
        assert found is not None
        return found["running"]

    with lock.open():
        assert running()
    board = contents(tmp_path)
    assert not running(), "killed: its lock is left"


def sweep_in(place: Path) -> dict[str, Any]:
    board = contents(place)
    found = board.sweep(board.overview()["sweeps"][0]["id"])
    assert found is not None
    return found


def test_a_sweep_is_finished_once_it_has_the_trials_that_its_last_start_wanted(tmp_path: Path) -> None:
    folder = files.sweep(tmp_path / "search", 3)
    found = sweep_in(tmp_path)
    assert (found["wanted"], found["state"]) == (5, "stopped")
    assert [trial["state"] for trial in found["trials"]] == ["complete", "complete", "lost"]
    study = Study(files.sweep_config(folder, 2))  # the same command with fewer trials
    study.identify({"base": "b", "data": "d"})
    assert (sweep_in(tmp_path)["wanted"], sweep_in(tmp_path)["state"]) == (2, "finished")
    study = Study(files.sweep_config(folder, 9))
    study.identify({"base": "b", "data": "d"})
    assert read(folder, read_only=True).wanted == 9
    again, begun = study.next(), study.next()  # the lost one, and one that has no options yet
    assert again is not None
    assert begun is not None
    assert sorted(p.name for p in begun.folder.iterdir()) == [".running"]
    assert sweep_in(tmp_path)["trials"][-1]["state"] == sweep_in(tmp_path)["state"] == "running"
    begun.release()
    lost(begun.folder)
    assert sweep_in(tmp_path)["trials"][-1]["state"] == "lost"
    again.release()
    assert sweep_in(tmp_path)["state"] == "stopped"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:se/cret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://:secret@host/db", "postgresql://:***@host/db"),
        ("mysql://host/db?user=me&password=secret&ssl=1", "mysql://host/db?user=me&password=***&ssl=1"),
        ("postgresql://host:5432/db", None),
        ("sqlite:////a/b@c:d.db", None),
        ("runs/a:b@c.journal", None),
    ],
)
def test_a_storages_password_is_neither_kept_nor_shown(url: str, shown: str | None) -> None:
    assert has_password(url) == (shown is not None)
    assert redacted(f"connecting to {url} has failed") == f"connecting to {shown or url} has failed"


def test_the_board_never_takes_the_lock_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = files.run(tmp_path / "one", 2, done=False) / ".running"
    lock.write_text(str(os.getpid()))
    monkeypatch.setattr("graftlm.dashboard.contents.SCAN_SECONDS", -1)
    board, ended = contents(tmp_path), threading.Event()

    def look() -> None:
        while not ended.is_set():
            board.overview()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(300):  # as a run does that begins: it is refused where somebody holds the lock for a moment
            with lock.open("r+") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize(
    ("change", "state", "how"),
    [
        (lambda f: (f / "adapter").mkdir(), "finished", "its result is saved"),
        (lambda f: (f / "model").mkdir(), "finished", "its result is saved"),
        (lambda f: (f / "adapter-so-far").mkdir(), "stopped", "--resume goes on"),
        (
            lambda f: (f / "result.json").write_text('{"diverged": "the loss is nan at step 3"}'),
            "failed",
            "the loss is nan at step 3",
        ),
        (
            lambda f: (
                (f / "metrics.jsonl")
                .open("a")
                .write('{"step": 5, "kind": "event", "event": "stopped", "signal": 15}\n')
            ),
            "stopped",
            "stopped by signal 15 after step 5; --resume goes on",
        ),
        (
            lambda f: (f / ".running").write_text("999999"),
            "running",
            "its process is not on this machine, or was just killed",
        ),
        (lambda f: (f / ".running").write_text("no number"), "running", "its process is not on this machine"),
        (lambda f: None, "failed", "ended by an error after step 5"),
        (
            lambda f: (f / "result.json").write_text('{"state": "pruned", "why": "pruned after step 5 of 9"}'),
            "stopped",
            "pruned after step 5 of 9",
        ),
        (
            lambda f: (f / "result.json").write_text('{"state": "pruned", "why": "the loss is nan at step 5"}'),
            "failed",
            "the loss is nan at step 5",
        ),
        (lambda f: went_on(f), "failed", "ended by an error after step 7"),
        (lambda f: (went_on(f), (f / "adapter-so-far").mkdir(), lost(f)), "failed", "killed or crashed after step 7"),
    ],
)
def test_how_a_run_ended_is_known_from_its_files(tmp_path: Path, change: Any, state: str, how: str) -> None:
    change(files.run(tmp_path / "one", 5, total=9, done=False))
    found = only(contents(tmp_path))
    assert found["state"] == state
    assert how in found["how"]


# ---- curves ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 7, 512, 513, 2000])
def test_a_curve_has_a_bounded_number_of_points_and_the_means_of_all_steps(tmp_path: Path, steps: int) -> None:
    folder = files.run(tmp_path / "one", steps)
    board = contents(tmp_path)
    found = board.curve(only(board)["id"])
    assert found is not None
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    width, columns = found["width"], found["columns"]
    assert len(columns["step"]) <= MOST_POINTS + 1
    assert width == 1 or steps / (width / 2) > MOST_POINTS - 1, "no coarser than it must be"
    for i, step in enumerate(columns["step"]):
        own = [line for line in train if line["step"] // width == step // width]
        assert columns["loss"][i] == pytest.approx(np.mean([line["loss"] for line in own]), rel=1e-5)
        assert columns["grad_norm"][i] == pytest.approx(max(line["grad_norm"] for line in own), rel=1e-5)
        assert columns["low"][i] == pytest.approx(min(line["loss"] for line in own), rel=1e-5)
        assert columns["rate"][i] == pytest.approx(
            sum(x["tokens"] for x in own) / sum(x["seconds"] for x in own), rel=1e-5
        )
        assert (step, columns["tokens"][i]) == (own[-1]["step"], own[-1]["num_tokens"])
    assert [e[0] for e in found["evals"]] == [line["step"] for line in lines if line["kind"] == "eval"]


def test_a_file_that_grows_by_any_pieces_gives_the_curve_of_the_whole(tmp_path: Path) -> None:
    whole = (files.run(tmp_path / "whole", 700) / "metrics.jsonl").read_bytes()
    expected = MetricsLog(tmp_path / "whole" / "metrics.jsonl", Folders([tmp_path]))
    expected.refresh(parse=True)
    piece, draw = tmp_path / "metrics.jsonl", random.Random(3)
    piece.write_bytes(b"")
    log = MetricsLog(piece, Folders([tmp_path]))
    seen: dict[str, list[Any]] = {}
    width = generation = -1
    at = 0
    while at < len(whole):
        step = draw.choice([1, 40, 3000, 20000])
        with piece.open("ab") as stream:
            stream.write(whole[at : at + step])
        at += step
        log.refresh(parse=True)
        curve = log.curve(generation, width, len(seen.get("step", ())))  # as a page asks for it
        seen = {name: [*seen.get(name, [])[: curve.first], *values] for name, values in curve.columns.items()}
        width, generation = curve.width, log.generation
    assert seen == expected.curve().columns
    assert (log.damaged, log.evals) == (0, expected.evals)


def test_only_new_bytes_are_read_and_the_list_parses_no_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(5):
        files.run(tmp_path / str(i), 1000, done=i > 0)
    parsed: list[Any] = []

    def counted(text: bytes) -> Any:
        found = parse_json(text)
        parsed.extend(found)
        return found

    monkeypatch.setattr(metrics_log, "parse_json", counted)
    board = contents(tmp_path)
    monkeypatch.setattr("graftlm.dashboard.contents.SCAN_SECONDS", -1)
    board.overview()
    assert len(parsed) == 5 * 10, "nine evaluations and the last step of each"
    parsed.clear()
    board.overview()
    assert parsed == []
    with (tmp_path / "0" / "metrics.jsonl").open("a") as stream:
        stream.write(files.step_line(1001, steps=2000) * 3)
    assert {run["name"]: run["step"] for run in board.overview()["runs"]}["0"] == 1001
    assert len(parsed) == 1
    id = next(run["id"] for run in board.overview()["runs"] if run["name"] == "0")
    first = board.curve(id)
    assert first is not None
    again = board.curve(id, first["generation"], first["width"], len(first["columns"]["step"]))
    assert again is not None
    assert len(again["columns"]["step"]) == 1, "the last point alone, which may have grown"


def test_a_run_that_goes_on_from_a_checkpoint_begins_its_curve_anew(tmp_path: Path) -> None:
    folder = files.run(tmp_path / "one", 50, done=False)
    board = contents(tmp_path)
    id = only(board)["id"]
    before = board.curve(id)
    assert before is not None
    kept = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[:30]
    (folder / "new").write_text("".join(kept))
    (folder / "new").replace(folder / "metrics.jsonl")
    after = board.curve(id, before["generation"], before["width"], 50)
    assert after is not None
    assert (after["first"], after["generation"] > before["generation"]) == (0, True)
    assert after["columns"]["step"][-1] < 30


def test_a_new_file_with_the_number_of_the_old_one_begins_the_curve_anew(tmp_path: Path) -> None:
    metrics = files.run(tmp_path / "one", 50, done=False) / "metrics.jsonl"
    log = MetricsLog(metrics, Folders([tmp_path]))
    log.refresh(parse=True)
    before = log.generation
    inode = metrics.stat().st_ino
    for steps in (50, 90):  # of the same length, and longer
        metrics.write_text("".join(files.step_line(step, bottom=2.2, steps=steps) for step in range(1, steps + 1)))
        if steps == 50:
            metrics.write_bytes(metrics.read_bytes().ljust(log._offset, b"\n")[: log._offset])  # pyright: ignore[reportPrivateUsage]
        assert metrics.stat().st_ino == inode
        log.refresh(parse=True)
        assert log.generation > before
        before = log.generation
        assert log.curve().columns["step"][-1] == steps
        assert log.evals == []
    again = MetricsLog(metrics, Folders([tmp_path]))
    assert again.generation > log.generation, "a board that is started again has other ones"
    assert again.generation > 1e12


# ---- damaged files ---------------------------------------------------------------------------------------------------


def all_of_it(board: Contents) -> str:
    """Everything that a page can ask for, as JSON."""
    found = board.overview()
    parts = [found, board.adapters(), *(board.run(run["id"]) for run in found["runs"])]
    parts += [board.curve(run["id"]) for run in found["runs"]]
    parts += [board.sweep(one["id"]) for one in found["sweeps"]] + [
        board.comparison(one["id"]) for one in found["comparisons"]
    ]
    return encode(parts)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("original")
    files.samples(files.run(place / "runs" / "first", 12))
    files.sweep(place / "runs" / "search", 3)
    files.comparison(place / "runs" / "methods")
    store = Store(place / "adapters")
    store.publish(stores.run(place / "a", 1), "formal")
    return place


@pytest.mark.parametrize("how", ["cut", "flipped", "other values", "huge values"])
def test_no_damage_ends_the_board(original: Path, tmp_path: Path, how: str) -> None:
    draw = random.Random(how)
    for attempt in range(4):
        place = tmp_path / str(attempt)
        shutil.copytree(original, place)
        files.damage(place, how, draw)
        all_of_it(contents(place / "runs", store=place / "adapters"))


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    folder = files.run(tmp_path / "one", 5, done=False)
    (folder / "plan.json").write_text('{"predicted": ')
    with (folder / "metrics.jsonl").open("ab") as stream:
        stream.write(
            b'garbage\n{"step": -1, "kind": "train"}\n[]\n'
            + b'{"step": 6, "kind": "train", "loss": NaN}\n'
            + b"x" * (3 << 20)
            + b"\n"
        )
        stream.write(files.step_line(7).encode() + b'{"step": 8, "ki')
    board = contents(tmp_path)
    found = board.run(only(board)["id"])
    assert found is not None
    assert any("plan.json is not JSON" in fault for fault in found["faults"])
    assert found["step"] == 7
    curve = board.curve(found["id"])
    assert curve is not None
    assert curve["columns"]["loss"][-2] is None, "a loss that is not finite is a gap"
    found = board.run(found["id"])
    assert found is not None
    assert "4 lines of metrics.jsonl cannot be read and are left out" in found["faults"]
    assert str(tmp_path) not in json.dumps(found["faults"]), "the page names files, not places of the machine"


def test_of_many_samples_the_last_are_shown_and_read_again_only_where_they_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = files.run(tmp_path / "one", 3)
    files.samples(folder, tuple(range(100)))
    monkeypatch.setattr(runs, "MOST_SAMPLE_BYTES", 3000)
    board = contents(tmp_path)
    id = only(board)["id"]
    opened: list[Path] = []
    real = Folders.opened

    def counted(self: Folders, path: Path) -> Any:
        opened.append(path)
        return real(self, path)

    monkeypatch.setattr(Folders, "opened", counted)
    found = board.run(id)
    assert found is not None
    assert found["samples"][-1]["step"] == 99
    assert len(found["samples"]) < 20
    assert any("shown are the samples in its last" in fault for fault in found["faults"])
    assert opened == [folder / "samples.jsonl"]
    assert board.run(id) == found
    assert len(opened) == 1
    files.samples(folder, (5,))
    found = board.run(id)
    assert found is not None
    assert ({sample["step"] for sample in found["samples"]}, found["faults"]) == ({5}, [])


# ---- nothing else ----------------------------------------------------------------------------------------------------


def test_nothing_outside_the_folders_is_read(tmp_path: Path) -> None:
    secret = files.run(tmp_path / "elsewhere" / "secret", 4, model="SECRET")
    (tmp_path / "elsewhere" / "words").write_text('{"model": "SECRET"}')
    runs = tmp_path / "runs"
    (runs / "linked files").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl"):
        (runs / "linked files" / name).symlink_to(secret / name)
    (runs / "linked folder").symlink_to(secret)
    one = files.run(runs / "one", 3)
    (one / "plan.json").unlink()
    os.mkfifo(one / "plan.json")  # reading it would never end
    (one / "samples.jsonl").symlink_to(secret / "metrics.jsonl")
    (one / ".running").symlink_to(tmp_path / "elsewhere" / "words")
    sweep = files.sweep(runs / "search", 2)
    (sweep / "report.html").symlink_to(tmp_path / "elsewhere" / "words")
    mark = json.loads((sweep / "sweep.json").read_text())
    (sweep / "sweep.json").write_text(json.dumps({**mark, "storage": str(tmp_path / "elsewhere" / "words")}))
    board = contents(runs)
    text = all_of_it(board)
    assert "SECRET" not in text
    assert "plan.json is no plain file and is not read" in text
    assert "samples.jsonl is a link and is not read" in text
    assert "lies outside the board's folders" in text
    assert board.report(board.overview()["sweeps"][0]["id"]) is None


def test_what_becomes_a_link_or_a_pipe_while_it_is_looked_at_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(Folders, "checked", lambda self, path: path)  # it was a plain file a moment ago
    for name in ("link", "pipe"):
        with pytest.raises(RunError, match=f"{name} "):
            Folders([tmp_path]).opened(tmp_path / name)


def test_folders_that_lie_too_deep_are_said(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*"12345678")
    files.run(deep, 1)
    found = contents(tmp_path).overview()
    assert (len(found["runs"]), found["cut"]) == (1, False)
    files.run(deep.parent / "other" / "run", 1)
    found = contents(tmp_path).overview()
    assert (len(found["runs"]), found["cut"]) == (1, True)


def test_a_board_writes_nothing(original: Path) -> None:
    def state() -> dict[str, Any]:
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(original.rglob("*"))}

    before = state()
    all_of_it(contents(original / "runs", store=original / "adapters"))
    assert state() == before


def test_a_sweep_is_what_graft_sweep_show_reads(original: Path) -> None:
    board = contents(original / "runs")
    found = board.sweep(board.overview()["sweeps"][0]["id"])
    assert found is not None
    real = read(original / "runs" / "search", read_only=True)
    assert found["best"] == (real.best.number if real.best else None)
    assert [t["params"] for t in found["trials"]] == [dict(t.params) for t in real.tried]
    assert [t["evals"] for t in found["trials"]] == [t.eval_losses for t in real.tried]
    assert found["space"] == dict(real.space)


def test_a_sweep_in_a_database_is_what_its_folders_say(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original / "runs" / "search", tmp_path / "search")
    mark = json.loads((tmp_path / "search" / "sweep.json").read_text())
    (tmp_path / "search" / "sweep.json").write_text(json.dumps({**mark, "storage": "postgresql://me:word@host/db"}))
    ended = {"state": "pruned", "why": "pruned after step 80 of 90"}
    (tmp_path / "search" / "trials" / "0002" / "result.json").write_text(json.dumps(ended))
    board = contents(tmp_path)
    found = board.sweep(board.overview()["sweeps"][0]["id"])
    assert found is not None
    assert "does not open" in found["faults"][0]
    assert "word" not in encode(found)
    assert (found["wanted"], found["state"]) == (None, None), "nobody knows how many there are to be"
    assert set(found["options"]) == {"learning_rate", "rank"}
    assert [t["state"] for t in found["trials"]] == ["complete", "complete", "pruned"]


def test_a_version_leads_to_the_run_that_made_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "adapters")
    first, _ = store.publish(stores.run(tmp_path / "a", 1), "formal")
    store.publish(stores.run(tmp_path / "b", 2), "formal", parents=[first.digest])
    store.alias("formal", "prod", 1)
    folder = files.run(tmp_path / "moved" / "elsewhere", 3)
    (folder / "summary.json").write_text(json.dumps({"adapter_digest": first.digest}))
    board = contents(tmp_path / "moved", store=store.root)
    found = board.adapters()
    assert found is not None
    second_line, first_line = found["names"][0]["versions"]
    assert first_line["run"] == only(board)["id"]
    assert (first_line["aliases"], first_line["children"]) == (["prod"], ["formal@2"])
    assert second_line["parents"] == [{"digest": first.digest, "label": "formal@1"}]
    journal = next((store.root / "bases").iterdir()) / "journal.jsonl"
    journal.write_bytes(b"x" + journal.read_bytes()[1:])
    found = board.adapters()
    assert found is not None
    assert "is damaged at line 1" in found["faults"][0]


# ---- over HTTP -------------------------------------------------------------------------------------------------------


def test_an_answer_that_is_known_is_not_sent_again_and_every_answer_is_guarded(original: Path) -> None:
    with (
        files.board(original / "runs", store=original / "adapters") as board,
        httpx.Client(base_url=board.url) as client,
    ):
        first = client.get("/api/overview")
        assert client.get("/api/overview", headers={"If-None-Match": first.headers["etag"]}).status_code == 304
        for path in ("/", "/api/overview", "/assets/board.js", "/api/runs/none", "/nothing"):
            found = client.get(path)
            assert "default-src 'none'" in found.headers["content-security-policy"]
            assert "unsafe" not in found.headers["content-security-policy"]
            assert found.headers["x-content-type-options"] == "nosniff"
        for path in (
            "/assets/../app.py",
            "/assets/%2e%2e/app.py",
            "/assets//etc/passwd",
            "/api/runs/..%2f..",
            "/reports/none",
            "/api/playground/models",
        ):
            assert client.get(path).status_code == 404
        assert client.post("/api/overview").status_code == 405
        assert client.get("/api/overview", headers={"Host": "evil.example:80"}).status_code == 403
        assert client.get("/api/overview", headers={"Host": "localhost:80"}).status_code == 200
        (original / "runs" / "methods" / "report.html").write_text("<script>alert(1)</script>")
        id = first.json()["comparisons"][0]["id"]
        assert client.get(f"/reports/{id}").headers["content-security-policy"].startswith("sandbox; default-src 'none'")
        assert "MIT" in client.get("/assets/uplot/LICENSE").text


def test_a_playground_without_its_server_says_so(original: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        files.board(original / "runs", server=f"http://127.0.0.1:{port}") as board,
        httpx.Client(base_url=board.url) as client,
    ):
        found = client.get("/api/playground/models")
        assert found.status_code == 502
        assert "is `graft serve` running there?" in found.json()["error"]["message"]
        assert (
            client.post("/api/playground/chat", content=b"{}", headers={"Content-Type": "text/plain"}).status_code
            == 415
        )
        assert client.post("/api/playground/chat", json=[1]).status_code == 400
        assert client.post("/api/playground/chat", json={"messages": "x" * (2 << 20)}).status_code == 413


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_board_starts_without_torch() -> None:
    heavy = "[m for m in ('torch', 'transformers') if m in sys.modules]"
    code = f"import sys, graftlm.commands.board, graftlm.dashboard.app; print({heavy})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_command_writes_a_page_and_refuses_what_it_cannot_mean(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(
        app, ["board", str(original / "runs"), "--out", "page.html", "--store", str(original / "adapters")]
    )
    assert (found.exit_code, found.stdout.strip()) == (0, "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "formal@1" in page
    assert "sha256-" in page
    assert graftlm.board(original / "runs", out=tmp_path / "other.html") == tmp_path / "other.html"
    for given, said in (
        ({"folder": ["nowhere"]}, "nowhere is not there; name a folder that holds runs"),
        ({"folder": ["page.html"]}, "page.html is a file"),
        ({"out": "x.html", "port": 80}, "--port does nothing"),
        ({"server": "localhost:8000"}, "is not the address of a server; give one such as http://127.0.0.1:8000"),
        ({"server": "http://me:word@host"}, "the address holds a password; leave it out, and give its key on the page"),
    ):
        with pytest.raises(ConfigError, match=said):
            graftlm.board(**given)
    with pytest.raises(StoreError, match="no store of adapters"):
        graftlm.board(original / "runs", store=tmp_path)
    assert BoardConfig.build({}).folder == ("runs",)
    assert BoardConfig.build({"server": "http://host:80/some/v1/"}).server == "http://host:80/some"


@pytest.mark.parametrize("where", ["a terminal", "a notebook"])
def test_the_board_is_served_until_a_signal(original: Path, where: str) -> None:
    from graftlm.commands import board as command

    ready = threading.Event()
    addresses: list[str] = []

    def begun(url: str) -> None:
        addresses.append(url)
        ready.set()

    config = BoardConfig.build({"folder": [str(original / "runs")], "port": 0})

    def ask_and_end() -> None:
        ready.wait(20)
        for _ in range(200):
            try:
                assert httpx.get(addresses[0] + "/api/overview").status_code == 200
                break
            except httpx.ConnectError:
                time.sleep(0.02)
        os.kill(os.getpid(), 2)

    thread = threading.Thread(target=ask_and_end)
    thread.start()
    if where == "a terminal":
        assert command.board(config, begun) is None
    else:

        async def cell() -> (
            None
        ):  # a notebook runs a cell within its loop, and an interrupt is a KeyboardInterrupt there
            assert command.board(config, begun) is None

        loop = asyncio.new_event_loop()
        loop.run_until_complete(cell())
        loop.close()
    thread.join(20)
