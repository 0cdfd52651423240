"""A process with the libraries loaded that forks a training run for each question, so that a run costs no imports.

    question   {"options": {...}, "folder": PATH, "mode": 0..3, "k": n, "kill_after": seconds or null}
    answer     {"status": exit status or minus signal, "kind": exception or "", "message": ..., "changes": n, "seconds": s}

The child is this process, forked: its disk fails, or it is killed, as `faults.c` says; or it is killed after some time.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

import torch

from graftlm.commands.train import train as train_command
from graftlm.config import TrainConfig
from graftlm.errors import GraftError
from graftlm.training.view import View

torch.set_num_threads(1)


def train(question: dict[str, Any], answers: int) -> None:
    """What the child does; never returns."""
    library = ctypes.CDLL(os.environ["GRAFT_FAULTS"])
    library.changes.restype = ctypes.c_long
    library.faults.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_long)
    library.faults(question["folder"].encode(), question.get("mode", 0), question.get("k", 0))
    kind, message = "", ""
    try:
        train_command(TrainConfig.build(question["options"]), View(quiet=True))
    except GraftError as error:
        kind, message = type(error).__name__, str(error)
    except BaseException:
        kind, message = "traceback", traceback.format_exc()
    answer = {"kind": kind, "message": message, "changes": library.changes()}
    os.write(answers, json.dumps(answer).encode())
    os._exit(0)


def asked(question: dict[str, Any]) -> dict[str, Any]:
    """Fork, wait or kill, and hear."""
    ours, theirs = os.pipe()
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.close(ours)
        train(question, theirs)
    os.close(theirs)
    if question.get("kill_after") is not None:
        time.sleep(question["kill_after"])
        os.kill(child, signal.SIGKILL)
    with os.fdopen(ours, "rb") as stream:
        heard = stream.read()
    _, status = os.waitpid(child, 0)
    found = json.loads(heard) if heard else {"kind": "", "message": "", "changes": 0}
    return {**found, "status": os.waitstatus_to_exitcode(status), "seconds": time.perf_counter() - started}


def main() -> None:
    channel = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    for line in sys.stdin:
        question = json.loads(line)
        os.write(channel, json.dumps(asked(question)).encode() + b"\n")


if __name__ == "__main__":
    main()
