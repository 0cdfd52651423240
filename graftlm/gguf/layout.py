"""Which tensor of a GGUF file is which of a Hugging Face checkpoint, and how its values differ: one table, both ways.

    llama        rows of q and k are reordered head by head: llama.cpp rotates neighbours, transformers rotates halves
    gemma*       norms hold w + 1, which is what they multiply with
    rope_freqs   Llama 3's scaling of the rotary frequencies: in the config, not among the weights

A reordering moves whole rows, so quantized rows are moved as they are and no value changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from graftlm.errors import GraftError, ModelError

if TYPE_CHECKING:
    from torch import Tensor


ARCHITECTURES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text",
}  # fmt: skip
"""GGUF's `general.architecture` -> transformers' model type. Mistral's models are `llama` in GGUF."""
WRITTEN_AS = {"mistral": "llama", **{model_type: name for name, model_type in ARCHITECTURES.items()}}
"""transformers' model type -> GGUF's architecture."""
ROPE_FREQS = "rope_freqs.weight"

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_FOUR_NORMS = {
    "ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_PLACE = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
_NAME = re.compile(r"(?:model\.layers\.(\d+)\.)?([\w.]+)\.(weight|bias)")

_Rows = TypeVar("_Rows", "Tensor", NDArray[np.uint8])


class GgufLayout:
    """The table for one architecture, in GGUF's or in transformers' words."""

    def __init__(self, architecture: str, heads: int, kv_heads: int) -> None:
        """Raises ModelError for an architecture that is not in the table."""
        if architecture not in ARCHITECTURES:
            raise ModelError(
                f"its architecture is '{architecture}', and GGUF files are read and written for {', '.join(ARCHITECTURES)}; "
                "take the model's Hugging Face folder"
            )
        self.architecture = architecture
        self._heads = {"q_proj": heads, "k_proj": kv_heads}
        self._inner = {**_INNER, **(_FOUR_NORMS if architecture in ("gemma2", "gemma3") else {})}
        self._inner_places = {name: place for place, name in self._inner.items()}
        self._outer_places = {name: place for place, name in _OUTER.items()}

    def name_of(self, place: str) -> str | None:
        """A GGUF tensor's name in a Hugging Face checkpoint, or None where the architecture has no such weight."""
        parts = _PLACE.fullmatch(place)
        if parts is None:
            return None
        layer, module, kind = parts.groups()
        if layer is None:
            return f"{_OUTER[module]}.{kind}" if module in _OUTER else None
        return f"model.layers.{layer}.{self._inner[module]}.{kind}" if module in self._inner else None

    def place_of(self, name: str) -> str | None:
        """A checkpoint tensor's name in a GGUF file, or None where the format has no place for it."""
        parts = _NAME.fullmatch(name)
        if parts is None:
            return None
        layer, module, kind = parts.groups()
        if layer is None:
            return f"{self._outer_places[module]}.{kind}" if module in self._outer_places else None
        return f"blk.{layer}.{self._inner_places[module]}.{kind}" if module in self._inner_places else None

    def reorders(self, name: str) -> bool:
        """Whether the rows of this checkpoint tensor lie in another order in a GGUF file."""
        return self._heads_of(name) is not None

    def _heads_of(self, name: str) -> int | None:
        return self._heads.get(name.split(".")[-2]) if self.architecture == "llama" else None

    def rows_for_gguf(self, name: str, rows: _Rows) -> _Rows:
        """Rows (out, ...) of a checkpoint tensor in the order in which a GGUF file has them."""
        heads = self._heads_of(name)
        return rows if heads is None else interleaved(rows, heads)

    def rows_from_gguf(self, name: str, rows: _Rows) -> _Rows:
        """Rows (out, ...) of a GGUF tensor in the order in which the checkpoint has them."""
        heads = self._heads_of(name)
        return rows if heads is None else halves(rows, heads)

    def norm_offset(self, name: str) -> float:
        """What a GGUF file's values of this checkpoint tensor have on top of the checkpoint's."""
        return 1.0 if self.architecture.startswith("gemma") and name.endswith("norm.weight") else 0.0


def layout_for(config: Any, raises: type[GraftError], way_out: str) -> GgufLayout:
    """The names and orders in GGUF for the model of a transformers config.

    Raises the given error, with the way out, for a type of model that is not in the table.
    """
    architecture = WRITTEN_AS.get(config.model_type)
    if architecture is None:
        raise raises(f"GGUF is supported for {', '.join(WRITTEN_AS)}, and this is a {config.model_type}; {way_out}")
    return GgufLayout(architecture, int(config.num_attention_heads), int(config.num_key_value_heads))


def interleaved(rows: _Rows, heads: int) -> _Rows:
    """Rows of each head from (first half, second half) to neighbours: row j and row j + D/2 become 2j and 2j + 1."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def halves(rows: _Rows, heads: int) -> _Rows:
    """The inverse of `interleaved`: rows 2j and 2j + 1 of each head become j and j + D/2."""
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def checkpoint_names(file: Path, layout: GgufLayout, places: Iterable[str]) -> dict[str, str]:
    """Checkpoint name -> GGUF name of all tensors of a file. Raises ModelError for one without a place in the table."""
    found: dict[str, str] = {}
    for place in places:
        if place == ROPE_FREQS:
            continue
        name = layout.name_of(place)
        if name is None:
            raise ModelError(
                f"{file} has tensor '{place}', and a {layout.architecture} model has none of that name as far as Graft knows; "
                "take the model's Hugging Face folder"
            )
        found[name] = place
    return found
