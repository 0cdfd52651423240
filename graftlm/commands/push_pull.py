"""`graft adapters push` and `pull`: which versions, and to or from what kind of place.

An address with `://`, a directory, or a path that begins with `.`, `/` or `~` is a place for `remote.py`; `owner/name` is a
repository of the hub.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from graftlm.adapters.store import hub
from graftlm.adapters.store.advice import command
from graftlm.adapters.store.base_versions import Version
from graftlm.adapters.store.names import parse
from graftlm.adapters.store.remote import Remote, pull_records, select_records
from graftlm.adapters.store.store import Store
from graftlm.config import PullConfig, PushConfig
from graftlm.errors import ConfigError, StoreError

_HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)


def is_hub_id(place: str) -> bool:
    """Whether a place is a repository of the hub rather than a folder or an address."""
    return "://" not in place and not Path(place).is_dir() and _HUB.fullmatch(place) is not None


def push(config: PushConfig) -> dict[str, Any]:
    """Copy versions to a place; returns what `--json` prints. Raises GraftError."""
    store = Store(config.store)
    versions = _wanted(store, config)
    if is_hub_id(config.place):
        if len(versions) != 1:
            raise ConfigError(
                f"a repository of the hub holds one version, and {len(versions)} are meant; name one: "
                f"{command('push', config.place, versions[-1].label, store=config.store)}"
            )
        return _report(config.place, [(versions[0], hub.push(versions[0], config.place, config.private))])
    if config.private:
        raise ConfigError("--private is for a repository of the hub; leave it out")
    remote = Remote(config.place)
    return _report(config.place, [(version, remote.push(version)) for version in versions])


def pull(config: PullConfig) -> dict[str, Any]:
    """Copy versions from a place; returns what `--json` prints. Raises GraftError."""
    store = Store(config.store)
    if is_hub_id(config.place):
        if config.versions:
            raise ConfigError("a repository of the hub holds one version; leave its name out, or take --revision")
        return _report(config.place, [hub.pull(store, config.place, config.name, config.revision)])
    if config.revision is not None:
        raise ConfigError("--revision is for a repository of the hub; leave it out")
    remote = Remote(config.place)
    there = remote.records()
    if not there:
        raise StoreError(f"{config.place} holds no versions; push some there first: {command('push', config.place)}")
    records = select_records(there, [parse(text) for text in config.versions], config.place)
    if config.name is not None and len(records) != 1:
        one = command("pull", config.place, records[-1].label, "--name", config.name, store=config.store)
        raise ConfigError(f"--name is for one version, and {len(records)} are meant; name one: {one}")
    return _report(config.place, pull_records(store, remote, records, config.name))


def _wanted(store: Store, config: PushConfig) -> list[Version]:
    if not config.versions:
        found = store.versions(config.base)
        if not found:
            raise StoreError(
                f"{store.root} holds no versions to push; publish one first: "
                f"{command('publish', 'RUN', '--name', 'NAME', store=store.root)}"
            )
        return found
    return list({v.label: v for v in (store.find(text, config.base) for text in config.versions)}.values())


def _report(place: str, versions: list[tuple[Version, bool]]) -> dict[str, Any]:
    return {
        "place": place,
        "versions": [
            {"version": v.label, "digest": v.digest, "fingerprint": v.base, "new": new} for v, new in versions
        ],
    }
