"""Tables of a store, a version, a difference or a merge for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any

from rich.console import Console
from rich.text import Text

from graftlm.adapters.store.advice import command
from graftlm.adapters.store.base_versions import BaseVersions, VerifyReport, Version
from graftlm.adapters.store.replay import NamedAdapter
from graftlm.formatting import size
from graftlm.terminal import Column, facts, table

_MANY = 500  # rows from which a table is printed as plain columns: rich lays out about 10,000 cells a second


def number(value: Any) -> str:
    """A loss or a distance; a dash for None."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 0.001 else f"{value:.4f}"


def moment(text: Any) -> str:
    """A time, to the minute, in the local time zone."""
    try:
        return datetime.fromisoformat(str(text)).astimezone().strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return "-"


def gain(event: dict[str, Any]) -> str:
    """Eval loss before and after."""
    before, after = event.get("before"), event.get("after")
    return "-" if before is None or after is None else f"{before:.4f} -> {after:.4f}"


def print_names(where: Console, names: Sequence[tuple[BaseVersions, NamedAdapter]]) -> None:
    """One line for each name."""
    columns = [
        Column("newest"), Column("versions", right=True, drop=4), Column("aliases", drop=1), Column("eval loss", drop=3),
        Column("base", drop=2), Column("method", drop=6), Column("rank", right=True, drop=7), Column("published", drop=5),
    ]  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for base_versions, name in names:
        newest = name.newest
        assert newest is not None
        event = newest.event
        aliases = "\n".join(f"{alias} -> {at}" for alias, at in sorted(name.aliases.items()))
        rows.append(
            (
                f"{name.name}@{newest.number}", f"{len(name.versions):,}", aliases or "-", gain(event),
                f"{_base_label(event.get('base'))} {base_versions.fingerprint[:8]}", str(event.get("method") or "-"),
                str(event.get("rank") or "-"), moment(event.get("at")),
            )
        )  # fmt: skip
    table(where, columns, rows)


def _base_label(name: Any) -> str:
    """A base's short name: a hub id unchanged, the last part of a folder."""
    text = str(name)
    return PurePath(text).name if text.count("/") > 1 or text.startswith(("/", ".", "~")) else text


def version_rows(versions: Sequence[Version]) -> list[tuple[str, ...]]:
    """The cells of a list of versions, the head first."""
    rows = [("version", "digest", "aliases", "eval loss", "size", "published", "note")]
    rows += [
        (v.label, v.digest[:12], ", ".join(v.aliases) or "-", gain(v.event), size(float(v.event.get("bytes") or 0)),
         moment(v.event.get("at")), str(v.event.get("note") or ""))
        for v in versions
    ]  # fmt: skip
    return rows


_VERSION_DROPS = {"eval loss": 2, "size": 4, "published": 3, "aliases": 1}


def print_versions(where: Console, versions: Sequence[Version]) -> None:
    """One line for each version."""
    head, *rows = version_rows(versions)
    if len(rows) > _MANY:
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in (head, *rows))
        where.file.write("\n".join(lines) + "\n")
        return
    noted = any(row[-1] for row in rows)
    columns = [
        Column(text, right=text == "size", drop=_VERSION_DROPS.get(text, 0), words=text in ("aliases", "note"))
        for text in head if noted or text != "note"
    ]  # fmt: skip
    table(where, columns, rows)


def print_name(where: Console, name: NamedAdapter, versions: Sequence[Version]) -> None:
    """A name with its versions, and the history of its aliases."""
    print_versions(where, versions)
    if name.history:
        rows: list[tuple[str, str, str]] = []
        for event in name.history[-20:]:
            at = event.get("version")
            what = {
                "alias": f"{event.get('alias')} -> {at}",
                "rollback": f"{event.get('alias')} rolled back from {event.get('from')} to {at}",
                "unalias": f"{event.get('alias')} deleted, was {at}",
                "remove": f"version {at} removed",
            }.get(event["do"], str(event["do"]))
            rows.append((moment(event.get("at")), what, str(event.get("by") or "-")))
        where.print()
        table(where, [Column("when"), Column("what", words=True), Column("by", drop=1)], rows, title="history")


def print_lineage(where: Console, found: dict[str, Any]) -> None:
    """One version: its base, data, config and results."""
    base, data, published = found["base"], found["data"], found["published"]
    train = data.get("train") or {}
    aliases = f" ({', '.join(found['aliases'])})" if found["aliases"] else ""
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
        ("eval loss", gain(found["metrics"])),
        ("parents", ", ".join(p["version"] or p["digest"][:12] for p in found["parents"]) or "none"),
    ]
    if found["children"]:
        rows.append(("children", ", ".join(found["children"])))
    rows += [
        ("tensors", f"{found['tensors']:,} with {found['parameters']:,} values, {size(found['bytes'])}"),
        ("made with", ", ".join(f"{k} {v}" for k, v in list(found["made_with"].items())[:5]) or "-"),
        ("folder", found["folder"]),
    ]
    facts(where, rows)


def _data_line(train: dict[str, Any], data: dict[str, Any]) -> str:
    train = {"target_tokens" if key == "trained_tokens" else key: value for key, value in train.items()}
    if not data.get("digest"):
        return "not recorded"
    sources = ", ".join(str(s.get("name")) for s in train.get("sources") or ())
    counts = ", ".join(
        f"{train[key]:,} {words}" for key, words in (("rows", "rows"), ("tokens", "tokens"), ("target_tokens", "target tokens"))
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


def print_differences(where: Console, found: dict[str, Any]) -> None:
    """The differences between two versions; of the layers, those with the largest distance."""
    a, b = found["first"]["version"], found["second"]["version"]
    for title, key in (("config", "config"), ("metrics", "metrics"), ("plan", "plan")):
        rows = found[key]
        if not rows:
            where.print(Text.assemble((title, "bold"), "  the same"))
            continue
        cells = [(row["key"], _short(row["first"]), _short(row["second"])) for row in rows[:30]]
        differ = f"{title}: {len(rows)} differ" if len(rows) > 1 else f"{title}: 1 differs"
        more = f"and {len(rows) - 30} more" if len(rows) > 30 else ""
        table(where, [Column(), Column(a, words=True), Column(b, words=True)], cells, title=differ, note=more)
    layers = found["weights"]["layers"]
    ordered = sorted(layers, key=lambda d: -1e9 if d["distance"] is None else -d["distance"])
    columns = [
        Column("layer"), Column("distance", right=True), Column("cosine", right=True), Column(f"|{a}|", right=True, drop=1),
        Column(f"|{b}|", right=True, drop=1),
    ]  # fmt: skip
    table(
        where, columns,
        [(d["layer"], *(number(d[key]) for key in ("distance", "cosine", "first", "second"))) for d in ordered[:20]],
        title=f"weights: relative distance {number(found['weights']['distance'])} over {len(layers)} layers",
        note=f"and {len(ordered) - 20} nearer ones" if len(ordered) > 20 else "",
    )  # fmt: skip


def _short(value: Any) -> str:
    text = "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def print_check(where: Console, check: VerifyReport, store: Path) -> None:
    """The result of `verify`."""
    if not check.faults:
        whole = f": {check.versions:,} versions of {check.contents:,} contents, {size(check.bytes)} read"
        where.print(Text.assemble(("whole", "green"), whole), soft_wrap=True)
    else:
        what = "1 is" if len(check.faults) == 1 else f"{len(check.faults):,} are"
        counted = f", of {check.versions:,} versions"
        where.print(Text.assemble((f"{what} not as published", "red"), counted), soft_wrap=True)
    for fault in check.faults:
        where.print(Text.assemble((fault.where, "bold"), f": {fault.what}"), soft_wrap=True)
    for left in check.leftovers:
        where.print(Text(f"left over, no version refers to it: {left}"), soft_wrap=True)
    if check.leftovers:
        advised = command("verify", "--clean", store=store)
        where.print(Text(f"to remove what is left over: {advised}"), soft_wrap=True)


def print_drift(where: Console, found: dict[str, Any]) -> None:
    """The drift of each way of merging."""
    live = found["live"]
    if live is None:
        return
    columns = [Column("merged onto")]
    columns += [Column(head, right=True) for head in ("loss", "relative difference", "same most likely token")]
    rows = [("the live model", f"{live['loss']:.4f}", "-", "-")]
    for d in found["drift"]:
        mark = " (chosen)" if d["onto"] == found["onto"] else ""
        rows.append((f"{d['onto']}{mark}", f"{d['loss']:.4f}", number(d["relative"]), f"{d['agreement']:.1%}"))
    table(where, columns, rows, title=f"{live['rows']} eval rows, {live['tokens']:,} target tokens")


def print_merged(where: Console, done: dict[str, Any]) -> None:
    """The measured drift, and the written files."""
    print_drift(where, done)
    rounding = done["rounding"]
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in done["dtypes"].items())
    files = "one file" if len(done["shards"]) == 1 else f"{len(done['shards'])} files"
    lines = [("written", f"{done['out']}: {size(done['bytes'])} in {files}, tensors: {kinds}")]
    if rounding["lost"] > 0:
        lines.append(
            (
                "rounding",
                f"took {rounding['lost']:.2%} of the update's size; {rounding['unmoved']:.1%} of its values moved nothing",
            )
        )
    if done["unties"]:
        lines.append(("head", "embedding and head were tied and are two tensors now"))
    if done.get("gguf"):
        g = done["gguf"]
        lines.append(
            (
                "gguf",
                f"{g['file']}: {size(g['bytes'])}, {g['architecture']}, {g['tensors']:,} tensors, read back and compared",
            )
        )
    lines += [("note", note) for note in done["notes"]]
    facts(where, lines)
