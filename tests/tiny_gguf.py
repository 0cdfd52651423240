"""Tiny models of every architecture that is written to GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import tiny_run

SIX = ["sliding_attention"] * 5 + ["full_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"vocab_size": tiny_run.VOCABULARY + 1},  # transformers adds a token of its own to this tokenizer
    "qwen3": {"head_dim": 128},  # transformers' reader does not read another
    "gemma2": {"num_hidden_layers": 2, "query_pre_attn_scalar": 10},
    "gemma3": {"num_hidden_layers": 6, "query_pre_attn_scalar": 10, "layer_types": SIX},
}


def folder(place: Path, architecture: str, **changes: Any) -> Path:
    """A tiny model with a tokenizer of bytes."""
    model = tiny.random_model(architecture, **{"vocab_size": tiny_run.VOCABULARY, **changes})
    model.save_pretrained(place)
    tiny_run.byte_tokenizer().save_pretrained(place)
    return place
