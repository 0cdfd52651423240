"""What the tests of the store share: adapters as small files, made without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file

from graftlm.adapters.manifest import FORMAT, digest_of, file_entries

BASE, OTHER = "a" * 64, "b" * 64
LAYER = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


def adapter(place: Path, seed: int = 0, *, base: str = BASE, scale: float = 1.0, **about: Any) -> Path:
    """An adapter's folder with a whole manifest: two layers of rank 3, alpha 5."""
    place.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    named = {
        LAYER.format(layer, kind): torch.randn(shape, generator=generator) * (scale if kind == "B" else 1.0)
        for layer in (0, 1)
        for kind, shape in (("A", (3, 7)), ("B", (11, 3)))
    }
    return written(place, named, base=base, **about)


def written(
    place: Path, named: dict[str, torch.Tensor], *, base: str = BASE, extra: Mapping[str, str] = MappingProxyType({}),
    **about: Any,
) -> Path:  # fmt: skip
    """These tensors as an adapter, with its manifest and the `extra` files that belong to it."""
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 5, "target_modules": ["q_proj"],
        "bias": "none", "use_rslora": False, "use_dora": False,
    }  # fmt: skip
    save_file(named, place / "adapter_model.safetensors")
    (place / "adapter_config.json").write_text(json.dumps(config))
    for name, text in extra.items():
        (place / name).write_text(text)
    formula = {key: config.get(key) for key in ("r", "lora_alpha", "target_modules", "bias", "use_rslora", "use_dora")}
    content = {
        "format": FORMAT,
        "files": file_entries(list(place.iterdir())),
        "base": {
            "name": "tiny",
            "fingerprint": base,
            "precision": "nf4",
            "compute_dtype": "float32",
            "architecture": "LlamaForCausalLM",
        },
        "formula": formula,
        "tensors": {name: {"shape": list(t.shape), "dtype": "F32"} for name, t in named.items()},
        "golden": {"chat": None, "text": [1, 2], "stop": [2]},
        "canary": {"prompts": [[1, 2]], "base": [0.5], "adapter": [0.25], "tolerance": {"nf4": 0.001}},
        "method": "qlora",
        "steps": 7,
        "data": {"train": {"digest": "d" * 32, "rows": 12, "tokens": 99, "target_tokens": 50, "sources": []}},
        "evaluation": {"before": 3.0, "after": 2.0},
        **about,
    }
    (place / "graft.json").write_text(json.dumps({"digest": digest_of(content), **content}))
    return place


def run(place: Path, seed: int = 0, **about: Any) -> Path:
    """A run's folder: its config and its adapter."""
    adapter(place / "adapter", seed, **about)
    (place / "config.json").write_text(
        json.dumps({"method": "qlora", "learning_rate": 2e-4, "seed": seed, "out": str(place)})
    )
    (place / "environment.json").write_text(json.dumps({"versions": {"graftlm": "0.1.0"}}))
    return place
