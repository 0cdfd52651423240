"""The CPU benchmarks of speed and memory, one after another: what `make bench` runs, within an hour on two cores.

    python bench/suite.py                          # all; writes bench/results/cpu.json and cpu.md, and the pages' sections
    python bench/suite.py --only train-gemma-lora  # some of them anew; the others' figures stay
    python bench/suite.py --readme                 # README's and docs/memory.md's sections from cpu.json, nothing is measured
    python bench/suite.py --list

Each runs in a process of its own, with a limit on its time; one that fails is reported, and the rest go on. Nothing else may
run on the machine. `report.py` has the targets. What other scripts of this folder measure (serving, the
planner's predictions, quality, trust) has commands and pages of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import torch
from machine import described

from graftlm.base.precision import default_compute_dtype
from graftlm.files import write_json, write_text

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
README = BENCH.parent / "README.md"
MEMORY = BENCH.parent / "docs" / "memory.md"
TOTAL_SECONDS = 3600


@dataclass(frozen=True, kw_only=True)
class Part:
    """One benchmark: a script of this folder, its arguments, and the seconds it may take."""

    name: str
    script: str
    arguments: tuple[str, ...] = ()
    seconds: float

    @property
    def command(self) -> list[str]:
        return [f"bench/{self.script}", *self.arguments]


def parts_of(folder: Path) -> list[Part]:
    """The parts, in the order of running; scripts that are not in `folder` are left out."""
    # A processor with AVX-512 BF16 takes half the time and multiplies bfloat16: more steps, and the peer in both dtypes.
    name = instructions()
    quick = name.startswith("AVX512 ")
    steps, warm_up = ("5", "3") if quick else ("3", "1")

    def train(
        base: str, method: str
    ) -> Part:  # apart: a method that does not come to its end takes nothing from another
        arguments = ("--base", base, "--methods", method, "--steps", steps, "--warm-up", warm_up)
        types = ("--types", method) if quick else ()
        return Part(name=f"train-{base}-{method}", script="train.py", seconds=700, arguments=(*arguments, *types))

    known = [
        Part(name="kernels", script="operations.py", seconds=120),
        *(train(base, method) for base in ("smollm2", "gemma") for method in ("full", "lora", "qlora")),
        Part(name="ladder", script="ladder.py", arguments=("--steps", "4"), seconds=330),
        Part(name="scaling", script="scaling.py", arguments=("--plot", f"bench/results/{report.plot(name)}"), seconds=360),
    ]  # fmt: skip
    return [part for part in known if (folder / part.script).is_file()]


def instructions() -> str:
    """The instruction set of matmuls here, PyTorch's and training's; figures are kept separately for each.

    A processor limited to narrower instructions than it has is named so. This limits both sides alike:
    `ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python bench/suite.py`.
    """
    own = default_compute_dtype(torch.device("cpu"), training=True)
    name = torch.backends.cpu.get_cpu_capability() + {"bf16-mixed": " BF16", "bfloat16": " AMX"}.get(own, "")
    return f"limited to {name}" if os.environ.get("ATEN_CPU_CAPABILITY") else name


def run(part: Part, seconds: float) -> dict[str, Any]:
    """Run one benchmark; its figures, or the error that ended it. What it prints is shown as it comes."""
    began = time.monotonic()
    found: dict[str, Any] = {"command": shlex.join(["python", *part.command]), "machine": described()}
    found["date"] = found["machine"]["date"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        child = subprocess.Popen(
            [sys.executable, *part.command, "--json", str(out)], cwd=BENCH.parent, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        assert child.stdout is not None
        lines: list[str] = []
        with _ended_after(child, seconds) as late:
            for line in child.stdout:
                lines.append(line.rstrip())
                print(f"    {line.rstrip()}", flush=True)
            status = child.wait()
        said = " | ".join(line for line in lines[-3:] if line.strip()) or "it said nothing"
        if late.is_set():
            found["error"] = f"not done after {seconds:.0f} s; last: {said}"
        elif status:
            found["error"] = f"ended with status {status}: {said}"
        try:  # what it had by then, where it did not come to its end
            found["figures"] = json.loads(out.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            found.setdefault("error", f"it wrote no figures ({error})")
    found["seconds"] = time.monotonic() - began
    return found


@contextmanager
def _ended_after(child: subprocess.Popen[str], seconds: float) -> Iterator[threading.Event]:
    """End a child, and every process it has started, after `seconds`; the event says whether that was needed."""
    late = threading.Event()

    def end() -> None:
        late.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # its own session: nobody else is in it

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        yield late
    except BaseException:
        end()
        raise
    finally:
        timer.cancel()


def measure(parts: Sequence[Part], place: Path, total: float) -> bool:
    """Run the parts and write `place` after each; returns whether all gave figures. Figures of other parts, and of other
    instruction sets, stay."""
    results: dict[str, Any] = read(place) or {}
    known = results.setdefault(instructions(), {})
    began, good = time.monotonic(), True
    for number, part in enumerate(parts, 1):
        left = total - (time.monotonic() - began)
        print(f"[{number}/{len(parts)}] {part.name}: {shlex.join(part.command)}, {left:.0f} s left in all", flush=True)
        if left < 1:
            print(f"    left out: the {total:.0f} s are up; run it with --only {part.name}", flush=True)
            good = False
            continue
        found = run(part, min(part.seconds, left))
        print(f"    {found.get('error') or 'done'}, {found['seconds']:.0f} s", flush=True)
        good = good and "error" not in found
        before = known.get(part.name)
        if "error" in found and before and "figures" in before:
            print("    its earlier figures stay", flush=True)
            continue
        known[part.name] = found
        write_json(place, results)
    return good


def read(place: Path) -> dict[str, Any] | None:
    return json.loads(place.read_text(encoding="utf-8")) if place.is_file() else None


def main(arguments: Sequence[str] | None = None) -> int:
    parts = parts_of(BENCH)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[part.name for part in parts], help="run these alone")
    parser.add_argument("--time-limit", type=float, default=TOTAL_SECONDS, help="seconds for all of them together")
    parser.add_argument("--json", type=Path, default=RESULTS / "cpu.json", help="the file of figures")
    parser.add_argument(
        "--readme",
        action="store_true",
        help="write the pages' sections and the page of tables from the figures, measure nothing",
    )
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    options = parser.parse_args(arguments)
    if options.list:
        for part in parts:
            print(f"{part.name:12} at most {part.seconds:.0f} s   {shlex.join(part.command)}")
        return 0
    good = True
    if not options.readme:
        chosen = [part for part in parts if options.only is None or part.name in options.only]
        good = measure(chosen, options.json, options.time_limit)
    results = read(options.json)
    if results is not None:
        write_text(options.json.with_suffix(".md"), report.page(results, options.json.name))
    if options.json == RESULTS / "cpu.json":
        write_text(README, report.with_section(README.read_text(encoding="utf-8"), report.README, results))
        write_text(MEMORY, report.with_section(MEMORY.read_text(encoding="utf-8"), report.LADDER, results))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
