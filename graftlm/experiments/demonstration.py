"""`graft demo`: full, LoRA and QLoRA trained for real on the bundled base and data, and one table of what was measured.

Each method runs in its own process on the same rows in the same order, with a learning rate that suits it. Nothing in the
table is a constant: parameters, bytes, peak memory, losses and speed are the three runs' own.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from graftlm import demo
from graftlm.config import Method, TrainConfig
from graftlm.errors import RunError
from graftlm.experiments.process import run_apart
from graftlm.files import write_json
from graftlm.training.runfolder import LOCK, locked
from graftlm.training.view import size

DATA = "demo"
BATCH = 16
RANK = 16
# Found on this base and data by trying a few of each: the adapters want more than full training, as everywhere.
LEARNING_RATES: dict[Method, float] = {"full": 1e-3, "lora": 1e-2, "qlora": 1e-2}
SAMPLES = 3
MARK = "demo.json"
"""The file that makes a folder a demonstration's own; without it nothing in a folder is removed."""


@dataclass(frozen=True)
class Sample:
    """One held-out prompt, what the base writes and what the tuned model writes."""

    prompt: str
    base: str
    tuned: str
    expected: str


def demonstrate(steps: int, out: Path, console: Console) -> dict[str, Any]:
    """Train the three, draw the table and the samples on `console`, and return all of it as plain values.

    Raises RunError when `out` holds something that is not an earlier demonstration, or one that is running.
    """
    with locked(out):
        _clear(out)
        return _demonstrate(steps, out, console)


def _demonstrate(steps: int, out: Path, console: Console) -> dict[str, Any]:
    started = time.perf_counter()
    console.print(
        f"Training the bundled base on {_rows(DATA)} product descriptions in a playful voice, three ways, {steps} steps each.\n"
    )
    results: dict[str, dict[str, Any]] = {}
    columns = (
        TextColumn("{task.description:<6}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        tasks = {method: bar.add_task(method, total=steps, loss="", start=False) for method in LEARNING_RATES}
        for method, rate in LEARNING_RATES.items():
            config = demo_config(method, rate, steps, out / method)
            bar.start_task(tasks[method])

            def advance(event: dict[str, Any], task: Any = tasks[method]) -> None:
                if event["event"] == "step":
                    bar.update(task, completed=event["step"], loss=f"loss {event['loss']:.3f}")

            results[method] = run_apart(config, advance)
            bar.stop_task(tasks[method])
    _add_shares(results)
    console.print()
    console.print(table(results))
    samples = make_samples(out / "lora" / "adapter")
    for sample in samples:
        console.print(sample_panel(sample))
    seconds = time.perf_counter() - started
    console.print(
        f"Done in {seconds:.0f} s. The runs are in {out}. Try the QLoRA one on a product of your own:\n\n"
        f"  graft generate --model demo --adapter {out}/qlora/adapter --prompt "
        "$'Describe this product.\\nname: Copper Wren\\nkind: kettle\\ncolour: red\\nprice: $30\\nDescription:'\n\n"
        "and your own model and data:\n\n"
        "  graft check train.jsonl --model Qwen/Qwen3-0.6B\n"
        "  graft train --model Qwen/Qwen3-0.6B --data train.jsonl --method qlora --out runs/first\n",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    return {"results": results, "samples": [sample.__dict__ for sample in samples], "seconds": seconds}


def demo_config(method: Method, rate: float, steps: int, out: Path) -> TrainConfig:
    """One of the three trainings."""
    adapter: dict[str, Any] = {} if method == "full" else {"rank": RANK}
    return TrainConfig(
        model="demo", data=(DATA,), eval_data=DATA, method=method, learning_rate=rate, steps=steps, batch_size=BATCH,
        out=out, **adapter,
    )  # fmt: skip


def _clear(out: Path) -> None:
    """Remove an earlier demonstration, and only that: a folder that this function itself marked."""
    held = sorted(p.name for p in out.iterdir() if p.name != LOCK)
    others = [name for name in held if name not in (*LEARNING_RATES, MARK)]
    if others or (held and MARK not in held):
        name = (others or held)[0]
        raise RunError(f"--out {out} holds '{name}', which no demonstration wrote; take another folder")
    for method in LEARNING_RATES:
        if (out / method).exists():
            with locked(out / method):  # somebody may go on with this one run
                shutil.rmtree(out / method)
    write_json(out / MARK, {"written_by": "graft demo", "runs": list(LEARNING_RATES)})


def _rows(name: str) -> int:
    with Path(demo.resolve_data(name)).open(encoding="utf-8") as stream:
        return sum(1 for _ in stream)


def _add_shares(results: dict[str, dict[str, Any]]) -> None:
    """Each method's gain in held-out loss as a share of full fine-tuning's: (base - method) / (base - full)."""
    full = results["full"]
    gain = full["eval_loss_before"] - full["eval_loss_after"]
    for result in results.values():
        # Its own start: a base in 4 bits begins a little worse, and that is part of its price.
        result["share_of_full"] = (full["eval_loss_before"] - result["eval_loss_after"]) / gain if gain > 0 else None


def table(results: dict[str, dict[str, Any]]) -> Table:
    """Methods as columns, what was measured as rows."""
    drawn = Table(title="full, LoRA, QLoRA, as measured on this machine", title_justify="left")
    drawn.add_column("")
    for method in results:
        drawn.add_column({"full": "full", "lora": "LoRA", "qlora": "QLoRA"}[method], justify="right")

    def row(name: str, write: Any) -> None:
        drawn.add_row(name, *(write(result) for result in results.values()))

    row("what is trained", lambda r: "every weight" if r["method"] == "full" else f"A, B of rank {RANK}")
    row("trained parameters", lambda r: f"{r['trained_parameters']:,}")
    row("share of the base", lambda r: f"{r['trained_parameters'] / r['base_parameters']:.1%}")
    row("base stored as", lambda r: r["base_precision"])
    row("base in memory", lambda r: size(r["base_bytes"]))
    row("peak memory", lambda r: size(r["peak_memory_bytes"]))
    row("  above the idle process", lambda r: size(r["peak_memory_bytes"] - r["idle_memory_bytes"]))
    row("saved file", lambda r: size(r["saved_bytes"]))
    row("held-out loss before", lambda r: f"{r['eval_loss_before']:.3f}")
    row("held-out loss after", lambda r: f"{r['eval_loss_after']:.3f}")
    row("share of full's gain", lambda r: "-" if r["share_of_full"] is None else f"{r['share_of_full']:.1%}")
    row("learning rate", lambda r: f"{LEARNING_RATES[r['method']]:g}")
    row("tokens/s", lambda r: f"{r['tokens_per_second']:,.0f}")
    return drawn


def make_samples(adapter: Path) -> list[Sample]:
    """Held-out prompts, answered by the base and by the adapter on it, from one copy of the base."""
    import torch

    from graftlm.adapters import format as adapter_format
    from graftlm.adapters.attach import attach
    from graftlm.base.chat import Encoder
    from graftlm.base.load import load_base
    from graftlm.serving.generate import complete

    manifest = adapter_format.read_manifest(adapter) or {}
    base = load_base("demo", precision=manifest["base"]["precision"])
    attach(base, adapter_format.load(base, adapter), slot=1)
    encoder = Encoder(base.tokenizer)
    rows = [
        json.loads(line) for line in Path(demo.resolve_data(DATA, "valid")).read_text(encoding="utf-8").splitlines()
    ]
    samples: list[Sample] = []
    for row in rows[:: max(1, len(rows) // SAMPLES)][:SAMPLES]:
        ids = encoder.prompt_text(row["prompt"])
        answers = [
            complete(base, encoder, ids, slot=slot, max_tokens=90, generator=torch.Generator()).text for slot in (0, 1)
        ]
        samples.append(Sample(row["prompt"], answers[0].strip(), answers[1].strip(), row["completion"].strip()))
    return samples


def sample_panel(sample: Sample) -> Panel:
    """A prompt with both answers side by side."""
    facts = Text(sample.prompt.strip(), style="dim")
    answers = Table.grid(expand=True)
    answers.add_column(ratio=1)
    answers.add_column(ratio=1)
    answers.add_row(Panel(Text(sample.base), title="base"), Panel(Text(sample.tuned), title="LoRA"))
    return Panel(Group(facts, answers), title="held-out product", title_align="left")
