"""Ranks as forks of this process: what takes seconds to import is there already. They meet in a file, through gloo."""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from graftlm.distributed.group import Ranks
from graftlm.errors import GraftError, Stopped

SECONDS = 60.0


def on_ranks(count: int, place: Path, call: Callable[[Ranks], Any]) -> list[dict[str, Any]]:
    """What each rank's call returned (`found`) or raised (`error`, `kind`, `everywhere`), by rank."""
    place.mkdir(parents=True, exist_ok=True)
    children = [_fork(rank, count, place, call) for rank in range(count)]
    until = time.monotonic() + SECONDS
    while children and time.monotonic() < until:
        children = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
        time.sleep(0.02)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not children, f"{len(children)} of {count} ranks still waited after {SECONDS:.0f} s"
    return [json.loads((place / f"{rank}.json").read_text()) for rank in range(count)]


def _fork(rank: int, count: int, place: Path, call: Callable[[Ranks], Any]) -> int:
    child = os.fork()
    if child:
        return child
    found: dict[str, Any] = {}
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{place}/store", rank=rank, world_size=count, timeout=timedelta(seconds=SECONDS)
        )
        found = {"found": call(Ranks(rank, count, count))}
    except (GraftError, Stopped) as error:
        found = {"kind": type(error).__name__, "error": str(error), "everywhere": getattr(error, "everywhere", False)}
    except BaseException:
        found = {"kind": "traceback", "error": traceback.format_exc()}
    (place / f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)
