"""What a GPU shows in its first quarter of an hour: checks, kernels, steps, memory beside the plan, decode, PEFT beside it.

    python3 bench/gpu.py --out DIR                        # all jobs, at most 9 minutes; run it again to go on where it stopped
    python3 bench/gpu.py --out DIR --wheels wheels        # with packages that the machine lacks, from a folder of wheels
    python3 bench/gpu.py --out DIR --only kernels decode  # some of the jobs, anew
    python3 bench/gpu.py --out DIR --device cpu --small   # the script itself, tried anywhere on tiny shapes
    python3 bench/gpu.py --page                           # docs/performance.md's section from bench/results/gpu.json

It needs no network, no installation and no checkpoint: weights are random in the real shapes, made on the GPU and stored one by
one. PyTorch, transformers and Triton are there; a wheel of --wheels is unpacked into a folder on the path where its package
cannot be imported. Each job is a process of its own (`gpu_jobs.py`), with a limit on its time, and writes DIR/JOB.json after
each figure; DIR/gpu.json joins them after each job. A job that fails or takes too long is noted, keeps what it had, and the
next one runs. This file itself imports nothing but Python's own library, so that it starts wherever Python does.

To publish: copy DIR/gpu.json to bench/results/gpu.json and write the page.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
RESULTS = BENCH / "results" / "gpu.json"
PAGE = ROOT / "docs" / "performance.md"
TIME_LIMIT = 540
LEAST = 15  # seconds without which no job is begun: imports alone take as long


@dataclass(frozen=True, kw_only=True)
class Job:
    """A process of the run: what it measures, and the seconds it may take."""

    name: str
    what: str
    seconds: float


JOBS = (
    Job(name="environment", what="packages, the GPU, each kernel's check before first use", seconds=60),
    Job(name="correct", what="losses and gradients beside the CPU's; a checkpoint loaded; a run resumed", seconds=90),
    Job(name="kernels", what="each kernel beside what PyTorch does", seconds=90),
    Job(name="7b-qlora", what="steps: time, launches, synchronisations, memory beside the plan", seconds=75),
    Job(name="7b-lora", what="the same", seconds=75),
    Job(name="7b-full", what="the same, with the whole memory ladder", seconds=60),
    Job(name="70b-qlora", what="memory beside the plan, and a step's time", seconds=75),
    Job(name="decode", what="tokens a second at batch 1, 16 and 64", seconds=60),
    Job(name="peft-7b-lora", what="the steps of 7b-lora by transformers and PEFT", seconds=75),
    Job(name="peft-7b-qlora", what="the steps of 7b-qlora by PEFT and bitsandbytes", seconds=75),
)  # fmt: skip


# ---- carried packages ------------------------------------------------------------------------------------------------


def unpack_missing(wheels: Path, site: Path) -> dict[str, str]:
    """Unpack each wheel whose packages cannot be imported here; returns what became of each file."""
    found: dict[str, str] = {}
    for wheel in sorted(wheels.glob("*.whl")):
        if not _suits(wheel):
            found[wheel.name] = "left out: for another Python"
            continue
        with zipfile.ZipFile(wheel) as archive:
            if all(_importable(name) for name in packages_of(archive.namelist())):
                found[wheel.name] = "left out: installed already"
                continue
            archive.extractall(site)
        found[wheel.name] = "unpacked"
    return found


def packages_of(files: Sequence[str]) -> set[str]:
    """The packages and modules that a wheel's files make."""
    tops = {name.partition("/")[0] for name in files}
    return {top.partition(".")[0] for top in tops if not top.endswith((".dist-info", ".data", ".libs"))}


def _suits(wheel: Path) -> bool:
    """Whether a wheel's name says that it is for this Python."""
    python = wheel.stem.split("-")[-3]
    own = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return own in python.split(".") or "py3" in python.split(".") or "abi3" in wheel.stem


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


# ---- the jobs --------------------------------------------------------------------------------------------------------


def run_job(job: Job, out: Path, seconds: float, device: str, small: bool, path: Sequence[str]) -> dict[str, Any]:
    """Run a job in a process of its own, ended after `seconds`; returns what it wrote, with an error where there was one."""
    place = out / f"{job.name}.json"
    place.unlink(missing_ok=True)
    command = [sys.executable, str(BENCH / "gpu_jobs.py"), job.name, "--json", str(place), "--device", device]
    command += ["--seconds", f"{seconds:.0f}", *(["--small"] if small else [])]
    given = os.environ.get("PYTHONPATH", "")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *path, given]))}
    began, error = time.monotonic(), ""
    log = out / f"{job.name}.log"
    with log.open("w", encoding="utf-8") as written:
        try:
            # The job itself begins nothing new towards its end; this is for one that hangs.
            done = subprocess.run(command, stdout=written, stderr=subprocess.STDOUT, timeout=seconds, env=environment)
            error = f"ended with status {done.returncode}: {_last_line(log)}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            error = f"not done after {seconds:.0f} s: {_last_line(log)}"
    found = read(place) or {"figures": {}}
    if error and not found.get("error"):
        found["error"] = error
    return {**found, "seconds": time.monotonic() - began}


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][-300:] if lines else "it said nothing"


def read(place: Path) -> dict[str, Any] | None:
    """A JSON file; None where it is not there, or was not written to its end."""
    try:
        return json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write(place: Path, values: dict[str, Any]) -> None:
    """A JSON file, replaced at once: whatever ends this leaves the old or the new one."""
    new = place.with_suffix(".new")
    new.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    new.replace(place)


def measure(jobs: Sequence[Job], out: Path, seconds: float, device: str, small: bool, wheels: Path | None) -> bool:
    """Run jobs within `seconds` and write DIR/gpu.json after each; whether all of them came to their end."""
    deadline, good = time.monotonic() + seconds, True
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = read(out / "gpu.json") or {"jobs": {}}
    with tempfile.TemporaryDirectory() as site:
        result["wheels"] = unpack_missing(wheels, Path(site)) if wheels is not None else {}
        for name, what in result["wheels"].items():
            print(f"{name}: {what}", flush=True)
        for job in jobs:
            left = deadline - time.monotonic()
            if left < LEAST:
                print(f"{job.name}: left out, the time is up; run it again to go on", flush=True)
                good = False
                continue
            most = left if small else min(job.seconds, left)
            print(f"{job.name}: {job.what}, at most {most:.0f} s", flush=True)
            found = run_job(job, out, most, device, small, [site])
            before = result["jobs"].get(job.name, {})
            if (
                not found.get("error") or not before.get("done") or before["small"] != small
            ):  # else the better one stays
                result["jobs"][job.name] = {**found, "small": small, "device": device}
            write(out / "gpu.json", result)
            print(f"    {found.get('error') or 'done'}, {found['seconds']:.0f} s", flush=True)
            good = good and not found.get("error")
    return good


def waiting(out: Path, small: bool) -> list[Job]:
    """The jobs that DIR has not in full."""
    before = (read(out / "gpu.json") or {"jobs": {}})["jobs"]
    return [job for job in JOBS if not before.get(job.name, {}).get("done") or before[job.name]["small"] != small]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the figures; what it has is not measured again"
    )
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="folder of wheels for packages that are missing here"
    )
    parser.add_argument("--only", nargs="+", choices=[job.name for job in JOBS], help="these jobs alone, anew")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT, help="seconds for all of them together")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu with --small")
    parser.add_argument("--small", action="store_true", help="tiny shapes: tries the script, measures nothing")
    parser.add_argument("--page", action="store_true", help="write the page's section from bench/results/gpu.json")
    options = parser.parse_args(arguments)
    if options.page:
        import gpu_page

        text = gpu_page.with_section(PAGE.read_text(encoding="utf-8"), read(RESULTS))
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if options.out is None:
        parser.error("--out DIR says where the figures go")
    if options.wheels is not None and not options.wheels.is_dir():
        parser.error(f"--wheels {options.wheels} is no folder")
    jobs = waiting(options.out, options.small)
    if options.only:
        jobs = [job for job in JOBS if job.name in options.only]
    good = measure(jobs, options.out, options.time_limit, options.device, options.small, options.wheels)
    print(f"figures in {options.out / 'gpu.json'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
