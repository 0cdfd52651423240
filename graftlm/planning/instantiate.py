"""From a config to a shape: the model is built by transformers without storage, and its parts are counted.

Nothing here knows an architecture. Modules live on PyTorch's meta device, where a tensor has a shape and no bytes, so a
model of 70 billion values takes 40 ms; which of them are stored and adapted is decided by the same `find_replacements` that
training uses.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from graftlm.adapters.attach import in_attention
from graftlm.base.attention import position_dependent_rotary
from graftlm.base.random_init import random_model
from graftlm.base.surgery import Replacements, find_replacements
from graftlm.errors import ModelError
from graftlm.planning.shapes import ModelShape, Norms, Part, Weights

# What some models do to their logits, by the names of their configs.
_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def instantiate(config: Any, trust_remote_code: bool = False) -> ModelShape:
    """The shape of the model that a config describes; ModelError for one that cannot be built or has nothing to store."""
    try:
        with torch.device("meta"):
            model = random_model(config, 0, trust_remote_code)
    except (
        TypeError,
        ValueError,
        AttributeError,
        KeyError,
        ZeroDivisionError,
        RuntimeError,
        NotImplementedError,
    ) as error:
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"the config of a '{config.model_type}' cannot be built into a model: {said}") from None
    return shape_of(model)


def shape_of(model: Any) -> ModelShape:
    """Count a model that transformers built, on any device, before its modules are replaced by stored ones."""
    replacements = find_replacements(model, "bfloat16")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    config = model.config.get_text_config()
    heads = int(getattr(config, "num_attention_heads", None) or getattr(config, "n_head", None) or 1)
    layers = [name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    stored = {*replacements.all()}
    tied = head.weight is embedding.weight
    own = {id(embedding.weight), id(head.weight)}
    rest = {n: p for n, p in model.named_parameters() if n not in stored and id(p) not in own}
    linears = [model.get_submodule(name.removesuffix(".weight")) for name in replacements.linears]
    biases = sum(m.bias.numel() for m in linears if getattr(m, "bias", None) is not None)
    weights = _weights(model, replacements, layers)
    wide = [n for n in rest if any(part in _float32_parts(model) for part in n.split("."))]
    stacks = [m for m in model.modules() if hasattr(m, "has_gate") and hasattr(m, "is_concatenated")]
    return ModelShape(
        architecture=type(model).__name__,
        layers=len(layers),
        width=int(embedding.weight.shape[1]),
        vocabulary=int(head.weight.shape[0]),
        max_positions=int(getattr(config, "max_position_embeddings", 0) or 0),
        weights=weights,
        norms=_norms(model, layers, heads, int(getattr(config, "num_key_value_heads", None) or heads)),
        embedding=embedding.weight.numel(),
        head=0 if tied else head.weight.numel(),
        small=sum(p.numel() for p in rest.values()),
        small_float32=sum(rest[n].numel() for n in wide),
        biases=biases,
        heads=heads,
        gated=bool(stacks[0].has_gate) if stacks else _is_gated(weights),
        activation=_activation(config),
        rotary=_angles(model, config, heads),
        softcapped=getattr(config, "attn_logit_softcapping", None) is not None,
        plain_head=type(head) is nn.Linear
        and head.bias is None  # pyright: ignore[reportUnnecessaryComparison]
        and not any(getattr(config, n, None) for n in _AFTER_HEAD),
        experts_per_token=int(getattr(config, "num_experts_per_tok", None) or (1 if stacks else 0)),
        packs=_packs(model),
    )


def _float32_parts(model: Any) -> set[str]:
    return {*(model._keep_in_fp32_modules or ()), *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}


def common_name(name: str) -> str:
    """A name with `*` for its numbers."""
    return re.sub(r"(?<=\.)[0-9]+(?=\.|$)", "*", name)


def _weights(model: Any, replacements: Replacements, layers: list[str]) -> tuple[Weights, ...]:
    """Matrices of the same name, part and size, counted, in the model's order."""
    found: Counter[tuple[str, Part, int, int, int]] = Counter()
    for name, module in replacements.all().items():
        path = name.removesuffix(".weight")
        *_, out, inner = module.shape
        experts = module.shape[0] if len(module.shape) == 3 else 0
        part: Part
        if name in replacements.stacks:
            part = "experts"
        elif name in replacements.routers:
            part = "router"
        elif in_attention(model, path):
            part = "attention"
        else:
            part = "mlp" if path.startswith(tuple(f"{layer}." for layer in layers)) else "other"
        found[common_name(path), part, out, inner, experts] += 1
    return tuple(
        Weights(name=name, part=part, out=out, inner=inner, count=count, experts=experts)
        for (name, part, out, inner, experts), count in found.items()
    )


def _norms(model: Any, layers: list[str], heads: int, key_value_heads: int) -> tuple[Norms, ...]:
    """Normalizations by kind and width; one over each head's width runs once for every head."""
    found: Counter[tuple[str, int, bool]] = Counter()
    for name, module in model.named_modules():
        kind = type(module).__name__.lower()
        weight = getattr(module, "weight", None)
        if "norm" not in kind or next(module.children(), None) is not None or weight is None or weight.ndim != 1:
            continue
        inside = any(name.startswith(f"{layer}.") for layer in layers)
        width = len(weight)
        if inside and in_attention(model, name):
            end = name.rpartition(".")[2]
            times = {"q": heads, "k": key_value_heads}.get(end[:1], 1)
            width *= times if width * times <= _widest_output(model, name.rpartition(".")[0]) else 1
        found["layer" if isinstance(module, nn.LayerNorm) else "rms", width, inside] += 1
    return tuple(
        Norms(kind="layer" if kind == "layer" else "rms", width=width, count=count, inside=inside)
        for (kind, width, inside), count in found.items()
    )


def _widest_output(model: Any, path: str) -> int:
    """The most values per token that a linear layer of a module gives."""
    return max((m.weight.shape[0] for m in model.get_submodule(path).children() if isinstance(m, nn.Linear)), default=0)


def _is_gated(weights: tuple[Weights, ...]) -> bool:
    """Whether the feed-forward part makes twice the values that its last matrix takes."""
    mlp = [w for w in weights if w.part == "mlp"]
    return bool(mlp) and sum(w.out for w in mlp[:-1]) == 2 * mlp[-1].inner


def _activation(config: Any) -> str:
    for name in ("hidden_act", "hidden_activation", "activation_function", "activation"):
        value = getattr(config, name, None)
        if isinstance(value, str):
            return value
    return ""


def _angles(model: Any, config: Any, heads: int) -> int:
    """The width of a head for each set of rotary angles that the model makes: one for all layers, or one a kind of layer."""
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return 0
    sets = 1 if "rope_type" in parameters else len(parameters)
    return sets * int(getattr(config, "head_dim", None) or model.get_input_embeddings().weight.shape[1] // heads)


def _packs(model: Any) -> bool:
    """Whether our attention will likely take the model: its class reads a registered attention and takes positions.

    The last word has `may_pack`, on the actual weights.
    """
    body = getattr(model, model.base_model_prefix, model)
    takes = "position_ids" in inspect.signature(body.forward).parameters
    return bool(model._supports_attention_backend) and takes and position_dependent_rotary(model.config) is None
