"""Assign an adapter's tensors to the layers of a base.

PEFT names a tensor by its layer. For stacked experts it nests parameter wrappers: of n adapted stacks in one module the first
one's tensors are below n - 1 times `base_layer.`, the last one's below none. A tensor that fits no layer, is missing, or has
another shape than the config says is an error that names it; no tensor is ignored.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.adapters.attach import Adapter, AdapterPlan, adaptable
from graftlm.adapters.layer_adapter import LayerAdapter, LowRank, ModulesToSave, TrainableTokens, scale_of
from graftlm.adapters.manifest import CONFIG
from graftlm.adapters.targets import Targets, applied, key_of, layers
from graftlm.base.loading import Base
from graftlm.base.modules import Stored, StoredStack
from graftlm.errors import AdapterError, nearest
from graftlm.formatting import quote
from graftlm.kernels.counter_rng import hash_words

MOST_ALPHA = 1_000_000
"""The largest rank and alpha that a file may have."""
PREFIX = "base_model.model."
_ROWS = "token_adapter.trainable_tokens_delta"
_OF_VOCABULARY = ("weight", _ROWS)
"""Tensors that only the embedding and the head have: a full weight, or some rows of it."""


def _stack_groups(base: Base, names: list[str]) -> dict[str, list[str]]:
    """The adapted stacks of each experts module, in the module's order."""
    stored = adaptable(base)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in stored:  # in the model's order
        if name in names and isinstance(stored[name], StoredStack):
            groups[name.rpartition(".")[0]].append(name)
    return groups


def tensor_prefixes(base: Base, names: list[str]) -> dict[str, str]:
    """PEFT's prefix of each adapted layer's tensors: layer name -> path before `lora_A.weight`."""
    places = {name: name for name in names}
    for module, stacks in _stack_groups(base, names).items():
        for index, name in enumerate(stacks):
            places[name] = module + ".base_layer" * (len(stacks) - 1 - index)
    return places


def assign_tensors(base: Base, folder: Path, config: dict[str, Any], named: dict[str, Tensor]) -> Adapter:
    """Make an adapter of the tensors. Raises AdapterError for a tensor that fits no layer or has the wrong shape."""
    stored = layers(base)
    targets = Targets(config, f"{folder}/{CONFIG}")
    modules, parameters, no_slot_reason = applied(base, targets)
    saved = {
        key: _trained(base, folder, key, config.get(key)) for key in ("modules_to_save", "trainable_token_indices")
    }
    _refuse_tying(base, folder, config, saved["modules_to_save"])
    plan = AdapterPlan(
        rank=_rank(folder, config),
        alpha=_positive(folder, config, "lora_alpha"),
        rank_stabilized=bool(config.get("use_rslora")),
        dropout=float(config.get("lora_dropout") or 0.0),
        dora=bool(config.get("use_dora")),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
    )
    adapted = [n for n, m in stored.items() if n in parameters or not isinstance(m, StoredStack)]
    grouped = _grouped(base, folder, named, adapted, saved["modules_to_save"])
    by_layer: dict[str, LayerAdapter] = {}
    for name in dict.fromkeys([*stored, base.structure.embedding_name, base.structure.head_name]):
        parts = grouped.get(name)
        if not parts:
            continue
        if len(parts) > 1 and not parts.keys().isdisjoint(_OF_VOCABULARY):
            raise AdapterError(f"{folder}: '{name}' is adapted in two ways at once: {', '.join(sorted(parts))}")
        if "weight" in parts:
            by_layer[name] = _whole(base, folder, name, parts["weight"])
        elif _ROWS in parts:
            by_layer[name] = _rows(base, folder, saved["trainable_token_indices"].get(name), name, parts[_ROWS])
        elif name not in stored:
            raise AdapterError(
                f"{folder}: a low-rank adapter on '{name}' is not supported; its rows can be trained instead"
            )
        elif name not in modules and name not in parameters:
            raise AdapterError(
                f"{folder}: it holds tensors of '{name}', and {no_slot_reason(name)}; PEFT would not load them"
            )
        else:
            key = key_of(name, stored[name], name in parameters)
            by_layer[name] = _low_rank(base, folder, targets, plan, name, key, stored[name], parts)
    _complete(folder, modules | parameters, saved, by_layer)
    return Adapter(plan, by_layer)


def _grouped(
    base: Base, folder: Path, named: Mapping[str, Tensor], adapted: list[str], saved: Collection[str]
) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer by the last part of their names. Raises AdapterError for one that fits no layer."""
    whole = {base.structure.embedding_name, base.structure.head_name}
    places = {place: name for name, place in tensor_prefixes(base, adapted).items()}
    places.update({name: name for name in whole})
    grouped: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in named.items():
        if not key.startswith(PREFIX):
            raise AdapterError(f"{folder}: tensor '{key}' does not start with '{PREFIX}'")
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{folder}: tensor '{key}' holds values that are not finite; the adapter is broken")
        path = key.removeprefix(PREFIX)
        match = re.fullmatch(
            r"(.+?)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?"
            r"|token_adapter\.trainable_tokens_delta|weight)", path,
        )  # fmt: skip
        place = match.group(1) if match else ""
        if match is not None and match.group(2) == "weight":
            place = place.removesuffix(".base_layer")
            if place in whole and place not in saved:
                _check_copy(base, folder, place, tensor)
                continue
        misplaced = match is not None and match.group(2) in _OF_VOCABULARY and place not in whole
        if match is None or place not in places or misplaced:
            raise AdapterError(
                f"{folder}: tensor '{key}' fits no layer of this base{nearest(place or path, places)} "
                "Is it another architecture's adapter?"
            )
        grouped[places[place]][match.group(2).removesuffix(".weight")] = tensor
    return grouped


def _placed(base: Base, tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.to(base.device, torch.float32))


def _positive(folder: Path, config: Mapping[str, Any], key: str) -> float:
    """A number of the config that must be above zero and plausible."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MOST_ALPHA:
        raise AdapterError(
            f"{folder}/{CONFIG}: {key} is {repr(value)[:40]}, expected a number above 0 and at most {MOST_ALPHA:,}; "
            "the adapter is damaged"
        )
    return value


def _rank(folder: Path, config: Mapping[str, Any]) -> int:
    rank = _positive(folder, config, "r")
    if rank != int(rank):
        raise AdapterError(f"{folder}/{CONFIG}: r is {rank!r}, expected a whole number; the adapter is damaged")
    return int(rank)


def _check_copy(base: Base, folder: Path, name: str, weight: Tensor) -> None:
    """PEFT saves the embedding and the head with an adapter that changes them; an unchanged copy is accepted."""
    own: Any = base.model.get_submodule(name).weight
    if weight.shape != own.shape or not torch.equal(weight.to(own.device, own.dtype), own.detach()):
        raise AdapterError(
            f"{folder}: tensor '{name}.weight' differs from this base's, and modules_to_save does not name it"
        )


def _whole(base: Base, folder: Path, name: str, weight: Tensor) -> ModulesToSave:
    if name == base.structure.head_name and not isinstance(base.structure.head, Stored):
        raise AdapterError(
            f"{folder}: '{name}' is a {type(base.structure.head).__name__}, which computes more than a linear layer; "
            "Graft cannot load it from an adapter"
        )
    own: Any = base.model.get_submodule(name).weight
    if weight.shape != own.shape:
        raise AdapterError(f"{folder}: '{name}' has shape {tuple(weight.shape)}, expected {tuple(own.shape)}")
    return ModulesToSave(_placed(base, weight))


def _rows(base: Base, folder: Path, given: Sequence[int] | None, name: str, values: Tensor) -> TrainableTokens:
    indices = [int(i) for i in given or ()]
    vocabulary, width = base.model.get_submodule(name).weight.shape
    if tuple(values.shape) != (len(indices), width):
        raise AdapterError(
            f"{folder}: token rows of '{name}' have shape {tuple(values.shape)}, and {len(indices)} trainable_token_indices "
            f"of width {width} are expected"
        )
    if len(set(indices)) < len(indices) or not all(0 <= i < vocabulary for i in indices):
        raise AdapterError(
            f"{folder}: trainable_token_indices ({quote(indices)}) must differ and lie below {vocabulary}"
        )
    return TrainableTokens(tuple(indices), _placed(base, values), vocabulary=vocabulary)


def _low_rank(
    base: Base,
    folder: Path,
    targets: Targets,
    plan: AdapterPlan,
    name: str,
    key: str,
    module: Stored,
    parts: dict[str, Tensor],
) -> LowRank:
    if "lora_A" not in parts or "lora_B" not in parts:
        missing = "lora_A" if "lora_A" not in parts else "lora_B"
        raise AdapterError(f"{folder}: layer '{name}' has no {missing}; the adapter is incomplete")
    A, B = parts["lora_A"], parts["lora_B"]
    patterns = {"r": targets.ranks.of(key, plan.rank), "lora_alpha": targets.alphas.of(key, plan.alpha)}
    rank, alpha = _rank(folder, patterns), _positive(folder, patterns, "lora_alpha")
    experts = module.experts if isinstance(module, StoredStack) else 0
    out_features, in_features = module.shape[-2:]
    rows = rank * max(experts, 1)
    for label, tensor, shape in (("lora_A", A, (rows, in_features)), ("lora_B", B, (out_features, rows))):
        if tuple(tensor.shape) != shape:
            raise AdapterError(f"{folder}: {label} of '{name}' has shape {tuple(tensor.shape)}, expected {shape}")
    magnitude = parts.get("lora_magnitude_vector")
    if plan.dora != (magnitude is not None):
        raise AdapterError(
            f"{folder}: use_dora is {plan.dora} and '{name}' has {'no' if magnitude is None else 'a'} magnitude"
        )
    if magnitude is not None and magnitude.numel() != out_features:
        raise AdapterError(
            f"{folder}: the magnitude of '{name}' has {magnitude.numel()} values, expected {out_features}"
        )
    return LowRank(
        A=_placed(base, A), B=_placed(base, B), scale=scale_of(alpha, rank, plan.rank_stabilized), alpha=alpha, rank=rank,
        dropout=plan.dropout, dropout_key=hash_words("dropout", name), experts=experts,
        magnitude=None if magnitude is None else _placed(base, magnitude.reshape(-1)),
    )  # fmt: skip


def _trained(base: Base, folder: Path, key: str, value: Any) -> dict[str, Any]:
    """Embedding or head by full name, if `modules_to_save` or `trainable_token_indices` names it, and its indices.

    PEFT (`_set_trainable`) matches every module whose name ends with an entry; plain indices mean the embedding.
    """
    structure = base.structure
    if isinstance(value, list) and value and isinstance(value[0], int):
        return {structure.embedding_name: value}
    found: dict[str, Any] = {}
    for module in value or ():
        hits = [name for name, _ in base.model.named_modules(remove_duplicate=False) if name.endswith(module)]
        odd = next((name for name in hits if name not in (structure.embedding_name, structure.head_name)), None)
        if not hits or odd is not None:
            also = f"; it matches '{odd}' too" if hits else ""
            raise AdapterError(
                f"{folder}/{CONFIG}: {key} '{module}' is neither this base's embedding nor its head{also}; Graft supports "
                "only these two"
            )
        found.update({name: value[module] if isinstance(value, dict) else () for name in hits})
    return found


def _complete(
    folder: Path, expected: set[str], saved: Mapping[str, dict[str, Any]], by_layer: Mapping[str, LayerAdapter]
) -> None:
    """Every layer that the config names must have its tensors."""
    for key, kind in (("modules_to_save", ModulesToSave), ("trainable_token_indices", TrainableTokens)):
        for name in saved[key]:
            if not isinstance(by_layer.get(name), kind):
                raise AdapterError(
                    f"{folder}: {key} names '{name}', and its tensor is missing; the adapter is incomplete"
                )
    missing = sorted(expected - set(by_layer))
    if missing:
        raise AdapterError(
            f"{folder}: {len(missing)} of {len(expected)} target layers have no tensors, the first is '{missing[0]}'; "
            "the adapter is incomplete"
        )


def _refuse_tying(base: Base, folder: Path, config: Mapping[str, Any], whole: Collection[str]) -> None:
    """Refuse `ensure_weight_tying`: PEFT then ties the head to the adapter's embedding, and ours stays the base's."""
    tied = getattr(base.structure.head, "weight", None) is base.structure.embedding.weight
    if config.get("ensure_weight_tying") and tied and base.structure.embedding_name in whole:
        raise AdapterError(
            f"{folder}/{CONFIG}: ensure_weight_tying = True makes this base's head follow the adapter's own embedding, which "
            "Graft does not compute; save the adapter without it, or merge it with PEFT"
        )
