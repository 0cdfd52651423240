"""What a run really used: the peak of this process's own memory, or of the GPU's.

On a CPU it is the anonymous resident memory (`RssAnon`): pages of a mapped checkpoint belong to the file and can be dropped
by the system at any time, so they do not count. Linux keeps no peak of it, so a thread samples it.
"""

from __future__ import annotations

import resource
import sys
import threading
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def process_memory() -> int:
    """Bytes of resident memory that are this process's own; the highest ever seen where the system gives no better."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class PeakMemory:
    """Measures the highest memory in use while it is open.

    with PeakMemory(device) as memory: ...; memory.bytes

    `keep` leaves a GPU's own record as it is, for one that is open around this one; the peak is then that of both.
    """

    def __init__(self, device: torch.device, every_seconds: float = 0.01, *, keep: bool = False) -> None:
        self.device = device
        self.every = every_seconds
        self.keep = keep
        self.start = 0
        self.bytes = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            if not self.keep:
                torch.cuda.reset_peak_memory_stats(self.device)
            return self
        self.start = self.bytes = process_memory()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(self.every):
            self.bytes = max(self.bytes, process_memory())

    def __exit__(self, *exc: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.bytes = max(self.bytes, process_memory())
