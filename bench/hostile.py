"""Adapters that must not be served, made from a good one. Each is whole in itself: its manifest and digests are forged to fit.

another base     says it was trained on this base, and its matrices have another one's widths
not finite       one value is NaN
missing          half of its tensors are gone
truncated        the file ends in the middle of a tensor
long header      the file's first number claims a header of a terabyte
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftlm.adapters.manifest import CONFIG, MANIFEST, TENSORS, digest_of, file_entries

Tensors = dict[str, Tensor]


def _wider(named: Tensors) -> Tensors:
    return {n: torch.cat([t, t[:, :8]], dim=1) if "lora_A" in n else t for n, t in named.items()}


def _not_finite(named: Tensors) -> Tensors:
    first = min(named)
    changed = named[first].clone()
    changed.view(-1)[len(changed.view(-1)) // 2] = float("nan")
    return {**named, first: changed}


def _missing(named: Tensors) -> Tensors:
    return {name: tensor for i, (name, tensor) in enumerate(sorted(named.items())) if i % 2}


def _truncated(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def _long_header(data: bytes) -> bytes:
    return struct.pack("<Q", 1 << 40) + data[8:]


_TENSORS: dict[str, Callable[[Tensors], Tensors]] = {
    "another base": _wider, "not finite": _not_finite, "missing": _missing,
}  # fmt: skip
_BYTES: dict[str, Callable[[bytes], bytes]] = {"truncated": _truncated, "long header": _long_header}
KINDS = (*_TENSORS, *_BYTES)


def forge(kind: str, good: Path, place: Path, number: int) -> Path:
    """A hostile copy of a good adapter, as an own folder; `number` makes its content, and so its digest, its own."""
    shutil.copytree(good, place)
    for file in place.iterdir():
        file.chmod(0o644)
    spoil(kind, place / TENSORS)
    manifest = json.loads((place / MANIFEST).read_text())
    if kind in _TENSORS:
        named = load_file(place / TENSORS)
        manifest["tensors"] = {name: {"shape": list(t.shape), "dtype": "F32"} for name, t in sorted(named.items())}
    manifest["files"] = file_entries([place / CONFIG, place / TENSORS])
    manifest["seed"] = number
    (place / MANIFEST).write_text(json.dumps({**manifest, "digest": digest_of(manifest)}))
    return place


def spoil(kind: str, file: Path) -> None:
    """Put a hostile file of tensors in the place of a good one, in one move, as a copy that went wrong or an enemy would."""
    other = file.with_suffix(".new")
    if kind in _TENSORS:
        save_file(_TENSORS[kind](load_file(file)), other, metadata={"format": "pt"})
    else:
        other.write_bytes(_BYTES[kind](file.read_bytes()))
    os.replace(other, file)
