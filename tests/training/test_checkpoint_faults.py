"""Killed at any moment, or with a disk that fails, a run is the same run afterwards.

The run is a real one in a process of its own; faults come from a library in front of libc (faults/faults.c), so they reach
what Python writes and what safetensors writes in Rust alike.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from faults import COUNT, EVERY_KTH_WRITE, FULL_FROM_KTH, KILL_AT_KTH, Server
from tiny_run import adapter_bytes, lines, without

from graftlm.errors import RunError
from graftlm.files import find_damage
from graftlm.training import checkpoint


class Proof:
    """A server, options of a run, and what that run gives when nothing happens to it."""

    def __init__(self, server: Server, place: Path, **options: Any) -> None:
        self.server = server
        self.place = place
        self.options = tiny_run.options(place, save_every=2, lora_dropout=0.3, weight_decay=0.1, **options)
        self.whole = place / "whole"
        answer = self.run(self.whole)
        assert (answer["status"], answer["kind"]) == (0, ""), answer
        self.changes: int = answer["changes"]
        self.seconds: float = answer["seconds"]

    def run(self, out: Path, **fault: Any) -> Any:
        return self.server.run({**self.options, "out": str(out), "resume": out.exists()}, **fault)

    def finish(self, out: Path) -> None:
        """Go on until the end, and find what the whole run gave."""
        answer = self.run(out)
        ended = answer["kind"] == "RunError" and "has ended" in answer["message"]
        assert answer["status"] == 0, answer
        assert ended or not answer["kind"], answer
        assert adapter_bytes(out) == adapter_bytes(self.whole)
        assert (out / "evaluation.jsonl").read_bytes() == (self.whole / "evaluation.jsonl").read_bytes()
        found, expected = (without(lines(p / "metrics.jsonl"), "seconds") for p in (out, self.whole))
        assert found == expected
        left = [p for p in out.rglob(".*") if p.name != ".running"]
        assert ended or not left, left

    def killed_at(self, k: int) -> None:
        """Die right before change k, in one life after the other while that happens, then finish."""
        out = self.place / f"killed-{k}"
        answer = self.run(out, mode=KILL_AT_KTH, k=k)
        assert answer["status"] == -signal.SIGKILL, answer
        self.finish(out)

    def failing(self, mode: int, k: int) -> None:
        """Writes fail; the run says so in one sentence, and goes on once there is room."""
        out = self.place / f"failed-{mode}-{k}"
        answer = self.run(out, mode=mode, k=k)
        assert answer["status"] == 0, answer
        if answer[
            "kind"
        ]:  # else what failed did not matter, such as a checkpoint in front of a result that was written
            assert answer["kind"] == "RunError", answer
            assert "No space left on device" in answer["message"], answer
            try:
                newest, _ = checkpoint.newest(out)
            except RunError as error:
                raise AssertionError(f"nothing to go on from after write {k}: {error}") from None
            assert newest is None or find_damage(newest) is None
        self.finish(out)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("faults")) as server:
        yield server


@pytest.fixture(scope="module")
def proof(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Proof:
    return Proof(server, tmp_path_factory.mktemp("proof"))


def test_the_library_counts_what_the_run_writes(proof: Proof) -> None:
    assert proof.run(proof.place / "counted", mode=COUNT)["changes"] == proof.changes
    assert proof.changes > 80, "safetensors' own writes are among them"


@pytest.mark.parametrize("part", [0.25, 0.5, 0.8])
def test_a_run_killed_while_it_writes_goes_on_to_the_same_bytes(proof: Proof, part: float) -> None:
    proof.killed_at(int(part * proof.changes))


def test_a_run_killed_at_random_moments_goes_on_to_the_same_bytes(proof: Proof) -> None:
    draw = random.Random(7)
    out = proof.place / "random"
    for _ in range(3):
        proof.run(out, kill_after=draw.uniform(0.2, 1.0) * proof.seconds)
    proof.finish(out)


@pytest.mark.parametrize("mode", [EVERY_KTH_WRITE, FULL_FROM_KTH])
def test_a_disk_that_fails_ends_the_run_with_a_sentence_and_loses_nothing(proof: Proof, mode: int) -> None:
    for k in (2, int(0.6 * proof.changes)):
        proof.failing(mode, k)


# ---- long proofs ----------------------------------------------------------------------------------------------------


@pytest.mark.prove
def test_killed_at_twenty_random_moments_and_resumed_each_time(
    server: Server, tmp_path: Path, record_property: Any
) -> None:
    """One long run that dies twenty times; how far it comes in each life is left to chance."""
    proof = Proof(server, tmp_path, steps=800, eval_every=100)
    short = {**proof.options, "steps": 1, "eval_every": 1, "out": str(tmp_path / "short")}
    loading = server.run(short)["seconds"]
    draw = random.Random(20)
    out, deaths, moments = tmp_path / "run", 0, []
    while deaths < 20:
        moment = draw.uniform(0, loading + 0.05 * (proof.seconds - loading))  # twenty of these are half of the run
        answer = proof.run(out, kill_after=moment)
        assert answer["status"] == -signal.SIGKILL, f"it ended in life {deaths + 1}; make the run longer"
        deaths += 1
        newest, _ = checkpoint.newest(out)
        moments.append((round(moment, 3), newest.name if newest else None))
    record_property("killed after seconds, newest checkpoint then", moments)
    record_property("seconds of the run that was never killed", round(proof.seconds, 2))
    assert len({name for _, name in moments}) > 3, "otherwise it died before it trained each time"
    proof.finish(out)
    record_property("final adapter", "the bytes of the run that was never killed")


@pytest.mark.prove
@pytest.mark.parametrize("method", ["lora", "full"])
def test_killed_before_every_single_change_of_a_file(
    server: Server, tmp_path: Path, method: str, record_property: Any
) -> None:
    if method == "lora":
        proof = Proof(server, tmp_path)
        record_property("changes", proof.changes)
        for k in range(1, proof.changes + 1):
            proof.killed_at(k)
        return
    options = tiny_run.options(tmp_path, method="full", learning_rate=1e-3, save_every=3)
    whole = {**options, "out": str(tmp_path / "whole")}
    changes = server.run(whole)["changes"]
    record_property("changes", changes)
    expected = (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    for k in range(1, changes + 1):
        out = tmp_path / f"killed-{k}"
        assert server.run({**options, "out": str(out)}, KILL_AT_KTH, k)["status"] == -signal.SIGKILL
        answer = server.run({**options, "out": str(out), "resume": True})
        assert not answer["kind"] or "has ended" in answer["message"], answer
        assert (out / "model" / "model.safetensors").read_bytes() == expected


@pytest.mark.prove
@pytest.mark.parametrize("mode", [EVERY_KTH_WRITE, FULL_FROM_KTH])
def test_every_single_write_fails_once(proof: Proof, mode: int, record_property: Any) -> None:
    record_property(
        "fault", "every k-th write fails" if mode == EVERY_KTH_WRITE else "the disk is full from write k on"
    )
    record_property("k", [1, proof.changes])
    for k in range(1, proof.changes + 1):
        if not (proof.place / f"failed-{mode}-{k}").exists():
            proof.failing(mode, k)
