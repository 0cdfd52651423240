"""Ranks as forks of a process that has imported everything: what takes seconds is done once. They meet in a file, through gloo.

    python forked.py              {"scenario": "over", "count": 2, "place": "...", "options": {...}} a line, an answer a line

`Forks` is pytest's side. The forks are not pytest's own, for it has threads, whose locks a fork would keep forever.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SECONDS = 60.0
ENDED = "RANK_ENDED"  # environment variable: the file of what a rank found


class Forks:
    """The process that forks ranks; one question at a time."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent), *sys.path])
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )  # fmt: skip

    def run(self, scenario: str, count: int, place: Path, **options: Any) -> list[dict[str, Any]]:
        """What each rank of a scenario returned (`found`) or raised (`kind`, `error`, `everywhere`), by rank; of one that
        was killed its `kind` alone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"scenario": scenario, "count": count, "place": str(place), "options": options}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        ended: list[dict[str, Any]] = json.loads(self._process.stdout.readline())
        assert not [one for one in ended if one.get("kind") == "traceback"], ended
        return ended

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def on_ranks(scenario: str, count: int, place: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Fork the ranks and wait for them."""
    place.mkdir(parents=True, exist_ok=True)
    children = [_fork(rank, count, place, scenario, options) for rank in range(count)]
    until = time.monotonic() + SECONDS
    while children and time.monotonic() < until:
        children = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
        time.sleep(0.02)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if children:
        return [{"kind": "traceback", "error": f"{len(children)} of {count} ranks still waited after {SECONDS:.0f} s"}]
    return [_ended(place / f"{rank}.json") for rank in range(count)]


def _ended(file: Path) -> dict[str, Any]:
    """What a rank has written; of one that was killed, nothing."""
    return json.loads(file.read_text()) if file.is_file() else {"kind": "killed"}


def _fork(rank: int, count: int, place: Path, scenario: str, options: dict[str, Any]) -> int:
    child = os.fork()
    if child:
        return child
    import rank_scenarios
    import torch.distributed as dist

    from graftlm.distributed.group import Ranks
    from graftlm.errors import GraftError, Stopped

    found: dict[str, Any] = {}
    os.environ[ENDED] = str(place / f"{rank}.json")
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{place}/store", rank=rank, world_size=count, timeout=timedelta(seconds=SECONDS)
        )
        found = {"found": getattr(rank_scenarios, scenario)(Ranks(rank, count, count), **options)}
    except (GraftError, Stopped) as error:
        found = {"kind": type(error).__name__, "error": str(error), "everywhere": getattr(error, "everywhere", False)}
    except BaseException:
        found = {"kind": "traceback", "error": traceback.format_exc()}
    if not Path(os.environ[ENDED]).is_file():  # else a hanging rank was told of, and this follows from its end
        Path(os.environ[ENDED]).write_text(json.dumps(found))
    os._exit(0)


def main() -> None:
    import torch

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anybody prints is for the log
    torch.set_num_threads(1)
    import rank_scenarios  # noqa: F401  (imported once, before the forks)

    for line in sys.stdin:
        asked = json.loads(line)
        ended = on_ranks(asked["scenario"], asked["count"], Path(asked["place"]), asked["options"])
        answers.write(json.dumps(ended) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
