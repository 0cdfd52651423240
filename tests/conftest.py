"""For all tests: this folder is importable (`import tiny`), one thread, and a cache folder that is nobody's own.

Processes that a test starts have one thread too: as many tests run at once as there are cores.

`pytest --record` (what `make prove` runs) keeps what the proofs showed in bench/results/proofs.json: a test says it with
pytest's own `record_property`, and when, where, how long and with what end is added here.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("GRAFT_CACHE", tempfile.mkdtemp(prefix="graft-test-cache-"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
os.fsync = lambda _: None  # a run flushes 47 times, which takes as long as its steps; no test cuts the power

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `tools`, which is not installed

PROOFS = Path(__file__).parents[1] / "bench" / "results" / "proofs.json"


@pytest.fixture
def graft_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own."""
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium without a window, the system's where it has one."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        system = shutil.which("chromium") or shutil.which("google-chrome")
        try:
            found = driver.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium here: {str(error).splitlines()[0]}")
        yield found
        found.close()


def pytest_collection_finish() -> None:
    """What has been imported stays: looking through two million objects for garbage, as a run does twice, is half of a small
    run's time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries report what is not freed at the end


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="keep what proofs show in bench/results/proofs.json")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record"):
        config.pluginmanager.register(Recorded())


class Recorded:
    """Writes each proof's figures as it ends, so that one that is cut off takes no other with it."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" or not {"prove", "measured"} & set(report.keywords):
            return
        known: dict[str, Any] = json.loads(PROOFS.read_text(encoding="utf-8")) if PROOFS.is_file() else {}
        known[report.nodeid] = {
            "outcome": report.outcome,
            "figures": dict(report.user_properties),
            "seconds": round(report.duration, 1),
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        }
        PROOFS.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", encoding="utf-8")
