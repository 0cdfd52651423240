"""Memory that `graft plan` predicts, compared with measured runs: python bench/memory.py

Each run is planned from the model's config alone, and trained for two steps on this machine's processor, in a process of its
own; its peak is that of its own memory above what the interpreter had before the run began. The bases are real,
SmolLM2-135M-Instruct and Gemma 3 270M in every precision and by every method (`real_bases.py` has where they are from), and
random Llamas of 5 to 60 million values, which vary the shapes. `memory_runs.py` lists the runs.

    python bench/memory.py --out bench/results       the table, the figures as JSON, and a plot
    python bench/memory.py --only gemma              some of the runs
    python bench/memory.py --out DIR --keep          runs that DIR/memory.json has are not run again, only planned again
    python bench/memory.py --out DIR --page          writes docs/planning.md's section too

It needs no quiet machine, for nothing is timed, and 7 GB. Figures are written after every run: what is interrupted goes on
with --keep. A base that is not installed, or rows that are not there, are left out and named.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import real_bases
from memory_plot import plot
from memory_runs import ROWS, RUNS, SHAPES, Run, make_model, write_rows

from graftlm.config import TrainConfig
from graftlm.experiments.subprocess_run import train_in_subprocess
from graftlm.planning.activations import Workload
from graftlm.planning.answers import AnswerLoad
from graftlm.planning.hardware import processor
from graftlm.planning.memory import requirement
from graftlm.planning.method import NO_ADAPTER, TrainingSetting, adapter_shape
from graftlm.planning.models import find
from graftlm.planning.plan import DEFAULT_MICRO_BATCH_TOKENS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "planning.md"
BEGIN, END = "<!-- accuracy: written by `python bench/memory.py --out bench/results --page` -->", "<!-- /accuracy -->"
STEPS = 2  # the second has the optimizer's states from its beginning on


def plan(run: Run, model: str, load: dict[str, int], answers: dict[str, int] | None) -> dict[str, Any]:
    """What the planner makes of a run over its heaviest micro-batch, and its scored answers: bytes at the peak, in parts."""
    shape = find(model).shape
    setting = TrainingSetting(
        key=run.method,
        label=run.method,
        method=run.method,
        precision=run.precision,  # pyright: ignore[reportArgumentType]
        compute_dtype="float32",
        optimizer=run.options.get("optimizer", "adamw"),
        optimizer_in_backward=run.options.get("optimizer_in_backward", False),
        activation_checkpointing=run.options.get("activation_checkpointing", False),
        dora=run.options.get("dora", False),
        dropout="lora_dropout" in run.options,
    )
    workload = Workload(
        tokens=load["tokens"], target_tokens=load["target_tokens"], longest=load["longest_example"],
        examples=load["examples"], micro_batches=load["micro_batches_in_its_step"],
        small=run.micro_batch_tokens < DEFAULT_MICRO_BATCH_TOKENS,
    )  # fmt: skip
    adapter = NO_ADAPTER
    if run.method != "full":
        targets, rank = run.options.get("targets", ["all-linear"]), run.options.get("rank", 16)
        adapter = adapter_shape(shape, targets, rank, dora=setting.dora)
    found = requirement(
        shape, setting, adapter, workload, "cpu", fused=True, fused_dequant=processor().fused_dequant,
        answers=AnswerLoad(**answers) if answers else None,
    )  # fmt: skip
    at = "loading" if found.loading > found.training else found.moment
    return {"bytes": found.peak, "highest_at": at, "parts": found.parts.to_json(), "loading": found.loading}


def measure(run: Run, model: str, folder: Path) -> dict[str, Any]:
    """Train, in a process of its own; the peak above what the interpreter had before, and the heaviest micro-batch."""
    rows = folder / "rows.jsonl"
    write_rows(run, rows)
    given = {**run.options, **({"eval_data": str(rows)} if "eval_data" in run.options else {})}
    config = TrainConfig.build({
        "model": model, "data": [str(rows)], "method": run.method, "batch_size": run.batch, "steps": STEPS,
        "max_length": run.length, "overlong": "truncate", "micro_batch_tokens": run.micro_batch_tokens, "device": "cpu",
        "out": str(folder / "run"), **given,
    })  # fmt: skip
    summary = train_in_subprocess(config, lambda event: None)
    plan = json.loads((folder / "run" / "plan.json").read_text(encoding="utf-8"))
    return {
        "bytes": summary["peak_memory_bytes"] - summary["idle_memory_bytes"],
        "dry_run_bytes": plan["dry_run_bytes"],
        "load": plan["heaviest_micro_batch"],
        "answers": plan.get("answers"),
    }


def line(figures: dict[str, Any]) -> str:
    """One run as a row of the table."""
    return (
        f"| {figures['base']} | {figures['what']} | {figures['length']} | {figures['batch']} | {figures['load']['tokens']} | "
        f"{figures['planned'] / 1e6:,.0f} | {figures['measured'] / 1e6:,.0f} | {figures['error']:+.1%} |"
    )


HEAD = """\
| base | training | length | batch | micro-batch tokens | planned MB | measured MB | error |
|---|---|---:|---:|---:|---:|---:|---:|
"""


def measured_before(folder: Path | None) -> dict[str, dict[str, Any]]:
    """What the runs in a folder's memory.json took, by their names."""
    file = None if folder is None else folder / "memory.json"
    if file is None or not file.is_file():
        return {}
    return {f["name"]: f for f in json.loads(file.read_text(encoding="utf-8"))["results"]}


def model_of(run: Run, place: Path) -> str | None:
    """The name of a run's base; None for a real one that is not here, or without the rows it would learn."""
    if run.real:
        file = real_bases.find(run.base, place)
        return None if file is None or not ROWS.is_file() else str(file)
    if not (place / run.base).is_dir():
        make_model(SHAPES[run.base], place / run.base)
    return str(place / run.base)


def figures_of(run: Run, model: str, place: Path, before: dict[str, Any] | None) -> dict[str, Any]:
    """One run, measured and planned; where it was measured `before`, planned alone."""
    if before is None:
        folder = place / re.sub(r"[^a-z0-9]+", "-", run.name)
        folder.mkdir()
        found = measure(run, model, folder)
    else:
        found = {"bytes": before["measured"], "dry_run_bytes": before["dry_run_bytes"], "load": before["load"],
                 "answers": before.get("answers")}  # fmt: skip
    planned = plan(run, model, found["load"], found["answers"])
    return {
        "name": run.name, "base": run.base, "method": run.method, "what": run.label, "length": run.length,
        "batch": run.batch, "load": found["load"], "answers": found["answers"], "planned": planned["bytes"],
        "measured": found["bytes"], "error": planned["bytes"] / found["bytes"] - 1, "highest_at": planned["highest_at"],
        "parts": planned["parts"], "loading": planned["loading"], "dry_run_bytes": found["dry_run_bytes"],
    }  # fmt: skip


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The errors of runs together."""
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


def kinds(found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs on each real base, those on random Llamas, and all."""
    bases = {"SmolLM2-135M-Instruct": ("smollm2",), "Gemma 3 270M": ("gemma",), "random Llamas": tuple(SHAPES)}
    parts = {kind: [f for f in found if f["base"] in names] for kind, names in bases.items()}
    return {**{kind: own for kind, own in parts.items() if own}, "all": found}


def of_each_kind(found: list[dict[str, Any]]) -> str:
    """The errors of each kind of runs, a line each."""
    return "\n".join(f"{kind[0].upper()}{kind[1:]}: {in_words(summary(own))}." for kind, own in kinds(found).items())


def with_figures(page: str, found: list[dict[str, Any]]) -> str:
    """A page with the table of errors between its marks. Raises ValueError if they are missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks the marks {BEGIN} and {END}")
    rows = [
        "| base | runs | within 10 % | absolute error, median | largest | signed, mean |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for kind, own in kinds(found).items():
        said = summary(own)
        rows.append(
            f"| {kind} | {said['runs']} | {said['within_a_tenth']} | {said['median_absolute_error']:.1%} | "
            f"{said['largest_absolute_error']:.1%} | {said['mean_signed_error']:+.1%} |"
        )
    return "\n".join([f"{before}{begin}", *rows, f"{end}{after}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for memory.json, memory.md and memory.png")
    parser.add_argument("--only", default="", help="runs whose name holds this text")
    parser.add_argument("--keep", action="store_true", help="take what --out has measured already")
    parser.add_argument("--page", action="store_true", help="write the section of docs/planning.md too")
    options = parser.parse_args()
    before = measured_before(options.out) if options.keep else {}
    chosen = [run for run in RUNS if options.only in run.name or run.name in before]
    found: list[dict[str, Any]] = []
    missing: set[str] = set()
    sys.stdout.write(HEAD)
    with tempfile.TemporaryDirectory() as place:
        for run in chosen:
            model = model_of(run, Path(place))
            if model is None:
                missing.add(run.base)
                continue
            found.append(figures_of(run, model, Path(place), before.get(run.name)))
            sys.stdout.write(line(found[-1]) + "\n")
            sys.stdout.flush()
            if options.out is not None:
                write(found, options.out)
    for base in sorted(missing):
        sys.stdout.write(f"\n{base} was left out: it needs the package {real_bases.PACKAGES[base]} and {ROWS}\n")
    if not found:
        return
    sys.stdout.write(f"\n{of_each_kind(found)}\n")
    if options.out is not None:
        plot(found, options.out / "memory.png")
    if options.page:
        PAGE.write_text(with_figures(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")


def write(found: list[dict[str, Any]], folder: Path) -> None:
    """The figures as JSON, and as a table."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}"
    totals = {"machine": machine, **summary(found), "results": found}
    (folder / "memory.json").write_text(json.dumps(totals, indent=1) + "\n", encoding="utf-8")
    table = "".join(f"{line(f)}\n" for f in found)
    words = of_each_kind(found).replace("\n", "\n\n")
    (folder / "memory.md").write_text(
        f"# Memory, planned and measured\n\n    python bench/memory.py\n\n{HEAD}{table}\n{words}\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
