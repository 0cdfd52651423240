"""Training on a GPU: memory, speed and the share of the machine's matrix rate, for Llama 2 of 7, 13 and 70 billion values.

    PYTHONPATH=. python3 bench/gpu.py                        # all points; run it again to go on where it stopped
    PYTHONPATH=. python3 bench/gpu.py --quick                # the memory bars alone
    PYTHONPATH=. python3 bench/gpu.py --only 7b/qlora --time-limit 500
    PYTHONPATH=. python3 bench/gpu.py --device cpu --shape tiny --json /tmp/gpu.json      # the script itself, tried anywhere

It needs no network and no checkpoint: weights are random in the real shapes, made on the GPU and stored one by one, so
70B in NF4 never exists in 16 bits. Each point runs Graft's training loop (`point.py`); PEFT, with bitsandbytes where it is
installed, runs the same points (`peft_point.py`). Peak memory is torch.cuda.max_memory_allocated from before the
adapter or optimizer is made, the base included. Every point is written to the JSON file as soon as it is measured. What is
there already is skipped; points that ran out of memory count as measured, those that failed otherwise are tried again.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft_point
import torch
from machine import described, processor
from point import Point, base_of, in_process, llama, train_steps

from graftlm.adapters.attach import detach
from graftlm.base.loading import default_device
from graftlm.errors import ModelError
from graftlm.files import write_json
from graftlm.planning.instantiate import instantiate
from graftlm.planning.peak_memory import PeakMemory
from graftlm.planning.shapes import ModelShape

RESULTS = Path(__file__).resolve().parent / "results"
GIB = 2**30
LADDER = {"optimizer": "adamw-8bit", "optimizer_in_backward": True, "max_grad_norm": 0.0}
"""Full training of bfloat16 weights with everything that saves memory on the GPU itself."""
VARIANTS: dict[str, dict[str, Any]] = {
    "qlora": {"method": "qlora"},
    "lora": {"method": "lora"},
    "lora-int8": {"method": "lora", "precision": "int8"},
    "full": {"method": "full", "options": LADDER},
    "full-offload": {"method": "full", "options": {**LADDER, "offload_optimizer": True}},
}
MODELS = {
    "7b": ("qlora", "lora", "full", "full-offload"),
    "13b": ("qlora", "lora", "full"),
    "70b": ("qlora", "lora-int8", "lora"),
    "tiny": ("qlora", "lora", "lora-int8", "full", "full-offload"),
}
# (model, variant, GiB, "must" or "goal"), at sequence 512, batch 1, activations checkpointed
BARS = [
    ("7b", "qlora", 6, "must"), ("7b", "lora", 16, "must"), ("7b", "full", 29, "must"), ("7b", "full-offload", 22, "goal"),
    ("13b", "qlora", 10, "must"), ("70b", "qlora", 40, "must"), ("70b", "lora-int8", 80, "must"),
]  # fmt: skip
BITS = {"float32": 32.0, "bfloat16": 16.0, "int8": 8.0, "nf4": 4.127}


# ---- which points ----------------------------------------------------------------------------------------------------


def points_of(model: str, quick: bool, device: str) -> dict[str, Point]:
    """A model's points by name, those that decide a bar first within each variant."""
    short, long = (512, 2048) if model != "tiny" else (32, 64)
    sizes = [(short, 1, True)]
    if not quick:
        sizes += [(short, 1, False), *((long, batch, on) for batch in (1, 4) for on in (True, False))]
    found: dict[str, Point] = {}
    for side in ("graft", "peft"):
        for variant in MODELS[model]:
            made = VARIANTS[variant]
            if "offload_optimizer" in made.get("options", {}) and (side == "peft" or device == "cpu"):
                continue
            if side == "peft" and (quick or made.get("precision") == "int8"):
                continue
            for sequence, batch, on in sizes[:1] if variant == "full-offload" else sizes:
                point = Point(model=model, side=side, sequence=sequence, batch=batch, checkpointing=on, **made)
                found[name_of(point, variant)] = point if side == "graft" else replace(point, options={})
    return found


def name_of(point: Point, variant: str) -> str:
    kept = "checkpointed" if point.checkpointing else "kept"
    return f"{point.side}/{point.model}/{variant}/{point.sequence}x{point.batch}/{kept}"


def groups_of(points: dict[str, Point]) -> list[dict[str, Point]]:
    """Points that share a process: those of one side and variant; Graft's full training changes its base, so each is alone."""
    found: dict[str, dict[str, Point]] = {}
    for name, point in points.items():
        alone = point.side == "graft" and point.method == "full"
        key = name if alone else name.rpartition("/")[0].rpartition("/")[0]
        found.setdefault(key, {})[name] = point
    return list(found.values())


def done(result: dict[str, Any] | None) -> bool:
    """Whether a point has figures or ran out of memory; anything else is tried again."""
    return result is not None and ("tokens_per_second" in result or bool(result.get("out_of_memory")))


# ---- one process: a base and its points ------------------------------------------------------------------------------


def measure_group(points: dict[str, Point], device: str, steps: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure points that share a base; ends early after a failure, for a GPU's process may be beyond use then."""
    place = default_device(device)
    base: Any = None
    for name, point in points.items():
        began = time.perf_counter()
        try:
            if point.side == "peft":
                result = _peer(point, place, steps)
            else:
                if base is None:
                    base = base_of(llama(point.model), point.stored, device)
                loaded = time.perf_counter() - began
                result = {**_ours(base, point, steps), "seconds_loading": loaded}
                detach(base, 1)
        except torch.OutOfMemoryError as error:
            result = {"out_of_memory": True, "error": _first_line(error)}
        except ModelError as error:
            result = {"out_of_memory": "does not fit" in str(error), "error": str(error)}
        except Exception as error:  # whatever it is, the other points are still to be measured
            yield name, {"error": f"{type(error).__name__}: {_first_line(error)}"}
            return
        if "error" in result:
            base = None
        _release(place)
        yield name, {**point.to_json(), **result, "seconds": time.perf_counter() - began}


def _ours(base: Any, point: Point, steps: int) -> dict[str, Any]:
    with PeakMemory(base.device) as memory:
        found = train_steps(base, point, steps)
    return {**found, **_peaks(memory), "base_bytes": base.bytes, "packs": base.packs, "note": base.no_packing_reason}


def _peer(point: Point, device: torch.device, steps: int) -> dict[str, Any]:
    model = peft_point.build(point, device)
    with PeakMemory(device) as memory:
        found = peft_point.peer_steps(model, point, device, steps)
    return {**found, **_peaks(memory)}


def _peaks(memory: PeakMemory) -> dict[str, Any]:
    reserved = torch.cuda.max_memory_reserved(memory.device) if memory.device.type == "cuda" else None
    return {"peak_memory": memory.bytes, "peak_reserved": reserved}


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def describe_device(device: str) -> Iterator[dict[str, Any]]:
    """The machine, and its rate of multiplying matrices: 16-bit ones on a GPU, the best of 5 medians of 10."""
    place = default_device(device)
    gpu = place.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if gpu else (512, torch.float32)
    a = torch.randn(size, size, device=place).to(dtype)
    b = torch.randn(size, size, device=place).to(dtype)
    best = 0.0
    for _ in range(5):
        times: list[float] = []
        for _ in range(12):
            if gpu:
                torch.cuda.synchronize(place)
            began = time.perf_counter()
            a @ b
            if gpu:
                torch.cuda.synchronize(place)
            times.append(time.perf_counter() - began)
        best = max(best, 2 * size**3 / sorted(times[2:])[5])
    yield {
        "device": torch.cuda.get_device_name(place) if gpu else processor(),
        "device_memory": torch.cuda.get_device_properties(place).total_memory if gpu else None,
        "matrix_rate": best,
        "matrix": f"{size}x{size} {str(dtype).removeprefix('torch.')}",
        **described(),
    }


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def weight_bytes(shape: ModelShape, precision: str) -> float:
    """Bytes of a base: its linear layers in `precision`, embeddings, head and norms in 16 bits."""
    return shape.stored * BITS[precision] / 8 + 2 * (shape.parameters - shape.stored)


def flops_per_token(shape: ModelShape, method: str, sequence: int, rank: int) -> float:
    """Operations of the matrix products that a token's training needs; what checkpointing runs again is not counted.

    Forward 2 for each value of a weight, gradient to the input 2, to a trained weight 2. Causal attention of an example of
    L tokens: two products over L / 2 positions forward, four back.
    """
    full = method == "full"
    head = shape.width * shape.vocabulary
    products = (6 if full else 4) * (shape.stored + head)
    adapter = 0 if full else 6 * rank * sum(w.count * (w.out + w.inner) for w in shape.weights)
    attention = 6 * sequence * shape.attention_width * shape.layers
    return products + adapter + attention


def judged(found: dict[str, Any], models: Sequence[str]) -> list[dict[str, Any]]:
    """The memory bars with what was measured: met, missed, or None where it was not."""
    lines: list[dict[str, Any]] = []
    for model, variant, limit, kind in BARS:
        if model not in models:
            continue
        result = found.get(f"graft/{model}/{variant}/512x1/checkpointed") or {}
        peak = result.get("peak_memory")
        met = peak <= limit * GIB if peak is not None else (False if result.get("out_of_memory") else None)
        lines.append({"model": model, "variant": variant, "kind": kind, "limit_gib": limit,
                      "peak_gib": None if peak is None else peak / GIB, "met": met})  # fmt: skip
    return lines


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> str:
    """The whole file as Markdown."""
    machine, found = result["machine"], result["points"]
    lines = [
        f"{machine['device']}, {machine['date'][:10]}, torch {machine['versions']['torch']}; matrix rate "
        f"{machine['matrix_rate'] / 1e12:.4g} TFLOP/s ({machine['matrix']})", "",
    ]  # fmt: skip
    if result["bars"]:
        lines += ["| memory at sequence 512, batch 1 | bar, GiB | peak, GiB | |", "|---|---:|---:|---|"]
        for bar in result["bars"]:
            peak = "" if bar["peak_gib"] is None else f"{bar['peak_gib']:.2f}"
            verdict = {True: "met", False: "missed", None: "not measured"}[bar["met"]]
            lines.append(f"| {bar['model']} {bar['variant']} | {bar['kind']} {bar['limit_gib']} | {peak} | {verdict} |")
        lines.append("")
    lines += [
        "| model, method | tokens | batch | activations | Graft tokens/s | of matrix rate | GiB | PEFT tokens/s | GiB | by |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    names = dict.fromkeys(name.partition("/")[2] for name in found)
    for name in names:
        model, variant, size, kept = name.split("/")
        sequence, _, batch = size.partition("x")
        ours, theirs = found.get(f"graft/{name}"), found.get(f"peft/{name}")
        cells = [*_cells(ours, True), *_cells(theirs, False), _ratio(ours, theirs)]
        lines.append(f"| {model} {variant} | {sequence} | {batch} | {kept} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(result: dict[str, Any] | None, with_share: bool) -> list[str]:
    if result is None or "tokens_per_second" not in result:
        said = "" if result is None else "out of memory" if result.get("out_of_memory") else "failed"
        return [said, "", ""] if with_share else [said, ""]
    share = [f"{result['share']:.0%}"] if with_share else []
    return [f"{result['tokens_per_second']:,.0f}", *share, f"{result['peak_memory'] / GIB:.2f}"]


def _ratio(ours: dict[str, Any] | None, theirs: dict[str, Any] | None) -> str:
    if not ours or not theirs or "tokens_per_second" not in ours or "tokens_per_second" not in theirs:
        return ""
    return f"{ours['tokens_per_second'] / theirs['tokens_per_second']:.2f}x"


# ---- the run ---------------------------------------------------------------------------------------------------------


def measure(
    result: dict[str, Any], points: dict[str, Point], device: str, steps: int, place: Path, deadline: float
) -> None:
    """Measure what is not done yet, writing the file after every point, until all is done or the time is up."""
    shapes = {model: instantiate(llama(model)) for model in {point.model for point in points.values()}}
    found: dict[str, Any] = result["points"]

    def keep(name: str, figures: dict[str, Any]) -> None:
        point = points[name]
        if "tokens_per_second" in figures:
            flops = flops_per_token(shapes[point.model], point.method, point.sequence, point.rank)
            figures["share"] = figures["tokens_per_second"] * flops / result["machine"]["matrix_rate"]
        found[name] = {**figures, "date": time.strftime("%Y-%m-%d")}
        result["bars"] = judged(found, list(dict.fromkeys(n.split("/")[1] for n in found)))
        write_json(place, result)
        print(f"{name}: {_said(figures)}", flush=True)

    memory = result["machine"]["device_memory"]
    absent: set[str] = set()
    for group in groups_of({name: point for name, point in points.items() if not done(found.get(name))}):
        for name, point in list(group.items()):
            needed = weight_bytes(shapes[point.model], point.stored)
            why = peft_point.missing(point) if point.side == "peft" else ""
            if memory is not None and needed > memory:
                keep(
                    name,
                    {**point.to_json(), "out_of_memory": True, "error": f"weights of {needed / GIB:.0f} GiB alone"},
                )
                del group[name]
            elif why:
                absent.add(f"{name.rpartition('/')[0].rpartition('/')[0]}: left out, {why}")
                del group[name]
        for words in sorted(absent):
            print(words, flush=True)
        absent.clear()
        while group:
            left = deadline - time.monotonic()
            if left < 1:
                print("time is up; run it again to go on", flush=True)
                return
            try:
                for name, figures in in_process(measure_group, (group, device, steps), left, "spawn"):
                    keep(name, figures)
                    group = {n: p for n, p in group.items() if n != name}
            except TimeoutError:
                continue  # said above
            except RuntimeError as error:  # the process is gone, and the point that it was at with it
                name = next(iter(group))
                keep(name, {**points[name].to_json(), "error": str(error)})
                group = {n: p for n, p in group.items() if n != name}


def _said(figures: dict[str, Any]) -> str:
    if "tokens_per_second" not in figures:
        return f"{'out of memory' if figures.get('out_of_memory') else 'failed'}: {figures['error']}"
    return (
        f"{figures['tokens_per_second']:,.0f} tokens/s, {figures['share']:.0%} of the matrix rate, "
        f"{figures['peak_memory'] / GIB:.2f} GiB, {figures['seconds']:.0f} s"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu with --shape tiny")
    parser.add_argument("--shape", nargs="+", choices=list(MODELS), default=["7b", "13b", "70b"])
    parser.add_argument("--quick", action="store_true", help="the memory bars alone, without the peer")
    parser.add_argument(
        "--only", nargs="+", default=[], help="points whose name holds one of these, such as 7b/qlora or peft/"
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a point, after those that warm up")
    parser.add_argument("--time-limit", type=float, default=86400, help="seconds after which no more is measured")
    parser.add_argument("--again", action="store_true", help="measure the chosen points anew")
    parser.add_argument("--json", type=Path, help="the file of figures (default bench/results/gpu-NAME.json)")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.time_limit
    points = {n: p for model in options.shape for n, p in points_of(model, options.quick, options.device).items()}
    points = {n: p for n, p in points.items() if not options.only or any(part in n for part in options.only)}
    if not points:
        raise SystemExit(f"no point's name holds {' or '.join(options.only)}")

    (machine,) = list(in_process(describe_device, [options.device], 300, "spawn"))
    slug = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    place = options.json or RESULTS / f"gpu-{slug}.json"
    result: dict[str, Any] = {"machine": machine, "points": {}, "bars": []}
    if place.is_file():
        before = json.loads(place.read_text(encoding="utf-8"))
        if before["machine"]["device"] != machine["device"]:
            raise SystemExit(
                f"{place} holds figures of {before['machine']['device']}, this is {machine['device']}; give another --json"
            )
        result["points"] = before["points"]
    if options.again:
        result["points"] = {n: v for n, v in result["points"].items() if n not in points}
    skipped = sum(done(result["points"].get(name)) for name in points)
    print(f"{machine['device']}: {len(points)} points, {skipped} measured before", flush=True)
    measure(result, points, options.device, options.steps, place, deadline)
    result["bars"] = judged(result["points"], list(dict.fromkeys(n.split("/")[1] for n in result["points"])))
    write_json(place, result)
    print(f"\n{tables(result)}\n\nfigures in {place}")


if __name__ == "__main__":
    main()
