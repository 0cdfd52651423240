"""One job of `gpu.py` in a process of its own: python bench/gpu_jobs.py JOB --json FILE --device cuda --seconds 60

A job is a generator of (name, figures). Each pair is written to the file at once; between two the time is looked at, and the
job ends, unfinished, where most of it is gone. What a job raises is written too, with the end of its traceback.
"""

from __future__ import annotations

import argparse
import importlib
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gpu

Figures = Iterator[tuple[str, dict[str, Any]]]
RESERVED = 0.1  # of a job's time, in which nothing new is begun


@dataclass(frozen=True, kw_only=True)
class Where:
    """What a job runs on."""

    device: str
    small: bool = False
    """Whether shapes are tiny: to try a job, where nothing is measured."""


# Imported when they run: what a machine lacks fails in its own job.
PLACES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "environment": ("gpu_checks", "environment", {}),
    "correct": ("gpu_checks", "correct", {}),
    "kernels": ("gpu_kernels", "kernels_job", {}),
    "7b-qlora": ("gpu_steps", "steps", {"model": "7b", "variant": "qlora"}),
    "7b-lora": ("gpu_steps", "steps", {"model": "7b", "variant": "lora"}),
    "7b-full": ("gpu_steps", "steps", {"model": "7b", "variant": "full"}),
    "70b-qlora": ("gpu_steps", "steps", {"model": "70b", "variant": "qlora"}),
    "decode": ("gpu_decode", "decode", {}),
    "peft-7b-lora": ("gpu_steps", "peer_steps", {"model": "7b", "variant": "lora"}),
    "peft-7b-qlora": ("gpu_steps", "peer_steps", {"model": "7b", "variant": "qlora"}),
}


def figures_of(job: str, where: Where) -> Figures:
    """A job's figures as they come."""
    module, function, options = PLACES[job]
    work = partial(getattr(importlib.import_module(module), function), **options)
    yield from work(where)


def run(job: str, place: Path, where: Where, seconds: float) -> bool:
    """Run a job and write its file after each figure; whether it came to its end."""
    deadline = time.monotonic() + (1 - RESERVED) * seconds
    found: dict[str, Any] = {"figures": {}, "date": time.strftime("%Y-%m-%d %H:%M"), "done": False}
    gpu.write(place, found)
    try:
        for name, figures in figures_of(job, where):
            found["figures"][name] = figures
            gpu.write(place, found)
            print(f"{name}: {figures}", flush=True)
            if time.monotonic() > deadline:
                raise TimeoutError(f"the time was up after {name}")
        found["done"] = True
    except Exception as error:  # whatever it is, the other jobs are still to be run
        found["error"] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"
        found["traceback"] = traceback.format_exc().splitlines()[-12:]
        traceback.print_exc()
    gpu.write(place, found)
    return bool(found["done"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=list(PLACES))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(arguments)
    return (
        0 if run(options.job, options.json, Where(device=options.device, small=options.small), options.seconds) else 1
    )


if __name__ == "__main__":
    raise SystemExit(main())
