"""Where things lie in the folder of a comparison.

compare.json         what was asked; in the end also every figure and the verdict
report.md .html      the same for people
runs/lora/seed-0/    an ordinary run folder, with result.json (its summary) and scores.json (general text, task)
search/              short runs that chose the learning rates; rows/ are the training rows they used
base/nf4.json        what the untrained base scores in each precision
"""

from __future__ import annotations

from pathlib import Path

from graftlm.config import CompareConfig
from graftlm.config.compare import Variant
from graftlm.errors import RunError
from graftlm.files import write_json
from graftlm.training.run_folder import LOCK

MARK = "compare.json"
RESULT = "result.json"
REPORTS = ("report.md", "report.html")
_WRITTEN = {MARK, *REPORTS, "runs", "search", "base"}


def run_folder(config: CompareConfig, variant: Variant, seed: int) -> Path:
    """A run of the comparison."""
    return config.out / "runs" / variant.folder / f"seed-{seed}"


def search_folder(config: CompareConfig, variant: Variant, rate: float) -> Path:
    """A short run of the search for a variant's learning rate."""
    return config.out / "search" / variant.folder / f"{rate:g}"


def search_rows(config: CompareConfig) -> Path:
    """Training rows that the search uses."""
    return config.out / "search" / "rows"


def base_scores(config: CompareConfig, precision: str) -> Path:
    """What the bare base in a precision scores."""
    return config.out / "base" / f"{precision}.json"


def claim(out: Path) -> None:
    """Make `out` a comparison's folder; RunError where it holds something that no comparison wrote."""
    held = sorted(p.name for p in out.iterdir() if p.name != LOCK and not p.name.startswith("."))
    others = [name for name in held if name not in _WRITTEN]
    if others or (held and MARK not in held):
        raise RunError(f"--out {out} holds '{(others or held)[0]}', which no comparison wrote; take another folder")
    if not held:
        write_json(out / MARK, {"written_by": "graft compare"})
