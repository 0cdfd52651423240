"""A plan in the terminal: for each model the memory, what fits where, and the advice."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from graftlm.formatting import count, duration, size
from graftlm.planning.hardware import Card
from graftlm.planning.plan import MethodPlan, ModelPlan, PlanReport
from graftlm.planning.rules import Reason, plain
from graftlm.planning.timing import BANDWIDTH_REACHED, EFFICIENCY
from graftlm.terminal import Cell, Column, table

_PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "workspace", "runtime")
# On a narrow terminal parts share a column.
_JOINED = {
    "weights": ("weights",),
    "trained": ("adapters", "gradients", "optimizer"),
    "activations": ("activations", "logits", "workspace", "runtime"),
}
_WIDE = 140  # characters that every part in a column of its own takes


def render(report: PlanReport, console: Console) -> None:
    """Print everything."""
    card = report.card
    console.print(
        f"Planned for {card.name}: {size(card.memory)}, of which a run can use {size(card.usable)}", highlight=False
    )
    for plan in report.plans:
        console.print()
        _model(plan, report, console)
    if any(plan.quoted for plan in report.plans):
        console.print()
        _quoted(report, console)


def _model(plan: ModelPlan, report: PlanReport, console: Console) -> None:
    shape, load = plan.case.shape, plan.case.load
    facts = f"{count(shape.parameters)} parameters, {shape.layers} layers"
    console.print(Text(plan.model.name, style="bold"), Text(facts))
    examples = "one example" if load.examples == 1 else f"{load.examples} examples"
    micro_batches = "one micro-batch" if load.micro_batches == 1 else f"{load.micro_batches} micro-batches"
    console.print(
        f"A step: {micro_batches} of {examples} of {load.longest:,} tokens; rank {plan.case.rank} on "
        f"{', '.join(plan.case.targets)}; "
        f"matmuls in {report.card.matmul_dtype}.",
        highlight=False,
    )
    _memory(plan, report.card, console)
    _fitting(plan, report, console)
    if report.cluster.ranks > 1:
        _together(plan, report, console)
    for row in plan.rows:
        if not row.fits and row.changes and row.requirement.setting.key in ("full", "lora", "qlora"):
            _changes(row, report.card, console)
    _advice(plan, report, console)
    for note in plan.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)


def _memory(plan: ModelPlan, card: Card, where: Console) -> None:
    """Bytes of each part at the peak of training."""
    wide = where.width >= _WIDE
    parts = {name: (name,) for name in _PARTS} if wide else _JOINED
    if not any(row.requirement.parts.runtime for row in plan.rows):
        parts = {name: joined for name, joined in parts.items() if name != "runtime"}
    drops = {name: i for i, name in enumerate(parts, 1)}
    columns = [
        Column("method"), *(Column(name, right=True, drop=drops[name]) for name in parts), Column("peak", right=True),
        Column("checkpointed", right=True),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for row in plan.rows:
        values = row.requirement.parts.to_json()
        good = "green" if row.fits else "red"
        again = "green" if row.checkpointed <= card.usable else "red"
        rows.append(
            [
                row.requirement.setting.label, *(_cell(sum(values[p] for p in joined)) for joined in parts.values()),
                Text(size(row.requirement.peak), style=f"bold {good}"), Text(size(row.checkpointed), style=again),
            ]
        )  # fmt: skip
    note = (
        "trained: adapters, gradients and optimizer; activations: with logits and workspace; checkpointed: the peak with "
        "--activation-checkpointing. A terminal of 140 characters shows every part."
    )
    where.print()
    table(where, columns, rows, title="memory at the peak", note="" if wide else note)


def _cell(value: int) -> str:
    return size(value) if value else "-"


# Which columns are left out first where there is no room; `fits` and a step's or an epoch's time never are.
_LEFT_OUT = {"loading": 6, "saved": 5, "tokens/s": 4, "a step": 3, "length": 2, "batch": 1}


def _fitting(plan: ModelPlan, report: PlanReport, where: Console) -> None:
    """Where each method fits, how far it reaches, and how long it takes; a narrow terminal gets what matters most."""
    rows = [_reach(plan, row, report) for row in plan.rows]
    names = list(rows[0])
    columns = [
        Column(name, right=name not in ("method", "smallest card"), drop=_LEFT_OUT.get(name, 0)) for name in names
    ]
    note = (
        "batch: most examples of this length in one micro-batch; length: most tokens of one example. Times are estimates at "
        f"{EFFICIENCY[report.card.kind]:.0%} of the card's rate and {BANDWIDTH_REACHED:.0%} of its bandwidth."
    )
    if any((row.cards or 1) > 1 for row in plan.rows):
        note += " on N: with weights split over N cards (FSDP; docs/distributed.md)."
    where.print()
    table(where, columns, [[cells[name] for name in names] for cells in rows], title="where it fits", note=note)


def _reach(plan: ModelPlan, row: MethodPlan, report: PlanReport) -> dict[str, str]:
    """The cells of a method, by their columns' names."""
    cells = {
        "method": row.requirement.setting.label,
        "fits": "yes" if row.fits else "no" if row.cards is None else f"on {row.cards}",
    }
    if report.card.kind == "cuda":
        cells["smallest card"] = row.smallest.key if row.smallest is not None else "several"
    cells["batch"] = f"{row.batch:,}" if row.batch else "-"
    cells["length"] = f"{row.length:,}" if row.length else "-"
    cells["loading"], cells["saved"] = size(row.requirement.loading), size(row.requirement.saved)
    cells["a step"] = "-" if row.time is None else duration(row.time.step)
    cells["tokens/s"] = "-" if row.time is None else f"{row.time.tokens_per_second:,.0f}"
    if plan.facts.rows:
        seconds = report.seconds(plan, row)
        cells["an epoch" if report.epochs == 1 else f"{report.epochs:g} epochs"] = (
            "-" if seconds is None else duration(seconds)
        )
        if report.price_per_hour is not None:
            cost = None if seconds is None else report.cost(seconds, row.cards or 1)
            cells["cost"] = "-" if cost is None else f"{cost:,.2f}"
    return cells


def _together(plan: ModelPlan, report: PlanReport, where: Console) -> None:
    """How each method lies on the GPUs that were asked about."""
    several = report.cluster.nodes > 1
    columns = [
        Column("method"), Column("layout", words=True), Column("micro-batch", right=True, drop=3),
        Column("on each", right=True), Column("on the host", right=True, drop=2), Column("sent a step", right=True),
        *([Column("to other nodes", right=True)] if several else []), Column("over PCIe", right=True, drop=1),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for row in plan.rows:
        found = row.layout
        label = row.requirement.setting.label
        if found is None:
            rows.append([label, Text("does not fit", style="red"), *(["-"] * (len(columns) - 2))])
            continue
        values = (found.bytes, found.host, found.within, *([found.between] if several else []), found.copied)
        load = found.load
        times = f"{load.micro_batches} x " if load.micro_batches > 1 else ""
        rows.append([label, found.words, f"{times}{load.tokens:,}", *(_cell(value) for value in values)])
    note = (
        "layout: the first that fits. replicate: the whole model on each GPU; hybrid: on each node, split over its GPUs; "
        "shard: split over all, layers gathered as they run. micro-batch: tokens of one on each GPU. graft train has all of "
        "these (--layout); the bytes were simulated, not measured."
    )
    if several:
        note += " sent a step: to GPUs of the same node."
    where.print()
    table(where, columns, rows, title=f"on {report.cluster.words} x {report.card.name}", note=note)


def _changes(row: MethodPlan, card: Card, console: Console) -> None:
    name = row.requirement.setting.label.strip()
    console.print(f"{name} does not fit ({size(row.requirement.peak)}). Cheapest first:", highlight=False)
    for change in row.changes:
        enough = "" if change.peak > card.usable else " - fits"
        console.print(_indented(f"{change.text}: {size(change.peak)}{enough}", 2), highlight=False)


def _advice(plan: ModelPlan, report: PlanReport, console: Console) -> None:
    console.print(Text("advice", style="dim italic"))
    for reason in plan.advice.reasons:
        _reason(reason, console, 2, explain=report.explain)
    if plan.advice.would_change:
        console.print(Text("  What would change it:", style="dim"))
        for reason in plan.advice.would_change:
            _reason(reason, console, 4, explain=report.explain)
    command = report.command(plan)
    if command:
        console.print(Text(f"  {command}", style="bold"), soft_wrap=True)  # to be copied


def _reason(reason: Reason, console: Console, by: int, *, explain: bool) -> None:
    """A sentence, and where it is asked for the measurement behind it."""
    console.print(_indented(reason.text, by), highlight=False)
    if explain:
        rule = reason.rule
        threshold = "" if rule.threshold == "-" else f" ({rule.threshold})"
        console.print(_indented(f"{rule.name}{threshold}: {plain(rule.measurement)}", by + 2, "dim"), highlight=False)


def _indented(text: str, by: int, style: str = "") -> Padding:
    """A sentence whose further lines stand under its first."""
    return Padding(Text(text, style=style), (0, 0, 0, by))


def _quoted(report: PlanReport, console: Console) -> None:
    """The figures that are usually quoted, beside ours."""
    columns = [Column("quoted"), Column("ours", right=True), Column(), Column("under", words=True)]
    rows: list[list[Cell]] = []
    before = ""
    for plan in report.plans:
        for answer in plan.quoted:
            style = "" if answer.verdict == "holds" else "green" if "lower" in answer.verdict else "yellow"
            quoted = "" if answer.claim.what == before else answer.claim.what
            before = answer.claim.what
            rows.append([quoted, size(answer.ours * 1e9), Text(answer.verdict, style=style), answer.claim.under])
    table(console, columns, rows, title="figures that are usually quoted, on a GPU")
