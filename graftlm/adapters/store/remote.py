"""Versions in an object store or a folder, through fsspec: `s3://bucket/path`, `gs://...`, `/mnt/shared/adapters`.

    PLACE/<fingerprint>/versions/<digest>/...            the files of a version, its graft.json last
    PLACE/<fingerprint>/names/<name>/<number>.json       the record of a version: written after all files, never overwritten

An interrupted transfer leaves files without a record, which are not listed; the next transfer writes them again. A pull
downloads to a temporary folder, checks the digest, and then publishes in the store.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.adapters.store.base_versions import Event, Version
from graftlm.adapters.store.content import DIGEST, RUN, content_fault, run_of
from graftlm.adapters.store.names import Reference, check_name
from graftlm.adapters.store.store import Store
from graftlm.errors import AdapterError, GraftError, StoreError, nearest
from graftlm.files import sha256
from graftlm.jsonfile import parse_json
from graftlm.progress import working

_MOST_RECORD = 1 << 20
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_RECORD = re.compile(r"([1-9][0-9]{0,9})\.json")
_MOST_FILES, _MOST_BYTES = 64, 1 << 40
_LAST = "graft.json"


@dataclass(frozen=True)
class RemoteVersion:
    """The record of a version at a remote location."""

    base: str
    name: str
    number: int
    digest: str
    event: Event

    @property
    def label(self) -> str:
        return f"{self.name}@{self.number}"


class Remote:
    """A remote location that has versions."""

    def __init__(self, place: str) -> None:
        """Raises StoreError for an address that no installed package supports."""
        import fsspec

        self.place = place
        address = place if "://" in place else str(Path(place).expanduser().absolute())
        try:
            self.fs: Any
            self.fs, self.root = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise StoreError(f"{place}: {error}; for s3:// install: pip install 'graftlm[remote]'") from None
        self.root = self.root.rstrip("/")

    def records(self) -> list[RemoteVersion]:
        """Every version there, by name and number. Raises StoreError if the location cannot be read or is damaged."""
        try:
            self.fs.invalidate_cache()
            if not self.fs.exists(self.root):
                raise StoreError(f"there is nothing at {self.place}")
            with working(f"listing {self.place}"):
                paths = sorted(self.fs.find(self.root))
        except GraftError:
            raise
        except Exception as error:  # each file system has its own exceptions
            raise self._failed("listed", error) from None
        found: list[RemoteVersion] = []
        for path in paths:
            parts = path.removeprefix(self.root).strip("/").split("/")
            number = _RECORD.fullmatch(parts[-1])
            if len(parts) == 4 and parts[1] == "names" and DIGEST.fullmatch(parts[0]) and number is not None:
                found.append(self._record(path, parts[0], parts[2], int(number[1])))
        return sorted(found, key=lambda r: (r.name, r.base, r.number))

    def _record(self, path: str, base: str, name: str, number: int) -> RemoteVersion:
        check_name(name)
        try:
            if self.fs.size(path) > _MOST_RECORD:
                raise ValueError("it is too large")
            event = parse_json(self.fs.cat_file(path))
            same = (event["name"], event["version"]) == (name, number)
            if not same or not DIGEST.fullmatch(event["digest"]):
                raise ValueError("it names another version")
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self.place}: the record of {name}@{number} is damaged ({error})") from None
        except Exception as error:
            raise self._failed("read", error) from None
        return RemoteVersion(base, name, number, event["digest"], event)

    def push(self, version: Version) -> bool:
        """Upload a version; returns False if it is there already. Raises StoreError for other content under its number."""
        found = version.opened()
        path = f"{self.root}/{version.base}/names/{version.name}/{version.number}.json"
        place = f"{self.root}/{version.base}/versions/{version.digest}"
        try:
            self.fs.invalidate_cache()
            if self.fs.exists(path):
                return self._same(path, version)
            names = [n for n in found.files if n != _LAST]
            names += [RUN] if (version.folder / RUN).is_file() else []
            self.fs.makedirs(place, exist_ok=True)
            sizes = {name: (version.folder / name).stat().st_size for name in [*names, _LAST]}
            with working(f"pushing {version.label}", sum(sizes.values()), "bytes") as task:
                for name, size in sizes.items():
                    self.fs.put_file(str(version.folder / name), f"{place}/{name}")
                    task.to(task.done + size)
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            try:
                self.fs.pipe_file(path, json.dumps(version.event).encode(), mode="create")
            except FileExistsError:  # a concurrent push
                return self._same(path, version)
        except GraftError:
            raise
        except Exception as error:
            raise self._failed("written", error) from None
        return True

    def _same(self, path: str, version: Version) -> bool:
        there = self._record(path, version.base, version.name, version.number)
        if there.digest != version.digest:
            raise StoreError(
                f"{self.place} has another {version.label} ({there.digest[:12]}, yours is {version.digest[:12]}); "
                "pull it, and publish yours as the next version or under another name"
            )
        return False

    def fetch(self, record: RemoteVersion, into: Path) -> None:
        """Download a version's files into an empty folder, and check them. Raises StoreError if they do not match."""
        from graftlm.adapters.peft_folder import inspect_folder

        place = f"{self.root}/{record.base}/versions/{record.digest}"
        try:
            self.fs.invalidate_cache()
            listed = [(e["name"], int(e["size"])) for e in self.fs.ls(place, detail=True) if e["type"] == "file"]
            total = sum(size for _, size in listed)
            odd = [n for n, _ in listed if not _FILE.fullmatch(n.rpartition("/")[2])]
            if odd or len(listed) > _MOST_FILES or total > _MOST_BYTES:
                raise StoreError(
                    f"{self.place}: {record.label} holds {odd[0] if odd else 'too much'}; it was not published"
                )
            if total > shutil.disk_usage(into).free:
                raise StoreError(f"{record.label} takes {total:,} bytes, and {into.parent} has less free space")
            with working(f"pulling {record.label}", total, "bytes") as task:
                for path, size in listed:
                    self.fs.get_file(path, str(into / path.rpartition("/")[2]))
                    task.to(task.done + size)
        except GraftError:
            raise
        except Exception as error:
            raise self._failed("read", error) from None
        check_fetched(into, record, self.place, inspect_folder)

    def _failed(self, what: str, error: Exception) -> StoreError:
        return StoreError(f"{self.place} cannot be {what}: {reason(error)}")


def reason(error: Exception) -> str:
    """An error of a library in one line: its class, and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__} {text[0] if text else ''}".rstrip()


def check_fetched(folder: Path, record: RemoteVersion, place: str, inspect: Any) -> None:
    """Check that the downloaded files have the published digest. Raises StoreError."""
    try:
        found = inspect(folder)
    except AdapterError as error:
        raise StoreError(f"{record.label} from {place} is damaged and was not published: {error}") from None
    run = record.event.get("run")
    if run is not None and (not (folder / RUN).is_file() or sha256(folder / RUN) != run):
        raise StoreError(f"{record.label} from {place} is damaged and was not published: its {RUN} has changed")
    base = ((found.manifest or {}).get("base") or {}).get("fingerprint")
    if found.digest != record.digest or base != record.base:
        raise StoreError(
            f"{record.label} from {place} is another adapter than its record says ({found.digest[:12]}, not "
            f"{record.digest[:12]}); it was not published"
        )


def select_records(records: Iterable[RemoteVersion], wanted: Iterable[Reference], place: str) -> list[RemoteVersion]:
    """The records of the wanted references: one version, or all of a name. Raises StoreError for one that is missing."""
    records = list(records)
    wanted = list(wanted)
    if not wanted:
        return records
    found: list[RemoteVersion] = []
    for reference in wanted:
        if reference.alias is not None:
            raise StoreError(
                f"'{reference}' is an alias, and aliases are not transferred; name a version by its number"
            )
        hits = [r for r in records if r.name == reference.name and reference.number in (None, r.number)]
        if not hits:
            labels = [r.label for r in records]
            raise StoreError(f"{place} has no {reference}{nearest(str(reference), labels)}")
        found += [r for r in hits if r not in found]
    return found


def pull_records(
    store: Store, remote: Remote, records: Iterable[RemoteVersion], name: str | None
) -> list[tuple[Version, bool]]:
    """Download, check and publish each record. Raises StoreError; a version that fails is not published."""
    done: list[tuple[Version, bool]] = []
    for record in records:
        here = _known(store, record) if name is None else None
        if here is not None:
            done.append((here, False))
            continue
        with tempfile.TemporaryDirectory(prefix="graft-pull-") as place:
            folder = Path(place) / "adapter"
            folder.mkdir()
            remote.fetch(record, folder)
            run = run_of(folder)
            number = record.number if name is None else None
            done.append(store.publish(folder, name or record.name, number=number, event=record.event, run=run))
    return done


def _known(store: Store, record: RemoteVersion) -> Version | None:
    """The local version equal to a record; None if there is none, or if its files are damaged and are to be fetched again."""
    if not store.exists:
        return None
    wanted = (record.base, record.name, record.digest)
    found = next((v for v in store.versions() if (v.base, v.name, v.digest) == wanted), None)
    if found is None or content_fault(found.folder, found.digest, found.base, found.event.get("run")) is not None:
        return None
    return found
