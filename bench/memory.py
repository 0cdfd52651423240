"""Memory that `graft plan` predicts, compared with measured runs: python bench/memory.py

Each run is planned first, from the model's config alone, and then trained for two steps on this machine's processor, in a
process of its own; its peak is that of its own memory above what the interpreter had before the run began. Random Llamas of
5 to 135 million values, every way of storing and training, ranks, lengths, batches, checkpointing, optimizers.

    python bench/memory.py --out bench/results       the table, the figures as JSON, and a plot
    python bench/memory.py --only qlora              some of the runs
    python bench/memory.py --out DIR --keep          runs that DIR/memory.json has are not run again, only planned again

It needs no quiet machine, for nothing is timed. Figures are written after every run: what is interrupted goes on with --keep.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftlm.config import TrainConfig
from graftlm.experiments.subprocess_run import train_in_subprocess
from graftlm.planning.activations import Workload
from graftlm.planning.hardware import processor
from graftlm.planning.memory import requirement
from graftlm.planning.method import NO_ADAPTER, TrainingSetting, adapter_shape
from graftlm.planning.models import find
from graftlm.planning.plan import DEFAULT_MICRO_BATCH_TOKENS

SHAPES: dict[str, dict[str, int]] = {
    "5m": {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
           "num_attention_heads": 4, "num_key_value_heads": 2},
    "12m": {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 5,
            "num_attention_heads": 6, "num_key_value_heads": 6},
    "30m": {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 8},
    "60m": {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12,
            "num_attention_heads": 8, "num_key_value_heads": 4},
    "135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3},
}  # fmt: skip
STEPS = 2  # the second has the optimizer's states from its beginning on
AGAIN = {"activation_checkpointing": True}
BF16, EIGHT = {"base_precision": "bfloat16"}, {"optimizer": "adamw-8bit"}
IN_BACKWARD = {"optimizer_in_backward": True, "max_grad_norm": 0}


@dataclass(frozen=True)
class Run:
    """One run: a shape, a method, examples of one length, and options of `graft train`."""

    shape: str
    method: Any
    length: int
    batch: int
    micro_batch_tokens: int
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def label(self) -> str:
        given = ", ".join(str(v) if k in ("base_precision", "optimizer") else f"{k.replace('_', ' ')} {v}" if v is not True else
                         k.replace("_", " ") for k, v in self.options.items() if k != "max_grad_norm")  # fmt: skip
        return f"{self.method}{', ' + given if given else ''}"

    @property
    def name(self) -> str:
        """What tells it from every other run."""
        return f"{self.shape} {self.label}, {self.batch} x {self.length}, {self.micro_batch_tokens} a pass"


RUNS = (
    Run("5m", "lora", 512, 4, 2048),
    Run("5m", "lora", 128, 16, 1024, {"rank": 64}),
    Run("5m", "full", 256, 8, 2048),
    Run("5m", "qlora", 1024, 4, 4096),
    Run("12m", "lora", 256, 4, 1024, {"rank": 4}),
    Run("12m", "full", 512, 4, 2048),
    Run("12m", "full", 512, 4, 2048, {**BF16, **EIGHT}),
    Run("12m", "qlora", 512, 8, 4096),
    Run("12m", "lora", 512, 4, 2048, {"targets": ["attention"]}),
    Run("30m", "lora", 128, 4, 512),
    Run("30m", "lora", 512, 4, 2048),
    Run("30m", "lora", 512, 8, 4096, {"rank": 64}),
    Run("30m", "lora", 512, 4, 2048, AGAIN),
    Run("30m", "lora", 256, 8, 1024, {"base_precision": "int8"}),
    Run("30m", "qlora", 1024, 2, 2048, {"targets": ["attention"]}),
    Run("30m", "full", 512, 4, 2048),
    Run("30m", "full", 512, 8, 1024, AGAIN),
    Run("30m", "full", 256, 4, 1024, EIGHT),
    Run("30m", "full", 256, 4, 1024, {**BF16, **EIGHT, **IN_BACKWARD}),
    Run("60m", "lora", 512, 2, 1024),
    Run("60m", "qlora", 256, 8, 2048, {"rank": 32}),
    Run("60m", "lora", 256, 8, 2048, {"targets": ["q_proj", "v_proj"]}),
    Run("60m", "qlora", 512, 4, 2048, AGAIN),
    Run("60m", "full", 256, 8, 1024, BF16),
    Run("60m", "full", 512, 2, 1024, {**EIGHT, **AGAIN}),
    Run("135m", "lora", 512, 2, 1024),
    Run("135m", "qlora", 256, 2, 512, {"rank": 8}),
    Run("135m", "lora", 512, 4, 2048, {"base_precision": "int8", **AGAIN}),
    Run("135m", "full", 256, 2, 512),
    Run("135m", "full", 256, 4, 1024, {**BF16, **EIGHT, **IN_BACKWARD, **AGAIN}),
)


def make_model(sizes: dict[str, int], folder: Path) -> None:
    """A Llama with random weights, and the bundled base's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from graftlm import demo

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo.resolve_model("demo"))
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        **sizes,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(file: Path, count: int, length: int) -> None:
    """Rows of nonsense that are longer than `length` tokens each; training cuts them there."""
    letters = random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        for i in range(count):
            words = ["".join(letters.choices("abcdefghiklmnoprstuvw", k=5)) for _ in range(length)]
            stream.write(json.dumps({"prompt": f"{i}", "completion": " ".join(words)}) + "\n")


def plan(run: Run, model: Path) -> dict[str, Any]:
    """What `graft plan` makes of a run: bytes at the peak, in parts."""
    shape = find(str(model)).shape
    default = {"full": "float32", "lora": "bfloat16", "qlora": "nf4"}[run.method]
    setting = TrainingSetting(
        key=run.method,
        label=run.method,
        method=run.method,
        precision=run.options.get("base_precision", default),
        compute_dtype="float32",
        optimizer=run.options.get("optimizer", "adamw"),
        optimizer_in_backward=run.options.get("optimizer_in_backward", False),
        activation_checkpointing=run.options.get("activation_checkpointing", False),
    )
    together = min(run.batch, max(1, run.micro_batch_tokens // run.length))
    load = Workload(
        tokens=together * run.length, target_tokens=together * (run.length - 2), longest=run.length, examples=together,
        micro_batches=-(-run.batch // together), small=run.micro_batch_tokens < DEFAULT_MICRO_BATCH_TOKENS,
    )  # fmt: skip
    adapter = NO_ADAPTER
    if run.method != "full":
        adapter = adapter_shape(shape, run.options.get("targets", ["all-linear"]), run.options.get("rank", 16))
    found = requirement(shape, setting, adapter, load, "cpu", fused=True, fused_dequant=processor().fused_dequant)
    return {"bytes": found.training, "highest_at": found.moment, "parts": found.parts.to_json()}


def measure(run: Run, model: Path, folder: Path) -> dict[str, Any]:
    """Train, in a process of its own; the peak above what the interpreter had before."""
    rows = folder / "rows.jsonl"
    write_rows(rows, 2 * run.batch, run.length)
    config = TrainConfig.build({
        "model": str(model), "data": [str(rows)], "method": run.method, "batch_size": run.batch, "steps": STEPS,
        "max_length": run.length, "overlong": "truncate", "micro_batch_tokens": run.micro_batch_tokens, "device": "cpu",
        "compute_dtype": "float32", "out": str(folder / "run"), **run.options,
    })  # fmt: skip
    summary = train_in_subprocess(config, lambda event: None)
    plan = json.loads((folder / "run" / "plan.json").read_text(encoding="utf-8"))
    return {
        "bytes": summary["peak_memory_bytes"] - summary["idle_memory_bytes"],
        "dry_run_bytes": plan["dry_run_bytes"],
    }


def line(figures: dict[str, Any]) -> str:
    """One run as a row of the table."""
    return (
        f"| {figures['shape']} | {figures['what']} | {figures['length']} | {figures['batch']} | {figures['tokens']} | "
        f"{figures['planned'] / 1e6:,.0f} | {figures['measured'] / 1e6:,.0f} | {figures['error']:+.1%} |"
    )


HEAD = """\
| shape | training | length | batch | micro-batch tokens | planned MB | measured MB | error |
|---|---|---:|---:|---:|---:|---:|---:|
"""


def plot(found: list[dict[str, Any]], file: Path) -> None:
    """Planned against measured, and the errors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, NullLocator

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), width_ratios=(1.1, 1))
    colours = {"full": "#1f77b4", "lora": "#d95f02", "qlora": "#1b9e77"}
    most = 1.1 * max(max(f["planned"], f["measured"]) for f in found) / 1e6
    least = 0.8 * min(min(f["planned"], f["measured"]) for f in found) / 1e6
    left.plot([least, most], [least, most], color="0.4", linewidth=1)
    left.fill_between(
        [least, most], [0.9 * least, 0.9 * most], [1.1 * least, 1.1 * most], color="0.92", label="within 10 %"
    )
    for method, colour in colours.items():
        own = [f for f in found if f["method"] == method]
        left.scatter(
            [f["measured"] / 1e6 for f in own], [f["planned"] / 1e6 for f in own], color=colour, label=method, s=26
        )
    left.set(
        xscale="log", yscale="log", xlim=(least, most), ylim=(least, most), xlabel="measured MB", ylabel="planned MB"
    )
    shown = [mb for mb in (50, 100, 200, 500, 1000, 2000, 5000) if least < mb < most]
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_locator(FixedLocator(shown))
        axis.set_major_formatter(lambda mb, place: f"{mb:,.0f}")
        axis.set_minor_locator(NullLocator())
    left.set_title("Peak memory of a training run", fontsize=11)
    left.legend(frameon=False, fontsize=9)
    ordered = sorted(found, key=lambda f: f["error"])
    right.barh(range(len(ordered)), [100 * f["error"] for f in ordered], color=[colours[f["method"]] for f in ordered])
    right.set_yticks(range(len(ordered)), [_short(f) for f in ordered], fontsize=6.5)
    right.axvline(0, color="0.3", linewidth=0.8)
    for bar in (-10, 10):
        right.axvline(bar, color="0.6", linewidth=0.8, linestyle="--")
    edge = max(15.0, *(105 * abs(f["error"]) for f in found))
    right.set(xlim=(-edge, edge), xlabel="planned above measured, %")
    right.set_title("Signed error of each run", fontsize=11)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def _short(figures: dict[str, Any]) -> str:
    what = (
        figures["what"].replace("activation checkpointing", "run again").replace("optimizer in backward", "in backward")
    )
    return f"{figures['shape']} {what}, {figures['batch']} x {figures['length']}"


def measured_before(folder: Path | None) -> dict[str, dict[str, Any]]:
    """What the runs in a folder's memory.json took, by their names."""
    file = None if folder is None else folder / "memory.json"
    if file is None or not file.is_file():
        return {}
    return {f["name"]: f for f in json.loads(file.read_text(encoding="utf-8"))["results"]}


def figures_of(run: Run, place: Path, before: dict[str, Any] | None) -> dict[str, Any]:
    """One run, planned and measured; where it was measured `before`, planned alone."""
    model = place / run.shape
    if not model.is_dir():
        make_model(SHAPES[run.shape], model)
    planned = plan(run, model)
    if before is None:
        folder = place / re.sub(r"[^a-z0-9]+", "-", run.name)
        folder.mkdir()
        found = measure(run, model, folder)
    else:
        found = {"bytes": before["measured"], "dry_run_bytes": before["dry_run_bytes"]}
    return {
        "name": run.name, "shape": run.shape, "method": run.method, "what": run.label, "length": run.length,
        "batch": run.batch, "tokens": min(run.micro_batch_tokens, run.length * run.batch), "planned": planned["bytes"],
        "measured": found["bytes"], "error": planned["bytes"] / found["bytes"] - 1, "highest_at": planned["highest_at"],
        "parts": planned["parts"], "dry_run_bytes": found["dry_run_bytes"],
    }  # fmt: skip


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The errors of all runs together."""
    errors = [f["error"] for f in found]
    return {
        "runs": len(errors),
        "within_a_tenth": sum(abs(e) <= 0.10 for e in errors),
        "median_absolute_error": statistics.median(map(abs, errors)),
        "largest_absolute_error": max(map(abs, errors)),
        "mean_signed_error": statistics.mean(errors),
    }


def in_words(said: dict[str, Any]) -> str:
    return (
        f"{said['runs']} runs, {said['within_a_tenth']} of them within 10 %; absolute error "
        f"{said['median_absolute_error']:.1%} in the median, {said['largest_absolute_error']:.1%} at most; signed "
        f"{said['mean_signed_error']:+.1%} in the mean"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for memory.json, memory.md and memory.png")
    parser.add_argument("--only", default="", help="runs whose name holds this text")
    parser.add_argument("--keep", action="store_true", help="take what --out has measured already")
    options = parser.parse_args()
    before = measured_before(options.out) if options.keep else {}
    chosen = [run for run in RUNS if options.only in run.name or run.name in before]
    found: list[dict[str, Any]] = []
    sys.stdout.write(HEAD)
    with tempfile.TemporaryDirectory() as place:
        for run in chosen:
            found.append(figures_of(run, Path(place), before.get(run.name)))
            sys.stdout.write(line(found[-1]) + "\n")
            sys.stdout.flush()
            if options.out is not None:
                write(found, options.out)
    sys.stdout.write(f"\n{in_words(summary(found))}\n")
    if options.out is not None:
        write(found, options.out)
        plot(found, options.out / "memory.png")


def write(found: list[dict[str, Any]], folder: Path) -> None:
    """The figures as JSON, and as a table."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}"
    totals = summary(found)
    (folder / "memory.json").write_text(json.dumps({"machine": machine, **totals, "results": found}, indent=1) + "\n")
    table = "".join(f"{line(f)}\n" for f in found)
    (folder / "memory.md").write_text(
        f"# Memory, planned and measured\n\n    python bench/memory.py\n\n{HEAD}{table}\n{in_words(totals)}.\n"
    )


if __name__ == "__main__":
    main()
