"""Signs of progress of one rank: how many there were, how long it may go on without one, and whether it waits for others.

    with pulse.phase("step", "in step 12"):      signs come as often as in the last steps, or the rank hangs
        pulse.beat()                             a micro-batch is done
    with pulse.waiting():                        in a sum: who waits for the others is not the one that hangs

Outside of a phase (reading files, saving, generating answers) signs may be `PATIENT` seconds apart; every move of a progress
bar is one, and every tensor and block of bytes that is read or written. Before a library is called that gives none, a sign says
how long the next may take. `watch.py` reads the pulses of all ranks.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 45.0
"""How long a rank may show no progress in a phase, at least."""
PATIENT = 600.0
"""How long elsewhere, and in the first phase of a kind: something may be compiled there."""
_SILENT = (
    4  # times `SECONDS`: how long a process may say nothing at all, as while a file is written that holds Python's lock
)
_SLOWER = 4  # times as long as the longest pause of the last phases of a kind
_REMEMBERED = 20  # phases of a kind


class Pulse:
    """What the main thread of a rank says of itself."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.beats = 0
        self.passes = 0
        """How often a pass that all ranks make together has begun, and ended. Signs of progress do not tell how far a rank is
        beside another: the first has more, of what it alone writes and draws."""
        self.waits = 0
        """How often it has begun to wait, and stopped: odd while it waits."""
        self.where = "while the run was set up"
        self._limit = max(seconds, PATIENT)
        self._quiet_for = 0.0
        self.silence = _SILENT * seconds
        self._seconds = seconds
        self._pauses: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))
        self._longest = 0.0
        self._last = time.monotonic()

    @property
    def limit(self) -> float:
        """How many seconds it may be until the next sign."""
        return max(self._limit, self._quiet_for)

    def beat(self, quiet_for: float = 0.0) -> None:
        """A sign of progress; the next may take `quiet_for` seconds, where that is longer than usual."""
        self._quiet_for = quiet_for
        now = time.monotonic()
        self._longest = max(self._longest, now - self._last)
        self._last = now
        self.beats += 1

    @contextmanager
    def phase(self, kind: str, where: str) -> Iterator[None]:
        """Around work that is done again and again; `where` says in which part of the run it is, for a message."""
        before = self._limit
        pauses = self._pauses[kind]
        self.where = where
        self._limit = max(self._seconds, _SLOWER * max(pauses)) if pauses else max(self._seconds, PATIENT)
        self.beat()
        self._longest = 0.0
        try:
            yield
        finally:
            self.beat()
            pauses.append(self._longest)
            self._limit = before
            self.where = f"after what was done {where}"

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what ends only when the other ranks have come to it; the time is not this rank's."""
        self.beat()
        self.waits += 1
        try:
            yield
        finally:
            self.waits += 1
            self._last = time.monotonic()
            self.beats += 1
