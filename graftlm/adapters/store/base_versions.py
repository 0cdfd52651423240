"""The part of a store that belongs to one base: its journal, its versions, and versions that are being written."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftlm.adapters.store.advice import command
from graftlm.adapters.store.content import ANY_RUN, RUN, check_above, content_fault, open_content, open_manifest
from graftlm.adapters.store.journal import Event, Journal
from graftlm.adapters.store.replay import NamedAdapter, VersionEntry, replay
from graftlm.errors import AdapterError, StoreError
from graftlm.files import flush, sha256
from graftlm.progress import working

if TYPE_CHECKING:
    from graftlm.adapters.peft_folder import AdapterFolder


@dataclass(frozen=True)
class Version:
    """One version of a name, and the folder of its files."""

    name: str
    number: int
    digest: str
    base: str
    """The fingerprint of the base it was trained on."""
    folder: Path
    event: Event = field(repr=False)
    """Its publish event: when, by whom, from where, with what result."""
    aliases: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.name}@{self.number}"

    @property
    def root(self) -> Path:
        """The store that it is in."""
        return self.folder.parents[3]

    def opened(self) -> AdapterFolder:
        """Its files, after checking that every byte is as published; all commands read versions this way. Raises StoreError."""
        try:
            return open_content(self.folder, self.digest, self.base, self.event.get("run"))
        except (AdapterError, StoreError) as error:
            raise StoreError(
                f"{self.label} is not as it was published: {error}. Publish or pull the same adapter again, which restores its "
                "files, or use another version. To list everything that is damaged: "
                f"{command('verify', store=self.root)}"
            ) from None

    def manifest(self) -> dict[str, Any]:
        """Its `graft.json`, as it was published; the tensors are not read.

        Raises StoreError. Users of a server see it too, so it names no folder other than the version's.
        """
        try:
            return open_manifest(self.folder, self.digest, self.base, self.event.get("run"))
        except (AdapterError, StoreError) as error:
            raise StoreError(f"{self.label} is not as it was published: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """The version for `--json`."""
        kept = ("base", "precision", "method", "rank", "data", "before", "after", "steps", "bytes", "parents", "source",
                "note", "at", "by")  # fmt: skip
        event = {key: self.event.get(key) for key in kept}
        return {
            "version": self.label, "name": self.name, "number": self.number, "digest": self.digest,
            "aliases": list(self.aliases), "fingerprint": self.base, "folder": str(self.folder), **event,
        }  # fmt: skip


@dataclass(frozen=True)
class VerifyFault:
    """Something in a store that is not as it was published."""

    where: str
    what: str


@dataclass
class VerifyReport:
    """The result of `verify`."""

    versions: int = 0
    contents: int = 0
    bytes: int = 0
    faults: list[VerifyFault] = field(default_factory=list[VerifyFault])
    leftovers: list[str] = field(default_factory=list[str])
    """Contents that no version refers to, and incomplete ones whose writer has exited; `clean` removes both."""


class BaseVersions:
    """The part of a store that belongs to one base."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fingerprint = folder.name
        self.journal = Journal(folder / "journal.jsonl")

    @cached_property
    def names(self) -> dict[str, NamedAdapter]:
        """The names with their versions and aliases, from the journal."""
        return replay(self.journal.read())

    @property
    def base_name(self) -> str:
        """The base's name when its newest adapter was published."""
        entries = [name.newest for name in self.names.values()]
        known = [str(e.event.get("base") or "") for e in entries if e is not None]
        return known[-1] if known else ""

    def version(self, entry: VersionEntry, aliases: Sequence[str] = ()) -> Version:
        place = self.folder / "versions" / entry.digest
        return Version(entry.name, entry.number, entry.digest, self.fingerprint, place, entry.event, tuple(aliases))

    @contextmanager
    def incoming(self) -> Iterator[Path]:
        """A temporary folder to write a version into; it is removed when the block ends, unless `put` has moved it."""
        parent = self.folder / "incoming"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            descriptor, lock = _claimed(parent)
        except OSError as error:
            raise StoreError(f"{parent} cannot be written to: {error.strerror or error}") from None
        place = lock.with_suffix("")
        try:
            place.mkdir()
            yield place
        except OSError as error:
            raise StoreError(f"{place} cannot be written: {error.strerror or error}; nothing was published") from None
        finally:
            _remove(place)
            lock.unlink(missing_ok=True)
            os.close(descriptor)

    def settle(self, place: Path) -> None:
        """Flush a written version to disk and make it read-only."""
        for file in place.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
            file.chmod(0o444)
        flush(place)

    def put(
        self, place: Path, name: str, digest: str, about: Mapping[str, Any], number: int | None
    ) -> tuple[Version, bool]:
        """Move a written version to its final folder and record it; if an equal version exists, return that instead."""
        target = self.folder / "versions" / digest
        check_above(target)
        sound = content_fault(target, digest, self.fingerprint, ANY_RUN) is None
        with self.journal.writing() as writer:
            names = replay(writer.events)
            runs = {e.event.get("run") for n in names.values() for e in n.versions.values() if e.digest == digest}
            held = names.get(name) or NamedAdapter(name)
            same = next((e for e in held.versions.values() if e.digest == digest), None)
            if number is not None:
                taken = held.versions.get(number)
                if taken is not None and taken.digest != digest:
                    raise StoreError(
                        f"{name}@{number} is here already with other content ({taken.digest[:12]}, the new one is "
                        f"{digest[:12]}); take another name with --name"
                    )
                if taken is None and same is None and number <= held.highest and number not in held.versions:
                    removed = any(e["do"] == "remove" and e["version"] == number for e in held.history)
                    if removed:
                        raise StoreError(f"{name}@{number} was removed here, and numbers are never reused")
            self._place(place, target, sound, runs)
            if same is not None:
                return self.version(same, held.pointing_at(same.number)), False
            given = number or held.highest + 1
            recorded = {"do": "publish", "name": name, "version": given, "digest": digest, "run": _run_in(target)}
            event: Event = {**about, **recorded}
            writer.append(event)
            return self.version(VersionEntry(name, given, digest, event)), True

    def _place(self, place: Path, target: Path, sound: bool, runs: set[str | None]) -> None:
        """Move a written version to `target`, unless it is there; the same content again replaces a damaged copy, or a link.

        One content has one run.json, from its first publish: `runs` are the checksums that its versions record.
        """
        if not os.path.lexists(target):
            target.parent.mkdir(exist_ok=True)
            place.rename(target)
            flush(target.parent)
            return
        kept = not runs or _run_in(target) in runs
        if sound and kept:
            return
        if runs and _run_in(place) not in runs:
            if not kept:
                raise StoreError(
                    f"{target} and its {RUN} are damaged; publish the run that it was first published from, which "
                    "restores both, or remove its versions first"
                )
            (place / RUN).unlink(missing_ok=True)
            if _run_in(target) is not None:
                shutil.copyfile(target / RUN, place / RUN)
                (place / RUN).chmod(0o444)
        damaged = place.with_suffix(".damaged")
        target.rename(damaged)
        place.rename(target)
        flush(target.parent)
        _remove(damaged)

    def drop(self, content: Path) -> None:
        """Remove a content that no version refers to; the caller holds the journal."""
        if os.path.lexists(content):
            gone = self.folder / "incoming" / f"{secrets.token_hex(6)}.gone"
            gone.parent.mkdir(exist_ok=True)
            content.rename(gone)  # now no process finds it, however long the removal takes
            _remove(gone)

    def verify(self, check: VerifyReport) -> None:
        """Add to `check` what is wrong with these versions."""
        where = f"base {self.fingerprint[:12]}"
        try:
            names = replay(self.journal.read())
        except StoreError as error:
            check.faults.append(VerifyFault(where, str(error)))
            return
        users: dict[str, list[VersionEntry]] = {}
        for name in names.values():
            for entry in name.versions.values():
                users.setdefault(entry.digest, []).append(entry)
            for alias, number in name.aliases.items():
                if number not in name.versions:
                    check.faults.append(
                        VerifyFault(f"{name.name}@{alias}", f"points at version {number}, which is not there")
                    )
        with working(f"verifying {where}", len(users), "versions") as task:
            found: dict[str, str | None] = {}
            for digest, entries in users.items():
                found[digest] = content_fault(
                    self.folder / "versions" / digest, digest, self.fingerprint, entries[0].event.get("run")
                )
                task.to(len(found))
        for digest, entries in users.items():
            content, fault = self.folder / "versions" / digest, found[digest]
            check.versions += len(entries)
            check.contents += 1
            if fault is not None:
                labels = ", ".join(f"{e.name}@{e.number}" for e in entries)
                check.faults.append(VerifyFault(labels, fault))
            else:
                check.bytes += sum(f.stat().st_size for f in content.iterdir())
        check.leftovers += [str(p) for p in self._unused(set(users))]

    def _unused(self, used: set[str]) -> list[Path]:
        place = self.folder / "versions"
        return [p for p in sorted(place.iterdir()) if p.name not in used] if place.is_dir() else []

    def clean(self) -> list[str]:
        """Remove contents that no version refers to, and what interrupted processes left in `incoming`."""
        with self.journal.writing() as writer:
            used = {e.digest for n in replay(writer.events).values() for e in n.versions.values()}
            gone = self._unused(used)
            for path in gone:
                self.drop(path)
        incoming = self.folder / "incoming"
        for lock in sorted(incoming.glob("*.lock")) if incoming.is_dir() else ():
            descriptor = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # its writer is running
            else:
                place = lock.with_suffix("")
                gone += [place] if place.exists() else []
                _remove(place)
                lock.unlink(missing_ok=True)
            finally:
                os.close(descriptor)
        for left in sorted(incoming.iterdir()) if incoming.is_dir() else ():
            if left.suffix in (".gone", ".damaged"):
                gone.append(left)
                _remove(left)
        return [str(p) for p in gone]


def _run_in(folder: Path) -> str | None:
    """The checksum of the run.json in a version's folder; None where there is none."""
    if folder.is_symlink() or os.path.islink(folder / RUN) or not (folder / RUN).is_file():
        return None
    return sha256(folder / RUN)


def _claimed(parent: Path) -> tuple[int, Path]:
    """A lock file of this process: (descriptor, path). No other process can lock it while this one runs."""
    while True:
        lock = parent / f"{secrets.token_hex(8)}.lock"
        descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_RDWR)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):
            if os.stat(lock).st_ino == os.fstat(descriptor).st_ino:
                return descriptor, lock
        os.close(descriptor)  # a cleaner took it between the two calls


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():  # replaced by hand
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
