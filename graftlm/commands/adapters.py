"""`graft adapters`: each subcommand from its config to values; push and pull are `push_pull.py`."""

from __future__ import annotations

from typing import Any

from graftlm import config as configs
from graftlm.adapters.store import BaseVersions, NamedAdapter, Store, VerifyReport, Version
from graftlm.progress import working


def publish(config: configs.PublishConfig) -> tuple[Version, bool]:
    """A run's adapter as the next version of a name, and whether it is a new one. Raises StoreError, AdapterError."""
    with working(f"publishing {config.name}"):
        store = Store(config.store)
        parents = [store.find(text).digest for text in config.parents]
        return store.publish(config.source, config.name, note=config.note, parents=parents)


def names(config: configs.ListConfig) -> list[tuple[BaseVersions, NamedAdapter]]:
    """Every name of the store, with its base. Raises StoreError."""
    return Store(config.store).names(config.base)


def every_version(config: configs.ListConfig) -> list[Version]:
    """Every version of the store, by name and number. Raises StoreError."""
    return Store(config.store).versions(config.base)


def versions_of(config: configs.ListConfig, name: str) -> tuple[NamedAdapter, list[Version]]:
    """One name, and its versions. Raises StoreError."""
    base_versions, named = Store(config.store).name(name, config.base)
    return named, [base_versions.version(e, named.pointing_at(n)) for n, e in sorted(named.versions.items())]


def show(config: configs.ShowConfig) -> dict[str, Any]:
    """Where a version comes from. Raises StoreError."""
    from graftlm.adapters.store.lineage import lineage

    store = Store(config.store)
    return lineage(store, store.find(config.version, config.base))


def diff(config: configs.DiffConfig) -> dict[str, Any]:
    """How two versions differ. Raises StoreError."""
    from graftlm.adapters.store.lineage import differences

    store = Store(config.store)
    with working("comparing the versions"):
        return differences(store, store.find(config.first, config.base), store.find(config.second, config.base))


def verify(config: configs.VerifyConfig) -> tuple[VerifyReport, list[str]]:
    """What every byte of every version was found to be, and what was cleaned away before. Raises StoreError."""
    store = Store(config.store)
    cleaned = store.clean() if config.clean else []
    return store.verify(config.base), cleaned


def alias(config: configs.AliasConfig) -> tuple[int | None, int | None]:
    """Where an alias pointed, and where it points now; None for nowhere. Raises StoreError."""
    store = Store(config.store)
    if config.delete:
        return store.unalias(config.name, config.alias, config.base), None
    return store.alias(config.name, config.alias, config.version, config.base)


def rollback(config: configs.RollbackConfig) -> tuple[int, int]:
    """Where an alias pointed, and where it points again. Raises StoreError."""
    return Store(config.store).rollback(config.name, config.alias, config.base)


def remove(config: configs.RemoveConfig) -> tuple[Version, bool]:
    """The version that was removed, and whether its content went too. Raises StoreError."""
    return Store(config.store).remove(config.version, config.base)


def import_(config: configs.ImportConfig) -> tuple[Version, bool, list[str]]:
    """An adapter of PEFT's as a version, whether it is a new one, and notes. Raises GraftError."""
    from graftlm.adapters.fetching import import_adapter

    with working(f"importing {config.source}"):
        return import_adapter(config)


def export(config: configs.ExportConfig) -> dict[str, Any]:
    """Write a version as a plain PEFT folder, for vLLM, or as a GGUF file. Raises GraftError."""
    from graftlm.adapters.export import export_adapter

    with working(f"exporting {config.version}"):
        return export_adapter(config)
