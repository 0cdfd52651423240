"""The fingerprint of a base: a digest over the tensors of its source checkpoint.

It depends only on the tensors' names, dtypes, shapes and bytes, not on the folder's path, the sharding, or the precision in
which Graft stores the base. Reading 14 GB takes a while, so the fingerprint is cached in the user's cache folder by each
file's path, size and time.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from graftlm.config.fields import is_gguf
from graftlm.errors import ModelError
from graftlm.files import cache_folder, write_text
from graftlm.gguf.folder import gguf_of
from graftlm.gguf.header import read_gguf
from graftlm.jsonfile import read_json
from graftlm.progress import Task, working
from graftlm.tensorfile import TensorInfo, read_header

_CHUNK = 1 << 22


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a model folder: the safetensors files in its index, else all of them, or the GGUF file
    that it stands for.

    Raises ModelError for an index that is damaged, names a file that is missing, or one outside of the folder.
    """
    gguf = gguf_of(folder)
    if gguf is not None:
        return [gguf.path]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = read_json(index, ModelError).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ModelError(f"{index} has no weight_map of tensor names to files; download it again")
        names = sorted(set(places.values()))
        odd = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if odd:
            raise ModelError(
                f"{index} names '{odd[0]}', which is not a safetensors file in this folder; only those are read"
            )
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{folder}: {len(missing)} of {len(names)} weight files are missing, the first is {missing[0]}"
            )
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def tensors_in(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors or GGUF file, under the file's own names. Raises ModelError."""
    if not is_gguf(file.name):
        return read_header(file, ModelError)
    listed = read_gguf(file).tensors
    return {name: TensorInfo(t.type.name.upper(), t.shape, t.first, t.last) for name, t in listed.items()}


def tensor_digests(file: Path, task: Task | None = None) -> Iterator[tuple[str, str]]:
    """(tensor name, digest over its dtype, shape and bytes) of each tensor, read as a stream. Raises ModelError.

    `task` gets the number of bytes read, as progress.
    """
    header = tensors_in(file)
    with file.open("rb") as stream:
        for name, info in header.items():
            digest = hashlib.sha256(f"{info.dtype} {list(info.shape)}\n".encode())
            stream.seek(info.first)
            left = info.last - info.first
            while left:
                block = stream.read(min(_CHUNK, left))
                if not block:
                    raise ModelError(f"{file} is cut short within tensor '{name}'; download it again")
                digest.update(block)
                left -= len(block)
                if task is not None:
                    task.to(task.done + len(block))
            yield name, digest.hexdigest()


def fingerprint(folder: Path) -> str:
    """The base's fingerprint, 64 hexadecimal digits. Raises ModelError for files that are missing, damaged or truncated."""
    files = weight_files(folder)
    # ctime is part of the key too: a copy can preserve mtime but not ctime.
    stats = [(file.resolve(), file.stat()) for file in files]
    key_parts = [f"{path}|{s.st_size}|{s.st_mtime_ns}|{s.st_ctime_ns}" for path, s in stats]
    key = hashlib.sha256("\n".join(key_parts).encode()).hexdigest()
    entry = cache_folder() / "fingerprints" / key
    if entry.is_file():
        known = entry.read_text(errors="replace").strip()
        if re.fullmatch("[0-9a-f]{64}", known):
            return known
    with working("fingerprinting the base", sum(s.st_size for _, s in stats), "bytes") as task:
        lines = sorted(f"{name} {digest}" for file in files for name, digest in tensor_digests(file, task))
    result = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_text(entry, result)
    except OSError:
        pass  # without a cache it takes longer, nothing else
    return result
