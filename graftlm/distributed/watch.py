"""Whether every rank still moves: one that hangs is named and ended, and the run with it.

A rank that hangs makes all others wait in the next sum. A timeout there would have to be longer than anything that a rank may
rightly do alone, and could not say who is missing. So a thread of each rank puts its pulse (`pulse.py`) into the launcher's
store once a second, and the first two ranks read all of them. The first to find a rank without a sign of progress says so;
then every rank ends, and kills the one that hangs where that is on its machine. A rank whose launcher is gone ends too: no
process is left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.distributed.distributed_c10d import Store

from graftlm.distributed.pulse import PATIENT, Pulse
from graftlm.jsonfile import parse_json

PERIOD = 1.0  # seconds between two looks
_ASLEEP = 10.0  # seconds between two looks after which it was this process that did not run
_JUDGES = 2  # ranks that read the others' pulses: the second is for the first
_VERDICT = "verdict"


@dataclass
class _Seen:
    """A rank's pulse as another saw it last, and when it had moved. Clocks of machines are not compared."""

    message: dict[str, Any]
    moved: float
    told: float


class Watch:
    """The thread of one rank."""

    def __init__(self, pulse: Pulse, rank: int, size: int, store: Store, tell: Callable[[str], None]) -> None:
        """`tell` is called with what is wrong, on one rank, just before all of them end."""
        self.pulse, self.rank, self.size = pulse, rank, size
        self._store, self._tell = store, tell
        self._over = threading.Event()
        self._seen: dict[int, _Seen] = {}
        self._looked = time.monotonic()
        self._ticks = 0

    def run(self) -> None:
        """Look at the ranks until `close`, or end this process."""
        while not self._over.wait(PERIOD):
            try:
                self._put(over=False)
                if self._store.check([_VERDICT]):
                    self._end(parse_json(self._store.get(_VERDICT).decode())["pids"])
                if self.rank < _JUDGES:
                    self._judge()
            except (RuntimeError, ValueError) as error:  # of the store
                if self._over.is_set():
                    return
                self._tell(
                    f"rank {self.rank} of {self.size} has lost its launcher ({str(error).splitlines()[0][:120]})"
                )
                self._end([])

    def close(self) -> None:
        """This rank is done and does not hang when it says nothing more."""
        self._over.set()
        with contextlib.suppress(RuntimeError, ValueError):
            self._put(over=True)

    def _put(self, *, over: bool) -> None:
        self._ticks += 1
        pulse = self.pulse
        message = {
            "beats": pulse.beats, "passes": pulse.passes, "waits": pulse.waits, "limit": pulse.limit,
            "silence": pulse.silence, "where": pulse.where,
            "ticks": self._ticks, "host": socket.gethostname(), "pid": os.getpid(), "over": over,
        }  # fmt: skip
        self._store.set(str(self.rank), json.dumps(message))

    def _judge(self) -> None:
        now = time.monotonic()
        asleep = now - self._looked > _ASLEEP
        self._looked = now
        for rank in range(self.size):
            if not self._store.check([str(rank)]):
                continue
            message = parse_json(self._store.get(str(rank)).decode())
            before = self._seen.get(rank)
            if before is None or asleep:
                self._seen[rank] = _Seen(message, now, now)
                continue
            moved = (message["beats"], message["waits"]) != (before.message["beats"], before.message["waits"])
            told = message["ticks"] != before.message["ticks"]
            self._seen[rank] = _Seen(message, now if moved else before.moved, now if told else before.told)
        found = hanging(self._seen, now)
        if found is not None:
            self._sentence(*found)

    def _sentence(self, ranks: list[int], why: str) -> None:
        pids = [[self._seen[rank].message["host"], self._seen[rank].message["pid"]] for rank in ranks]
        verdict = json.dumps({"rank": self.rank, "pids": pids})
        if self._store.compare_set(_VERDICT, "", verdict).decode() == verdict:  # the other judge may have been first
            self._tell(f"{_named(ranks, self.size)} {why}")
            time.sleep(3 * PERIOD)  # until all have read it: the store may end with this process
            self._end(pids)

    def _end(self, pids: list[list[Any]]) -> None:
        for host, pid in pids:
            if host == socket.gethostname() and pid != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)  # it may not listen to anything less
        os._exit(2)


def hanging(seen: dict[int, _Seen], now: float) -> tuple[list[int], str] | None:
    """The ranks that hang, and why, as the end of a sentence; None while all is well.

    A rank hangs that shows no progress and does not wait for others, or whose process says nothing at all. Where it cannot be
    told who waits for whom, as within passes that gather weights, those that have come through the fewest.
    """
    there = {rank: one for rank, one in seen.items() if not one.message["over"]}
    silent = [rank for rank, one in there.items() if now - one.told > one.message["silence"]]
    if silent:
        one = there[silent[0]]
        return silent, f"{_seconds(now - one.told)} not answered, {one.message['where']}"
    still = {
        r: one for r, one in there.items() if now - one.moved > one.message["limit"] and not one.message["waits"] % 2
    }
    if still:
        least = min(one.message["passes"] for one in still.values())
        found = [rank for rank, one in still.items() if one.message["passes"] == least]
        one = still[found[0]]
        return found, f"{_seconds(now - one.moved)} shown no progress, {one.message['where']}"
    if there and all(
        one.message["waits"] % 2 and now - one.moved > max(PATIENT, one.message["limit"]) for one in there.values()
    ):
        first = min(there)
        return [
            first
        ], f"{_seconds(now - there[first].moved)} waited for the others as these for it: the network stands still"
    return None


def _seconds(count: float) -> str:
    return f"has for {count:.0f} s"


def _named(ranks: list[int], size: int) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} of {size}"
    return f"each of the ranks {', '.join(map(str, ranks))} of {size}"


@contextmanager
def watched(pulse: Pulse, rank: int, size: int, store: Store, tell: Callable[[str], None]) -> Iterator[None]:
    """Watch the ranks during the block. Whatever goes wrong ends this process with status 2, `tell` having been called."""
    watch = Watch(pulse, rank, size, store, tell)
    thread = threading.Thread(target=watch.run, name="graft-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        watch.close()
        thread.join(timeout=2 * PERIOD)
