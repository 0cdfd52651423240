"""Runs whose disk fails or whose process is killed: a preloaded library and a server that forks; `Server` asks it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
COUNT, EVERY_KTH_WRITE, FULL_FROM_KTH, KILL_AT_KTH = range(4)
"""Modes of `faults.c`."""


class Server:
    """Trains in children of one process that has the libraries loaded; `with Server(folder) as server`."""

    def __init__(self, place: Path) -> None:
        """`place` gets the compiled library. Skips the test where there is no C compiler, or no Linux."""
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None or not sys.platform.startswith("linux"):
            pytest.skip("needs Linux and a C compiler")
        library = place / "faults.so"
        command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, HERE / "faults.c", "-ldl"]
        subprocess.run([str(part) for part in command], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(library), "GRAFT_FAULTS": str(library)}
        self._said = (place / "server.log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "server.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._said, text=True, env=environment,
        )  # fmt: skip

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()
        self._said.close()

    def run(self, options: dict[str, Any], mode: int = COUNT, k: int = 0, kill_after: float | None = None) -> Any:
        """One run; the answer as `server.py` says."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        given = {name: value for name, value in options.items() if value is not None}
        question = {"options": given, "folder": options["out"], "mode": mode, "k": k, "kill_after": kill_after}
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._said.seek(0)
            raise AssertionError(f"the server of faults ended: {self._said.read()[-2000:]}")
        return json.loads(line)


__all__ = ["COUNT", "EVERY_KTH_WRITE", "FULL_FROM_KTH", "KILL_AT_KTH", "Server"]
