"""A store of adapters on disk: names, numbered versions that never change, and aliases.

    STORE/store.json                             marks the folder as a store
    STORE/bases/<fingerprint>/journal.jsonl      every publish, alias, rollback and removal on this base
                              versions/<digest>/ an adapter's files as they were published, and run.json
                              incoming/          versions that are being written; leftovers of interrupted processes are removed

A folder is named by the adapter's digest, so an adapter that is published twice is stored once, under any number of names.
Publishing copies into `incoming`, checks the copy, and then, holding the journal's lock, moves it to its final folder and
appends the line that makes it a version. A crash before that line leaves nothing visible.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftlm.adapters.store.advice import DEFAULT, command
from graftlm.adapters.store.base_versions import BaseVersions, VerifyReport, Version
from graftlm.adapters.store.content import ANY_RUN, DIGEST, RUN, open_content
from graftlm.adapters.store.names import Reference, check_name, looks_like_a_name, parse
from graftlm.adapters.store.publishing import adapter_and_run, base_of, describe, signed
from graftlm.adapters.store.replay import NamedAdapter, replay
from graftlm.errors import AdapterError, StoreError, nearest
from graftlm.files import write_json
from graftlm.jsonfile import read_json

if TYPE_CHECKING:
    from graftlm.adapters.peft_folder import AdapterFolder

_MARK = "store.json"
_FORMAT = 1


class Store:
    """Versions of adapters in one folder; several processes may use it at once."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    # ---- reading -----------------------------------------------------------------------------------------------------

    @property
    def exists(self) -> bool:
        return (self.root / _MARK).is_file()

    def _open(self) -> None:
        """Raises StoreError for a folder that is not a store, or a store of a later format."""
        mark = self.root / _MARK
        if not mark.is_file():
            what = "holds other files" if self.root.is_dir() and any(self.root.iterdir()) else "is not there"
            raise StoreError(
                f"no store of adapters at {self.root} ({what}); name one with --store, or publish into a new one"
            )
        try:
            found = read_json(mark, StoreError)["format"]
        except (StoreError, KeyError):
            raise StoreError(f"{mark} is damaged; it should say {{'format': {_FORMAT}}}") from None
        if found != _FORMAT:
            raise StoreError(f"{self.root} is a store of format {found}, this Graft reads {_FORMAT}; update graftlm")

    def bases(self) -> list[BaseVersions]:
        """One `BaseVersions` for each base that has adapters here."""
        self._open()
        place = self.root / "bases"
        found = [p for p in place.iterdir() if DIGEST.fullmatch(p.name)] if place.is_dir() else []
        return [BaseVersions(p) for p in sorted(found)]

    def base_versions(self, fingerprint: str) -> BaseVersions:
        """The versions on a base, which may be none."""
        return BaseVersions(self.root / "bases" / fingerprint)

    def _bases_of(self, base: str | None) -> list[BaseVersions]:
        """The bases that match: by fingerprint, its first digits, or the base's name in this store."""
        found = self.bases()
        if base is None:
            return found
        few = len(base) >= 6 and re.fullmatch(r"[0-9a-f]+", base) is not None
        hits = [s for s in found if (few and s.fingerprint.startswith(base)) or s.base_name == base]
        if not hits:
            known = [f"{s.fingerprint[:12]} ({s.base_name})" for s in found]
            short = base[:12] if DIGEST.fullmatch(base) else base
            raise StoreError(f"no adapters on base '{short}' in {self.root}; it has: {', '.join(known) or 'none'}")
        return hits

    def names(self, base: str | None = None) -> list[tuple[BaseVersions, NamedAdapter]]:
        """Every name that has versions, with the versions of its base, sorted by name."""
        found = [
            (base_versions, name)
            for base_versions in self._bases_of(base)
            for name in base_versions.names.values()
            if name.versions
        ]
        return sorted(found, key=lambda pair: (pair[1].name, pair[0].fingerprint))

    def versions(self, base: str | None = None) -> list[Version]:
        """Every version, sorted by name and number. Reads the journals only."""
        found: list[Version] = []
        for base_versions, name in self.names(base):
            pointing: dict[int, list[str]] = {}
            for alias, number in sorted(name.aliases.items()):
                pointing.setdefault(number, []).append(alias)
            found += [base_versions.version(entry, pointing.get(n, ())) for n, entry in sorted(name.versions.items())]
        return found

    def name(self, text: str, base: str | None = None) -> tuple[BaseVersions, NamedAdapter]:
        """A name and the versions on its base. Raises StoreError, with the nearest name, for one that is not here or on
        several bases."""
        check_name(text)
        known = self.names(base)
        hits = [(base_versions, name) for base_versions, name in known if name.name == text]
        if not hits:
            raise StoreError(f"no adapter named '{text}' in {self.root}{nearest(text, [n.name for _, n in known])}")
        if len(hits) > 1:
            which = ", ".join(f"{s.fingerprint[:12]} ({s.base_name})" for s, _ in hits)
            raise StoreError(f"'{text}' is there for {len(hits)} bases: {which}; choose one with --base")
        return hits[0]

    def find(self, text: str, base: str | None = None) -> Version:
        """`formal` (its newest version), `formal@3` or `formal@prod` -> the version. Raises StoreError."""
        reference = parse(text)
        base_versions, name = self.name(reference.name, base)
        number = _number(name, reference)
        return base_versions.version(name.versions[number], name.pointing_at(number))

    # ---- changing ----------------------------------------------------------------------------------------------------

    def publish(
        self,
        source: Path,
        name: str,
        *,
        note: str = "",
        parents: Sequence[str] = (),
        number: int | None = None,
        event: Mapping[str, Any] | None = None,
        origin: str | None = None,
        run: Mapping[str, Any] | None = None,
    ) -> tuple[Version, bool]:
        """Publish an adapter's folder, or a run's, as the next version of a name; also returns whether it is new.

        An adapter that the name already has is not published again: its version is returned. `number` and `event` are those
        of a version from another store; `origin` is recorded as its source, default `source`. Raises StoreError, and
        AdapterError for a folder that is damaged or has no `graft.json`.
        """
        from graftlm.adapters.peft_folder import inspect_folder

        check_name(name)
        folder, beside = adapter_and_run(Path(source))
        run = run or beside
        found = inspect_folder(folder)
        fingerprint = base_of(found, name, self.root)
        self._make()
        base_versions = self.base_versions(fingerprint)
        about = dict(event) if event is not None else describe(found, origin or source, note, parents)
        with base_versions.incoming() as place:
            for file in found.files:
                shutil.copyfile(folder / file, place / file)
            if run:
                write_json(place / RUN, run)
            if inspect_folder(place).digest != found.digest:
                raise StoreError(f"{folder} changed while it was read; publish it again when it is no longer written")
            base_versions.settle(place)
            return base_versions.put(place, name, found.digest, about, number)

    def alias(self, name: str, alias: str, number: int | None, base: str | None = None) -> tuple[int | None, int]:
        """Point an alias at a version; returns the previous version and the new one.

        Raises StoreError; if the number is missing or part of the name, the message has the command to write.
        """
        check_name(alias, "alias")
        if number is None or "@" in name:
            version = self.find(name, base)
            meant = version.number if number is None else number
            raise StoreError(
                f"an alias points at the number of a version, which is given after it: "
                f"{self._advised('alias', version.name, alias, meant, base=base)}"
            )
        base_versions, _ = self.name(name, base)
        with base_versions.journal.writing() as writer:
            held = replay(writer.events)[name]
            _number(held, Reference(name, number=number))
            before = held.aliases.get(alias)
            if before != number:
                writer.append({"do": "alias", "name": name, "alias": alias, "version": number, **signed()})
            return before, number

    def unalias(self, name: str, alias: str, base: str | None = None) -> int:
        """Delete an alias; returns the version that it pointed at. Raises StoreError."""
        base_versions, _ = self.name(name, base)
        with base_versions.journal.writing() as writer:
            held = replay(writer.events)[name]
            before = _number(held, Reference(name, alias=alias))
            writer.append({"do": "unalias", "name": name, "alias": alias, "version": before, **signed()})
            return before

    def rollback(self, name: str, alias: str, base: str | None = None) -> tuple[int, int]:
        """Point an alias at its previous version; returns (from, to). Raises StoreError if there is none."""
        base_versions, _ = self.name(name, base)
        with base_versions.journal.writing() as writer:
            held = replay(writer.events)[name]
            now = _number(held, Reference(name, alias=alias))
            before = held.before(alias)
            if before is None:
                other = next((n for n in sorted(held.versions, reverse=True) if n != now), None)
                way = (
                    f"point it at another one: {self._advised('alias', name, alias, other, base=base)}"
                    if other is not None
                    else f"it is the only version; delete the alias with: "
                    f"{self._advised('alias', name, alias, '--delete', base=base)}"
                )
                raise StoreError(
                    f"{name}@{alias} points at version {now} and has no previous version that is still there; {way}"
                )
            writer.append({"do": "rollback", "name": name, "alias": alias, "version": before, "from": now, **signed()})
            return now, before

    def remove(self, text: str, base: str | None = None) -> tuple[Version, bool]:
        """Remove one version; also returns whether its content was removed, which stays while another version has it.

        Raises StoreError while an alias points at it, and for a reference that is not a number.
        """
        reference = parse(text)
        if reference.number is None:
            meant = self.find(text, base)
            self._unpointed(meant.label, meant.name, meant.aliases, base)
            raise StoreError(
                f"'{text}' may mean another version tomorrow; give the number: "
                f"{self._advised('remove', meant.label, base=base)}"
            )
        base_versions, _ = self.name(reference.name, base)
        with base_versions.journal.writing() as writer:
            names = replay(writer.events)
            held = names[reference.name]
            number = _number(held, reference)
            self._unpointed(str(reference), held.name, held.pointing_at(number), base)
            version = base_versions.version(held.versions[number])
            writer.append({"do": "remove", "name": held.name, "version": number, "digest": version.digest, **signed()})
            del held.versions[number]
            used = {e.digest for n in names.values() for e in n.versions.values()}
            if version.digest in used:
                return version, False
            base_versions.drop(version.folder)
            return version, True

    def _unpointed(self, label: str, name: str, aliases: Sequence[str], base: str | None) -> None:
        """Raise StoreError if aliases point at a version that is to be removed."""
        if aliases:
            raise StoreError(
                f"{label} is what {', '.join(f'{name}@{a}' for a in aliases)} points at; point the alias elsewhere first, "
                f"roll it back, or delete it: {self._advised('alias', name, aliases[0], '--delete', base=base)}"
            )

    def _advised(self, *words: object, base: str | None = None) -> str:
        return command(*words, *(["--base", base] if base else []), store=self.root)

    def verify(self, base: str | None = None) -> VerifyReport:
        """Read every file and compare it with what was published."""
        check = VerifyReport()
        for base_versions in self._bases_of(base):
            base_versions.verify(check)
        return check

    def clean(self) -> list[str]:
        """Remove contents that no version refers to and leftovers of interrupted processes; returns what was removed."""
        return [path for base_versions in self.bases() for path in base_versions.clean()]

    def _make(self) -> None:
        """Create the store if needed. Raises StoreError for a folder that holds other files."""
        if not self.exists:
            if self.root.is_dir() and any(p.name not in ("bases",) and p.name[0] != "." for p in self.root.iterdir()):
                if self.exists:  # another process has just created it
                    return
                raise StoreError(f"{self.root} holds other files and is not a store; name another folder with --store")
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                write_json(self.root / _MARK, {"format": _FORMAT, "holds": "adapters, see docs/adapters.md"})
            except OSError as error:
                raise StoreError(f"{self.root} cannot be written to: {error.strerror or error}") from None
        self._open()


def resolve(text: str, store: Path = DEFAULT, base: str | None = None) -> Version:
    """`formal@prod`, `formal@1` or `formal` -> the version: its folder, digest and base. Raises StoreError."""
    return Store(store).find(text, base)


def open_adapter(
    adapter: Path | str, store: Path | None = None, base: str | None = None, *, model: str | None = None
) -> AdapterFolder:
    """Open the adapter that a user gives, a folder or a version in a store, and check its files.

    If several bases have the name and `base` does not choose one, `model` does, as `--model` gives it. Raises StoreError,
    AdapterError.
    """
    from graftlm.adapters.peft_folder import inspect_folder

    text = str(adapter)
    if not looks_like_a_name(text):
        folder = Path(adapter)
        of_base, kind = folder.parent.parent.name, folder.parent.name
        if DIGEST.fullmatch(folder.name) and DIGEST.fullmatch(of_base) and kind == "versions":  # a version, by its path
            return open_content(folder, folder.name, of_base, ANY_RUN)
        return inspect_folder(folder)
    place = Store(store or DEFAULT)
    if store is None and not place.exists:
        raise AdapterError(f"no adapter folder at {text}, and no store at ./{DEFAULT}; give a folder, or --store")
    if base is None and model is not None and sum(n.name == parse(text).name for _, n in place.names()) > 1:
        from graftlm.base.fingerprint import fingerprint
        from graftlm.base.loading import resolve as model_folder

        base = fingerprint(model_folder(model))
    return place.find(text, base).opened()


def _number(name: NamedAdapter, reference: Reference) -> int:
    """The version that a reference means. Raises StoreError, with what exists instead."""
    if reference.alias is not None:
        aliases = name.aliases
        if reference.alias not in aliases:
            known = ", ".join(f"{a} -> {n}" for a, n in sorted(aliases.items())) or "none"
            raise StoreError(
                f"'{name.name}' has no alias '{reference.alias}'{nearest(reference.alias, aliases)} It has: {known}"
            )
        return aliases[reference.alias]
    if reference.number is None:
        return max(name.versions)
    if reference.number not in name.versions:
        removed = any(e["do"] == "remove" and e["version"] == reference.number for e in name.history)
        there = sorted(name.versions)
        shown = ", ".join(map(str, there[-5:])) if there else "none"
        raise StoreError(
            f"{reference} {'was removed' if removed else 'is not there'}; versions of '{name.name}': "
            f"{'... ' if len(there) > 5 else ''}{shown}"
        )
    return reference.number
