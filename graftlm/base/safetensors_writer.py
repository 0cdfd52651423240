"""Write safetensors files one tensor at a time, so that a file may be larger than memory.

The header, which comes first in the file, is known beforehand: names, dtypes and shapes. Then each tensor is computed, written
and freed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.progress import sign_of_life

_BLOCK = 1 << 24  # bytes that are written at once
_FLUSHED = (
    1 << 30
)  # bytes after which they are flushed: of a large file at its end alone, it could take longer than a rank may
INDEX = "model.safetensors.index.json"
_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.uint8: "U8",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip
_TYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written: its dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def dtype_of(name: str) -> torch.dtype | None:
    """Safetensors' name of a dtype -> torch's; None for one that torch cannot compute with (8-bit floats and below)."""
    return _TYPES.get(name)


def raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes in memory."""
    flat = tensor.detach().contiguous().reshape(-1)
    numbers: Any = flat.view(torch.uint8).numpy()
    return memoryview(numbers)


def write_tensors(path: Path, specs: Mapping[str, TensorSpec], value: Callable[[str], Tensor]) -> int:
    """Write a safetensors file; `value` gives each tensor in turn. Returns the bytes of all tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = unflushed = 0
    for name, spec in specs.items():
        header[name] = {
            "dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [place, place + spec.nbytes],
        }  # fmt: skip
        place += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, spec in specs.items():
            tensor = value(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), f"{name} is not as it was announced"
            for block in _blocks(raw(tensor)):
                stream.write(block)
                unflushed += len(block)
                if unflushed >= _FLUSHED:
                    stream.flush()
                    os.fsync(stream.fileno())
                    unflushed = 0
                sign_of_life()
        stream.flush()
        os.fsync(stream.fileno())
    return place


def _blocks(data: memoryview) -> Iterator[memoryview]:
    for first in range(0, len(data), _BLOCK):
        yield data[first : first + _BLOCK]


def write_index(folder: Path, places: Mapping[str, str], total_bytes: int) -> None:
    """Write the index of tensor names to files in transformers' format."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def total(specs: Iterable[TensorSpec]) -> int:
    """Bytes of these tensors."""
    return sum(spec.nbytes for spec in specs)
