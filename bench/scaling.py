"""How training grows: tokens a second and peak memory over sequence length, rank, batch and vocabulary, on the CPU.

    python bench/scaling.py                                  # 30M Llama, LoRA, about four minutes on two cores
    python bench/scaling.py --series rank batch
    python bench/scaling.py --json bench/results/scaling.json --plot /tmp/scaling.png

Each point is a process of its own with nothing else running: random weights, random examples of one length, every token a
target token, a batch in one micro-batch. Memory is what the peak lies above the same process before it had a model, so it
holds the weights (float32), the adapter, its optimizer and the activations. One step warms up, one to four count.

    sequence     128 to 4096 tokens an example; 4096 tokens a step, rank 16
    rank         4 to 256; 8 examples of 256 tokens a step
    batch        1 to 64 examples of 128 tokens, rank 16
    vocabulary   8192 and 131072 tokens; 256 to 2048 tokens a step: memory grows by the same amount per token
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import described
from point import Point, base_of, in_process, llama, train_steps

from graftlm.heap import mmap_allocations
from graftlm.planning.peak_memory import PeakMemory

Line = dict[str, Any]
SECONDS = 60  # of one point
LARGE = 131072  # tokens of the large vocabulary
TIMED_TOKENS = 4096  # as many steps count as hold so many tokens: one to four


def series(model: str) -> dict[str, list[Line]]:
    """The points of each series: what changes, and what `measured` needs."""

    def one(x: int, sequence: int, batch: int, vocabulary: int | None = None, **more: Any) -> Line:
        point = Point(model=model, method="lora", precision="float32", sequence=sequence, batch=batch, **more)
        return {"x": x, "point": point, "vocabulary": vocabulary}

    # Few points, and two that are checkpointed: twenty minutes are all there is for every benchmark.
    lengths = {False: (128, 1024, 4096), True: (128, 4096)}
    sizes = {None: (256, 2048), LARGE: (256, 1024, 2048)}
    batches = {False: (1, 8, 64), True: (1, 16)}
    return {
        "sequence": [one(n, n, 4096 // n, checkpointing=on) for on, few in lengths.items() for n in few],
        "rank": [one(rank, 256, 8, rank=rank) for rank in (4, 32, 256)],
        "batch": [one(n, 128, n, checkpointing=on) for on, few in batches.items() for n in few],
        "vocabulary": [one(n, 256, n // 256, size) for size, few in sizes.items() for n in few],
    }


def measured(line: Line) -> Iterator[Line]:
    """Train one point in this process; yields its figures."""
    point: Point = line["point"]
    changes = {} if line["vocabulary"] is None else {"vocab_size": line["vocabulary"]}
    config = llama(point.model, **changes)
    steps = max(1, min(4, TIMED_TOKENS // point.tokens))
    with mmap_allocations(point.checkpointing), PeakMemory(torch.device("cpu")) as memory:  # as `training.run` does
        base = base_of(config, point.stored, "cpu")
        found = train_steps(base, point, steps, warm_up=1)
    yield {
        "x": line["x"], "sequence": point.sequence, "batch": point.batch, "tokens_per_step": point.tokens,
        "rank": point.rank, "checkpointing": point.checkpointing, "vocabulary": base.structure.vocabulary,
        "tokens_per_second": found["tokens_per_second"], "peak_memory": memory.bytes - memory.start,
    }  # fmt: skip


def bytes_per_token(points: Sequence[Line]) -> float:
    """By how many bytes the peak grows with each token of a step: the slope of the least-squares line."""
    tokens = [p["tokens_per_step"] for p in points]
    bytes_ = [p["peak_memory"] for p in points]
    middle, mean = sum(tokens) / len(tokens), sum(bytes_) / len(bytes_)
    across = sum((t - middle) ** 2 for t in tokens)
    return sum((t - middle) * (b - mean) for t, b in zip(tokens, bytes_)) / across


def growth(found: dict[str, list[Line]]) -> list[Line]:
    """Bytes a token for each vocabulary, and the bytes of its logits alone in float32."""
    points = found.get("vocabulary", [])
    counts = {
        size: {p["tokens_per_step"] for p in points if p["vocabulary"] == size}
        for size in sorted({p["vocabulary"] for p in points})
    }
    sizes = [size for size, tokens in counts.items() if len(tokens) > 1]
    return [
        {
            "vocabulary": size,
            "bytes_per_token": bytes_per_token([p for p in found["vocabulary"] if p["vocabulary"] == size]),
            "bytes_of_a_tokens_logits": 4 * size,
        }
        for size in sizes
    ]


def table(found: dict[str, list[Line]]) -> str:
    """All series as Markdown."""
    titles = {
        "sequence": "Sequence length (4096 tokens a step, rank 16)",
        "rank": "Rank (8 examples of 256 tokens a step)",
        "batch": "Batch (examples of 128 tokens, rank 16)",
        "vocabulary": "Vocabulary (examples of 256 tokens, rank 16)",
    }
    lines: list[str] = []
    for name, points in found.items():
        lines += [f"**{titles[name]}**", ""]
        if name in ("sequence", "batch"):
            word = "tokens an example" if name == "sequence" else "examples"
            lines += [
                f"| {word} | tokens/s | peak MB | checkpointed: tokens/s | peak MB |",
                "|---:|---:|---:|---:|---:|",
            ]
            for x in dict.fromkeys(p["x"] for p in points):
                at = {p["checkpointing"]: p for p in points if p["x"] == x}
                said = [
                    f"{at[on]['tokens_per_second']:,.0f} | {at[on]['peak_memory'] / 1e6:,.0f}" if on in at else " | "
                    for on in (False, True)
                ]
                lines.append(f"| {x} | {' | '.join(said)} |")
        else:
            lines += [
                f"| {'rank' if name == 'rank' else 'vocabulary, tokens a step'} | tokens/s | peak MB |",
                "|---:|---:|---:|",
            ]
            for p in points:
                what = p["x"] if name == "rank" else f"{p['vocabulary']:,}, {p['tokens_per_step']:,}"
                lines.append(f"| {what} | {p['tokens_per_second']:,.0f} | {p['peak_memory'] / 1e6:,.0f} |")
        lines.append("")
    for line in growth(found):
        lines.append(
            f"With {line['vocabulary']:,} tokens in the vocabulary the peak grows by {line['bytes_per_token'] / 1e3:,.0f} kB a "
            f"token of the step; one token's logits in float32 are {line['bytes_of_a_tokens_logits'] / 1e3:,.0f} kB."
        )
    return "\n".join(lines)


def plot(found: dict[str, list[Line]], place: Path, title: str) -> None:
    """Tokens a second above, peak memory below; one column for each of sequence, rank and batch."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    columns = [
        ("sequence", "tokens an example\n(4096 tokens a step)"),
        ("rank", "rank\n(2048 tokens a step)"),
        ("batch", "examples of 128 tokens a step"),
        ("vocabulary", "tokens a step"),
    ]
    shown = [(name, label) for name, label in columns if name in found]
    figure, axes = pyplot.subplots(2, len(shown), figsize=(3.7 * len(shown), 6.2), sharex="col", squeeze=False)
    for column, (name, label) in enumerate(shown):
        upper, lower = axes[0][column], axes[1][column]
        for words, colour, mark, points in _curves(name, found[name]):
            x = [p["x"] for p in points]
            upper.plot(x, [p["tokens_per_second"] for p in points], mark, color=colour, label=words, linewidth=1.6)
            lower.plot(x, [p["peak_memory"] / 1e6 for p in points], mark, color=colour, label=words, linewidth=1.6)
        if name == "vocabulary":
            large = [p for p in found[name] if p["vocabulary"] == LARGE]
            if large:
                x = [p["x"] for p in large]
                lower.plot(
                    x,
                    [4 * LARGE * t / 1e6 for t in x],
                    ":",
                    color="0.45",
                    linewidth=1.4,
                    label=f"logits of {LARGE:,} alone",
                )
        linear = name in ("batch", "vocabulary")  # here memory is to be seen as the straight line that it is
        upper.set_xscale("linear" if linear else "log", **({} if linear else {"base": 2}))
        lower.set_xticks(_apart(sorted({p["x"] for p in found[name]}), linear))
        lower.xaxis.set_major_formatter(ScalarFormatter())
        lower.xaxis.set_minor_formatter(NullFormatter())
        lower.tick_params(axis="x", labelsize=8)
        lower.set_xlabel(label)
        many = len(upper.get_lines()) > 1
        for axis in (upper, lower):
            axis.set_ylim(0, axis.get_ylim()[1] * (1.25 if many and axis is lower else 1.05))  # the legend stands above
            axis.grid(alpha=0.25, linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
        if many:
            lower.legend(fontsize=7.5, frameon=False, loc="upper left")
    axes[0][0].set_ylabel("tokens a second")
    axes[1][0].set_ylabel("peak memory of training, MB")
    figure.suptitle(title, fontsize=10.5)
    figure.tight_layout()
    figure.savefig(place, dpi=110)
    pyplot.close(figure)


def _apart(ticks: Sequence[int], linear: bool) -> list[int]:
    """Those that have room for their numbers: on a linear axis small ones lie on top of each other."""
    if not linear:
        return list(ticks)
    kept = [ticks[-1]]
    for tick in reversed(ticks[:-1]):
        if kept[-1] - tick > 0.07 * (ticks[-1] - ticks[0]):
            kept.append(tick)
    return kept


def _curves(name: str, points: Sequence[Line]) -> Iterator[tuple[str, str, str, list[Line]]]:
    """(words, colour, mark, points) of each line that a series draws."""
    if name == "vocabulary":
        for size, colour in zip(sorted({p["vocabulary"] for p in points}), ("#1f6fb4", "#c8553d")):
            yield f"vocabulary {size:,}", colour, "o-", [p for p in points if p["vocabulary"] == size]
        return
    for on, colour, mark in ((False, "#1f6fb4", "o-"), (True, "#2a9d6e", "s--")):
        chosen = [p for p in points if p["checkpointing"] == on]
        if chosen:
            yield ("activation checkpointing" if on else "activations kept"), colour, mark, chosen


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="30m", help="30m, 135m or tiny")
    parser.add_argument("--series", nargs="+", choices=list(series("tiny")), default=list(series("tiny")))
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write the picture here")
    parser.add_argument("--from-json", type=Path, help="draw and print what was measured before, and measure nothing")
    options = parser.parse_args(arguments)
    result: dict[str, Any]
    if options.from_json:
        result = json.loads(options.from_json.read_text(encoding="utf-8"))
    else:
        result = {"model": options.model, "machine": described(), "series": {}, "growth": []}
        for found in measure_all(options.model, options.series):
            result.update(series=found, growth=growth(found))
            if options.json:  # after each point: a run that is cut off has what it measured
                options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result["series"]))
    if options.plot:
        machine = result["machine"]
        title = f"LoRA on a {result['model'].upper()} Llama, {machine['processor']}, {machine['threads']} threads"
        plot(result["series"], options.plot, title)


def measure_all(model: str, names: Sequence[str]) -> Iterator[dict[str, list[Line]]]:
    """All that is measured, after every point of the named series, each in a process of its own; one that fails is said
    and left out."""
    chosen = {name: points for name, points in series(model).items() if name in names}
    count, done = sum(map(len, chosen.values())), 0
    found: dict[str, list[Line]] = {name: [] for name in chosen}
    for name, points in chosen.items():
        for line in points:
            done += 1
            began = time.perf_counter()
            try:
                (one,) = list(in_process(measured, [line], SECONDS, "forkserver"))
            except (TimeoutError, RuntimeError) as error:
                print(f"[{done}/{count}] {name} {line['x']}: {error}", flush=True)
                continue
            found[name].append(one)
            print(
                f"[{done}/{count}] {name} {line['x']}{' checkpointed' if one['checkpointing'] else ''}: "
                f"{one['tokens_per_second']:,.0f} tokens/s, {one['peak_memory'] / 1e6:,.0f} MB, "
                f"{time.perf_counter() - began:.1f} s",
                flush=True,
            )
            yield {name: points for name, points in found.items() if points}


if __name__ == "__main__":
    main()
