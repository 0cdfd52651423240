"""A rank that hangs, dies or cannot write: the run ends, the rank is named, and the newest whole checkpoint stays."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
import torch.distributed as dist
from forked import Forks
from safetensors.torch import load_file
from test_ranks import over

from graftlm import files, progress
from graftlm.base import safetensors_writer
from graftlm.base.loading import resolve
from graftlm.distributed import group
from graftlm.distributed import pulse as pulse_module
from graftlm.distributed.group import Ranks
from graftlm.distributed.pulse import PATIENT, Pulse
from graftlm.distributed.shard import SplitWeights
from graftlm.distributed.watch import _Seen, hanging
from graftlm.errors import GraftError, ModelError, RunError, Stopped
from graftlm.training import checkpoint, saved_tensors


class Clock:
    """Time that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(pulse_module.time, "monotonic", lambda: self.now)


def test_a_rank_may_be_silent_four_times_as_long_as_in_its_last_steps_and_at_least_the_given_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, found = Clock(monkeypatch), []
    pulse = Pulse(45)
    assert pulse.limit == PATIENT  # while the run is set up
    for seconds in (100, 3, 30, 2):
        with pulse.phase("step", "in a step"):
            found.append(pulse.limit)
            clock.now += seconds
            pulse.beat()
        assert pulse.limit == PATIENT
    assert found == [PATIENT, 400, 400, 400]
    for _ in range(18):
        with pulse.phase("step", "in a step"):
            found.append(pulse.limit)
            clock.now += 2
    assert found[-1] == 120  # of the 30 seconds; what the first step compiled is forgotten
    with pulse.phase("evaluation", "in an evaluation"):
        assert pulse.limit == PATIENT


def test_a_sign_of_life_says_how_long_the_next_may_take_and_the_next_takes_it_back() -> None:
    pulse = Pulse(45)
    with progress.heard(pulse.beat):
        progress.sign_of_life(progress.LONG)
        assert (pulse.limit, pulse.beats) == (progress.LONG, 1)
        progress.sign_of_life()
        assert (pulse.limit, pulse.beats) == (PATIENT, 2)
    assert Pulse(2 * PATIENT).limit == 2 * PATIENT


def test_every_block_of_a_file_that_is_written_or_summed_is_a_sign_of_life(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(safetensors_writer, "_BLOCK", 100)
    monkeypatch.setattr(safetensors_writer, "_FLUSHED", 250)
    monkeypatch.setattr(files, "_BLOCK", 100)
    tensors = {"wide": torch.arange(100.0), "narrow": torch.arange(30, dtype=torch.uint8)}
    pulse, file = Pulse(45), tmp_path / "some.safetensors"
    with progress.heard(pulse.beat):
        saved_tensors.write(file, tensors)
        assert pulse.beats == 4 + 1
        assert files.sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()
        assert pulse.beats == 5 + -(-file.stat().st_size // 100)
    found = load_file(file)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_rank_may_wait_an_hour_while_another_downloads_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pulse, found = Pulse(45), []

    def download(*given: Any, **options: Any) -> str:
        found.append(pulse.limit)
        raise OSError("no network here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with progress.heard(pulse.beat), pytest.raises(ModelError, match="no network here"):
        resolve("owner/name")
    assert found == [progress.LONG]


def test_the_time_that_a_rank_waits_for_others_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pulse = Clock(monkeypatch), Pulse(45)
    for _ in range(2):
        with pulse.phase("step", "in a step"):
            clock.now += 1
            with pulse.waiting():
                assert pulse.waits % 2
                clock.now += 500
        assert not pulse.waits % 2
    with pulse.phase("step", "in a step"):
        assert pulse.limit == 45


def seen(now: float, moved: float, told: float | None = None, **message: Any) -> _Seen:
    known = {
        "beats": 7,
        "passes": 7,
        "waits": 4,
        "limit": 45,
        "silence": 180,
        "where": "in step 3",
        "over": False,
        **message,
    }
    return _Seen(known, now - moved, now - (1 if told is None else told))


@pytest.mark.parametrize(
    ("ranks", "found"),
    [
        ([seen(999, 40), seen(999, 44)], None),
        ([seen(999, 50, waits=5), seen(999, 46)], ([1], "has for 46 s shown no progress, in step 3")),
        ([seen(999, 46), seen(999, 50, waits=5)], ([0], "has for 46 s shown no progress, in step 3")),
        ([seen(999, 50, waits=5), seen(999, 46, limit=120)], None),
        ([seen(999, 50, waits=5), seen(999, 50, waits=3)], None),
        (
            [seen(999, 46, passes=9), seen(999, 46, passes=8, beats=90)],
            ([1], "has for 46 s shown no progress, in step 3"),
        ),
        (
            [seen(999, 46, passes=8, beats=90), seen(999, 46, passes=9)],
            ([0], "has for 46 s shown no progress, in step 3"),
        ),
        ([seen(999, 46, beats=90), seen(999, 46)], ([0, 1], "has for 46 s shown no progress, in step 3")),
        ([seen(999, 50, waits=5), seen(999, 181, 181, waits=5)], ([1], "has for 181 s not answered, in step 3")),
        ([seen(999, 50, waits=5), seen(999, 700, 700, over=True)], None),
    ],
    ids=[
        "all well",
        "second hangs",
        "first hangs",
        "slow steps",
        "all wait",
        "behind",
        "first behind",
        "equal",
        "stopped",
        "done",
    ],
)
def test_the_rank_that_hangs_is_told_from_those_that_wait_for_it(ranks: list[_Seen], found: Any) -> None:
    assert hanging(dict(enumerate(ranks)), 999) == found


def test_a_pass_that_ranks_make_together_counts_when_it_begins_and_when_it_ends() -> None:
    weights: Any = object.__new__(SplitWeights)
    weights.ranks, weights._running, weights._root = Ranks(0, 2), False, lambda call: call()
    pulse, found = weights.ranks.pulse, []

    def inner() -> None:
        found.append(pulse.passes)

    weights.run(lambda: weights.run(inner))  # a pass within a pass is a part of it
    assert (found, pulse.passes) == ([1], 2)


def together(error: GraftError, *, lost: bool = False) -> GraftError:
    error.everywhere, error.lost = True, lost
    return error


@pytest.mark.parametrize(
    ("error", "taken_apart", "ended"),
    [
        (None, True, False),
        (Stopped(15, "all stop"), True, False),
        (together(RunError("all found it")), True, False),
        (together(RunError("the others are gone"), lost=True), False, False),
        (RunError("of this rank alone"), False, True),
        (ZeroDivisionError("a bug"), False, True),
    ],
    ids=["done", "stopped", "everywhere", "lost", "own", "bug"],
)
def test_a_rank_that_fails_by_itself_does_not_wait_for_the_others_to_take_the_group_apart(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, taken_apart: bool, ended: bool
) -> None:
    done: list[str] = []
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(dist, "init_process_group", lambda *given, **options: done.append("made"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("taken apart"))
    monkeypatch.setattr(group.atexit, "register", lambda call, *given: at_exit.append(partial(call, *given)))
    monkeypatch.setattr(group.os, "_exit", lambda status: done.append(f"status {status}"))
    with nullcontext() if error is None else pytest.raises(type(error)), group._process_group():
        if error is not None:
            raise error
    for call in at_exit:
        call()
    assert done == ["made", *["taken apart"] * taken_apart, *["status 2"] * ended]


def test_ranks_that_all_wait_for_one_another_are_ended_late() -> None:
    both = {0: seen(9999, PATIENT + 1, waits=5), 1: seen(9999, PATIENT + 2, waits=7)}
    ranks, why = hanging(both, 9999) or ([], "")
    assert ranks == [0]
    assert "the network stands still" in why


@pytest.mark.parametrize("who", [0, 1, 2])
def test_a_rank_that_hangs_in_a_step_is_named_and_all_are_ended(forks: Forks, tmp_path: Path, who: int) -> None:
    forks.run("one_fails", 2, tmp_path / "first")  # the libraries are loaded now
    began = time.monotonic()
    ended = over(forks, 3, tmp_path, fault={"rank": who, "step": 4, "kind": "hang"}, steps=100, save_every=1)
    assert time.monotonic() - began < 40
    told = [one["told"] for one in ended if "told" in one]
    assert len(told) == 1, ended
    assert told[0].startswith(f"rank {who} of 3 has for "), told
    assert told[0].endswith("shown no progress, in step 4")
    newest, _ = checkpoint.newest(tmp_path / "ranks")
    assert newest is not None
    assert newest.name == "000003"


def test_a_rank_that_is_stopped_in_its_tracks_is_killed(forks: Forks, tmp_path: Path) -> None:
    ended = over(forks, 2, tmp_path, fault={"rank": 1, "step": 3, "kind": "freeze"}, steps=100)
    told = [one["told"] for one in ended if "told" in one]
    assert len(told) == 1, ended
    assert re.match(
        r"rank 1 of 2 has for \d+ s (not answered|shown no progress), ", told[0]
    )  # stopped between steps, or in one
    assert ended[1]["kind"] == "killed"


def test_a_rank_that_dies_while_it_saves_leaves_the_checkpoint_before_whole_and_the_others_end(
    forks: Forks, tmp_path: Path
) -> None:
    ended = over(forks, 2, tmp_path, fault={"rank": 0, "step": 2, "kind": "killed while saving"}, save_every=1)
    assert ended[0]["kind"] == "killed"
    assert ended[1]["kind"] == "TrainingError", ended
    assert ended[1]["error"].startswith("rank 1 of 2 has lost the others (")
    assert ended[1]["everywhere"]  # the first rank's end is the reason
    newest, damaged = checkpoint.newest(tmp_path / "ranks")
    assert newest is not None
    assert (newest.name, list(damaged)) == ("000001", [])
    assert over(forks, 2, tmp_path, resume=True)[0]["found"]["steps"] == 6


def test_a_disk_that_is_full_on_one_rank_ends_all_and_names_it(forks: Forks, tmp_path: Path) -> None:
    ended = over(forks, 2, tmp_path, fault={"rank": 0, "step": 3, "kind": "full disk"}, save_every=1)
    assert ended[0]["kind"] == "RunError", ended
    assert ended[0]["error"].startswith("rank 0 of 2: ")
    assert "No space left on device" in ended[0]["error"]
    assert not ended[0]["everywhere"]
    assert "has lost the others" in ended[1]["error"]
    newest, _ = checkpoint.newest(tmp_path / "ranks")
    assert newest is not None
    assert newest.name == "000002"


def test_an_output_folder_that_the_ranks_do_not_share_is_refused(forks: Forks, tmp_path: Path) -> None:
    ended = over(forks, 2, tmp_path, other={"out": str(tmp_path / "elsewhere")})
    assert {found["kind"] for found in ended} == {"RunError"}, ended
    assert all(found["error"].startswith("rank 1 of 2: --out ") for found in ended)
    assert "is not the folder that rank 0 writes to" in ended[0]["error"]
    assert [p.name for p in (tmp_path / "ranks").iterdir()] == []


def test_fewer_eval_rows_than_ranks_are_measured_by_some_of_them(forks: Forks, tmp_path: Path) -> None:
    one_row = str(tiny_run.write_rows(tmp_path / "one.jsonl", tiny_run.rows(1, seed=9)))
    alone = tiny_run.train(tmp_path, eval_data=one_row, out=str(tmp_path / "alone"))
    ended = over(forks, 2, tmp_path, eval_data=one_row)
    assert ended[0]["found"]["eval_loss_after"] == pytest.approx(alone["eval_loss_after"], rel=2e-5)
