"""What the tests of merging share: an adapter as files, and a merged folder made from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
import torch

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import detach
from graftlm.adapters.combine import MergeRecipe
from graftlm.adapters.merge import Merger, WeightedAdapter
from graftlm.adapters.merge_writer import write_merged_model
from graftlm.base.loading import Base
from graftlm.base.meta_base import load_meta_base


def saved(base: Base, place: Path, seed: int = 3, **plan: Any) -> Path:
    """An adapter with random B (and random magnitudes, rows, modules) in a folder; nothing stays attached."""
    adapter = tiny.adapted(base, seed=seed, slot=9, **plan)
    detach(base, slot=9)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter.parameters().items():
            if "lora_A" not in name and "lora_B" not in name:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    place.mkdir(parents=True)
    adapter_format.save(base, adapter, place, {})
    return place


def merger(
    model: Path, adapters: Sequence[Path | tuple[Path, float]], onto: Any = "original", precision: Any = "float32",
    recipe: MergeRecipe | None = None,
) -> Merger:  # fmt: skip
    """Adapters' folders, each with its weight, on a base's shapes."""
    base = load_meta_base(str(model), precision=precision)
    pairs = [(a, 1.0) if isinstance(a, Path) else a for a in adapters]
    return Merger(
        base, [WeightedAdapter(adapter_format.load(base, f), w) for f, w in pairs], recipe or MergeRecipe(), onto
    )


def written(out: Path, found: Merger, save_dtype: torch.dtype | None = None) -> Path:
    """The merged folder."""
    write_merged_model(found, out, {"method": "merge"}, save_dtype=save_dtype)
    return out
