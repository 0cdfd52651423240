"""Several workers on one sweep, forked from one process that has the libraries loaded; one of them may be killed.

    python sweep_workers.py '{"options": {...}, "workers": 4, "kill": true}'

Prints {"statuses": [...], "killed": {"worker": pid, "trials": [numbers it had]}}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from graftlm.commands.sweep import sweep
from graftlm.config import SweepConfig
from graftlm.experiments.sweep.view import SweepView

torch.set_num_threads(1)


def work(options: dict[str, Any]) -> None:
    """A worker; never returns."""
    try:
        sweep(SweepConfig.build(options), SweepView(Console(quiet=True)))
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def had_by(out: Path, worker: int) -> list[int]:
    """Trials whose folder a process holds and that have taken some steps."""
    found = []
    for lock in out.glob("trials/*/.running"):
        try:
            metrics = lock.parent / "metrics.jsonl"
            if lock.read_text() == str(worker) and metrics.read_text().count('"train"') >= 5:
                found.append(int(lock.parent.name))
        except OSError:
            continue
    return found


def main(question: dict[str, Any]) -> dict[str, Any]:
    out = Path(question["options"]["out"])
    workers = []
    for _ in range(question["workers"]):
        child = os.fork()
        if child == 0:
            work(question["options"])
        workers.append(child)
    killed: dict[str, Any] | None = None
    deadline = time.monotonic() + 120
    while question["kill"] and killed is None and time.monotonic() < deadline:
        time.sleep(0.005)
        for worker in workers:
            trials = had_by(out, worker)
            if trials:
                os.kill(worker, signal.SIGKILL)
                killed = {"worker": worker, "trials": trials}
                break
    return {"statuses": [os.waitstatus_to_exitcode(os.waitpid(w, 0)[1]) for w in workers], "killed": killed}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
