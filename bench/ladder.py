"""The memory ladder of full fine-tuning on the CPU: each rung on its own and all together, what it saves and what it costs.

    python bench/ladder.py                                   # 30M Llama, about three minutes on two cores
    python bench/ladder.py --only 0 5                        # these rungs alone
    python bench/ladder.py --json bench/results/ladder.json

Every rung is a process of its own that calls what `graft train` calls, three times, after a tiny model has been trained once
so that libraries and kernels are there already:

    short, longer   steps of one example of about 30 and 90 tokens. The line through the two peaks, above the idle process,
                    taken back to no tokens, is what does not grow with them: weights, gradients, states, and whatever
                    the allocator and the run hold beside them. These are the bytes a parameter.
    e2e             batches of 16 from E2E: seconds a step, the whole peak, and the eval loss after the same steps

No run clips its gradients, since the optimizer step in backward cannot. Optimizer states in the host's memory are the
ladder's fourth rung and need a GPU: `bench/traced.py` traces them. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import described
from point import in_process
from train import BATCH, RATES, make_data, make_model

SECONDS = 120  # of one rung
MUST = 4.5  # bytes a parameter of the fullest rung
SHORT_STEPS = 4  # the loop watches its first three
LENGTHS = {"short": 30, "longer": 90}  # words of an example
GPU_ONLY = "states in the host's memory (`--offload-optimizer`): GPU only, not measured here"


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One way of full training, as options of `graft train`."""

    name: str
    options: Mapping[str, Any]

    @property
    def flags(self) -> str:
        """The options as they are written in a command."""
        words = [f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in self.options.items()]
        return " ".join(words)

    def expected(self, parameters: int, largest: int) -> float:
        """Bytes a parameter: a weight, its gradient, its two states.

        2 or 4 for a weight, the same for its gradient, 2 x 4 for its states or 2 x (1 + 4 / 256) in 8 bits. With the step
        inside the backward pass only the largest tensor's gradient counts.
        """
        weight = 2 if self.options.get("base_precision") == "bfloat16" else 4
        states = 2 * (1 + 4 / 256) if self.options.get("optimizer") == "adamw-8bit" else 8
        gradients = weight * (largest / parameters if self.options.get("optimizer_in_backward") else 1)
        return weight + gradients + states


NARROW, EIGHT_BIT = {"base_precision": "bfloat16"}, {"optimizer": "adamw-8bit"}
INSIDE = {"optimizer_in_backward": True}
RUNGS = (
    Rung(name="none: float32", options={}),
    Rung(name="bfloat16 weights, rounded stochastically", options=NARROW),
    Rung(name="8-bit states", options=EIGHT_BIT),
    Rung(name="step inside the backward pass", options=INSIDE),
    Rung(name="bfloat16 and 8-bit", options={**NARROW, **EIGHT_BIT}),
    Rung(name="all three", options={**NARROW, **EIGHT_BIT, **INSIDE}),
)


def measured(rung: Rung, folder: Path, shape: str, steps: int) -> Iterator[dict[str, Any]]:
    """Train one rung in this process; yields its figures."""
    import torch
    from safetensors import safe_open

    _train(rung, folder, "tiny", "short", SHORT_STEPS)
    short, longer = (_train(rung, folder, shape, name, SHORT_STEPS) for name in LENGTHS)
    real = _train(rung, folder, shape, "train", steps)
    with safe_open(folder / shape / "model.safetensors", "pt") as file:
        sizes = [torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys()]  # noqa: SIM118
    parameters = sum(sizes)
    yield {
        "name": rung.name, "options": dict(rung.options), "flags": rung.flags, "parameters": parameters,
        "bytes_per_parameter": without_tokens(short, longer) / parameters,
        "expected": rung.expected(parameters, max(sizes)),
        "peaks": [{"tokens": run["tokens"], "memory": run["memory"]} for run in (short, longer)],
        "peak_memory": real["memory"], "seconds_per_step": real["seconds_per_step"], "loss": real["loss"],
        "loss_before": real["loss_before"],
    }  # fmt: skip


def without_tokens(short: Mapping[str, Any], longer: Mapping[str, Any]) -> float:
    """Bytes at no tokens, on the line through two runs' peaks."""
    slope = (longer["memory"] - short["memory"]) / (longer["tokens"] - short["tokens"])
    return short["memory"] - slope * short["tokens"]


def _train(rung: Rung, folder: Path, model: str, data: str, steps: int) -> dict[str, Any]:
    """One run as `graft train` makes it; its peak above what the process had before, and its steps after the watched ones."""
    from graftlm.commands.train import train
    from graftlm.config import TrainConfig
    from graftlm.heap import release_memory
    from graftlm.training.view import View

    gc.collect()
    release_memory()  # what an earlier run has freed
    evaluation = {"eval_data": str(folder / "valid.jsonl"), "eval_every": steps} if data == "train" else {}
    with tempfile.TemporaryDirectory() as out:
        config = TrainConfig.build(
            {
                "model": str(folder / model), "data": [str(folder / f"{data}.jsonl")], "method": "full", "steps": steps,
                "batch_size": BATCH if data == "train" else 1, "learning_rate": RATES["full"], "lr_scheduler": "constant",
                "warmup_ratio": 0.0, "max_grad_norm": 0.0, "out": str(Path(out) / "run"), **rung.options, **evaluation,
            }
        )  # fmt: skip
        summary = train(config, View(quiet=True))
        lines = [json.loads(line) for line in (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()]
    times = [line["seconds"] for line in lines if line["kind"] == "train"]
    return {
        "memory": summary["peak_memory_bytes"] - summary["idle_memory_bytes"],
        "tokens": summary["num_tokens"] / steps,
        "seconds_per_step": statistics.median(times[3:] or times[-1:]),
        "loss": summary["eval_loss_after"],
        "loss_before": summary["eval_loss_before"],
    }


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The rungs as Markdown, with formula and measurement."""
    lines = [
        "| rung | options | bytes a parameter, formula | measured | peak on E2E, MB | seconds a step | eval loss |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for f in found:
        options = f"`{f['flags']}`" if f["flags"] else ""
        lines.append(
            f"| {f['name']} | {options} | {f['expected']:.2f} | {f['bytes_per_parameter']:.2f} | "
            f"{f['peak_memory'] / 1e6:,.0f} | {f['seconds_per_step']:.2f} | {f['loss']:.4f} |"
        )
    lines.append(f"| {GPU_ONLY} | | | | | | |")
    return "\n".join(lines)


def prepare(folder: Path, shape: str, steps: int) -> None:
    """The two models and the data of every run."""
    for name in ("tiny", shape):
        make_model(name, folder / name)
    make_data(folder, steps)
    for name, words in LENGTHS.items():
        row = {"prompt": "Say it.", "completion": " ".join(["and"] * words)}
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="30m", help="30m, 135m or tiny")
    parser.add_argument("--steps", type=int, default=8, help="steps of the run on E2E; those after the third are timed")
    parser.add_argument("--only", nargs="+", type=int, help="rungs by number, from 0")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.shape, options.steps)
        for i, rung in enumerate(RUNGS):
            if options.only is not None and i not in options.only:
                continue
            (one,) = list(in_process(measured, [rung, folder, options.shape, options.steps], SECONDS, "spawn"))
            found.append(one)
            if options.json:  # after each: a run that is cut off has what it measured
                result = {
                    "shape": options.shape,
                    "steps": options.steps,
                    "machine": described(),
                    "must": MUST,
                    "rungs": found,
                }
                options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            print(
                f"{rung.name}: {one['bytes_per_parameter']:.2f} bytes a parameter (formula {one['expected']:.2f}), "
                f"{one['peak_memory'] / 1e6:,.0f} MB, {one['seconds_per_step']:.2f} s a step, loss {one['loss']:.4f}",
                flush=True,
            )
    print(table(found))


if __name__ == "__main__":
    main()
