"""7B and 70B split over 2, 8 and 64 cards: memory and bytes sent, simulated, beside `graft plan`: python bench/ranks.py

Each row is a real step of one of the ranks, through all of its Python code and PyTorch's FSDP2, on a fake card (tensors with a
shape, a dtype and a device and no values: `tests/gpu/fake_card.py`) and a fake process group: nothing is sent. What is held at
once is counted as the caching allocator rounds it, and what would be gathered and summed is counted too. Not in it: CUDA's
context, NCCL's buffers, the allocator's gaps, time.

    python bench/ranks.py                  every row that bench/results/ranks.json lacks, and docs/distributed.md's table
    python bench/ranks.py --only 70B       rows whose name holds this text
    python bench/ranks.py --again          rows that are there are simulated anew too
    python bench/ranks.py --plan           nothing is simulated: only planned again, and the table written

It needs a C++ compiler. Models of 70B have 6 of their 80 layers, in the plan too: what is gathered at once is the same, and a
row takes a minute instead of a quarter of an hour. Of full training the moments are there and the update is not run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "ranks.json"
PAGE = ROOT / "docs" / "distributed.md"
BEGIN, END = "<!-- ranks: written by `python bench/ranks.py` -->", "<!-- /ranks -->"
LAYOUTS, LAYOUTS_END = "<!-- layouts: written by `python bench/ranks.py` -->", "<!-- /layouts -->"
FIELD = [
    ("llama-2-7b", "full-bfloat16", 2048, 2, "a100-80gb"), ("llama-2-70b", "full-8bit", 2048, 8, "a100-80gb"),
    ("llama-2-70b", "lora", 1024, 2, "a100-80gb"), ("llama-2-70b", "qlora", 2048, 1, "a100-80gb"),
    ("llama-2-70b", "qlora", 1024, 2, "rtx-4090"),
]  # fmt: skip
"""Model, method, tokens, cards: what the field trains on several."""
WITHIN = 0.05
LAYERS_OF_70B = 6


@dataclass(frozen=True, kw_only=True)
class Row:
    """A step of one micro-batch on each of `cards`; rank 16 on all linear layers, activation checkpointing."""

    size: Literal["7b", "70b"]
    method: Literal["full", "lora", "qlora"]
    precision: Literal["bfloat16", "int8", "nf4"]
    tokens: int
    cards: int
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    in_backward: bool = False

    @property
    def name(self) -> str:
        """What the table calls it."""
        layers = f", {LAYERS_OF_70B} layers" if self.size == "70b" else ""
        how = ", 8-bit AdamW" if self.optimizer == "adamw-8bit" else ""
        how += ", steps in backward" if self.in_backward else ""
        method = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}[self.method]
        return f"{self.size.upper()}{layers}: {method} in {self.precision}{how}, {self.tokens:,} tokens, {self.cards} cards"

    @property
    def config(self) -> dict[str, Any]:
        """The values of its `LlamaConfig`."""
        from graftlm.planning.models import built_in

        known = {**built_in()[f"llama-2-{self.size}"], "max_position_embeddings": 4096}
        if self.size == "70b":
            known["num_hidden_layers"] = LAYERS_OF_70B
        return {name: value for name, value in known.items() if name not in ("hub", "model_type")}


def rows() -> list[Row]:
    """What the field trains on several cards."""
    full, eight = {"method": "full", "precision": "bfloat16"}, {"optimizer": "adamw-8bit"}
    return [
        Row(size="7b", tokens=2048, cards=2, **full),
        Row(size="7b", tokens=2048, cards=2, in_backward=True, **full, **eight),
        Row(size="70b", tokens=2048, cards=8, **full, **eight),
        Row(size="70b", tokens=2048, cards=8, in_backward=True, **full, **eight),
        Row(size="70b", tokens=4096, cards=64, **full),
        Row(size="70b", method="lora", precision="bfloat16", tokens=1024, cards=2),
        Row(size="70b", method="lora", precision="int8", tokens=2048, cards=2),
        Row(size="70b", method="qlora", precision="nf4", tokens=1024, cards=2),
    ]


# ---- the plan --------------------------------------------------------------------------------------------------------


def planned(row: Row) -> dict[str, int]:
    """Bytes on a card and bytes that it sends in a step, from the model's config alone."""
    from transformers import LlamaConfig

    from graftlm.planning.activations import Workload
    from graftlm.planning.fitting import PlanCase
    from graftlm.planning.hardware import card
    from graftlm.planning.instantiate import instantiate
    from graftlm.planning.layouts import NCCL_BYTES, sharded
    from graftlm.planning.method import TrainingSetting

    load = Workload(tokens=row.tokens, target_tokens=row.tokens - 1, longest=row.tokens)
    shape = instantiate(LlamaConfig(**row.config))
    case = PlanCase(shape=shape, targets=("all-linear",), rank=16, load=load, card=card("h100"), fused=True)
    setting = TrainingSetting(
        key=row.method, label=row.method, method=row.method, precision=row.precision, compute_dtype="bfloat16",
        optimizer=row.optimizer, optimizer_in_backward=row.in_backward, activation_checkpointing=True,
    )  # fmt: skip
    found = sharded(case, setting, row.cards)
    return {"planned": found.bytes - NCCL_BYTES, "planned_moved": found.moved}


# ---- the table -------------------------------------------------------------------------------------------------------


def table(figures: dict[str, dict[str, int]]) -> str:
    """The rows beside their plans, in GB."""
    lines = ["| run | simulated GB | plan GB | | sent a step, GB | plan GB |", "|---|---:|---:|---:|---:|---:|"]
    errors: list[float] = []
    for row in rows():
        found = figures.get(row.name)
        if found is None:
            continue
        error = found["planned"] / found["peak"] - 1
        errors.append(abs(error))
        values = found["peak"], found["planned"], found["moved"], found["planned_moved"]
        peak, plan, moved, planned_moved = (f"{value / 1e9:.2f}" for value in values)
        lines.append(f"| {row.name} | {peak} | {plan} | {error:+.1%} | {moved} | {planned_moved} |")
    within, most = sum(error <= WITHIN for error in errors), max(errors)
    lines += [
        "", f"{within} of {len(errors)} plans are within {WITHIN:.0%} of the simulation; the largest error is {most:.1%}.",
    ]  # fmt: skip
    return "\n".join(lines)


def layouts() -> str:
    """The layouts of what the field trains, planned."""
    from graftlm.planning.activations import Workload
    from graftlm.planning.fitting import PlanCase
    from graftlm.planning.hardware import card
    from graftlm.planning.layouts import cards_needed, layout_of
    from graftlm.planning.method import METHODS
    from graftlm.planning.models import find

    lines = ["| run | cards | layout | on each, GB | usable | sent a step, GB | over PCIe | needed without the host |"]
    lines.append("|---|---|---|---:|---:|---:|---:|---:|")
    for model, key, tokens, count, on in FIELD:
        load = Workload(tokens=tokens, target_tokens=tokens - 1, longest=tokens)
        case = PlanCase(shape=find(model).shape, targets=("all-linear",), rank=16, load=load, card=card(on), fused=True)
        setting = replace(next(m for m in METHODS if m.key == key).checkpointed(), compute_dtype="bfloat16")
        found = layout_of(case, setting, count)
        assert found is not None, (model, key)
        sizes = (found.bytes, case.card.usable, found.moved, found.copied)
        cells = " | ".join(f"{value / 1e9:.1f}" if value else "-" for value in sizes)
        label = {"full-8bit": "full, bfloat16 weights, 8-bit AdamW"}.get(key, setting.label)
        lines.append(
            f"| {model}: {label}, {tokens:,} tokens | {count} x {on} | {found.words} | {cells} | "
            f"{cards_needed(case, setting)} |"
        )
    return "\n".join(lines)


def write_page(figures: dict[str, dict[str, int]]) -> None:
    """Write the tables into docs/distributed.md."""
    text = PAGE.read_text(encoding="utf-8")
    for begin, end, written in ((BEGIN, END, table(figures)), (LAYOUTS, LAYOUTS_END, layouts())):
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{written}\n{end}{rest.split(end)[1]}"
    PAGE.write_text(text, encoding="utf-8")


def simulated(row: Row) -> dict[str, int]:
    """A row's figures, from a process of its own: a fake card cannot be taken out of one again."""
    code = [
        sys.executable,
        str(Path(__file__).with_name("ranks_step.py")),
        json.dumps({**asdict(row), "config": row.config}),
    ]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{row.name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--again", action="store_true", help="simulate rows that are there anew")
    parser.add_argument("--plan", action="store_true", help="simulate nothing; plan again and write the table")
    given = parser.parse_args()
    known: dict[str, dict[str, int]] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for row in rows():
        wanted = given.only in row.name and (given.again or row.name not in known) and not given.plan
        if not wanted and row.name not in known:
            continue
        found = simulated(row) if wanted else known[row.name]
        known[row.name] = {**found, **planned(row)}
        RESULTS.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        error = known[row.name]["planned"] / known[row.name]["peak"] - 1
        sys.stdout.write(f"{row.name}: {known[row.name]['peak'] / 1e9:.2f} GB, {error:+.1%}\n")
    write_page(known)


if __name__ == "__main__":
    main()
