"""Write an adapter as one GGUF file for llama.cpp's `--lora`.

    general.type "adapter", adapter.type "lora", general.architecture, adapter.lora.alpha
    <tensor of the base>.lora_a (r, in) and .lora_b (out, r), such as blk.0.attn_q.weight.lora_a

llama.cpp (`src/llama-adapter.cpp`, `build_lora_mm`) computes W x + alpha / r B (A x): r is taken from each pair, alpha is one
number for the whole file. A layer with another scale gets it multiplied into its B. Where the base's rows have another order
in GGUF, so have the rows of B (`gguf/layout.py`). llama.cpp compares architecture and shapes with the base, nothing else.

Letters: r rank, `in`, `out` features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from graftlm.adapters.gguf import gguf_package, partial_file
from graftlm.adapters.layer_adapter import LowRank
from graftlm.base.meta_base import MetaBase
from graftlm.errors import AdapterError
from graftlm.gguf.header import read_gguf
from graftlm.gguf.layout import GgufLayout

Array = NDArray[Any]
Kind = Literal["f32", "f16"]
_DTYPES = {"f32": np.float32, "f16": np.float16}
_FILE_TYPES = {"f32": 0, "f16": 1}  # general.file_type
MOST_ROUNDING = 0.01
"""How much of a tensor's norm rounding to f16 may be; it is above this only outside of f16's range."""


@dataclass(frozen=True)
class GgufAdapter:
    """An adapter in llama.cpp's terms."""

    architecture: str
    alpha: float
    """A float32's value: what the file holds."""
    tensors: dict[str, Array]
    """By their names in the file, float32 or float16: lora_a (r, in), lora_b (out, r)."""
    rescaled: int
    """Number of layers whose scale was multiplied into B."""


def without_place(base: MetaBase, layout: GgufLayout, layer: str) -> str | None:
    """Why llama.cpp has no place for an adapter on a layer; None if it has one."""
    if layer == base.structure.head_name and base.tied:
        return "it adapts a head that is tied to the embedding, and a GGUF file then has no tensor for the head"
    if layout.place_of(f"{layer}.weight") is None:
        return f"it adapts '{layer}', for which GGUF has no name"
    return None


def for_llama_cpp(layout: GgufLayout, parts: Mapping[str, LowRank], kind: Kind) -> GgufAdapter:
    """Convert low-rank layers: one alpha, the names and the order of rows of GGUF.

    Raises AdapterError for a tensor that `kind` cannot hold.
    """
    alphas = {layer: float(np.float32(part.scale * part.rank)) for layer, part in parts.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    tensors: dict[str, Array] = {}
    for layer, part in parts.items():
        name = f"{layer}.weight"
        place = layout.place_of(name)
        factor = 1.0 if alphas[layer] == alpha else part.scale * part.rank / alpha
        scaled = part.B.detach().float() * factor  # (out, r)
        for tensor, letter in ((part.A.detach().float(), "a"), (layout.rows_for_gguf(name, scaled), "b")):
            tensors[f"{place}.lora_{letter}"] = _rounded(tensor, kind, f"lora_{letter.upper()} of '{layer}'")
    return GgufAdapter(layout.architecture, alpha, tensors, sum(found != alpha for found in alphas.values()))


def _rounded(tensor: torch.Tensor, kind: Kind, label: str) -> Array:
    """A tensor as an array of the file's type. Raises AdapterError where f16 loses too much of it."""
    exact = tensor.contiguous().numpy()
    with np.errstate(over="ignore"):
        found = exact.astype(_DTYPES[kind])
        size = float(np.linalg.norm(exact))
        lost = float(np.linalg.norm(found.astype(np.float32) - exact))
    if not lost <= MOST_ROUNDING * size:
        raise AdapterError(
            f"{label} has values up to {np.abs(exact).max():.3g}, and f16 holds those from 0.00006 to 65,504 well; take "
            "--gguf-type f32"
        )
    return found


def write_gguf_adapter(adapter: GgufAdapter, base_name: str, file: Path, kind: Kind) -> int:
    """Write the file, read it back, compare every tensor, and give it its name; returns its size in bytes.

    Raises AdapterError, ModelError without the package gguf, and OSError; no file is left then.
    """
    gguf = gguf_package()
    file.parent.mkdir(parents=True, exist_ok=True)
    with partial_file(file) as temporary:
        writer = gguf.GGUFWriter(str(temporary), adapter.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.alpha)
        writer.add_name(file.stem)
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, Path(base_name).name)
        writer.add_file_type(_FILE_TYPES[kind])
        for name, tensor in adapter.tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _read_back(temporary, file.name, adapter, kind)
        return temporary.stat().st_size


def _read_back(written: Path, name: str, adapter: GgufAdapter, kind: Kind) -> None:
    """Read the file as a base's is read, and compare what llama.cpp reads of it with what was meant."""
    found = read_gguf(written)
    meant: dict[str, Any] = {
        "general.type": "adapter", "adapter.type": "lora", "general.architecture": adapter.architecture,
        "adapter.lora.alpha": adapter.alpha,
    }  # fmt: skip
    odd = [key for key, value in meant.items() if found.metadata.get(key) != value]
    odd += sorted(found.tensors.keys() ^ adapter.tensors.keys())
    for place, tensor in adapter.tensors.items():
        if place in odd:
            continue
        same = found.tensors[place].type.name == kind and found.tensors[place].shape == tensor.shape
        if not same or found.bytes_of(place).tobytes() != tensor.tobytes():
            odd.append(place)
    if odd:
        raise AdapterError(f"{odd[0]} in {name} differs from what was written; the file was removed")
