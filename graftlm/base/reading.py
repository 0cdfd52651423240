"""Read a model's weights into their stored form: plain or quantized ones, those of a GGUF file, or random ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from graftlm.base.gguf_loading import load_gguf
from graftlm.base.quantizer import load_dequantized, stream_checkpoint
from graftlm.base.random_init import random_model
from graftlm.base.surgery import Replacements, convert_model
from graftlm.config import Precision
from graftlm.distributed.group import ALONE, Ranks
from graftlm.errors import ModelError
from graftlm.gguf.folder import gguf_of
from graftlm.jsonfile import read_json


@dataclass(frozen=True)
class Reading:
    """From where, into which form, and to which device."""

    folder: str
    precision: Precision
    activation_dtype: torch.dtype
    device: torch.device
    trust_remote_code: bool = False
    ranks: Ranks = ALONE
    """Those that share the weights: of a plain checkpoint or a GGUF file each keeps its rows as soon as a tensor is read."""
    host_layers: int = 0
    """Layers whose rows wait on the host."""


def read_model(config: Any, how: Reading, random_seed: int | None) -> tuple[PreTrainedModel, Replacements, list[str]]:
    """The model with stored weights, what was replaced in it, and notes for the user; random weights if there is a seed.

    Raises ModelError.
    """
    folder, precision, dtype = Path(how.folder), how.precision, how.activation_dtype
    if random_seed is not None:
        model: Any = random_model(config, random_seed, how.trust_remote_code)
    elif gguf_of(folder) is not None:
        return *load_gguf(folder, config, precision, dtype, how.device, how.ranks, how.host_layers), []
    elif (quantized := _quantization_of(folder)) is not None:
        model = load_dequantized(how.folder, quantized, how.trust_remote_code)
    else:
        model, replacements, unused = stream_checkpoint(
            how.folder, precision, dtype, how.device, how.trust_remote_code, how.ranks, how.host_layers
        )
        what = f"{len(unused)} tensors of the checkpoint have no place in this architecture"
        return model, replacements, [f"{what}: {unused[0]}, ..."] if unused else []
    model, replacements = convert_model(model, precision, dtype)
    return model.to(how.device), replacements, []


def _quantization_of(folder: Path) -> str | None:
    """The quantization method that a checkpoint's config names, or None."""
    config = read_json(folder / "config.json", ModelError)
    inner = config.get("text_config")
    found = config.get("quantization_config") or (isinstance(inner, dict) and inner.get("quantization_config"))
    if not found:
        return None
    if not isinstance(found, dict):
        raise ModelError(f"{folder}/config.json: quantization_config is {found!r}, expected an object")
    return str(found.get("quant_method") or "bitsandbytes")
