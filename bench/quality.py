"""Quality of full, LoRA and QLoRA in two regimes, three seeds each, by `graft compare`: what docs/comparing.md publishes.

    python bench/quality.py                      # both; interrupted, the same command goes on
    python bench/quality.py --only voices
    python bench/quality.py --no-run             # read what --out holds already

    voices   a style shift on what the bundled base knows: product descriptions in a playful voice
    e2e      restaurant facts, far from the bundled base; needs the folder shared/data/e2e beside the checkout

Figures go to bench/results/quality.json and, as a table, to standard output. A regime without a finished comparison is
written down as missing, with the reason.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
E2E = ROOT.parent / "shared" / "data" / "e2e"
RESULTS = ROOT / "bench" / "results" / "quality.json"
OPTIONS: dict[str, list[str]] = {
    "voices": ["--model", "demo", "--data", "demo", "--eval-data", "demo", "--steps", "80"],
    "e2e": [
        "--model", "demo", "--data", str(E2E / "train.jsonl"), "--eval-data", str(E2E / "valid.jsonl"), "--steps", "150",
        "--search-steps", "30", "--methods", "full,lora,qlora,lora:rank=64", "--metric", "bleu",
    ],
}  # fmt: skip
KEPT = (
    "name", "method", "trained", "trainable_parameters", "base_precision", "learning_rate", "loss_before", "loss", "losses",
    "std", "share", "share_interval", "task_score_before", "task_score", "general_before", "general_after", "saved_bytes",
    "peak_measured", "idle",
)  # fmt: skip


def run(regime: str, out: Path) -> None:
    """Compare, or go on comparing."""
    command = [sys.executable, "-m", "graftlm.cli", "compare", *OPTIONS[regime], "--out", str(out)]
    subprocess.run(command, check=True, cwd=ROOT)


def read(regime: str, out: Path) -> dict[str, Any]:
    """The figures of a finished comparison, or why there are none."""
    shown = ["graft", "compare", *OPTIONS[regime], "--out", f"runs/quality/{regime}"]
    command = " ".join(shown).replace(str(E2E), "../shared/data/e2e")
    try:
        found = json.loads((out / "compare.json").read_text(encoding="utf-8"))
        lines = found["lines"]
    except FileNotFoundError:
        return {"command": command, "missing": "not run"}
    except KeyError:
        return {"command": command, "missing": "the comparison has not ended"}
    return {
        "command": command,
        "seeds": found["asked"]["seeds"],
        "data": found["data"],
        "lines": [{key: line[key] for key in KEPT} for line in lines],
        "differences": found["verdict"]["differences"],
        "choice": found["verdict"]["choice"],
        "certain": found["verdict"]["certain"],
        "sentences": found["verdict"]["sentences"],
        "failed": found["failed"],
        "versions": found["environment"]["versions"],
    }


def table(regime: str, found: dict[str, Any]) -> str:
    """A regime as a table of Markdown."""
    if "missing" in found:
        return f"{regime}: {found['missing']}"
    rows = [
        "| method | base | learning rate | eval loss before | after, mean ± sd of seeds | share of full's gain (95 %) |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for line in found["lines"]:
        interval = line["share_interval"]
        share = f"{line['share']:.1%}"
        if line["method"] != "full":
            share += f" ({100 * interval['low']:.1f} to {100 * interval['high']:.1f})"
        rows.append(
            f"| {line['name']} | {line['base_precision']} | {line['learning_rate']:g} | {line['loss_before']:.3f} | "
            f"{line['loss']:.3f} ± {line['std']:.3f} | {share} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quality", help="folder of the comparisons")
    parser.add_argument("--only", choices=list(OPTIONS), help="one regime")
    parser.add_argument("--no-run", action="store_true", help="read what is there")
    asked = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for regime in [asked.only] if asked.only else list(OPTIONS):
        if regime == "e2e" and not E2E.is_dir():
            sys.stderr.write(f"e2e is skipped: there is no {E2E}\n")
            continue
        if not asked.no_run:
            run(regime, asked.out / regime)
        results[regime] = read(regime, asked.out / regime)
        sys.stdout.write(f"{regime}\n{table(regime, results[regime])}\n\n")
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
