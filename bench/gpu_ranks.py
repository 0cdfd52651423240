"""Two GPUs, for whoever has them: does a run over two ranks equal one rank's, and what does it hold and send? Speed comes last.

    python bench/gpu_ranks.py                          two GPUs, NCCL
    python bench/gpu_ranks.py --device cpu             two processes on a processor, gloo: that the script works
    python bench/gpu_ranks.py --model Qwen/Qwen3-0.6B  another base than the bundled one

For LoRA, QLoRA and full training, in this order: losses of one rank and of two, step by step (they may differ by rounding: 2e-5
of a loss in float32, 1e-2 in bfloat16); peak memory of each; bytes that gradients take over the wire, by the formula of
docs/distributed.md; tokens a second, of the last half of the steps. Nothing of this has been run on GPUs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RUNS: dict[str, list[str]] = {
    "lora": ["--method", "lora"], "qlora": ["--method", "qlora"],
    "full": ["--method", "full", "--base-precision", "float32", "--learning-rate", "1e-4"],
}  # fmt: skip
ALLOWED = {"float32": 2e-5, "bf16-mixed": 1e-2, "bfloat16": 1e-2}
"""Largest relative difference of a loss, by compute dtype."""


def train(
    options: argparse.Namespace, method: str, ranks: int, out: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One run: its summary, and the lines of its steps."""
    command = [
        sys.executable, "-m", "graftlm.cli", "train", "--model", options.model, "--data", options.data, "--steps",
        str(options.steps), "--batch-size", "8", "--compute-dtype", options.compute_dtype, "--device", options.device,
        "--ranks", str(ranks), "--out", str(out), "--json", *RUNS[method],
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{method} over {ranks} ranks ended with status {done.returncode}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return json.loads(done.stdout.splitlines()[-1]), [line for line in lines if line["kind"] == "train"]


def speed(lines: list[dict[str, Any]]) -> float:
    """Tokens a second of the last half of the steps: the first compile."""
    late = lines[len(lines) // 2 :]
    return sum(line["tokens"] for line in late) / sum(line["seconds"] for line in late)


def compared(options: argparse.Namespace, method: str, place: Path) -> dict[str, Any]:
    """One rank and two, beside each other."""
    (one, alone), (two, both) = (train(options, method, ranks, place / f"{method}-{ranks}") for ranks in (1, 2))
    apart = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(alone, both, strict=True))
    return {
        "method": method, "steps": len(alone), "largest_relative_difference": apart,
        "equal": apart <= ALLOWED[options.compute_dtype], "peak_bytes": [one["peak_memory_bytes"], two["peak_memory_bytes"]],
        "sent_bytes_per_step": 4 * one["trainable_parameters"],  # 2 (n - 1) / n x 4 bytes, n = 2
        "tokens_per_second": [speed(alone), speed(both)],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--compute-dtype", default="float32", choices=sorted(ALLOWED))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--methods", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="graft-gpu-ranks-") as place:
        for method in options.methods:
            found = compared(options, method, Path(place))
            figures.append(found)
            peaks, rates = found["peak_bytes"], found["tokens_per_second"]
            sys.stdout.write(
                f"{method}: {'equal' if found['equal'] else 'NOT EQUAL'}, losses differ by at most "
                f"{found['largest_relative_difference']:.1e}; peak {peaks[0] / 1e9:.2f} and {peaks[1] / 1e9:.2f} GB; "
                f"{found['sent_bytes_per_step'] / 1e6:.1f} MB sent a step; {rates[0]:,.0f} and {rates[1]:,.0f} tokens/s\n"
            )
    if options.json is not None:
        options.json.write_text(
            json.dumps({"device": options.device, "runs": figures}, indent=2) + "\n", encoding="utf-8"
        )
    if not all(found["equal"] for found in figures):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
