"""A table of the figures of `serve.py` and their targets."""

from __future__ import annotations

from typing import Any


def table(found: dict[str, Any]) -> str:
    """One row for each target: the measured value, the required value, the goal, and whether it was reached."""
    turns, size, machine = found["turns"], found["size"], found["machine"]
    rows: list[tuple[str, str, str, str, str]] = []

    def ratio(what: str, ours: str, other: str, must: float, goal: float, share: bool = False) -> None:
        value = turns[other]["seconds"] / turns[ours]["seconds"]
        written = (lambda v: f"{v:.0%}") if share else (lambda v: f"{v:g}x")
        figure = f"{value:.0%}" if share else f"{value:.2f}x"
        speeds = f"{turns[ours]['tokens_per_second']:.1f} vs {turns[other]['tokens_per_second']:.1f} tokens/s"
        rows.append((what, f"{figure} ({speeds})", written(must), written(goal), _reached(value, must, goal)))

    peft, bitsandbytes = "transformers + PEFT", "transformers + PEFT + bitsandbytes"
    ratio(f"8 adapters mixed, batch 8, float32, vs {peft}", "graft float32 mixed", "peer float32 mixed", 4, 6)
    ratio(f"8 adapters mixed, batch 8, NF4, vs {bitsandbytes}", "graft nf4 mixed", "peer nf4 mixed", 6, 10)
    ratio("batch 1, NF4, vs transformers + bitsandbytes", "graft nf4 one", "peer nf4 bare one", 6, 10)
    ratio("NF4 vs our own float32 base, batch 1", "graft nf4 one", "graft float32 one", 1, 1.5)
    ratio("NF4 vs our own bfloat16 base, batch 1", "graft nf4 one", "graft bfloat16 one", 1, 1.5)
    for kind in ("float32", "bfloat16", "nf4"):
        mine, base = f"graft {kind} mixed", f"graft {kind} base"
        ratio(f"8 adapters mixed vs our own {kind} base alone, batch 8", mine, base, 0.8, 0.92, share=True)
    if "traffic" in found:
        traffic = found["traffic"]
        few, every = (traffic[k]["tokens_per_second"] for k in ("few", "all"))
        what = (
            f"{few:.1f} vs {every:.1f} tokens/s; {traffic['few']['swaps']} swaps, {traffic['few']['loads']} from disk"
        )
        rows.append((
            f"{traffic['store']} adapters in the store, Zipf over {traffic['slots']} slots, vs all resident",
            f"{few / every:.0%} ({what}, in {traffic['requests']} requests)", "70%", "90%", _reached(few / every, 0.7, 0.9),
        ))  # fmt: skip
    for count, one in found.get("choosing", {}).items():
        milliseconds, change = one["seconds"] * 1e3, one["change_seconds"] * 1e3
        what = f"choosing a resident adapter among {count}"
        figure = f"{milliseconds:.4f} ms; a step after a change {change:+.2f} ms"
        rows.append((what, figure, "1 ms", "0.1 ms", _reached(-milliseconds, -1, -0.1)))
    if "memory" in found:
        memory = found["memory"]
        rows.append((
            "memory per further resident adapter", f"{memory['ratio']:.2f} of its own {memory['own_bytes'] / 1e6:.1f} MB",
            "1.1", "", _reached(-memory["ratio"], -1.1, -1.1),
        ))  # fmt: skip
    lines = [
        "# Serving, compared with transformers + PEFT + bitsandbytes", "",
        f"`python bench/serve.py --json bench/results/serve.json`, {found['seconds']:.0f} s, {machine['processor']}, "
        f"{machine['threads']} threads, {machine['kernels']}, {machine['date'][:10]}. A Llama of random weights "
        f"({size['shape']}), prompts of 32 tokens, {size['new']} new ones, whole answers, "
        f"median of {size['rounds']} rounds.", "",
        "| | measured | must | goal | |", "|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows), "", "Answers of both sides that agree token for token:", "",
    ]  # fmt: skip
    for name, run in turns.items():
        if "same_as_peer" in run:
            lines.append(f"- {name}: {run['same_as_peer']} of {run['answers']}")
    steps = [f"{name.removeprefix('graft ')} {run['milliseconds_a_step']:.1f}" for name, run in turns.items()
             if "milliseconds_a_step" in run]  # fmt: skip
    lines += ["", f"Our milliseconds a decoding step: {', '.join(steps)}."]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return "\n".join([*lines, "", f"Versions: {versions}."])


def _reached(value: float, must: float, goal: float) -> str:
    return "goal" if value >= goal else "must" if value >= must else "missed"
