"""Save a base as transformers would: the weights with its names and layout, and the plain model folder."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from graftlm.base.modules import Stored, StoredStack
from graftlm.base.safetensors_writer import TensorSpec, total, write_index, write_tensors
from graftlm.base.transformers_log import quiet
from graftlm.distributed.shard import whole
from graftlm.progress import LONG, sign_of_life

_MOST_BYTES = 4_000_000_000  # of a file


@dataclass(frozen=True)
class DenseWeight:
    """A weight as transformers has it: its shape and type, and what makes it; of a split one every rank makes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def dense_weights(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, DenseWeight]:
    """Every weight with transformers' name and layout, dense in `dtype`, without tied copies; none is made yet."""
    found: dict[str, DenseWeight] = {}
    stored = {name: module for name, module in model.named_modules() if isinstance(module, Stored)}
    seen: set[int] = set()
    for name, module in stored.items():
        value = module.value
        identity = id(value if isinstance(value, Tensor) else next(iter(value.tensors().values())))
        if identity in seen:
            continue
        seen.add(identity)
        key = name if isinstance(module, StoredStack) else f"{name.removesuffix('.stored')}.weight"
        found[key] = DenseWeight(module.original_shape, dtype, partial(module.original, dtype))
        bias = getattr(module, "bias", None)
        if bias is not None:
            found[f"{name}.bias"] = _dense(bias, dtype)
    owned = {f"{name}.{key}" for name, module in stored.items() for key in ("weight", "bias", *module._parameters)}
    for name, parameter in model.named_parameters():  # tied parameters are listed once, with their first name
        if name in owned:
            continue
        if id(parameter) in seen:
            # Of a tied head and embedding, the embedding's name is saved.
            for key in [k for k, s in stored.items() if s.dense is parameter]:
                found.pop(f"{key}.weight", None)
        found[name] = _dense(parameter, dtype if parameter.is_floating_point() else parameter.dtype)
        seen.add(id(parameter))
    persistent = set(model.state_dict().keys())
    for name, buffer in model.named_buffers():
        if name in persistent:
            found[name] = DenseWeight(tuple(buffer.shape), buffer.dtype, partial(_same, buffer))
    return found


def _dense(tensor: Tensor, dtype: torch.dtype) -> DenseWeight:
    return DenseWeight(tuple(tensor.shape), dtype, lambda: whole(tensor.detach()).to(dtype))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def dense_state_dict(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every weight with transformers' name and layout as a dense `dtype` tensor, without tied copies."""
    state: dict[str, Tensor] = {}
    for name, weight in dense_weights(model, dtype).items():
        state[name] = weight.make()
        sign_of_life()
    return state


def save_model(model: PreTrainedModel, folder: str, dtype: torch.dtype) -> None:
    """Write a plain Hugging Face model folder: sharded safetensors and config.json."""
    _save(model, folder, dtype, dense_state_dict(model, dtype))


def _save(model: PreTrainedModel, folder: str, dtype: torch.dtype, state: dict[str, Tensor]) -> None:
    config: Any = model.config
    cache, implementation, kind = config.use_cache, config._attn_implementation, config.dtype
    experts = getattr(config, "_experts_implementation", None)
    config.use_cache, config.dtype = True, dtype
    rescale = model.__dict__.get("graft_rescale_every")
    if rescale is not None:
        config.rescale_every = rescale
    try:
        with quiet():
            sign_of_life(LONG)
            model.save_pretrained(folder, state_dict=state, max_shard_size="4GB")
    finally:
        config.use_cache, config.dtype = cache, kind
        if rescale is not None:
            config.rescale_every = 0
        config._attn_implementation = implementation
        if experts is not None:
            config._experts_implementation = experts
        sign_of_life()


# ---- weights that ranks share ----------------------------------------------------------------------------------------


def save_split_model(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """The same of a model whose weights ranks share, on the first: one weight after another, while the others `send_weights`.

    At most what makes up one of transformers' tensors is whole at a time.
    """
    weights, groups = _groups(model, dtype)
    specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for made in groups.values() for name, t in made.items()}
    waiting: dict[str, Tensor] = {}
    rest = iter(groups)

    def value(name: str) -> Tensor:
        while name not in waiting:
            waiting.update(_made(model, weights, next(rest)))
        return waiting.pop(name).contiguous().cpu()

    _save(model, str(folder), dtype, {})  # all but the weights
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    files = _files(specs)
    for file, own in files.items():
        write_tensors(folder / file, own, value)
    if len(files) > 1:
        write_index(folder, {name: file for file, own in files.items() for name in own}, total(specs.values()))


def send_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """On every rank but the first: its part in `save_split_model`."""
    weights, groups = _groups(model, dtype)
    for group in groups:
        for name in group:
            weights[name].make()
            sign_of_life()


def _groups(model: Any, dtype: torch.dtype) -> tuple[dict[str, DenseWeight], dict[tuple[str, ...], dict[str, Tensor]]]:
    """The weights, and which of them make which of the tensors that transformers saves (without values): mostly one makes one,
    or the experts of a stack; where that does not give all of them, all together."""
    ignored: set[str] = set(model._keys_to_ignore_on_save or ())
    weights = {name: weight for name, weight in dense_weights(model, dtype).items() if name not in ignored}
    empty = {name: torch.empty(w.shape, dtype=w.dtype, device="meta") for name, w in weights.items()}
    all_at_once = revert_weight_conversion(model, dict(empty))
    groups = {(name,): revert_weight_conversion(model, {name: tensor}) for name, tensor in empty.items()}
    found = {name: tensor.shape for made in groups.values() for name, tensor in made.items()}
    if found == {name: tensor.shape for name, tensor in all_at_once.items()}:
        return weights, groups
    return weights, {tuple(weights): all_at_once}


def _made(model: Any, weights: dict[str, DenseWeight], group: tuple[str, ...]) -> dict[str, Tensor]:
    return revert_weight_conversion(model, {name: weights[name].make() for name in group})


def _files(specs: dict[str, TensorSpec]) -> dict[str, dict[str, TensorSpec]]:
    """The tensors in files of at most 4 GB, in order, under transformers' names."""
    files: list[dict[str, TensorSpec]] = [{}]
    for name, spec in specs.items():
        if files[-1] and total(files[-1].values()) + spec.nbytes > _MOST_BYTES:
            files.append({})
        files[-1][name] = spec
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": file for i, file in enumerate(files, start=1)}
