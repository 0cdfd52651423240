"""pytest's side of the fake card: compiles the guard, starts the worker, asks it for traces (`fake_card.py`, `worker.py`)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from fake_trace import Trace
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class NoCard(Exception):
    """Why there can be no fake card here."""


def compile_guard() -> Path:
    """The folder of the compiled `guard.cpp`, made once for each PyTorch and interpreter. Raises NoCard."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        raise NoCard("no C++ compiler, which the fake card's device guard needs")
    if torch.version.cuda is not None or torch.version.hip is not None:
        raise NoCard(f"this PyTorch ({torch.__version__}) has a CUDA of its own; the fake card needs a CPU build")
    source = HERE / "guard.cpp"
    key = hashlib.sha256(source.read_bytes() + f"{torch.__version__} {sys.version}".encode()).hexdigest()[:12]
    folder = ROOT / "build" / f"fake-card-{key}"
    made = folder / "fake_card_guard.so"
    if made.is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    library = Path(torch.__file__).parent / "lib"
    with tempfile.TemporaryDirectory(dir=folder) as place:
        new = Path(place) / made.name
        includes = [f"-I{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
        done = subprocess.run(
            [compiler, "-shared", "-fPIC", "-std=c++20", *includes, str(source), "-o", str(new), f"-L{library}", "-lc10",
             "-ltorch_cpu", f"-Wl,-rpath,{library}"],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        if done.returncode:
            raise NoCard(f"{compiler} does not compile the fake card's device guard: {done.stderr.strip()[-300:]}")
        new.replace(made)  # another process may make the same
    return folder


def _path() -> str:
    """This checkout first, then what the environment has (a package that is not installed)."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])])


class Worker:
    """The process with the fake card; one question at a time."""

    def __init__(self, guard: Path) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the object)
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), str(guard)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _path()},
        )  # fmt: skip
        self._known: dict[str, Any] = {}

    def ask(self, scenario: str, **options: Any) -> Any:
        """What a scenario returns; the same question is answered once. Raises AssertionError with the scenario's traceback."""
        question = json.dumps({"scenario": scenario, "options": options})
        if question not in self._known:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            self._known[question] = json.loads(line) if line else {"error": self._end_of_log()}
        found = self._known[question]
        assert "error" not in found, f"{scenario} on the fake card: {found['error']}"
        return found["result"]

    def trace(self, scenario: str, **options: Any) -> Trace:
        """The trace that a scenario returns."""
        return Trace.from_json(self.ask(scenario, **options))

    def traces(self, scenario: str, **options: Any) -> dict[str, Trace]:
        """The traces that a scenario returns by name."""
        return {name: Trace.from_json(found) for name, found in self.ask(scenario, **options).items()}

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=120)

    def _end_of_log(self) -> str:
        self._log.seek(0)
        return "the worker ended: " + self._log.read()[-3000:]
