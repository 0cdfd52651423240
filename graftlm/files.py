"""Writing files so that a crash leaves the old ones or the new ones, never half of one.

A folder is written under a temporary name beside its place, flushed to the disk, and renamed; its manifest, with the
size and checksum of every file, is written last, so a folder with a manifest that fits is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one piece: to a temporary file, flushed, renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def sha256(path: Path) -> str:
    """The checksum of a file, 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def whole_folder(place: Path, *, manifest: bool = False) -> Iterator[Path]:
    """Give a temporary folder to write into; on success it replaces `place`, else it is removed."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        for file in files:
            file.chmod(0o666 & ~_umask())  # safetensors writes for the owner alone
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        if manifest:
            entries = {str(f.relative_to(temporary)): {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}
            write_json(temporary / MANIFEST, {"files": entries})
        if place.exists():
            old = place.with_name(f".{place.name}.{os.getpid()}.old")
            place.rename(old)
            temporary.rename(place)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(place)
        descriptor = os.open(place.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _umask() -> int:
    """The permissions this process takes away from new files; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that has a manifest, or None when every file is as it was written."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        written = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is missing or unreadable"
    for name, (size, checksum) in written.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, {size} were written"
        if sha256(file) != checksum:
            return f"{name} has changed since it was written"
    return None
