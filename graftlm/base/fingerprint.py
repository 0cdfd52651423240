"""What base is this, by content: a digest over the tensors of its source checkpoint.

It depends on the tensors' names, types, shapes and bytes, and on nothing else: neither on the folder's name and place, nor
on how the checkpoint is cut into files, nor on the precision in which Graft stores it. Reading 14 GB takes a while, so
the digest of a folder is cached in the user's cache folder by each file's path, size and time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from graftlm.errors import ModelError

_CHUNK = 1 << 22


def cache_folder() -> Path:
    """Graft's folder in the user's cache: `$GRAFT_CACHE`, else `$XDG_CACHE_HOME/graft`, else `~/.cache/graft`."""
    given = os.environ.get("GRAFT_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graft"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: those its index names, else all of them."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{folder}: {len(missing)} of {len(names)} weight files are missing, the first is {missing[0]}"
            )
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def tensor_digests(file: Path) -> Iterator[tuple[str, str]]:
    """(tensor name, digest over its type, shape and bytes) of each tensor, read as a stream."""
    with file.open("rb") as stream:
        head = stream.read(8)
        size = int.from_bytes(head, "little")
        limit = file.stat().st_size
        if len(head) < 8 or size > limit - 8 or size > 100_000_000:
            raise ModelError(f"{file} is not a safetensors file: its header claims {size} bytes of {limit}")
        header = json.loads(stream.read(size))
        start = 8 + size
        entries = [(n, e) for n, e in header.items() if n != "__metadata__"]
        for name, entry in sorted(entries, key=lambda item: item[1]["data_offsets"][0]):
            first, last = entry["data_offsets"]
            digest = hashlib.sha256(f"{entry['dtype']} {entry['shape']}\n".encode())
            stream.seek(start + first)
            left = last - first
            while left:
                block = stream.read(min(_CHUNK, left))
                if not block:
                    raise ModelError(f"{file} is cut short within tensor '{name}'; download it again")
                digest.update(block)
                left -= len(block)
            yield name, digest.hexdigest()


def fingerprint(folder: Path) -> str:
    """The base's identity, 64 hexadecimal digits; raises ModelError for files that are missing or cut short."""
    files = weight_files(folder)
    key_parts = [f"{f.resolve()}|{f.stat().st_size}|{f.stat().st_mtime_ns}" for f in files]
    key = hashlib.sha256("\n".join(key_parts).encode()).hexdigest()
    entry = cache_folder() / "fingerprints" / key
    if entry.is_file():
        known = entry.read_text().strip()
        if len(known) == 64:
            return known
    lines = sorted(f"{name} {digest}" for file in files for name, digest in tensor_digests(file))
    result = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary = entry.with_suffix(f".{os.getpid()}")
        temporary.write_text(result)
        temporary.replace(entry)
    except OSError:
        pass  # a cache that cannot be written costs time, nothing else
    return result
