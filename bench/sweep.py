"""Many trials on one base at once vs the same trials one after another, with Graft and with TRL + PEFT, in one run.

    python bench/sweep.py                          # 8 trials on the 30M Llama and E2E, LoRA; then 1 to 32 trials
    python bench/sweep.py --methods lora qlora --json bench/results/sweep.json

Eight trials of ranks 4 to 32 with batches of 8 examples of their own. Sides take turns as in `train.py`; a turn is one
optimizer step of all eight trials, whichever way it is made:

    together          micro-batches of all eight together, as in `graft sweep`
    together narrow   the same with micro-batches no larger than one trial's own batch
    apart             the same eight on the same base, one after another: what eight runs of `graft train` do in their steps
    trl               SFTTrainer and PEFT, a process for each rank; a step of each of the eight trials is added up

Time is that of steps, and of whole runs of STEPS steps including the time of each process to its first step:
once together, eight times apart and with TRL. Memory is the peak of a process of its own above what it held before
the base was loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import train as pairs

RANKS = (4, 4, 8, 8, 16, 16, 32, 32)
BATCH = 8
GROWTH = (1, 2, 4, 8, 16, 32)
STEPS = 50  # of a whole run
WIDE = 4096
"""Tokens in a micro-batch of all trials together, the default of `graft sweep`."""


class Turns(pairs.Turns):
    """Turns that know how long the process took to its first step."""

    start: float | None = None

    def next(self) -> None:
        if self.start is None:
            self.start = _age()
        super().next()


def _age() -> float:
    """Seconds since this process was begun, as Linux counts them."""
    begun = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - begun


def graft_side(work: dict[str, Any], turns: Turns) -> dict[str, Any]:
    import torch

    from graftlm.base.chat import Encoder
    from graftlm.base.loading import load_base
    from graftlm.config import TrainConfig
    from graftlm.data.sources import named_source
    from graftlm.heap import mmap_allocations
    from graftlm.planning.peak_memory import PeakMemory
    from graftlm.training.micro_batch import example_losses
    from graftlm.training.run import make_adapter, make_trial, read_data
    from graftlm.training.trainer import optimizer_step

    method = work["method"]
    with PeakMemory(torch.device("cpu")) as memory:
        base = load_base(work["model"], precision="nf4" if method == "qlora" else "float32", device="cpu")
        trials: list[Any] = []
        material: Any = None
        for slot, rank in enumerate(work["ranks"], 1):
            config = TrainConfig(
                model=work["model"], data=(work["train"],), eval_data=work["valid"], method=method, rank=rank, seed=slot,
                base_precision="nf4" if method == "qlora" else "float32", steps=work["steps"], batch_size=BATCH,
                learning_rate=pairs.RATES[method], lr_scheduler="constant", warmup_ratio=0.0, out=Path("unused"),
            )  # fmt: skip
            if material is None:
                encoder = Encoder(base.tokenizer)
                material = read_data(config, [named_source(work["train"], "train")], encoder, base)
            trials.append(make_trial(base, config, make_adapter(base, config, slot), slot, *material))
        width = WIDE if work["side"] != "narrow" else max(longest_batch(trial) for trial in trials)
        values = [sum(p.numel() for p in trial.parameters.values()) for trial in trials]
        with mmap_allocations(
            width < WIDE and len(trials) > 1
        ):  # several small micro-batches, as in `graft train` and `graft sweep`
            turns.next()
            for step in range(work["steps"]):
                if work["side"] == "apart":
                    for trial in trials:
                        optimizer_step(base, [trial], WIDE)
                else:
                    optimizer_step(base, trials, width)
                turns.end() if step + 1 == work["steps"] else turns.next()
    losses = [sum(r.loss for r in rows) / sum(r.target_tokens for r in rows)
              for rows in (example_losses(base, t.eval_examples, t.slot, WIDE) for t in trials if work["judged"])]  # fmt: skip
    return {
        "seconds": turns.counted, "steps": turns.seconds, "start": turns.start,
        "peak_memory": memory.bytes - memory.start, "micro_batch_tokens": width,
        "trained": values, "losses": losses,
    }  # fmt: skip


def longest_batch(trial: Any) -> int:
    """Tokens of a trial's longest batch."""
    steps = (trial.sampler.step(step) for step in range(trial.sampler.steps))
    return max(sum(trial.examples[i].tokens for _, i in step) for step in steps)


def trl_side(work: dict[str, Any], turns: Turns) -> dict[str, Any]:
    found = pairs.peer_side({**work, "learning_rate": pairs.RATES[work["method"]]}, turns)
    return {
        "seconds": turns.counted,
        "steps": turns.seconds,
        "start": turns.start,
        "peak_memory": found["peak_memory"],
        "loss": found["loss"],
    }


SIDES = {"together": graft_side, "narrow": graft_side, "apart": graft_side, "trl": trl_side}


def compare(common: dict[str, Any], method: str) -> dict[str, Any]:
    """All sides of one method."""
    work = {**common, "method": method, "ranks": RANKS, "judged": True}
    works = {"together": work, "narrow": {**work, "judged": False}, "apart": work}
    works.update({f"trl {rank}": {**work, "rank": rank} for rank in sorted(set(RANKS))})
    found = pairs.in_turns(works, __file__)
    one = pairs.in_turns({"narrow": {**work, "ranks": [max(RANKS)], "judged": False}}, __file__)["narrow"]
    peers = {rank: found.pop(f"trl {rank}") for rank in sorted(set(RANKS))}
    trl = [peers[rank] for rank in RANKS]
    found["trl"] = {
        "seconds": sum(side["seconds"] for side in trl), "start": sum(side["start"] for side in trl),
        "peak_memory": max(side["peak_memory"] for side in trl),
        "losses": [side["loss"] for side in trl],
    }  # fmt: skip
    values = found["narrow"]["trained"]
    states = sum(sorted(values)[: len(values) - 1]) * (4 + 8)  # A and B in float32, two moments
    found["apart"]["start"] = one["start"] * len(RANKS)
    together, narrow = found["together"], found["narrow"]

    def whole(side: str) -> float:
        return found[side]["start"] + STEPS * found[side]["seconds"]

    return {
        "sides": found,
        "one_trial_peak_memory": one["peak_memory"],
        "whole_vs_apart": whole("together") / whole("apart"),
        "whole_vs_trl": whole("together") / whole("trl"),
        "time_vs_apart": together["seconds"] / found["apart"]["seconds"],
        "time_vs_trl": together["seconds"] / found["trl"]["seconds"],
        "narrow_time_vs_apart": narrow["seconds"] / found["apart"]["seconds"],
        "narrow_time_vs_trl": narrow["seconds"] / found["trl"]["seconds"],
        "narrow_memory": narrow["peak_memory"],
        "memory_bound": 1.15 * (one["peak_memory"] + states),
        "together_memory": together["peak_memory"],
    }


def grow(common: dict[str, Any], method: str, counts: Sequence[int]) -> list[dict[str, Any]]:
    """One step of 1, 2, 4, ... trials of rank 16 together: seconds a trial's step, and peak memory."""
    common = {**common, "steps": 4, "warm_up": 1, "judged": False}
    works = {f"together {n}": {**common, "method": method, "ranks": [16] * n} for n in counts}
    found = pairs.in_turns(works, __file__)
    return [
        {
            "trials": n, "seconds": found[f"together {n}"]["seconds"],
            "seconds_per_trial": found[f"together {n}"]["seconds"] / n, "peak_memory": found[f"together {n}"]["peak_memory"],
        }
        for n in counts
    ]  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rows = ["| | must | goal | " + " | ".join(results) + " |", "|---|---|---|" + "---:|" * len(results)]

    def row(label: str, must: str, goal: str, write: Any) -> None:
        rows.append(f"| {label} | {must} | {goal} | " + " | ".join(write(r["eight"]) for r in results.values()) + " |")

    row(
        "time, micro-batches of all eight together, vs one after another",
        "0.9x",
        "0.75x",
        lambda r: f"{r['time_vs_apart']:.2f}x",
    )
    row("the same vs TRL + PEFT", "0.35x", "0.2x", lambda r: f"{r['time_vs_trl']:.2f}x")
    row(
        f"whole runs of {STEPS} steps, their starts included, vs one after another",
        "",
        "",
        lambda r: f"{r['whole_vs_apart']:.2f}x",
    )
    row("the same vs TRL + PEFT", "", "", lambda r: f"{r['whole_vs_trl']:.2f}x")
    row(
        "time, one trial's tokens in a micro-batch, vs one after another",
        "",
        "",
        lambda r: f"{r['narrow_time_vs_apart']:.2f}x",
    )
    row("the same vs TRL + PEFT", "", "", lambda r: f"{r['narrow_time_vs_trl']:.2f}x")
    row(
        "peak memory, one trial's tokens in a micro-batch, of the bound", "100 %", "",
        lambda r: f"{r['narrow_memory'] / r['memory_bound']:.0%} (of {r['memory_bound'] / 1e6:.0f} MB)",
    )  # fmt: skip
    row("peak memory, micro-batches of all eight together", "", "", lambda r: f"{r['together_memory'] / 1e6:.0f} MB")
    row("peak memory of one TRL run", "", "", lambda r: f"{r['sides']['trl']['peak_memory'] / 1e6:.0f} MB")
    row(
        "mean eval loss, together / apart / TRL", "", "",
        lambda r: " / ".join(f"{statistics.fmean(r['sides'][s]['losses']):.4f}" for s in ("together", "apart", "trl")),
    )  # fmt: skip
    for method, found in results.items():
        if found.get("growth"):
            rows += ["", f"Trials at once, {method}, rank 16:", "", "| trials | seconds a step | of each trial | peak memory |",
                     "|---:|---:|---:|---:|"]  # fmt: skip
            rows += [
                f"| {g['trials']} | {g['seconds']:.2f} | {g['seconds_per_trial']:.3f} | {g['peak_memory'] / 1e6:.0f} MB |"
                for g in found["growth"]
            ]
    return "\n".join(rows)


def plot(results: dict[str, Any], path: Path) -> None:
    """A trial's share of a step, and memory, by the number of trials."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for method, found in results.items():
        growth = found.get("growth")
        if not growth:
            continue
        counts = [g["trials"] for g in growth]
        left.plot(counts, [g["seconds_per_trial"] for g in growth], "o-", label=method)
        right.plot(counts, [g["peak_memory"] / 1e6 for g in growth], "o-", label=method)
    for axis, label in ((left, "seconds of a step, per trial"), (right, "peak memory, MB")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(GROWTH, [str(n) for n in GROWTH])
        axis.set_xlabel("trials at once")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=pairs.SHAPES, default="30m")
    parser.add_argument("--methods", nargs="+", choices=("lora", "qlora"), default=["lora"])
    parser.add_argument("--steps", type=int, default=7, help="steps of each side")
    parser.add_argument("--warm-up", type=int, default=2, help="first steps that do not count")
    parser.add_argument(
        "--growth", nargs="*", choices=("lora", "qlora"), default=["lora"], help="methods shown growing"
    )
    parser.add_argument("--most", type=int, default=32, help="most trials at once when growing")
    parser.add_argument("--json", type=Path, help="write the figures here, a table (.md) and a plot (.png) beside them")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        work = json.loads(options.one)
        print(json.dumps(SIDES[work["side"]](work, Turns(work["pipes"], work["warm_up"]))))
        return
    if not pairs.SHARED.is_dir():
        raise SystemExit(f"the E2E set is not there: {pairs.SHARED}")
    import machine

    subject = replace(pairs.SUBJECTS[options.shape], batch=BATCH)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / options.shape
        pairs.make_model(options.shape, model)
        common: dict[str, Any] = {
            "model": str(model), "steps": options.steps, "warm_up": options.warm_up, "batch": BATCH, "packing": False,
            **pairs.make_data(Path(folder), options.steps, subject),
        }  # fmt: skip
        common.update(pairs.batches(common))
        for method in options.methods:
            results[method] = {"eight": compare(common, method)}
            if options.json:  # a run that is cut off in what follows has kept this
                options.json.write_text(json.dumps({"shape": options.shape, "results": results}, indent=2) + "\n")
            counts = [n for n in GROWTH if n <= options.most]
            results[method]["growth"] = grow(common, method, counts) if method in options.growth else []
            print(table({method: results[method]}), file=sys.stderr, flush=True)
    print(table(results))
    if options.json:
        found = {"shape": options.shape, "machine": machine.described(), "results": results}
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        name = (
            f"{found['machine']['processor']}, {found['machine']['threads']} threads, {found['machine']['date'][:10]}"
        )
        command = f"python bench/sweep.py --methods {' '.join(options.methods)}"
        what = f"8 trials of ranks {min(RANKS)} to {max(RANKS)}, batches of {BATCH}"
        head = f"# Trials on one base at once\n\n`{command}` on {name}; {options.shape} Llama, E2E, {what}.\n\n"
        options.json.with_suffix(".md").write_text(head + table(results) + "\n", encoding="utf-8")
        plot(results, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
