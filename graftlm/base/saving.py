"""Save a base as transformers would: the weights with its names and layout, and the plain model folder."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graftlm.base.modules import Stored, StoredStack
from graftlm.base.transformers_log import quiet


def dense_state_dict(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every weight with transformers' name and layout as a dense `dtype` tensor, without tied copies."""
    state: dict[str, Tensor] = {}
    stored = {name: module for name, module in model.named_modules() if isinstance(module, Stored)}
    seen: set[int] = set()
    for name, module in stored.items():
        value = module.value
        if id(value) in seen:
            continue
        seen.add(id(value))
        key = name if isinstance(module, StoredStack) else f"{name.removesuffix('.stored')}.weight"
        state[key] = module.original(dtype)
        bias = getattr(module, "bias", None)
        if bias is not None:
            state[f"{name}.bias"] = bias.detach().to(dtype)
    owned = {f"{name}.{key}" for name in stored for key in ("weight", "bias")}
    for name, parameter in model.named_parameters():  # tied parameters are listed once, with their first name
        if name in owned:
            continue
        if id(parameter) in seen:
            # Of a tied head and embedding, the embedding's name is saved.
            for key in [k for k, s in stored.items() if s.dense is parameter]:
                state.pop(f"{key}.weight", None)
        state[name] = parameter.detach().to(dtype) if parameter.is_floating_point() else parameter.detach()
        seen.add(id(parameter))
    persistent = set(model.state_dict().keys())
    for name, buffer in model.named_buffers():
        if name in persistent:
            state[name] = buffer
    return state


def save_model(model: PreTrainedModel, folder: str, dtype: torch.dtype) -> None:
    """Write a plain Hugging Face model folder: sharded safetensors and config.json."""
    config: Any = model.config
    cache, implementation, kind = config.use_cache, config._attn_implementation, config.dtype
    experts = getattr(config, "_experts_implementation", None)
    config.use_cache, config.dtype = True, dtype
    rescale = model.__dict__.get("graft_rescale_every")
    if rescale is not None:
        config.rescale_every = rescale
    try:
        with quiet():
            model.save_pretrained(folder, state_dict=dense_state_dict(model, dtype), max_shard_size="4GB")
    finally:
        config.use_cache, config.dtype = cache, kind
        if rescale is not None:
            config.rescale_every = 0
        config._attn_implementation = implementation
        if experts is not None:
            config._experts_implementation = experts
