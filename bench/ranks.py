"""7B, 13B and 70B split over 2 to 64 GPUs: memory and bytes sent, simulated, beside `graft plan`: python bench/ranks.py

Each row is a real step of one of the ranks, through all of its Python code, Graft's splitting and PyTorch's FSDP2, on a fake
card (tensors with a shape, a dtype and a device and no values: `tests/gpu/fake_card.py`) and a fake process group: nothing is
sent. What is held at once is counted as the caching allocator rounds it, and what would be gathered and summed is counted too.
Not in it: CUDA's context, NCCL's buffers, the allocator's gaps, time.

    python bench/ranks.py                  every row that bench/results/ranks.json lacks, and docs/distributed.md's tables
    python bench/ranks.py --only 70B       rows whose name holds this text
    python bench/ranks.py --again          rows that are there are simulated anew too
    python bench/ranks.py --plan           nothing is simulated: only planned again, and the tables written

It needs a C++ compiler. Models have all of their layers: a row of 70B takes one to two minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "ranks.json"
PAGE = ROOT / "docs" / "distributed.md"
BEGIN, END = "<!-- ranks: written by `python bench/ranks.py` -->", "<!-- /ranks -->"
LAYOUTS, LAYOUTS_END = "<!-- layouts: written by `python bench/ranks.py` -->", "<!-- /layouts -->"
FIELD_MODELS = ("llama-2-7b", "llama-2-13b", "llama-2-70b")
FIELD_METHODS = {
    "full-bfloat16": "full, bfloat16 weights", "full-8bit": "full, bfloat16 weights, 8-bit AdamW", "lora": "LoRA on bfloat16",
    "qlora": "QLoRA (on nf4)",
}  # fmt: skip
FIELD_CARDS = ("a100-80gb", "rtx-4090")
WITHIN = 0.05


@dataclass(frozen=True, kw_only=True)
class Row:
    """A step of one micro-batch on each GPU of each node; rank 16 on all linear layers, activation checkpointing."""

    size: Literal["7b", "13b", "70b"]
    method: Literal["full", "lora", "qlora"]
    precision: Literal["bfloat16", "int8", "nf4"]
    tokens: int
    gpus: int
    nodes: int = 1
    layout: Literal["shard", "hybrid"] = "shard"
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    in_backward: bool = False
    offloaded: int = 0
    """Layers whose rows wait in the host's memory."""

    @property
    def name(self) -> str:
        """What the table calls it."""
        how = ", 8-bit AdamW" if self.optimizer == "adamw-8bit" else ""
        how += ", steps in backward" if self.in_backward else ""
        method = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}[self.method]
        where = f"{self.gpus} GPUs" if self.nodes == 1 else f"{self.nodes} x {self.gpus} GPUs, {self.layout}"
        host = f", {self.offloaded} layers on the host" if self.offloaded else ""
        return f"{self.size.upper()}: {method} in {self.precision}{how}, {self.tokens:,} tokens, {where}{host}"

    @property
    def config(self) -> dict[str, Any]:
        """The values of its `LlamaConfig`."""
        from graftlm.planning.models import built_in

        known = {**built_in()[f"llama-2-{self.size}"], "max_position_embeddings": 4096}
        return {name: value for name, value in known.items() if name not in ("hub", "model_type")}


def rows() -> list[Row]:
    """What the field trains on several GPUs."""
    full, eight = {"method": "full", "precision": "bfloat16"}, {"optimizer": "adamw-8bit"}
    lora, qlora = {"method": "lora", "precision": "bfloat16"}, {"method": "qlora", "precision": "nf4"}
    hybrid = {"gpus": 8, "nodes": 2, "layout": "hybrid"}
    return [
        Row(size="7b", tokens=2048, gpus=2, **full),
        Row(size="7b", tokens=2048, gpus=2, in_backward=True, **full, **eight),
        Row(size="7b", tokens=2048, gpus=2, offloaded=8, **lora),
        Row(size="13b", tokens=2048, gpus=8, **full),
        Row(size="13b", tokens=2048, gpus=2, **lora),
        Row(size="70b", tokens=2048, gpus=8, **full, **eight),
        Row(size="70b", tokens=2048, **hybrid, **full, **eight),
        Row(size="70b", tokens=4096, gpus=8, nodes=8, **full),
        Row(size="70b", tokens=1024, gpus=2, **lora),
        Row(size="70b", tokens=2048, **hybrid, **lora),
        Row(size="70b", tokens=2048, gpus=2, method="lora", precision="int8"),
        Row(size="70b", tokens=1024, gpus=2, **qlora),
        Row(size="70b", tokens=4096, gpus=8, nodes=8, **qlora),
    ]


# ---- the plan --------------------------------------------------------------------------------------------------------


def planned(row: Row) -> dict[str, int]:
    """Bytes on a GPU and bytes that it sends in a step, from the model's config alone."""
    from transformers import LlamaConfig

    from graftlm.planning.activations import Workload
    from graftlm.planning.fitting import PlanCase
    from graftlm.planning.hardware import card
    from graftlm.planning.instantiate import instantiate
    from graftlm.planning.layouts import Cluster, laid_out
    from graftlm.planning.method import TrainingSetting
    from graftlm.planning.rank_memory import of_one_rank, split_of

    load = Workload(tokens=row.tokens, target_tokens=row.tokens - 1, longest=row.tokens)
    shape = instantiate(LlamaConfig(**row.config))
    case = PlanCase(shape=shape, targets=("all-linear",), rank=16, load=load, card=card("h100"), fused=True)
    setting = TrainingSetting(
        key=row.method, label=row.method, method=row.method, precision=row.precision, compute_dtype="bfloat16",
        optimizer=row.optimizer, optimizer_in_backward=row.in_backward, activation_checkpointing=True,
    )  # fmt: skip
    cluster = Cluster(gpus=row.gpus, nodes=row.nodes)
    sent = laid_out(case, setting, cluster, row.layout, row.offloaded)
    took = of_one_rank(case.of(setting), shape, load, split_of(row.gpus, row.nodes, row.layout, row.offloaded))
    return {"planned": took.training, "planned_within": sent.within, "planned_between": sent.between}


# ---- the table -------------------------------------------------------------------------------------------------------


def table(figures: dict[str, dict[str, int]]) -> str:
    """The rows beside their plans, in GB."""
    lines = [
        "| run | simulated GB | plan GB | | sent within a node, GB | plan GB | between nodes, GB | plan GB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    errors: list[float] = []
    for row in rows():
        found = figures.get(row.name)
        if found is None:
            continue
        error = found["planned"] / found["peak"] - 1
        errors.append(abs(error))
        peak, plan, *sent = (
            f"{found[name] / 1e9:.2f}" if found[name] else "-"
            for name in ("peak", "planned", "within", "planned_within", "between", "planned_between")
        )
        lines.append(f"| {row.name} | {peak} | {plan} | {error:+.1%} | {' | '.join(sent)} |")
    within, most = sum(error <= WITHIN for error in errors), max(errors)
    lines += [
        "", f"{within} of {len(errors)} plans are within {WITHIN:.0%} of the simulation; the largest error is {most:.1%}.",
    ]  # fmt: skip
    return "\n".join(lines)


def layouts() -> str:
    """What the field trains: GPUs that it needs, and how it lies on two nodes of eight."""
    lines = [
        "| run | needs of a100-80gb | needs of rtx-4090 | on 2 x 8 a100-80gb | micro-batch | on each, GB "
        "| sent within a node, GB | between nodes, GB |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for model in FIELD_MODELS:
        for key, label in FIELD_METHODS.items():
            needs = " | ".join(_needs(model, key, on) for on in FIELD_CARDS)
            lines.append(f"| {model}: {label} | {needs} | {_on_two_nodes(model, key)} |")
    return "\n".join(lines)


def _field(model: str, key: str, on: str, examples: int, batch: int) -> tuple[Any, Any]:
    """A case of `batch` examples of 2,048 tokens, so many of them in a micro-batch, and how it is trained."""
    from graftlm.planning.activations import Workload
    from graftlm.planning.fitting import PlanCase
    from graftlm.planning.hardware import card
    from graftlm.planning.method import METHODS
    from graftlm.planning.models import find

    tokens = 2048 * examples
    load = Workload(
        tokens=tokens, target_tokens=tokens - examples, longest=2048, examples=examples, micro_batches=batch // examples
    )
    case = PlanCase(shape=find(model).shape, targets=("all-linear",), rank=16, load=load, card=card(on), fused=True)
    return case, next(m for m in METHODS if m.key == key).checkpointed()


def _needs(model: str, key: str, on: str) -> str:
    """GPUs that a micro-batch of one example on each needs, and where the weights are frozen how many with layers on the host,
    if these are fewer."""
    from graftlm.planning.layouts import GPUS_OF_A_NODE, Cluster, cards_needed, layout_of

    case, setting = _field(model, key, on, 1, 1)
    needed = cards_needed(case, setting)
    said = "more than 64" if needed is None else f"{needed}"
    count = 2
    while not setting.full and count < (needed or 0):
        here = min(count, GPUS_OF_A_NODE)
        found = layout_of(case, setting, Cluster(gpus=here, nodes=count // here))
        if found is not None:
            return f"{said}; {count} with {found.offloaded} layers on the host"
        count *= 2
    return said


def _on_two_nodes(model: str, key: str) -> str:
    """The layout of 64 examples a step on two nodes of eight."""
    from graftlm.planning.layouts import Cluster, layout_of

    case, setting = _field(model, key, FIELD_CARDS[0], 2, 64)
    found = layout_of(case, setting, Cluster(gpus=8, nodes=2))
    if found is None:
        return "does not fit | - | - | - | -"
    load = found.load
    sent = " | ".join(f"{value / 1e9:.2f}" for value in (found.within, found.between))
    return f"{found.words} | {load.micro_batches} x {load.tokens:,} | {found.bytes / 1e9:.1f} | {sent}"


def write_page(figures: dict[str, dict[str, int]]) -> None:
    """Write the tables into docs/distributed.md."""
    text = PAGE.read_text(encoding="utf-8")
    for begin, end, written in ((BEGIN, END, table(figures)), (LAYOUTS, LAYOUTS_END, layouts())):
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{written}\n{end}{rest.split(end)[1]}"
    PAGE.write_text(text, encoding="utf-8")


class Simulation:
    """The process in whose forks rows are simulated; it is started with the first."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def figures(self, row: Row) -> dict[str, int]:
        """A row's figures. Raises SystemExit where it fails; standard error says why."""
        if self._process is None:
            code = [sys.executable, str(Path(__file__).with_name("ranks_step.py"))]
            self._process = subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(
            json.dumps({**asdict(row), "ranks": row.gpus * row.nodes, "config": row.config}) + "\n"
        )
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{row.name} could not be simulated")
        return json.loads(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--again", action="store_true", help="simulate rows that are there anew")
    parser.add_argument("--plan", action="store_true", help="simulate nothing; plan again and write the table")
    given = parser.parse_args()
    known: dict[str, dict[str, int]] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    known = {row.name: known[row.name] for row in rows() if row.name in known}
    simulation = Simulation()
    for row in rows():
        wanted = given.only in row.name and (given.again or row.name not in known) and not given.plan
        if not wanted and row.name not in known:
            continue
        found = simulation.figures(row) if wanted else known[row.name]
        known[row.name] = {**found, **planned(row)}
        RESULTS.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        error = known[row.name]["planned"] / known[row.name]["peak"] - 1
        sys.stdout.write(f"{row.name}: {known[row.name]['peak'] / 1e9:.2f} GB, {error:+.1%}\n")
    write_page(known)


if __name__ == "__main__":
    main()
