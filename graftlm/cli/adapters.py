"""`graft adapters`: publish, list, show, diff, verify, alias, rollback, remove, import, export, push, pull."""

from __future__ import annotations

import typer

from graftlm import config as configs
from graftlm.cli.app import Json, app, options, print_json, starting
from graftlm.terminal import console

group = typer.Typer(
    help="Store adapters: names, immutable numbered versions, aliases, rollback, sharing.",
    no_args_is_help=True,
    epilog="Example:  graft adapters publish runs/first --name formal",
    rich_markup_mode="rich",
)
app.add_typer(group, name="adapters")


def _print(text: str) -> None:
    console(soft_wrap=True).print(text, highlight=False, markup=False)


@group.command(epilog='Example:  graft adapters publish runs/first --name formal --note "three epochs"')
@options(configs.PublishConfig)
def publish(config: configs.PublishConfig, json: Json = False) -> None:
    """Publish a run's adapter as the next version of a name. A version never changes."""
    with starting():
        from graftlm.commands.adapters import publish

    version, new = publish(config)
    if json:
        print_json({**version.to_json(), "new": new})
    else:
        _print(f"published {version.label}  {version.digest[:12]}" if new else f"{version.label} holds this already")


@group.command("list", epilog="Examples:\n\ngraft adapters list\n\ngraft adapters list formal")
@options(configs.ListConfig)
def list_(config: configs.ListConfig, json: Json = False) -> None:
    """List the names of a store, or the versions of one name."""
    from graftlm.adapters.store import tables as view
    from graftlm.commands.adapters import every_version, names, versions_of

    if config.name is not None:
        name, versions = versions_of(config, config.name)
        if json:
            print_json({"versions": [v.to_json() for v in versions], "history": name.history})
        else:
            view.print_name(console(), name, versions)
    elif json:
        print_json({"versions": [v.to_json() for v in every_version(config)]})
    else:
        view.print_names(console(), names(config))


@group.command(epilog="Example:  graft adapters show formal@prod")
@options(configs.ShowConfig)
def show(config: configs.ShowConfig, json: Json = False) -> None:
    """Show a version's base, data, config, losses before and after, and parents."""
    from graftlm.adapters.store import tables as view
    from graftlm.commands.adapters import show

    found = show(config)
    if json:
        print_json(found)
    else:
        view.print_lineage(console(), found)


@group.command(epilog="Example:  graft adapters diff formal@1 formal@2")
@options(configs.DiffConfig)
def diff(config: configs.DiffConfig, json: Json = False) -> None:
    """Compare two versions: config, tensors, losses, and the distance of each layer's weights."""
    with starting():
        from graftlm.adapters.store import tables as view
        from graftlm.commands.adapters import diff

    found = diff(config)
    if json:
        print_json(found)
    else:
        view.print_differences(console(), found)


@group.command(epilog="Example:  graft adapters verify")
@options(configs.VerifyConfig)
def verify(config: configs.VerifyConfig, json: Json = False) -> None:
    """Check every byte of every version against what was published; exit status 2 for a difference."""
    with starting():
        from graftlm.adapters.store import tables as view
        from graftlm.commands.adapters import verify

    check, cleaned = verify(config)
    if json:
        faults = [{"where": f.where, "what": f.what} for f in check.faults]
        print_json({
            "versions": check.versions, "contents": check.contents, "bytes": check.bytes, "faults": faults,
            "leftovers": check.leftovers, "cleaned": cleaned,
        })  # fmt: skip
    else:
        for path in cleaned:
            _print(f"removed {path}")
        view.print_check(console(), check, config.store)
    if check.faults:
        raise SystemExit(2)


@group.command(epilog="Example:  graft adapters alias formal prod 1")
@options(configs.AliasConfig)
def alias(config: configs.AliasConfig, json: Json = False) -> None:
    """Point an alias at a version."""
    from graftlm.commands.adapters import alias

    label = f"{config.name}@{config.alias}"
    before, now = alias(config)
    if json:
        print_json({"name": config.name, "alias": config.alias, "before": before, "now": now})
    elif now is None:
        _print(f"{label} is gone; it pointed at {before}")
    else:
        _print(f"{label} -> {now}" + (f", before {before}" if before not in (None, now) else ""))


@group.command(epilog="Example:  graft adapters rollback formal prod")
@options(configs.RollbackConfig)
def rollback(config: configs.RollbackConfig, json: Json = False) -> None:
    """Point an alias back at its previous version."""
    from graftlm.commands.adapters import rollback

    before, now = rollback(config)
    if json:
        print_json({"name": config.name, "alias": config.alias, "before": before, "now": now})
    else:
        _print(f"{config.name}@{config.alias} -> {now}, before {before}")


@group.command(epilog="Example:  graft adapters remove formal@1")
@options(configs.RemoveConfig)
def remove(config: configs.RemoveConfig, json: Json = False) -> None:
    """Remove a version; refused while an alias points at it."""
    from graftlm.commands.adapters import remove

    version, gone = remove(config)
    if json:
        print_json({"version": version.label, "digest": version.digest, "content_removed": gone})
    else:
        _print(f"removed {version.label}" + ("" if gone else "; another version has its content, which stays"))


@group.command("import", epilog="Example:  graft adapters import ./their-lora --name theirs --model Qwen/Qwen3-0.6B")
@options(configs.ImportConfig)
def import_(config: configs.ImportConfig, json: Json = False) -> None:
    """Import a PEFT adapter, a folder or a hub id, after checking it on its base."""
    with starting():
        from graftlm.commands.adapters import import_

    version, new, notes = import_(config)
    if json:
        print_json({**version.to_json(), "new": new, "notes": notes})
    else:
        _print(f"imported {version.label}  {version.digest[:12]}" if new else f"{version.label} holds this already")
        for note in notes:
            console(stderr=True, soft_wrap=True).print(f"note: {note}", highlight=False, markup=False)


@group.command(
    epilog="Examples:\n\ngraft adapters export formal@prod ./for-vllm --for vllm\n\n"
    "graft adapters export formal@prod formal.gguf --for gguf"
)
@options(configs.ExportConfig)
def export(config: configs.ExportConfig, json: Json = False) -> None:
    """Write a version as a plain PEFT folder, converted for vLLM, or as a GGUF file for llama.cpp."""
    with starting():
        from graftlm.commands.adapters import export

    done = export(config)
    if json:
        print_json(done)
    else:
        _print(f"wrote {done['out']}: rank {done['rank']}, alpha {done['alpha']:g}, {done['tensors']:,} tensors")
        for note in done["notes"]:
            console(stderr=True, soft_wrap=True).print(f"note: {note}", highlight=False, markup=False)


@group.command(
    epilog="Examples:\n\ngraft adapters push s3://bucket/adapters formal@1\n\ngraft adapters push owner/name formal@prod"
)
@options(configs.PushConfig)
def push(config: configs.PushConfig, json: Json = False) -> None:
    """Upload versions to an object store, a folder, or the Hugging Face hub."""
    with starting():
        from graftlm.commands.push_pull import push as send

    done = send(config)
    if json:
        print_json(done)
    else:
        for line in done["versions"]:
            _print(f"{'pushed' if line['new'] else 'there already:'} {line['version']}  {line['digest'][:12]}")


@group.command(
    epilog="Examples:\n\ngraft adapters pull s3://bucket/adapters\n\ngraft adapters pull owner/name --name theirs"
)
@options(configs.PullConfig)
def pull(config: configs.PullConfig, json: Json = False) -> None:
    """Download versions from an object store, a folder, or the hub; each is checked by its digest."""
    with starting():
        from graftlm.commands.push_pull import pull as fetch

    done = fetch(config)
    if json:
        print_json(done)
    else:
        for line in done["versions"]:
            _print(f"{'pulled' if line['new'] else 'here already:'} {line['version']}  {line['digest'][:12]}")
