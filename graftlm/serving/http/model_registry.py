"""What can be asked for by name: the base, and the versions of adapters in the store that were trained on it.

Names are looked up in the store's journal as it is now (`store/live_names.py`), so an alias that was moved by another process
means its new version from then on. A name is never a path: what is not in the journal is not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.adapters.store import LiveNames, NamedAdapter, Store, Version, parse
from graftlm.adapters.store.content import check_place
from graftlm.errors import StoreError
from graftlm.serving.http.api_keys import Tenant


class UnknownModel(StoreError):
    """No such name, or none that this key may use: the two cannot be told apart."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the model '{name[:200]}' does not exist, or this key may not use it")


@dataclass(frozen=True)
class ServedModel:
    """Who answers: a version of an adapter, or the bare base (an empty digest)."""

    label: str
    digest: str = ""
    folder: Path | None = None
    version: Version | None = None

    def manifest(self) -> dict[str, Any] | None:
        """What the version says of itself, as it was published; None for the base. Raises StoreError."""
        return None if self.version is None else self.version.manifest()


class ModelRegistry:
    """Finds who answers. May be used from several threads."""

    def __init__(self, base_name: str, fingerprint: str, store: Store | None = None) -> None:
        self.base_name, self.fingerprint, self.store = base_name, fingerprint, store
        self.base = ServedModel(base_name)
        self._live = None if store is None else LiveNames(store.base_versions(fingerprint))
        self._withdrawn: set[str] = set()

    def names(self) -> dict[str, NamedAdapter]:
        """The names that have versions, as they are now. Raises StoreError for a journal that never could be read."""
        return {} if self._live is None else self._live.names()

    def find(self, text: str, tenant: Tenant, *, withdrawn_too: bool = False) -> ServedModel:
        """`formal`, `formal@3`, `formal@prod` or the base's name. Raises UnknownModel, whatever the reason."""
        if text == self.base_name:
            if not tenant.may_use(""):
                raise UnknownModel(text)
            return self.base
        try:
            reference = parse(text)
        except StoreError:
            raise UnknownModel(text) from None
        name = self.names().get(reference.name)
        if name is None or not tenant.may_use(name.name):
            raise UnknownModel(text)
        number = name.number_of(reference)
        entry = name.versions[number] if number is not None else None
        if entry is None or (entry.digest in self._withdrawn and not withdrawn_too):
            raise UnknownModel(text)
        found = self._answerer(name, entry.number)
        assert found.folder is not None
        try:
            check_place(found.folder)
        except StoreError:
            raise UnknownModel(text) from None
        return found

    def listed(self, tenant: Tenant) -> list[tuple[NamedAdapter, list[ServedModel]]]:
        """Every name that a tenant may use, with its versions, newest first."""
        found: list[tuple[NamedAdapter, list[ServedModel]]] = []
        for name in sorted(self.names().values(), key=lambda n: n.name):
            if tenant.may_use(name.name):
                found.append((name, [self._answerer(name, number) for number in sorted(name.versions, reverse=True)]))
        return found

    def _answerer(self, name: NamedAdapter, number: int) -> ServedModel:
        assert self.store is not None
        entry = name.versions[number]
        version = self.store.base_versions(self.fingerprint).version(entry, name.pointing_at(number))
        return ServedModel(version.label, version.digest, version.folder, version)

    # ---- for administrators -----------------------------------------------------------------------------------------

    def withdraw(self, digest: str) -> None:
        """Answer for this version no more, until it is offered again."""
        self._withdrawn.add(digest)

    def offer(self, text: str, tenant: Tenant) -> ServedModel:
        """Find a version that may have been withdrawn, and answer for it again. Raises UnknownModel."""
        found = self.find(text, tenant, withdrawn_too=True)
        self._withdrawn.discard(found.digest)
        return found

    def withdrawn(self, digest: str) -> bool:
        return digest in self._withdrawn

    def alias(self, name: str, alias: str, number: int) -> tuple[int | None, int]:
        """Point an alias at a version; returns where it pointed and where it points. Raises StoreError."""
        return self._changing().alias(name, alias, number, self.fingerprint)

    def rollback(self, name: str, alias: str) -> tuple[int, int]:
        """Point an alias at what it pointed at before; returns (from, to). Raises StoreError."""
        return self._changing().rollback(name, alias, self.fingerprint)

    def _changing(self) -> Store:
        if self.store is None:
            raise StoreError("this server has no store of adapters; start it with --store")
        return self.store


def lineage(version: Version) -> dict[str, Any]:
    """What is told of where a version comes from: no paths, no names of people."""
    kept = ("precision", "method", "rank", "data", "before", "after", "steps", "bytes", "parents", "note", "at")
    return {key: version.event.get(key) for key in kept}
