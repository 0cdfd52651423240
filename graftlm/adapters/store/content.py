"""A version's files, and the check before any command reads them.

    STORE/bases/<fingerprint>/versions/<digest>/

A store may be on a shared disk, and its folders may be changed by hand. So a version is never opened by its path alone: its
content must have the published digest, be in the store itself and not behind a link, and have no extra files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftlm.errors import AdapterError, StoreError
from graftlm.files import sha256
from graftlm.jsonfile import read_json

if TYPE_CHECKING:
    from graftlm.adapters.peft_folder import AdapterFolder

RUN = "run.json"
ANY_RUN = "*"
"""For `run` below: the caller does not read run.json and does not know its checksum."""
DIGEST = re.compile(r"[0-9a-f]{64}")


def open_content(place: Path, digest: str, base: str, run: str | None = None) -> AdapterFolder:
    """The adapter in a version's folder, after checking that every byte is as published.

    `base` is the fingerprint it was published for, `run` the SHA-256 of its run.json, or None if it has none.
    Reads every file once. Raises StoreError and AdapterError, which name the file or the folder.
    """
    from graftlm.adapters.peft_folder import inspect_folder

    check_place(place)
    found = inspect_folder(place)
    _as_published(place, digest, base, run, found.digest, found.manifest, found.files)
    return found


def open_manifest(place: Path, digest: str, base: str, run: str | None = None) -> dict[str, Any]:
    """The `graft.json` of a version, after the same check of every file except the tensors, which are not read."""
    from graftlm.adapters.manifest import MANIFEST, TENSORS, check_files, digest_of, read_manifest

    check_place(place)
    manifest = read_manifest(place)
    files: dict[str, Any] = (manifest or {}).get("files") or {}
    checked = _as_published(place, digest, base, run, digest_of(manifest or {}), manifest, [*files, MANIFEST])
    check_files(place, {name: entry for name, entry in files.items() if name != TENSORS})
    return checked


def check_place(place: Path) -> None:
    """Raise StoreError unless a version's folder and its files are in the store itself and are not links."""
    if not DIGEST.fullmatch(place.name) or place.parent.name != "versions":
        raise StoreError(f"{place} is not the folder of a version: the journal has an invalid digest")
    check_above(place)
    link = place if place.is_symlink() else None
    if link is None:
        try:
            with os.scandir(place) as entries:
                odd = next((entry for entry in entries if not entry.is_file(follow_symlinks=False)), None)
        except OSError as error:
            raise StoreError(f"{place} cannot be read: {error.strerror}") from None
        if odd is None:
            return
        link = Path(odd.path)
    what = "a link" if link.is_symlink() else "no plain file"
    raise StoreError(f"{link} is {what}, and a store keeps its versions as plain files of its own")


def check_above(place: Path) -> None:
    """Raise StoreError if a folder between the store and a version is a link: versions, the base's folder, or bases."""
    link = next((p for p in place.parents[:3] if p.is_symlink()), None)
    if link is not None:
        raise StoreError(
            f"{link} is a link, and a store keeps its versions as plain files of its own; move the whole store, and name it "
            "with --store"
        )


def _as_published(
    place: Path, digest: str, base: str, run: str | None, found: str, manifest: dict[str, Any] | None,
    files: Iterable[str],
) -> dict[str, Any]:  # fmt: skip
    """The manifest, after checking it and the names of the files. Raises StoreError."""
    if manifest is None:
        raise StoreError(f"{place} has no graft.json, which every version has")
    if found != digest:
        raise StoreError(f"{place} holds another adapter, {found[:12]}")
    if manifest["base"]["fingerprint"] != base:
        raise StoreError(f"{place} belongs to base {str(manifest['base']['fingerprint'])[:12]}, not to {base[:12]}")
    extra = sorted({p.name for p in place.iterdir()} - set(files) - ({RUN} if run is not None else set()))
    if extra:
        raise StoreError(f"{place / extra[0]} was not published with it")
    if run not in (None, ANY_RUN) and (not (place / RUN).is_file() or sha256(place / RUN) != run):
        raise StoreError(f"{place / RUN} has changed since it was published")
    return manifest


def content_fault(place: Path, digest: str, base: str, run: str | None = None) -> str | None:
    """What is wrong with a version's files, or None if every byte is as published."""
    try:
        open_content(place, digest, base, run)
    except (AdapterError, StoreError, OSError) as error:
        return str(error)
    return None


def run_of(folder: Path) -> dict[str, Any]:
    """Config and environment of the run that made a version, if there was one; not part of its digest."""
    try:
        return read_json(folder / RUN, StoreError)
    except StoreError:
        return {}


__all__ = ["ANY_RUN", "DIGEST", "RUN", "check_place", "content_fault", "open_content", "open_manifest", "run_of"]
