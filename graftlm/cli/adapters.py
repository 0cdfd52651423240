"""`graft adapters`: publish, list, show, diff, verify, alias, rollback, remove, import, export, push, pull."""

from __future__ import annotations

import typer

from graftlm import config as configs
from graftlm.cli.app import Json, app, options, print_json, starting
from graftlm.progress import working
from graftlm.terminal import console

group = typer.Typer(
    help="Keep adapters: names, numbered versions that never change, aliases, rollback, sharing.",
    no_args_is_help=True,
    epilog="Example:  graft adapters publish runs/first --name formal",
    rich_markup_mode="rich",
)
app.add_typer(group, name="adapters")


def _said(text: str) -> None:
    console(soft_wrap=True).print(text, highlight=False, markup=False)


@group.command(epilog='Example:  graft adapters publish runs/first --name formal --note "three epochs"')
@options(configs.PublishConfig, positional="source")
def publish(config: configs.PublishConfig, json: Json = False) -> None:
    """Publish a run's adapter as the next version of a name; it never changes again."""
    with starting():
        from graftlm.adapters.store import Store

    with working(f"publishing {config.name}"):
        store = Store(config.store)
        parents = [store.find(text).digest for text in config.parents]
        version, new = store.publish(config.source, config.name, note=config.note, parents=parents)
    if json:
        print_json({**version.to_json(), "new": new})
    else:
        _said(f"published {version.label}  {version.digest[:12]}" if new else f"{version.label} holds this already")


@group.command("list", epilog="Examples:\n\ngraft adapters list\n\ngraft adapters list formal")
@options(configs.ListConfig, positional="name")
def list_(config: configs.ListConfig, json: Json = False) -> None:
    """List the names of a store, or the versions of one name."""
    from graftlm.adapters.store import Store
    from graftlm.adapters.store import tables as view

    store = Store(config.store)
    if config.name is not None:
        base_versions, name = store.name(config.name, config.base)
        versions = [base_versions.version(e, name.pointing_at(n)) for n, e in sorted(name.versions.items())]
        if json:
            print_json({"versions": [v.to_json() for v in versions], "history": name.history})
        else:
            view.print_name(console(), name, versions)
    elif json:
        print_json({"versions": [v.to_json() for v in store.versions(config.base)]})
    else:
        view.print_names(console(), store.names(config.base))


@group.command(epilog="Example:  graft adapters show formal@prod")
@options(configs.ShowConfig, positional="version")
def show(config: configs.ShowConfig, json: Json = False) -> None:
    """Show where a version comes from: base, data, config, losses before and after, parents."""
    from graftlm.adapters.store import Store
    from graftlm.adapters.store import tables as view
    from graftlm.adapters.store.lineage import lineage

    store = Store(config.store)
    found = lineage(store, store.find(config.version, config.base))
    if json:
        print_json(found)
    else:
        view.print_lineage(console(), found)


@group.command(epilog="Example:  graft adapters diff formal@1 formal@2")
@options(configs.DiffConfig, positional=("first", "second"))
def diff(config: configs.DiffConfig, json: Json = False) -> None:
    """Compare two versions: config, plan of tensors, losses, and how far the weights of each layer are apart."""
    with starting():
        from graftlm.adapters.store import Store
        from graftlm.adapters.store import tables as view
        from graftlm.adapters.store.lineage import differences

    store = Store(config.store)
    with working("comparing the versions"):
        found = differences(store, store.find(config.first, config.base), store.find(config.second, config.base))
    if json:
        print_json(found)
    else:
        view.print_differences(console(), found)


@group.command(epilog="Example:  graft adapters verify")
@options(configs.VerifyConfig)
def verify(config: configs.VerifyConfig, json: Json = False) -> None:
    """Read every byte of every version and hold it against what was published; exit status 2 for a difference."""
    with starting():
        from graftlm.adapters.store import Store
        from graftlm.adapters.store import tables as view

    store = Store(config.store)
    cleaned = store.clean() if config.clean else []
    check = store.verify(config.base)
    if json:
        faults = [{"where": f.where, "what": f.what} for f in check.faults]
        print_json({
            "versions": check.versions, "contents": check.contents, "bytes": check.bytes, "faults": faults,
            "leftovers": check.leftovers, "cleaned": cleaned,
        })  # fmt: skip
    else:
        for path in cleaned:
            _said(f"removed {path}")
        view.print_check(console(), check, config.store)
    if check.faults:
        raise SystemExit(2)


@group.command(epilog="Example:  graft adapters alias formal prod 1")
@options(configs.AliasConfig, positional=("name", "alias", "version"))
def alias(config: configs.AliasConfig, json: Json = False) -> None:
    """Point an alias at a version."""
    from graftlm.adapters.store import Store

    store, label = Store(config.store), f"{config.name}@{config.alias}"
    if config.delete:
        before, now = store.unalias(config.name, config.alias, config.base), None
    else:
        before, now = store.alias(config.name, config.alias, config.version, config.base)
    if json:
        print_json({"name": config.name, "alias": config.alias, "before": before, "now": now})
    elif now is None:
        _said(f"{label} is gone; it pointed at {before}")
    else:
        _said(f"{label} -> {now}" + (f", before {before}" if before not in (None, now) else ""))


@group.command(epilog="Example:  graft adapters rollback formal prod")
@options(configs.RollbackConfig, positional=("name", "alias"))
def rollback(config: configs.RollbackConfig, json: Json = False) -> None:
    """Point an alias at what it pointed at before."""
    from graftlm.adapters.store import Store

    before, now = Store(config.store).rollback(config.name, config.alias, config.base)
    if json:
        print_json({"name": config.name, "alias": config.alias, "before": before, "now": now})
    else:
        _said(f"{config.name}@{config.alias} -> {now}, before {before}")


@group.command(epilog="Example:  graft adapters remove formal@1")
@options(configs.RemoveConfig, positional="version")
def remove(config: configs.RemoveConfig, json: Json = False) -> None:
    """Remove a version; refused while an alias points at it."""
    from graftlm.adapters.store import Store

    version, gone = Store(config.store).remove(config.version, config.base)
    if json:
        print_json({"version": version.label, "digest": version.digest, "content_removed": gone})
    else:
        _said(f"removed {version.label}" + ("" if gone else "; another version has its content, which stays"))


@group.command("import", epilog="Example:  graft adapters import ./their-lora --name theirs --model Qwen/Qwen3-0.6B")
@options(configs.ImportConfig, positional="source")
def import_(config: configs.ImportConfig, json: Json = False) -> None:
    """Bring in an adapter of PEFT's, a folder or a hub id, once it has passed the checks on its base."""
    with starting():
        from graftlm.adapters.fetching import import_adapter

    with working(f"importing {config.source}"):
        version, new, notes = import_adapter(config)
    if json:
        print_json({**version.to_json(), "new": new, "notes": notes})
    else:
        _said(f"imported {version.label}  {version.digest[:12]}" if new else f"{version.label} holds this already")
        for note in notes:
            console(stderr=True, soft_wrap=True).print(f"note: {note}", highlight=False, markup=False)


@group.command(epilog="Example:  graft adapters export formal@prod ./for-vllm --for vllm")
@options(configs.ExportConfig, positional=("version", "out"))
def export(config: configs.ExportConfig, json: Json = False) -> None:
    """Write a version as a plain PEFT folder, or made fit for vLLM."""
    with starting():
        from graftlm.adapters.export import export_adapter

    with working(f"exporting {config.version}"):
        done = export_adapter(config)
    if json:
        print_json(done)
    else:
        _said(f"wrote {done['out']}: rank {done['rank']}, alpha {done['alpha']:g}, {done['tensors']:,} tensors")
        for note in done["notes"]:
            console(stderr=True, soft_wrap=True).print(f"note: {note}", highlight=False, markup=False)


@group.command(
    epilog="Examples:\n\ngraft adapters push s3://bucket/adapters formal@1\n\ngraft adapters push owner/name formal@prod"
)
@options(configs.PushConfig, positional=("place", "versions"))
def push(config: configs.PushConfig, json: Json = False) -> None:
    """Copy versions to an object store, a folder, or the Hugging Face hub."""
    with starting():
        from graftlm.commands.push_pull import push as send

    done = send(config)
    if json:
        print_json(done)
    else:
        for line in done["versions"]:
            _said(f"{'pushed' if line['new'] else 'there already:'} {line['version']}  {line['digest'][:12]}")


@group.command(
    epilog="Examples:\n\ngraft adapters pull s3://bucket/adapters\n\ngraft adapters pull owner/name --name theirs"
)
@options(configs.PullConfig, positional=("place", "versions"))
def pull(config: configs.PullConfig, json: Json = False) -> None:
    """Copy versions from an object store, a folder, or the hub; each is checked by its digest before it is there."""
    with starting():
        from graftlm.commands.push_pull import pull as fetch

    done = fetch(config)
    if json:
        print_json(done)
    else:
        for line in done["versions"]:
            _said(f"{'pulled' if line['new'] else 'here already:'} {line['version']}  {line['digest'][:12]}")
