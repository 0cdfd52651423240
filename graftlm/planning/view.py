"""A plan as a person reads it: a table for each model, what fits where, and the advice."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graftlm.planning.hardware import Card
from graftlm.planning.plan import Plan, Report, Row
from graftlm.planning.timing import BANDWIDTH_REACHED, EFFICIENCY
from graftlm.planning.words import count, duration, size

_PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "workspace")


def render(report: Report, console: Console) -> None:
    """Print everything."""
    card = report.card
    console.print(
        f"Planned for {card.name}: {size(card.memory)}, of which a run can use {size(card.usable)}", highlight=False
    )
    for plan in report.plans:
        console.print()
        _model(plan, report, console)
    if any(plan.known for plan in report.plans):
        console.print()
        _known(report, console)


def _model(plan: Plan, report: Report, console: Console) -> None:
    shape, load = plan.case.shape, plan.case.load
    facts = f"{count(shape.parameters)} parameters, {shape.layers} layers"
    console.print(Text(plan.model.name, style="bold"), Text(facts))
    documents = "one document" if load.documents == 1 else f"{load.documents} documents"
    passes = "one pass" if load.passes == 1 else f"{load.passes} passes"
    console.print(
        f"A step: {passes} of {documents} of {load.longest:,} tokens; rank {plan.case.rank} on {', '.join(plan.case.targets)}; "
        f"products in {report.card.compute}.",
        highlight=False,
    )
    console.print(_memory(plan, report.card))
    console.print(_fitting(plan, report))
    for row in plan.rows:
        if not row.fits and row.changes and row.need.setting.key in ("full", "lora", "qlora"):
            _changes(row, report.card, console)
    _advice(plan, console)
    for note in plan.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)


def _memory(plan: Plan, card: Card) -> Table:
    """Bytes of each part at the peak of training."""
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title="memory at the peak", title_justify="left", title_style="dim"
    )
    table.add_column("method", no_wrap=True)
    runtime = any(row.need.parts.runtime for row in plan.rows)
    for name in (*_PARTS, *(("runtime",) if runtime else ())):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("peak", justify="right", no_wrap=True)
    table.add_column("layers run again", justify="right", no_wrap=True)
    for row in plan.rows:
        values = row.need.parts.to_json()
        cells = [_cell(values[name]) for name in (*_PARTS, *(("runtime",) if runtime else ()))]
        good = "green" if row.fits else "red"
        again = "green" if row.checkpointed <= card.usable else "red"
        table.add_row(
            row.need.setting.label, *cells, Text(size(row.need.peak), style=f"bold {good}"),
            Text(size(row.checkpointed), style=again),
        )  # fmt: skip
    return table


def _cell(value: int) -> str:
    return size(value) if value else "-"


def _fitting(plan: Plan, report: Report) -> Table:
    """Where each method fits, how far it reaches, and how long it takes."""
    gpu = report.card.kind == "cuda"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="where it fits", title_justify="left", title_style="dim")
    table.add_column("method", no_wrap=True)
    table.add_column("fits", justify="right")
    if gpu:
        table.add_column("smallest card", no_wrap=True)
    table.add_column("batch", justify="right")
    table.add_column("length", justify="right")
    table.add_column("loading", justify="right", no_wrap=True)
    table.add_column("saved", justify="right", no_wrap=True)
    table.add_column("a step", justify="right", no_wrap=True)
    table.add_column("tokens/s", justify="right")
    if plan.facts.rows:
        epochs = "an epoch" if report.epochs == 1 else f"{report.epochs:g} epochs"
        table.add_column(epochs, justify="right", no_wrap=True)
    if plan.facts.rows and report.price_per_hour is not None:
        table.add_column("cost", justify="right")
    for row in plan.rows:
        table.add_row(*_reach(plan, row, report, gpu))
    table.caption = (
        "batch: most documents of this length in one pass; length: most tokens of one document. Times are estimates at "
        f"{EFFICIENCY[report.card.kind]:.0%} of the card's rate and {BANDWIDTH_REACHED:.0%} of its bandwidth."
    )
    if any((row.cards or 1) > 1 for row in plan.rows):
        table.caption += " on N: with weights split over N cards (FSDP), which graft train does not do itself."
    table.caption_style, table.caption_justify = "dim", "left"
    return table


def _reach(plan: Plan, row: Row, report: Report, gpu: bool) -> list[str]:
    fitting = "yes" if row.fits else "no" if row.cards is None else f"on {row.cards}"
    cells = [row.need.setting.label, fitting]
    if gpu:
        cells.append(row.smallest.key if row.smallest is not None else "several")
    cells += [f"{row.batch:,}" if row.batch else "-", f"{row.length:,}" if row.length else "-"]
    cells += [size(row.need.loading), size(row.need.saved)]
    cells += ["-", "-"] if row.time is None else [duration(row.time.step), f"{row.time.tokens_per_second:,.0f}"]
    if plan.facts.rows:
        seconds = report.seconds(plan, row)
        cells.append("-" if seconds is None else duration(seconds))
        if report.price_per_hour is not None:
            cost = None if seconds is None else report.cost(seconds, row.cards or 1)
            cells.append("-" if cost is None else f"{cost:,.2f}")
    return cells


def _changes(row: Row, card: Card, console: Console) -> None:
    name = row.need.setting.label.strip()
    console.print(f"{name} does not fit ({size(row.need.peak)}). Cheapest first:", highlight=False)
    for change in row.changes:
        enough = "" if change.peak > card.usable else " - fits"
        console.print(f"  {change.text}: {size(change.peak)}{enough}", markup=False, highlight=False)


def _advice(plan: Plan, console: Console) -> None:
    console.print(Text("advice", style="dim italic"))
    for sentence in plan.advice.reasons:
        console.print(Text(f"  {sentence}"), highlight=False)
    if plan.advice.would_change:
        console.print(Text("  What would change it:", style="dim"))
        for sentence in plan.advice.would_change:
            console.print(Text(f"    {sentence}"), highlight=False)
    if plan.advice.command:
        console.print(Text(f"  graft train {plan.advice.command}", style="bold"), highlight=False)


def _known(report: Report, console: Console) -> None:
    """The numbers that everybody quotes, beside ours."""
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title="the numbers that everybody quotes, on a GPU", title_justify="left",
        title_style="dim",
    )  # fmt: skip
    table.add_column("quoted", no_wrap=True)
    table.add_column("ours", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("under")
    before = ""
    for plan in report.plans:
        for answer in plan.known:
            style = "" if answer.verdict == "holds" else "green" if "lower" in answer.verdict else "yellow"
            quoted = "" if answer.claim.what == before else answer.claim.what
            before = answer.claim.what
            table.add_row(quoted, size(answer.ours * 1e9), Text(answer.verdict, style=style), answer.claim.under)
    console.print(table)
