"""What a version was made from, and how two versions differ.

The distance of two adapters is that of their updates s B A in each layer, not of A and B, since many pairs give the same
update. It is computed without any (out, in) matrix (Frobenius norm and inner product):

    <s B A, t D C> = s t trace((B^T D) (C A^T))        B (out, r), A (r, in), D (out, q), C (q, in)

Letters: E experts of a stack, whose A is (E r, in) and B (out, r E) with the expert running fastest.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftlm.adapters.store.base_versions import Version
from graftlm.adapters.store.content import run_of
from graftlm.adapters.store.store import Store
from graftlm.config.aliases import FORMER_FIGURES, former_value, renamed
from graftlm.jsonfile import read_json

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "base_model.model."


def lineage(store: Store, version: Version) -> dict[str, Any]:
    """A version's base, data, config, metrics, parents and files. Raises StoreError."""
    found = version.opened()
    manifest = found.manifest or {}
    event = version.event
    run = run_of(version.folder)
    data = manifest.get("data") or {}
    known = {v.digest: v for v in reversed(store.versions())}
    parents = [str(p) for p in event.get("parents") or ()]
    return {
        "version": version.label,
        "digest": version.digest,
        "aliases": list(version.aliases),
        "published": {key: event.get(key) for key in ("at", "by", "source", "note")},
        "base": {
            FORMER_FIGURES.get(k, k): former_value("compute_dtype", v) for k, v in (manifest.get("base") or {}).items()
        },
        "data": {
            "digest": (data.get("train") or {}).get("digest"),
            "train": data.get("train"),
            "eval": data.get("eval"),
        },
        "config": {**{k: manifest.get(k) for k in ("method", "seed", "steps")}, **renamed(run.get("config") or {})},
        "formula": manifest.get("formula") or found.config,
        "metrics": {"before": None, "after": None, **(manifest.get("evaluation") or {})},
        "parents": [{"digest": p, "version": known[p].label if p in known else None} for p in parents],
        "children": [v.label for v in known.values() if version.digest in (v.event.get("parents") or ())],
        "tensors": len(found.tensors),
        "parameters": sum(math.prod(t.shape) for t in found.tensors.values()),
        "bytes": found.bytes,
        "files": list(found.files),
        "folder": str(version.folder),
        "made_with": (run.get("environment") or {}).get("versions") or manifest.get("versions") or {},
    }


@dataclass(frozen=True)
class LayerDistance:
    """The distance of two updates of one layer."""

    layer: str
    distance: float | None
    """|U - V| / |U|; None if U is zero or the shapes differ."""
    cosine: float | None
    first: float
    second: float
    """The Frobenius norms |U| and |V|."""


def differences(store: Store, first: Version, second: Version) -> dict[str, Any]:
    """The differences between two versions: config, tensor shapes, metrics, and weights. Raises StoreError."""
    a, b = lineage(store, first), lineage(store, second)
    plain = {side: _flat({k: v[k] for k in ("base", "config", "formula")}) for side, v in (("a", a), ("b", b))}
    data = {side: {"data.digest": v["data"]["digest"]} for side, v in (("a", a), ("b", b))}
    shapes = {side: _shapes(v) for side, v in (("a", first), ("b", second))}
    layers = distances(first.folder, second.folder)
    apart = _total(layers)
    return {
        "first": {k: a[k] for k in ("version", "digest", "metrics", "parameters", "bytes")},
        "second": {k: b[k] for k in ("version", "digest", "metrics", "parameters", "bytes")},
        "config": _changes({**plain["a"], **data["a"]}, {**plain["b"], **data["b"]}),
        "plan": _changes(shapes["a"], shapes["b"]),
        "metrics": _changes(_flat(a["metrics"]), _flat(b["metrics"])),
        "weights": {
            "distance": apart,
            "layers": [
                {"layer": d.layer, "distance": d.distance, "cosine": d.cosine, "first": d.first, "second": d.second}
                for d in layers
            ],
        },
    }


def _shapes(version: Version) -> dict[str, Any]:
    from graftlm.adapters.peft_format import TENSORS
    from graftlm.errors import AdapterError
    from graftlm.tensorfile import read_header

    header = read_header(version.folder / TENSORS, AdapterError)
    return {name.removeprefix(_PREFIX): f"{t.dtype} {list(t.shape)}" for name, t in header.items()}


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """A nested mapping, flattened: `base.precision`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found.update(_flat(value, f"{before}{key}."))
        else:
            found[f"{before}{key}"] = value
    return found


def _changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries that differ; a missing entry is None."""
    ignored = {"config.out", "config.resume"}
    keys = [k for k in dict.fromkeys([*a, *b]) if k not in ignored and a.get(k) != b.get(k)]
    return [{"key": k, "first": a.get(k), "second": b.get(k)} for k in keys]


def distances(first: Path, second: Path) -> list[LayerDistance]:
    """The distance of each layer's update, |s B A - t D C| / |s B A|, and of each tensor that is not A or B."""
    import torch

    one, two = _updates(first), _updates(second)
    found: list[LayerDistance] = []
    with torch.no_grad():
        for layer in dict.fromkeys([*one, *two]):
            a, b = one.get(layer), two.get(layer)
            aa = a.inner(a) if a else 0.0
            bb = b.inner(b) if b else 0.0
            fits = a is None or b is None or a.fits(b)
            ab = a.inner(b) if a and b and fits else 0.0
            gap = math.sqrt(max(aa - 2 * ab + bb, 0.0))
            distance = gap / math.sqrt(aa) if aa > 0 and fits else None
            cosine = ab / math.sqrt(aa * bb) if aa > 0 and bb > 0 and fits else None
            found.append(LayerDistance(layer, distance, cosine, math.sqrt(aa), math.sqrt(bb)))
    return found


def _total(layers: list[LayerDistance]) -> float | None:
    """The distance over all layers as one vector."""
    if any(d.distance is None and d.first > 0 for d in layers):
        return None
    apart = sum((d.distance or 0.0) ** 2 * d.first**2 if d.first > 0 else d.second**2 for d in layers)
    size = sum(d.first**2 for d in layers)
    return math.sqrt(apart / size) if size > 0 else None


@dataclass
class _Update:
    """One layer's update as factors, or a full tensor (A is None)."""

    B: Tensor  # (E, out, r), times the scale
    A: Tensor | None  # (E, r, in)

    def fits(self, other: _Update) -> bool:
        if self.A is None or other.A is None:
            return self.A is other.A and self.B.shape == other.B.shape
        mine = (self.B.shape[0], self.B.shape[1], self.A.shape[2])
        return mine == (other.B.shape[0], other.B.shape[1], other.A.shape[2])

    def inner(self, other: _Update) -> float:
        if self.A is None or other.A is None:
            return float((self.B * other.B).sum())
        left = self.B.transpose(1, 2) @ other.B  # (E, r, q)
        right = self.A @ other.A.transpose(1, 2)  # (E, r, q)
        return float((left * right).sum())


def _updates(folder: Path) -> dict[str, _Update]:
    """The updates of an adapter's files by layer; other tensors are listed by their own names."""
    from safetensors.torch import load_file

    from graftlm.adapters.manifest import CONFIG, TENSORS
    from graftlm.adapters.patterns import Expressions
    from graftlm.errors import AdapterError

    config = read_json(folder / CONFIG, AdapterError)
    grouped: dict[str, dict[str, Any]] = defaultdict(dict)
    found: dict[str, _Update] = {}
    for key, tensor in load_file(folder / TENSORS).items():
        name, values = key.removeprefix(_PREFIX), tensor.double()
        for end in (".lora_A.weight", ".lora_B.weight"):
            if name.endswith(end):
                grouped[name.removesuffix(end)][end[6]] = values
                break
        else:
            found[name] = _Update(values[None], None)
    expressions = Expressions(str(folder / CONFIG))
    ranks, alphas = (expressions.values(key, config.get(key)) for key in ("rank_pattern", "alpha_pattern"))
    for layer, factors in grouped.items():
        A, B = factors["A"], factors["B"]
        rank = int(ranks.of_place(layer, config["r"]))
        rank = rank if len(A) % rank == 0 else len(A)
        alpha = float(alphas.of_place(layer, config["lora_alpha"]))
        scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        experts = len(A) // rank
        stacked = B.view(len(B), rank, experts).permute(2, 0, 1)  # (E, out, r)
        found[layer] = _Update(stacked * scale, A.view(experts, rank, -1))
    return dict(sorted(found.items()))
