"""The contract tests with each release of transformers that Graft is tried with: `make compat`.

    python tools/compat.py                      # VERSIONS; a table, and status 1 if a test fails
    python tools/compat.py --versions 5.22.2    # these

Each release has an environment of its own in build/compat/, made from constraints.txt with transformers replaced, and kept
until constraints.txt or pyproject.toml change.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import venv
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "build" / "compat"
VERSIONS = ("5.17.0", "5.20.2", "5.24.0")
"""The oldest release of pyproject.toml's range, one between, and the one that constraints.txt pins."""
CONTRACT = (
    "tests/base",
    "tests/architectures",
    "tests/adapters/test_attach.py",
    "tests/adapters/test_merge.py",
    "tests/adapters/test_peft.py",
    "tests/adapters/test_targets.py",
    "tests/planning/test_shapes.py",
    "tests/serving/engine/test_engine.py",
    "tests/serving/engine/test_native_decoder.py",
    "tests/training/test_run.py",
)
"""What rests on transformers' internals: loading, parity by architecture with transformers and PEFT, a whole run, decoding."""
CHOSEN_BY_PIP = ("transformers", "huggingface_hub")
"""Not pinned by constraints.txt here: transformers before 5.20 needs a huggingface_hub before 2."""


@dataclass(frozen=True)
class Result:
    """What the tests said with one release."""

    version: str
    passed: int
    skipped: int
    failed: tuple[str, ...]
    seconds: float


def constraints(text: str, version: str) -> str:
    """constraints.txt with this release of transformers, and no pin for what that decides."""
    lines = [line for line in text.splitlines() if line.partition("==")[0] not in CHOSEN_BY_PIP]
    return "\n".join([*lines, f"transformers=={version}", ""])


def environment(version: str) -> Path:
    """The Python of a release's environment, which is made or made again where it is not up to date."""
    place = PLACE / version
    wanted = constraints((ROOT / "constraints.txt").read_text(encoding="utf-8"), version)
    project = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "setup.py").read_bytes()
    stamp = hashlib.sha256(wanted.encode() + project).hexdigest()
    made = place / "made.txt"
    python = place / ("Scripts" if os.name == "nt" else "bin") / "python"
    if made.is_file() and made.read_text(encoding="utf-8") == stamp:
        return python
    print(f"transformers {version}: making {place.relative_to(ROOT)}", flush=True)
    venv.create(place, clear=True, with_pip=True)
    (place / "constraints.txt").write_text(wanted, encoding="utf-8")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(place / "constraints.txt")]
    subprocess.run([*pip, "--editable", ".[dev]"], check=True, cwd=ROOT)
    made.write_text(stamp, encoding="utf-8")
    return python


def run_tests(python: Path, version: str, tests: Sequence[str]) -> Result:
    """Run tests with an environment's Python; what pytest prints is shown."""
    report = PLACE / f"{version}.xml"
    report.unlink(missing_ok=True)
    options = ["-q", "-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder"]
    command = [str(python), "-m", "pytest", *options, "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    print(f"transformers {version}: {len(tests)} folders and files of tests", flush=True)
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if not report.is_file():
        raise SystemExit(f"transformers {version}: pytest did not run")
    return read_report(version, report.read_text(encoding="utf-8"))


def read_report(version: str, xml: str) -> Result:
    """What pytest's junit file says."""
    cases = list(ET.fromstring(xml).iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    names = tuple(f"{c.get('classname')}::{c.get('name')}" for c in failed)
    seconds = sum(float(suite.get("time", 0)) for suite in ET.fromstring(xml).iter("testsuite"))
    return Result(version, len(cases) - len(failed) - len(skipped), len(skipped), names, seconds)


def table(results: Sequence[Result]) -> str:
    """Version x passed, failed, skipped; below it the names of what failed."""
    lines = [f"{'transformers':<14}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}"]
    lines += [f"{r.version:<14}{r.passed:>8}{len(r.failed):>8}{r.skipped:>9}{r.seconds:>9.0f}" for r in results]
    return "\n".join([*lines, *(f"{r.version}: {name}" for r in results for name in r.failed)])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--versions", nargs="+", default=list(VERSIONS), metavar="X.Y.Z", help="releases of transformers"
    )
    versions: list[str] = parser.parse_args().versions
    results = [run_tests(environment(version), version, CONTRACT) for version in versions]
    print(table(results))
    return int(any(result.failed or not result.passed for result in results))


if __name__ == "__main__":
    sys.exit(main())
