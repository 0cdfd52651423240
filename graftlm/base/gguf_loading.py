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
from graftlm.base.precision import Weight, dequantize
from graftlm.base.random_init import random_model
from graftlm.base.surgery import Replacements, find_replacements, freeze, replace_modules
from graftlm.config import Precision
from graftlm.errors import ModelError
from graftlm.gguf.folder import gguf_of, layout_of
from graftlm.gguf.header import GgufFile
from graftlm.gguf.layout import checkpoint_names
from graftlm.progress import working


def load_gguf(
    folder: Path, config: Any, precision: Precision, activation_dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, Replacements]:
    """The model of a GGUF file's folder in `precision`: `gguf` keeps each weight's blocks, the others requantize its values.

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
    _check_names(file, names, parameters)
    with working("reading the GGUF file", len(names), "tensors") as task:
        for name, place in names.items():
            _check_shape(file, place, name, tuple(parameters[name].shape))
            value = read_tensor(file, layout, name, place)
            value = value.to(device)
            if name in stored:
                stored[name].set_weight(value if precision == "gguf" or isinstance(value, Tensor) else _dense(value))
            else:
                _set(model, name, value)
            task.to(task.done + 1)
    _make_buffers(model, device)
    model.tie_weights()
    replaced = replace_modules(model, replacements, precision, activation_dtype)
    return freeze(model), replaced


def _dense(value: Weight) -> Tensor:
    return dequantize(value, torch.float32)


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


def _set(model: Any, name: str, value: Weight) -> None:
    """Give the model's own module a value; blocks stay blocks only where a stored module takes them."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    parameter = nn.Parameter(value if isinstance(value, Tensor) else _dense(value), requires_grad=False)
    parameter.__dict__["_is_hf_initialized"] = True  # transformers' own initialization leaves it as it is
    setattr(module, attribute, parameter)


def _make_buffers(model: Any, device: torch.device) -> None:
    """Fill what no checkpoint holds: rotary frequencies and the like, by the class's own initialization."""
    for module in model.modules():
        if any(buffer.is_meta for buffer in module._buffers.values() if buffer is not None):
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device=device)
            model._init_weights(module)
