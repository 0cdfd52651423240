"""What a person sees of a store: tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from graftlm.adapters.store.advice import command
from graftlm.adapters.store.shelf import Check, Shelf, Version
from graftlm.adapters.store.state import Name

_MANY = 500  # rows from which a table is printed as plain columns: rich lays out about 10,000 cells a second


def number(value: Any) -> str:
    """A loss or a distance as people read it; a dash for none."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 0.001 else f"{value:.4f}"


def size(count: float) -> str:
    """Bytes as 1.3 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError


def moment(text: Any) -> str:
    """When, to the minute, in the reader's own time."""
    try:
        return datetime.fromisoformat(str(text)).astimezone().strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return "-"


def gain(event: dict[str, Any]) -> str:
    """Held-out loss before and after."""
    before, after = event.get("before"), event.get("after")
    return "-" if before is None or after is None else f"{before:.4f} -> {after:.4f}"


def plain_table(title: str, *columns: str) -> Table:
    """A table in the house's form; a column whose head ends with `>` is set to the right."""
    table = Table(
        title=title or None, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False
    )
    for column in columns:
        right = column.endswith(">")
        table.add_column(column.rstrip(">"), justify="right" if right else "left", overflow="fold")
    return table


def print_names(console: Console, names: Sequence[tuple[Shelf, Name]]) -> None:
    """One line for each name."""
    table = plain_table(
        "", "name", "versions>", "newest", "aliases", "base", "method", "rank>", "held-out loss", "published"
    )
    for shelf, name in names:
        newest = name.newest
        assert newest is not None
        event = newest.event
        aliases = ", ".join(f"{alias} -> {at}" for alias, at in sorted(name.aliases.items()))
        table.add_row(
            escape(name.name), f"{len(name.versions):,}", f"{name.name}@{newest.number}", escape(aliases) or "-",
            f"{escape(str(event.get('base')))} {shelf.fingerprint[:8]}", str(event.get("method") or "-"),
            str(event.get("rank") or "-"), gain(event), moment(event.get("at")),
        )  # fmt: skip
    console.print(table)


def version_rows(versions: Sequence[Version]) -> list[tuple[str, ...]]:
    """The cells of a list of versions, the head first."""
    rows = [("version", "digest", "aliases", "held-out loss", "size", "published", "note")]
    rows += [
        (v.label, v.digest[:12], ", ".join(v.aliases) or "-", gain(v.event), size(float(v.event.get("bytes") or 0)),
         moment(v.event.get("at")), str(v.event.get("note") or ""))
        for v in versions
    ]  # fmt: skip
    return rows


def print_versions(console: Console, versions: Sequence[Version]) -> None:
    """One line for each version."""
    head, *rows = version_rows(versions)
    if len(rows) > _MANY:
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in (head, *rows))
        console.file.write("\n".join(lines) + "\n")
        return
    table = plain_table("", *head)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def print_name(console: Console, name: Name, versions: Sequence[Version]) -> None:
    """A name with each of its versions, and how its aliases moved."""
    print_versions(console, versions)
    if name.history:
        table = plain_table("\nhistory", "when", "what", "by")
        for event in name.history[-20:]:
            at = event.get("version")
            what = {
                "alias": f"{event.get('alias')} -> {at}",
                "rollback": f"{event.get('alias')} rolled back from {event.get('from')} to {at}",
                "unalias": f"{event.get('alias')} taken away from {at}",
                "remove": f"version {at} removed",
            }.get(event["do"], str(event["do"]))
            table.add_row(moment(event.get("at")), escape(str(what)), escape(str(event.get("by") or "-")))
        console.print(table)


def print_lineage(console: Console, found: dict[str, Any]) -> None:
    """One version: where it comes from and what it can do."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    base, data, published = found["base"], found["data"], found["published"]
    train = data.get("train") or {}
    aliases = f"  ({', '.join(found['aliases'])})" if found["aliases"] else ""
    rows: list[tuple[str, str]] = [
        ("version", f"{found['version']}{aliases}"),
        ("digest", found["digest"]),
        ("published", f"{moment(published['at'])} by {published['by']}, from {published['source']}"),
    ]
    if published["note"]:
        rows.append(("note", published["note"]))
    rows += [
        ("base", f"{base.get('name')}, {base.get('precision')}, {base.get('architecture') or 'unknown architecture'}"),
        ("", str(base.get("fingerprint"))),
        ("data", _data_line(train, data)),
        ("config", _config_line(found["config"], found["formula"])),
        ("held-out loss", gain(found["metrics"])),
        ("parents", ", ".join(p["version"] or p["digest"][:12] for p in found["parents"]) or "none"),
    ]
    if found["children"]:
        rows.append(("children", ", ".join(found["children"])))
    rows += [
        ("tensors", f"{found['tensors']:,} with {found['parameters']:,} values, {size(found['bytes'])}"),
        ("made with", ", ".join(f"{k} {v}" for k, v in list(found["made_with"].items())[:5]) or "-"),
        ("folder", found["folder"]),
    ]
    for label, text in rows:
        table.add_row(label, escape(text))
    console.print(table)


def _data_line(train: dict[str, Any], data: dict[str, Any]) -> str:
    if not data.get("digest"):
        return "not recorded"
    sources = ", ".join(str(s.get("name")) for s in train.get("sources") or ())
    counts = ", ".join(
        f"{train[key]:,} {words}" for key, words in (("rows", "rows"), ("tokens", "tokens"), ("trained_tokens", "trained"))
        if isinstance(train.get(key), int)
    )  # fmt: skip
    return f"{str(data['digest'])[:12]}: {sources}; {counts}"


def _config_line(config: dict[str, Any], formula: dict[str, Any]) -> str:
    wanted = ("method", "learning_rate", "steps", "epochs", "batch_size", "seed")
    parts = [f"{k.replace('_', ' ')} {config[k]}" for k in wanted if config.get(k) is not None]
    parts += [f"rank {formula.get('r')}", f"alpha {formula.get('lora_alpha')}"]
    parts += [word for word, key in (("DoRA", "use_dora"), ("rsLoRA", "use_rslora")) if formula.get(key)]
    targets = formula.get("target_modules")
    parts.append(f"on {', '.join(targets) if isinstance(targets, list) else targets}")
    return ", ".join(parts)


def print_differences(console: Console, found: dict[str, Any]) -> None:
    """What differs between two versions; of the layers those that are farthest apart."""
    a, b = found["first"]["version"], found["second"]["version"]
    for title, key in (("config", "config"), ("metrics", "metrics"), ("plan", "plan")):
        rows = found[key]
        if not rows:
            console.print(f"[bold]{title}[/bold]  the same", highlight=False)
            continue
        table = plain_table(f"{title}: {len(rows)} differ" if len(rows) > 1 else f"{title}: 1 differs", "", a, b)
        for row in rows[:30]:
            table.add_row(escape(row["key"]), escape(_short(row["first"])), escape(_short(row["second"])))
        if len(rows) > 30:
            table.add_row(f"and {len(rows) - 30} more", "", "")
        console.print(table)
    layers = found["weights"]["layers"]
    total = found["weights"]["distance"]
    table = plain_table(
        f"weights: relative distance {number(total)} over {len(layers)} layers", "layer", "distance>", "cosine>", f"|{a}|>",
        f"|{b}|>",
    )  # fmt: skip
    ordered = sorted(layers, key=lambda d: -1e9 if d["distance"] is None else -d["distance"])
    for d in ordered[:20]:
        table.add_row(
            escape(d["layer"]), number(d["distance"]), number(d["cosine"]), number(d["first"]), number(d["second"])
        )
    if len(ordered) > 20:
        table.add_row(f"and {len(ordered) - 20} nearer ones", "", "", "", "")
    console.print(table)


def _short(value: Any) -> str:
    text = "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_report(check: Check, store: Path) -> RenderableType:
    """What `verify` found."""
    if not check.faults:
        line = f"[green]whole[/green]: {check.versions:,} versions of {check.contents:,} contents, {size(check.bytes)} read"
    else:
        what = "1 is" if len(check.faults) == 1 else f"{len(check.faults):,} are"
        line = f"[red]{what} not as published[/red], of {check.versions:,} versions"
    table = plain_table("")
    table.show_header = False
    table.add_column()
    table.add_row(line)
    for fault in check.faults:
        table.add_row(f"[bold]{escape(fault.where)}[/bold]: {escape(fault.what)}")
    for left in check.leftovers:
        table.add_row(f"left over, no name has it: {escape(left)}")
    if check.leftovers:
        table.add_row(f"what is left over is removed by: {escape(command('verify', '--clean', store=store))}")
    return table


def print_drift(console: Console, found: dict[str, Any]) -> None:
    """How far each way of merging is from the live model."""
    live = found["live"]
    if live is None:
        return
    table = plain_table(
        f"{live['rows']} held-out rows, {live['tokens']:,} trained tokens", "merged onto", "loss>", "relative difference>",
        "same likeliest token>",
    )  # fmt: skip
    table.add_row("the live model", f"{live['loss']:.4f}", "-", "-")
    for d in found["drift"]:
        mark = " [bold](chosen)[/bold]" if d["onto"] == found["onto"] else ""
        table.add_row(f"{d['onto']}{mark}", f"{d['loss']:.4f}", number(d["relative"]), f"{d['agreement']:.1%}")
    console.print(table)


def print_merged(console: Console, done: dict[str, Any]) -> None:
    """What was measured and written."""
    print_drift(console, done)
    rounding = done["rounding"]
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in done["dtypes"].items())
    lines = [("written", f"{done['out']}: {size(done['bytes'])} in {len(done['shards'])} files, tensors: {kinds}")]
    if rounding["lost"] > 0:
        lines.append(
            (
                "rounding",
                f"took {rounding['lost']:.2%} of the update's size; {rounding['unmoved']:.1%} of its values moved nothing",
            )
        )
    if done["unties"]:
        lines.append(("head", "embedding and head were one tensor and are two now"))
    if done.get("gguf"):
        g = done["gguf"]
        lines.append(
            (
                "gguf",
                f"{g['file']}: {size(g['bytes'])}, {g['architecture']}, {g['tensors']:,} tensors, read back and compared",
            )
        )
    lines += [("note", note) for note in done["notes"]]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in lines:
        table.add_row(label, escape(text))
    console.print(table)
