"""A training run, scoring, or a worker of a sweep, in its own process: its peak memory is its own, nothing of it stays behind.

The parent writes the config as JSON to the standard input of `commands/subprocess_main.py`, which answers with one JSON object
a line:

    {"event": "step", "step": 3, "steps": 60, "loss": 2.1, "tokens": 1500}      after every optimizer step
    {"event": "scored", "out": "..."}                                           after every model that was scored
    {"event": "trials", ...}   {"event": "trial", ...}   {"event": "trial-ended", ...}          of a sweep's worker
    {"event": "note", "text": "..."}                                            for the person who started it
    {"event": "done", "summary": {...}}
    {"event": "error", "kind": "DataError", "message": "..."}   or   {"event": "stopped", "signal": 15, "message": "..."}

Its standard error goes to a file: a pipe that nobody reads is full after 64 kB, and the child would wait for ever.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from graftlm import errors
from graftlm.config import SweepConfig, TrainConfig
from graftlm.errors import Stopped, TrainingError
from graftlm.experiments.compare.scoring import ScoringRequest
from graftlm.experiments.workers import Worker
from graftlm.jsonfile import parse_json

OnEvent = Callable[[dict[str, Any]], None]
_CHILD = [sys.executable, "-m", "graftlm.commands.subprocess_main"]


def train_in_subprocess(config: TrainConfig, on_event: OnEvent, worker: Worker | None = None) -> dict[str, Any]:
    """Run a training in another process; returns its summary, or raises the GraftError or Stopped that ended it."""
    return _run("train", config.to_json(), on_event, worker or Worker())


def score_in_subprocess(request: ScoringRequest, on_event: OnEvent, worker: Worker | None = None) -> None:
    """Score trained models on one base in another process; raises the GraftError that ended it."""
    _run("score", asdict(request), on_event, worker or Worker())


def sweep_in_subprocess(config: SweepConfig, on_event: OnEvent, worker: Worker) -> None:
    """Be one worker of a sweep in another process; raises the GraftError or Stopped that ended it."""
    given = config.model_dump(mode="json", exclude_unset=True)  # an option that is searched must not be given
    _run("sweep", given, on_event, worker)


def _run(task: str, request: dict[str, Any], on_event: OnEvent, worker: Worker) -> dict[str, Any]:
    return run_subprocess([*_CHILD, task, str(worker.sharing)], json.dumps(request), on_event, worker)


def run_subprocess(command: list[str], request: str, on_event: OnEvent, worker: Worker | None = None) -> dict[str, Any]:
    """Start a process, write `request` to its standard input and read its events up to the last; returns the summary.

    Raises what `train_in_subprocess` does, and TrainingError with the last lines of its standard error where it died.
    """
    worker = worker or Worker()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=worker.environment
        )
        worker.began(child)
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended before it read: its status is reported below
                child.stdin.write(request)
                child.stdin.close()
            for line in child.stdout:
                event = parse_json(line)
                if event["event"] == "done":
                    child.wait()
                    return event["summary"]
                if event["event"] == "stopped":
                    raise Stopped(event["signal"], event["message"])
                if event["event"] == "error":
                    kind = getattr(errors, event["kind"], TrainingError)
                    raise kind(event["message"])
                on_event(event)
            status = child.wait()
            log.seek(0)
            last = log.read().strip().splitlines()[-3:]
            raise TrainingError(f"the training process ended with status {status}: {' | '.join(last) or 'no message'}")
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
            child.stdout.close()
