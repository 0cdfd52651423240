"""The model in a GGUF file: each tensor in place of a parameter, its blocks as they are or brought into another form.

The model is built without storage; then one tensor after another is read, so at most one is there twice.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftlm.base.gguf_tensors import read_tensor
from graftlm.base.modules import StoredLinear, WeightHandle
from graftlm.base.precision import DTYPES, dequantize, embedding_precision
from graftlm.base.random_init import random_model
from graftlm.base.splitting import shared_weights, stays_whole, weights_on_host
from graftlm.base.surgery import Replacements, find_replacements, freeze, replace_modules
from graftlm.config import Precision
from graftlm.distributed.group import ALONE, Ranks
from graftlm.errors import ModelError
from graftlm.gguf.folder import gguf_of, layout_of
from graftlm.gguf.header import GgufFile
from graftlm.gguf.layout import checkpoint_names
from graftlm.kernels import GgufBlocks
from graftlm.progress import working


def load_gguf(
    folder: Path, config: Any, precision: Precision, activation_dtype: torch.dtype, device: torch.device,
    ranks: Ranks = ALONE, host_layers: int = 0,
) -> tuple[PreTrainedModel, Replacements]:  # fmt: skip
    """The model of a GGUF file's folder in `precision`: `gguf` keeps each weight's blocks, the others requantize its values.

    Several `ranks` share the stored weights: each keeps its rows of each, those of `host_layers` layers on the host.

    Raises ModelError for tensors that are missing, or have other shapes than the config asks for.
    """
    file = gguf_of(folder)
    assert file is not None, "asked for a folder that stands for a GGUF file"
    layout = layout_of(file)
    with torch.device("meta"):
        model: Any = random_model(config, 0, trust_remote_code=False)
    replacements = find_replacements(model, precision)
    stored = replacements.all()
    names = checkpoint_names(file.path, layout, file.tensors)
    parameters = dict(model.named_parameters())
    on_host = weights_on_host(model, host_layers, stored)
    shared = shared_weights(model)
    split = {name for name in stored if ranks.size > 1 and not stays_whole(name, replacements, shared)}
    _check_names(file, names, parameters)
    outer: dict[str, GgufBlocks] = {}  # embedding and head, which no replacement takes
    with working("reading the GGUF file", len(names), "tensors") as task:
        for name, place in names.items():
            _check_shape(file, place, name, tuple(parameters[name].shape))
            value = read_tensor(file, layout, name, place).to(device)
            if precision != "gguf" and not isinstance(value, Tensor):
                value = dequantize(value, _read_dtype(precision, name in stored))
            if name in stored:
                stored[name].set_weight(value)
                if name in split:
                    stored[name].split(ranks, on_host=name in on_host)
            elif isinstance(value, Tensor):
                _set(model, name, value)
            else:
                outer[name] = value
            task.to(task.done + 1)
    _make_buffers(model, device)
    model.tie_weights()
    replaced = replace_modules(model, replacements, precision, activation_dtype)
    _store_outer(model, outer, activation_dtype)
    return freeze(model), replaced


def _read_dtype(precision: Precision, is_linear: bool) -> torch.dtype:
    """The dtype that blocks are brought to on the way to `precision`: the final one where that is dense, which rounds their
    float32 values once; float32 for what is quantized anew."""
    return DTYPES.get(precision if is_linear else embedding_precision(precision), torch.float32)


def _store_outer(model: Any, blocks: dict[str, GgufBlocks], activation_dtype: torch.dtype) -> None:
    """Give embedding and head their blocks; where they are tied, both the same."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = {
        f"{name}.weight": module for name, module in model.named_modules() if module is head or module is embedding
    }
    for name, value in blocks.items():
        module = names[name]
        if module is embedding:
            tied = head.dense is embedding.weight
            linear = head if tied else StoredLinear((value.shape[0], value.shape[1]), "gguf")
            linear.compressed = value
            embedding.store_blocks(WeightHandle(linear, activation_dtype))
            if tied:
                _take_handle(head, embedding.weight)
        else:
            module.compressed = value
            _take_handle(module, WeightHandle(module, activation_dtype))


def _take_handle(head: StoredLinear, handle: WeightHandle) -> None:
    """Code that reads the head's weight, its shape or whether it is the embedding's, reads the handle."""
    head.register_parameter("weight", None)
    head.__dict__["weight"] = handle


def _check_names(file: GgufFile, names: dict[str, str], parameters: dict[str, nn.Parameter]) -> None:
    missing = sorted(name for name in parameters if name not in names)
    unknown = sorted(name for name in names if name not in parameters)
    if missing:
        raise ModelError(
            f"{file.path} lacks {len(missing)} tensors of a {file.architecture} model, the first is '{missing[0]}'; download "
            "it again, or convert it with all its tensors"
        )
    if unknown:
        raise ModelError(
            f"{file.path} has tensor '{names[unknown[0]]}', for which its {file.architecture} config has no place"
        )


def _check_shape(file: GgufFile, place: str, name: str, wanted: tuple[int, ...]) -> None:
    found = file.tensors[place].shape
    if found != wanted:
        raise ModelError(
            f"{file.path}: tensor '{place}' ({name}) has shape {list(found)}, its metadata asks for {list(wanted)}"
        )


def _set(model: Any, name: str, value: Tensor) -> None:
    """Give the model's own module a value."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    parameter: Any = nn.Parameter(value, requires_grad=False)
    parameter._is_hf_initialized = True  # transformers' own initialization leaves it as it is
    setattr(module, attribute, parameter)


def _make_buffers(model: Any, device: torch.device) -> None:
    """Fill what no checkpoint holds: rotary frequencies and the like, by the class's own initialization."""
    for module in model.modules():
        if any(buffer.is_meta for buffer in module._buffers.values() if buffer is not None):
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device=device)
            model._init_weights(module)
