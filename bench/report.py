"""Tables and page sections from the figures of the CPU benchmarks, compared with their targets.

A bar is a figure with a required value and a goal. Everything here is a function from `cpu.json` to values or text; `suite.py`
runs the benchmarks and writes the files. `cpu.json` has the parts by the instruction set of matmuls (`suite.instructions`):
figures of two kinds of processors are never in one column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ladder
import scaling
from train import BATCH, SHAPES, SUBJECTS, bare_share, peer

Parts = Mapping[str, Any]
"""Each benchmark of one instruction set by its name."""
Results = Mapping[str, Parts]
"""By instruction set."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One figure, its required value and its goal."""

    what: str
    measured: float
    must: float | None = None
    goal: float | None = None
    more: bool = True
    """Whether more is better."""
    form: str = "x"
    """Its unit: `x` for a ratio, `%` for a share, else the unit's name."""

    @property
    def verdict(self) -> str:
        """`goal reached`, `met`, `missed`; for a figure with only a goal `short of the goal`."""
        if self.goal is not None and self._reaches(self.goal):
            return "goal reached"
        if self.must is not None:
            return "met" if self._reaches(self.must) else "missed"
        return "short of the goal" if self.goal is not None else ""

    def _reaches(self, bound: float) -> bool:
        return self.measured >= bound if self.more else self.measured <= bound

    def written(self, value: float | None) -> str:
        if value is None:
            return ""
        if self.form == "%":
            return f"{value:.0%}"
        return f"{value:.2f}x" if self.form == "x" else f"{value:.2f} {self.form}"

    def bound(self, value: float | None) -> str:
        return "" if value is None else f"{'≥' if self.more else '≤'} {self.written(value)}"


# (operation, compared with): must, goal as ratios of the other's time to ours
_KERNELS: dict[tuple[str, str], tuple[float | None, float | None]] = {
    ("NF4 dequantize into a tensor", "bitsandbytes"): (10, 14),
    ("NF4 dequantize into a tensor", "memory copy"): (None, 0.8),
    ("NF4 times 1 row", "bitsandbytes"): (15, 25),
    ("NF4 times 1 row", "dense float32"): (1, 2),
    ("NF4 times 1 row", "dense bfloat16"): (1, None),
    ("NF4 quantize", "bitsandbytes"): (8, 20),
    ("NF4 times 256 rows", "dense float32"): (1 / 1.15, 1 / 1.05),
}
# by instruction set and method: must of examples/s as a ratio to the peer's
_SPEED = {"AVX2": {"lora": 2.5, "qlora": 4.0}, "AVX512": {"lora": 5.0, "qlora": 5.0}}
_MEMORY = 0.4  # of the peer's, with an adapter
_BARE = 0.75  # of the rate of the matmuls alone
_NAMES = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
_ENGINES = {"float32": "PyTorch float32", "bfloat16": "PyTorch bfloat16", "own": "Graft's kernels"}


def kernel_bars(figures: Mapping[str, Any]) -> list[Bar]:
    """Speed of the kernels vs bitsandbytes and dense matmuls."""
    found: list[Bar] = []
    for line in figures.get("results", []):
        bound = _KERNELS.get((line["operation"], line["beside"]))
        if bound is not None:
            what = f"{line['operation']}, speed vs {line['beside']}"
            found.append(Bar(what=what, measured=line["ratio"], must=bound[0], goal=bound[1]))
    return found


def train_bars(figures: Mapping[str, Any], instructions: str) -> list[Bar]:
    """Speed and memory of training vs TRL, for one subject."""
    found: list[Bar] = []
    for method, sides in figures["results"].items():
        their_speed, their_memory = peer(sides)
        name, bound = (
            f"{SUBJECTS[figures['subject']].title} {_NAMES[method]}",
            _SPEED[instructions.removeprefix("limited to ").split()[0]].get(method),
        )
        ours = sides["graft"]
        for side, label in (("graft", name), ("graft gguf", f"{name} on the GGUF's blocks")):
            if side not in sides:
                continue
            ratio = sides[side]["examples_per_second"] / their_speed
            found.append(Bar(what=f"{label}, examples/s vs TRL", measured=ratio, must=bound))
            ratio = sides[side]["peak_memory"] / their_memory
            must = None if method == "full" else _MEMORY
            found.append(Bar(what=f"{label}, peak memory vs TRL", measured=ratio, must=must, more=False))
        if "trl bf16" in sides:
            ratio = ours["examples_per_second"] / sides["trl"]["examples_per_second"]
            found.append(Bar(what=f"{name}, examples/s vs TRL in float32", measured=ratio))
        packed = sides.get("trl packed")
        if packed is not None:
            ratio = ours["examples_per_second"] / packed["examples_per_second"]
            found.append(Bar(what=f"{name}, examples/s vs TRL with its packing", measured=ratio))
        if "bare" in ours:
            what = f"{name}, bare matmuls' share of a step"
            found.append(Bar(what=what, measured=bare_share(ours), must=_BARE, form="%"))
    return found


def scaling_bars(figures: Mapping[str, Any]) -> list[Bar]:
    """Memory per token with a vocabulary 16 times as large, as a ratio."""
    grown = figures.get("growth", [])
    if len(grown) < 2:
        return []
    small, large = grown[0], grown[-1]
    what = f"memory per token, vocabulary {large['vocabulary']:,} over {small['vocabulary']:,}"
    return [Bar(what=what, measured=large["bytes_per_token"] / small["bytes_per_token"], more=False)]


def ladder_bars(figures: Mapping[str, Any]) -> list[Bar]:
    """Memory of the last rung of the memory ladder."""
    rungs = [rung for rung in figures.get("rungs", []) if rung["name"] == ladder.RUNGS[-1].name]
    what = f"{figures.get('shape', '').upper()} full, weights + gradients + states with all options"
    unit = "bytes a parameter"
    return [
        Bar(what=what, measured=rung["bytes_per_parameter"], must=ladder.MUST, more=False, form=unit) for rung in rungs
    ]


def bars_of(name: str, figures: Mapping[str, Any], instructions: str) -> list[Bar]:
    """The bars of one part of the suite on an instruction set; none for a part that has none."""
    if name == "kernels":
        return kernel_bars(figures)
    if name.startswith("train"):
        return train_bars(figures, instructions) if figures else []
    if name == "ladder":
        return ladder_bars(figures)
    return scaling_bars(figures) if name == "scaling" else []


def bar_table(bars: Sequence[Bar]) -> str:
    lines = ["| figure | must | goal | measured | |", "|---|---:|---:|---:|---|"]
    lines += [
        f"| {b.what} | {b.bound(b.must)} | {b.bound(b.goal)} | {b.written(b.measured)} | {b.verdict} |" for b in bars
    ]
    return "\n".join(lines)


def train_table(figures: Mapping[str, Any]) -> str:
    """The figures of both sides, losses among them."""
    subject = SUBJECTS[figures["subject"]]
    lines = [
        f"**Training, {subject.title}, batches of {subject.batch}**", "",
        "| method | side | examples/s | target tokens/s | peak memory, MB | eval loss |", "|---|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for method, sides in figures["results"].items():
        lines += [
            f"| {_NAMES[method]} | {side} | {f['examples_per_second']:.2f} | {f['trained_tokens_per_second']:,.0f} | "
            f"{f['peak_memory'] / 1e6:,.0f} | {f['loss']:.4f} |"
            for side, f in sides.items()
        ]
        bare = sides["graft"].get("bare", {})
        lines += [
            f"| {_NAMES[method]} | matmuls alone, {_ENGINES[engine]} | {subject.batch / f['seconds_per_step']:.2f} | | | |"
            for engine, f in bare.items()
        ]
    return "\n".join(lines)


def page(results: Results, figures: str = "cpu.json") -> str:
    """The page for the file of `figures`: for each instruction set the bars, both sides' figures, the growth, and failures."""
    about = (
        f"Written by `make bench` from `{figures}`. Parts ran one after another; nothing else should run meanwhile, which is "
        "not checked. `trl bf16` is TRL with its own bfloat16; where TRL ran in float32 and bfloat16, ratios are to the faster."
        " `limited to`: a processor with AVX-512 that PyTorch, oneDNN, MKL and Graft's kernels used as one with AVX2 alone."
    )
    lines = ["# CPU benchmarks", "", about, ""]
    for instructions, parts in results.items():
        lines += [f"# {instructions}", "", *_of_one(parts, instructions), ""]
    return "\n".join(lines).rstrip() + "\n"


def plot(instructions: str) -> str:
    """The file name of the plot of scaling on one instruction set."""
    return f"scaling-{instructions.lower().replace(' ', '-')}.png"


def _of_one(parts: Parts, instructions: str) -> list[str]:
    """The lines of one instruction set."""
    lines: list[str] = []
    bars = [bar for name, part in parts.items() for bar in bars_of(name, part.get("figures") or {}, instructions)]
    if bars:
        lines += [bar_table(bars), ""]
    for name, part in parts.items():
        lines += [
            f"## {name}",
            "",
            f"`{part['command']}`: {part['seconds']:.0f} s on {part['date'][:10]}, {machine(part['machine'])}",
            "",
        ]
        if part.get("note"):
            lines += [f"How it was measured: {part['note']}.", ""]
        figures = part.get("figures")
        if part.get("error"):
            lines += [f"**{'Not finished' if figures else 'Failed'}:** {part['error']}", ""]
        if not figures:
            continue
        if name.startswith("train"):
            lines += [train_table(figures), ""]
        elif name == "ladder":
            lines += [ladder.table(figures["rungs"]), ""]
        elif name == "scaling":
            lines += [scaling.table(figures["series"]), ""]
            lines += [] if part.get("error") else [f"![growth]({plot(instructions)})", ""]
        elif name == "kernels":
            lines += ["| operation | graft, ms | compared with | its ms | faster by |", "|---|---:|---|---:|---:|"]
            lines += [
                f"| {f['operation']} | {f['graft_ms']:.2f} | {f['beside']} | {f['beside_ms']:.2f} | {f['ratio']:.2f}x |"
                for f in figures["results"]
            ]
            lines.append("")
        else:
            lines += ["Its figures are in `cpu.json`.", ""]
    return lines


def machine(found: Mapping[str, Any]) -> str:
    """A machine in a few words."""
    return f"{found['processor']}, {found['threads']} threads, {found['instructions']}"


@dataclass(frozen=True)
class Section:
    """A section of a page that is generated from the figures, between two marks."""

    name: str
    of: Callable[[Results], str]
    """Its text; empty if there are no figures for it."""

    @property
    def begin(self) -> str:
        return f"<!-- {self.name}: written by `python bench/suite.py --readme` -->"

    @property
    def end(self) -> str:
        return f"<!-- /{self.name} -->"

    def written(self, results: Results | None) -> str:
        """The section with its marks."""
        text = "" if results is None else self.of(results)
        return "\n".join(
            [self.begin, text or "Not measured yet: `make bench` measures, and writes this section.", self.end]
        )


# The README's columns: (method, side) with what it is called there.
_COLUMNS = {
    ("lora", "graft"): "LoRA", ("lora", "graft gguf"): "LoRA on GGUF", ("qlora", "graft"): "QLoRA", ("full", "graft"): "full",
}  # fmt: skip


def performance(results: Results) -> str:
    """The README's table: speed and memory relative to the peer's, a row for each real base and instruction set."""
    rows: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    where: dict[str, str] = {}
    for instructions, parts in results.items():
        for name, part in parts.items():
            figures = part.get("figures")
            if not name.startswith("train") or not figures or figures["subject"] in SHAPES:
                continue
            found = part["machine"]
            where[instructions] = f"{found['processor']}, {found['threads']} threads, {part['date'][:10]}"
            for method, sides in figures["results"].items():
                speed, memory = peer(sides)
                for side in sides.keys() & {"graft", "graft gguf"}:
                    ratios = sides[side]["examples_per_second"] / speed, sides[side]["peak_memory"] / memory
                    row = rows.setdefault((SUBJECTS[figures["subject"]].title, instructions), {})
                    row[method, side] = f"{ratios[0]:.1f}x, {ratios[1]:.2f}x"
    if not any(part.get("figures") for parts in results.values() for part in parts.values()):
        return ""
    lines: list[str] = []
    if rows:
        columns = [key for key in _COLUMNS if any(key in row for row in rows.values())]
        lines += [
            "Training on GSM8K: examples/s and peak memory relative to TRL+PEFT+bitsandbytes, the better of its float32 and "
            f"bfloat16 ({'; '.join(dict.fromkeys(where.values()))}):",
            "",
            f"| | {' | '.join(_COLUMNS[key] for key in columns)} |",
            "|---|" + "---:|" * len(columns),
        ]
        for (title, instructions), row in rows.items():
            lines.append(f"| {title}, {instructions} | {' | '.join(row.get(key, '') for key in columns)} |")
        lines.append("")
    lines.append("[All figures](bench/results/cpu.md), [how they are measured](docs/performance.md).")
    return "\n".join(lines)


def rungs(results: Results) -> str:
    """The newest table of the memory ladder, and the machine it was measured on."""
    found = [parts["ladder"] for parts in results.values() if parts.get("ladder", {}).get("figures")]
    if not found:
        return ""
    part = max(found, key=lambda part: part["date"])
    figures = part["figures"]
    return (
        f"`{part['command']}`: {figures['shape'].upper()} Llama, {figures['steps']} steps of {BATCH} examples, "
        f"{machine(part['machine'])}, {part['date'][:10]}.\n\n{ladder.table(figures['rungs'])}"
    )


README = Section("performance", performance)
LADDER = Section("ladder", rungs)


def with_section(page: str, section: Section, results: Results | None) -> str:
    """A page with one section replaced. Raises ValueError if its two marks are missing."""
    before, begin, rest = page.partition(section.begin)
    _, end, after = rest.partition(section.end)
    if not begin or not end:
        raise ValueError(f"the page lacks the marks {section.begin} and {section.end}")
    return before + section.written(results) + after
