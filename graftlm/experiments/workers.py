"""Workers: processes that train at once, one on each GPU, or beside each other on a processor.

    workers_for(4, "cuda")            four workers, each of which will see one GPU
    spread(jobs, workers, do, ended)  every job on some worker, one at a time on each

`compare` gives a worker one run after another; in `sweep` each worker searches on. With one worker nothing changes: its child
sees what this process sees.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from graftlm.base.loading import default_device
from graftlm.distributed.group import without_launcher
from graftlm.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


class Worker:
    """Starts processes one after another, all in the same place."""

    def __init__(self, name: str = "", changes: Mapping[str, str] | None = None, sharing: int = 1) -> None:
        """`name` is its place for messages, `changes` are those of the environment; `sharing` workers share a processor."""
        self.name, self.sharing = name, sharing
        self._changes = dict(changes or {})
        self._child: subprocess.Popen[str] | None = None
        self._stopped = False
        self._lock = threading.Lock()

    @property
    def environment(self) -> dict[str, str]:
        """The environment of its processes; a launcher's ranks are not theirs."""
        return {**without_launcher(os.environ), **self._changes}

    def began(self, child: subprocess.Popen[str]) -> None:
        """Its process runs; one that began after `stop` is ended at once."""
        with self._lock:
            self._child = child
            if self._stopped:
                child.terminate()

    def stop(self) -> None:
        """Ask its process to stop, as SIGTERM does: a run leaves a checkpoint."""
        with self._lock:
            self._stopped = True
            if self._child is not None and self._child.poll() is None:
                self._child.terminate()


def workers_for(count: int, device: str | None) -> tuple[Worker, ...]:
    """So many workers on the GPUs that this process sees, in the order of CUDA_VISIBLE_DEVICES, or on the processor.

    Raises ConfigError where there are fewer GPUs, and ModelError for a device that is not there.
    """
    if count == 1:
        return (Worker(),)
    if default_device(device).type == "cpu":
        return tuple(Worker(f"worker {number}", sharing=count) for number in range(count))
    seen = visible_gpus()
    if count > len(seen):
        named = f" ({VISIBLE} is {os.environ[VISIBLE]})" if VISIBLE in os.environ else ""
        raise ConfigError(
            f"--workers {count} takes a GPU each, and there {'is' if len(seen) == 1 else 'are'} {len(seen)}{named}; give "
            f"--workers {len(seen)}" + (f", or name more of them in {VISIBLE}" if named else "")
        )
    return tuple(Worker(f"GPU {gpu}", {VISIBLE: gpu}) for gpu in seen[:count])


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, by the names that CUDA_VISIBLE_DEVICES has for them: numbers, or GPU-... and MIG-..."""
    count = torch.cuda.device_count()
    named = os.environ.get(VISIBLE)
    found = [str(number) for number in range(count)] if named is None else [n.strip() for n in named.split(",")]
    return found[:count]


def spread(
    jobs: Sequence[_Job],
    workers: Sequence[Worker],
    do: Callable[[_Job, Worker], _Result],
    ended: Callable[[_Job, _Result], None],
) -> None:
    """Do every job, in order, on whichever worker is free; `ended` gets each result, in this thread, as it comes.

    The first error ends it: no job is begun after it, the running ones are stopped, and it is raised once these have ended.
    """
    if len(workers) == 1:
        for job in jobs:
            ended(job, do(job, workers[0]))
        return
    waiting, free = deque(jobs), list(workers)
    running: dict[Future[_Result], tuple[_Job, Worker]] = {}
    with ThreadPoolExecutor(len(workers)) as threads:
        try:
            while waiting or running:
                while waiting and free:
                    job, worker = waiting.popleft(), free.pop(0)
                    running[threads.submit(do, job, worker)] = job, worker
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job, worker = running.pop(future)
                    free.append(worker)
                    ended(job, future.result())
        except BaseException:
            for _, worker in running.values():
                worker.stop()
            raise
