"""Atomic writes: after a crash the old files or the new ones are there, never parts of them.

A folder is written under a temporary name beside its target; its files are flushed to disk, then a manifest with the size and
checksum of every file is written, then the folder is flushed and renamed. So a folder whose manifest matches is complete, and
after an interruption the folder is missing or its manifest shows what is damaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graftlm.errors import RunError
from graftlm.jsonfile import read_json
from graftlm.progress import sign_of_life

MANIFEST = "manifest.json"
_BLOCK = 1 << 24  # bytes of a file that are read at once
_LEFT = re.compile(r"\..+\.[0-9]+(\.partial|\.old)?")


def cache_folder() -> Path:
    """Graft's folder in the user's cache: `$GRAFT_CACHE`, else `$XDG_CACHE_HOME/graft`, else `~/.cache/graft`."""
    given = os.environ.get("GRAFT_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graft"


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: to a temporary file, flushed, renamed. Raises OSError; the old file is then unchanged."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: to a temporary file, flushed, renamed. Raises OSError; the old file is then unchanged."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sha256(path: Path) -> str:
    """The checksum of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            sign_of_life()
    return digest.hexdigest()


@contextmanager
def atomic_folder(
    target: Path, *, manifest: bool = False, sums: Mapping[str, dict[str, Any]] | None = None
) -> Iterator[Path]:
    """A temporary folder to write into; it replaces `target` on success, else it is removed.

    `sums` are the manifest's entries of files that somebody else has written and summed.
    Raises what the block raises, or OSError; `target` is then unchanged.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        for file in files:
            file.chmod(0o666 & ~_umask())  # safetensors gives permissions to the owner alone
            flush(file)
        if manifest:
            names = {str(file.relative_to(temporary)): file for file in files}
            known = dict(sums or {})  # also of files that another machine has written and this one may not see yet
            entries = {
                name: known.pop(name, None) or {"bytes": file.stat().st_size, "sha256": sha256(file)}
                for name, file in names.items()
            } | known
            write_json(temporary / MANIFEST, {"files": entries})
        for folder in {temporary, *(file.parent for file in files)}:
            flush(folder)
        _put(temporary, target)
        flush(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _put(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        sign_of_life()
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The umask of this process; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of killed processes from a folder; no other process may be writing there."""
    for left in folder.glob(".*"):
        if not _LEFT.fullmatch(left.name):
            continue
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                left.unlink()


Own = Callable[[Sequence[str], Sequence[int]], Sequence[str]]
"""Files and their bytes -> those of them that this process looks at."""


def find_damage(folder: Path, own: Own | None = None) -> str | None:
    """What is wrong with a folder that has a manifest, or None if every file, or each of those that are `own`, matches it."""
    try:
        entries = read_json(folder / MANIFEST, RunError)["files"]
        written = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except (RunError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is missing or unreadable"
    names = list(written)
    for name in names if own is None else own(names, [size for size, _ in written.values()]):
        size, checksum = written[name]
        file = folder / name
        try:
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, {size} were written"
            if sha256(file) != checksum:
                return f"{name} has changed since it was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None
