"""Replay a journal's events: the versions of each name, and what its aliases point at.

An alias is a stack of versions: setting it pushes one, a rollback pops one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from graftlm.adapters.store.journal import Event
from graftlm.adapters.store.names import Reference
from graftlm.errors import StoreError


@dataclass(slots=True)
class VersionEntry:
    """One published version, from its event."""

    name: str
    number: int
    digest: str
    event: Event


@dataclass(slots=True)
class NamedAdapter:
    """One name: its versions, the highest number it ever used, and the history of its aliases."""

    name: str
    versions: dict[int, VersionEntry] = field(default_factory=dict[int, VersionEntry])
    highest: int = 0
    trails: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    history: list[Event] = field(default_factory=list[Event])
    """Every change of an alias and every removal, oldest first."""

    @property
    def aliases(self) -> dict[str, int]:
        """The version that each alias points at."""
        return {alias: trail[-1] for alias, trail in self.trails.items() if trail}

    @property
    def newest(self) -> VersionEntry | None:
        return self.versions[max(self.versions)] if self.versions else None

    def number_of(self, reference: Reference) -> int | None:
        """The version that a reference to this name means; None for one that is not there."""
        if reference.alias is not None:
            number = self.aliases.get(reference.alias)
        else:
            number = reference.number or max(self.versions, default=None)
        return number if number in self.versions else None

    def pointing_at(self, number: int) -> list[str]:
        """The aliases that point at a version."""
        return sorted(alias for alias, at in self.aliases.items() if at == number)

    def before(self, alias: str) -> int | None:
        """The version that a rollback of an alias goes to: the last previous one that still exists."""
        trail = self.trails.get(alias, [])
        current = trail[-1] if trail else None
        return next((n for n in reversed(trail[:-1]) if n in self.versions and n != current), None)


def replay(events: Iterable[Event]) -> dict[str, NamedAdapter]:
    """Names in the order of their first publishing. Raises StoreError for an event that this Graft does not know."""
    names: dict[str, NamedAdapter] = {}
    for event in events:
        name = names.get(event["name"])
        if name is None:
            name = names[event["name"]] = NamedAdapter(event["name"])
        _apply(name, event)
    return names


def apply_events(names: Mapping[str, NamedAdapter], events: Iterable[Event]) -> dict[str, NamedAdapter]:
    """Apply further events to a copy of `names`, without their history, which would grow without end in a server.

    Raises StoreError as `replay` does.
    """
    found = dict(names)
    changed: dict[str, NamedAdapter] = {}
    for event in events:
        key = event["name"]
        if key not in changed:
            old = names.get(key, NamedAdapter(key))
            trails = {alias: list(trail) for alias, trail in old.trails.items()}
            found[key] = changed[key] = NamedAdapter(key, dict(old.versions), old.highest, trails)
        _apply(changed[key], event)
    for name in changed.values():
        name.history.clear()
        name.trails = {alias: trail[-1:] for alias, trail in name.trails.items()}
    return found


def _apply(name: NamedAdapter, event: dict[str, Any]) -> None:
    do = event["do"]
    if do == "publish":
        number = event["version"]
        name.versions[number] = VersionEntry(name.name, number, event["digest"], event)
        name.highest = max(name.highest, number)
        return
    name.history.append(event)
    if do == "remove":
        name.versions.pop(event["version"], None)
    elif do == "alias":
        trail = name.trails.setdefault(event["alias"], [])
        if not trail or trail[-1] != event["version"]:
            trail.append(event["version"])
    elif do == "rollback":
        trail = name.trails[event["alias"]]
        while trail and trail[-1] != event["version"]:
            trail.pop()
        if not trail:  # no history here
            trail.append(event["version"])
    elif do == "unalias":
        name.trails.pop(event["alias"], None)
    else:
        raise StoreError(f"the store's journal holds '{do}', which this Graft does not know; update graftlm")
