"""Processes on several GPUs: each sees one of them, none is a launcher's rank, and an error or a signal ends all."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.config import CompareConfig, SweepConfig
from graftlm.errors import ConfigError, DataError, Stopped
from graftlm.experiments import workers as module
from graftlm.experiments.subprocess_run import run_subprocess
from graftlm.experiments.workers import Worker, spread, workers_for

LAUNCHER = {
    "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "run", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with four GPUs, of which CUDA_VISIBLE_DEVICES leaves as many as it names."""

    def count() -> int:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        return 4 if named is None else len(named.split(","))

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", count)
    monkeypatch.setattr(module, "default_device", lambda asked: torch.device(asked or "cuda"))


def child(code: str, worker: Worker) -> dict[str, Any]:
    return run_subprocess(
        [sys.executable, "-c", f"import json, os, sys, time\n{code}"], "{}", lambda event: None, worker
    )


TELL = """print(json.dumps({"event": "done", "summary": dict(os.environ)}))"""


@pytest.mark.usefixtures("gpus")
def test_each_worker_sees_one_gpu_by_its_number() -> None:
    found = workers_for(3, None)
    assert [(worker.name, worker.environment["CUDA_VISIBLE_DEVICES"]) for worker in found] == [
        ("GPU 0", "0"), ("GPU 1", "1"), ("GPU 2", "2"),
    ]  # fmt: skip
    assert [child(TELL, worker)["CUDA_VISIBLE_DEVICES"] for worker in found[1:]] == ["1", "2"]


@pytest.mark.usefixtures("gpus")
def test_the_gpus_that_the_environment_names_are_dealt_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6, GPU-8f2a,1")
    found = workers_for(2, "cuda")
    assert [worker.environment["CUDA_VISIBLE_DEVICES"] for worker in found] == ["6", "GPU-8f2a"]
    with pytest.raises(ConfigError, match=r"--workers 4 takes a GPU each, and there are 3 \(CUDA_VISIBLE_DEVICES is 6"):
        workers_for(4, None)


@pytest.mark.usefixtures("gpus")
def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match="--workers 5 takes a GPU each, and there are 4; give --workers 4"):
        workers_for(5, None)


def test_workers_on_a_processor_share_it_and_one_worker_is_this_place() -> None:
    assert [(worker.name, worker.sharing) for worker in workers_for(2, "cpu")] == [("worker 0", 2), ("worker 1", 2)]
    (alone,) = workers_for(1, "cuda:3")
    assert (alone.environment, alone.sharing) == (dict(os.environ), 1)


def test_a_child_is_no_rank_of_a_launcher_that_started_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHER.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    seen = child(TELL, Worker())
    assert not LAUNCHER.keys() & seen.keys()
    assert seen["OMP_NUM_THREADS"] == "1"


def test_every_job_is_done_once_and_no_worker_has_two_at_a_time() -> None:
    busy: set[Worker] = set()
    most, done = 0, []
    guard = threading.Lock()
    together = threading.Barrier(3, timeout=20)

    def do(job: int, worker: Worker) -> int:
        nonlocal most
        with guard:
            assert worker not in busy
            busy.add(worker)
            most = max(most, len(busy))
        if job < 3:
            together.wait()  # all three workers are at work
        with guard:
            busy.discard(worker)
        return job * job

    spread(range(8), [Worker(str(i)) for i in range(3)], do, lambda job, found: done.append((job, found)))
    assert sorted(done) == [(job, job * job) for job in range(8)]
    assert most == 3


SLEEP = """
import signal
def stop(number, frame):
    print(json.dumps({"event": "stopped", "signal": number, "message": "left a checkpoint"}), flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
open(os.environ["MARK"], "w").close()
time.sleep(60)
"""


@pytest.mark.timeout(30)
def test_an_error_of_one_worker_stops_the_others_and_no_job_begins_after_it(tmp_path: Path) -> None:
    begun: list[int] = []
    ended: list[Any] = []
    workers = [Worker(str(i), {"MARK": str(tmp_path / f"{i}")}) for i in range(2)]

    def do(job: int, worker: Worker) -> None:
        begun.append(job)
        if job == 1:
            while not list(tmp_path.iterdir()):
                time.sleep(0.01)
            raise DataError("a row is wrong")
        try:
            child(SLEEP, worker)
        except Stopped as stopped:
            ended.append((job, stopped.signal_number, str(stopped)))
            raise

    with pytest.raises(DataError, match="a row is wrong"):
        spread(range(4), workers, do, lambda job, found: None)
    assert sorted(begun) == [0, 1]
    assert ended == [(0, signal.SIGTERM, "left a checkpoint")]


@pytest.mark.timeout(30)
def test_a_process_that_begins_after_the_stop_is_ended_too() -> None:
    worker = Worker()
    worker.stop()
    began = time.monotonic()
    with pytest.raises(Exception, match="ended with status"):
        child("time.sleep(60)", worker)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("config", [CompareConfig, SweepConfig])
def test_one_gpu_for_several_workers_is_refused(config: Any) -> None:
    options = {"model": "demo", "data": ["demo"], "workers": 2, "device": "cuda:1"}
    search = {"search": {"rank": "4|8"}} if config is SweepConfig else {}
    with pytest.raises(ConfigError, match="--device cuda:1 is one GPU, found --workers 2"):
        config.build({**options, **search})
    assert json.loads(json.dumps(config.build({**options, **search, "device": "cuda"}).to_json()))["workers"] == 2
