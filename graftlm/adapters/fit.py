"""Sorting an adapter's tensors into the slots of a base: every tensor has its place and its shape, every target its tensors.

PEFT names a tensor by the layer it sits on. For stacked experts it nests parameter wrappers: of n adapted stacks in one
module the first one's tensors lie below n - 1 times `base_layer.`, the last one's below none. What fits nowhere, is missing,
or has another shape than the config says is an error that names it; nothing is ever left out in silence.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.adapters.attach import Adapter, Plan, adaptable
from graftlm.adapters.bank import LowRank, Rows, Slot, Whole, scale_of
from graftlm.adapters.manifest import CONFIG
from graftlm.base.linear import Stored, StoredLinear, StoredStack
from graftlm.base.load import Base
from graftlm.errors import AdapterError, nearest
from graftlm.kernels.counter import hash_words

PREFIX = "base_model.model."
_ROWS = "token_adapter.trainable_tokens_delta"
_OF_VOCABULARY = ("weight", _ROWS)
"""What only the embedding and the head have: a weight of their own, or some rows of it."""


def layers(base: Base) -> dict[str, Stored]:
    """Every layer whose tensors a file may hold: the adaptable ones, and the head, which PEFT adapts when it is named."""
    head = base.anatomy.head
    return {**adaptable(base), **({base.anatomy.head_name: head} if isinstance(head, Stored) else {})}


def _stack_groups(base: Base, names: list[str]) -> dict[str, list[str]]:
    """The adapted stacks of each experts module, in the order in which the module holds them."""
    stored = adaptable(base)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in stored:  # in the model's order
        if name in names and isinstance(stored[name], StoredStack):
            groups[name.rpartition(".")[0]].append(name)
    return groups


def places_of(base: Base, names: list[str]) -> dict[str, str]:
    """Where PEFT keeps each adapted layer's tensors: layer name -> path in front of `lora_A.weight`."""
    places = {name: name for name in names}
    for module, stacks in _stack_groups(base, names).items():
        for index, name in enumerate(stacks):
            places[name] = module + ".base_layer" * (len(stacks) - 1 - index)
    return places


def _of_peft_pattern(name: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """PEFT's own matching: the first pattern that, as a regular expression, fits the name or its end after a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def fit(base: Base, folder: Path, config: dict[str, Any], named: dict[str, Tensor]) -> Adapter:
    """Sort the tensors into slots; every one must have its place and its shape. Raises AdapterError."""
    stored = layers(base)
    wanted_parameters = config.get("target_parameters") or []
    stacks = [
        n for n, m in stored.items()
        if isinstance(m, StoredStack) and any(n == t or n.endswith("." + t) for t in wanted_parameters)
    ]  # fmt: skip
    others = [n for n, m in stored.items() if not isinstance(m, StoredStack)]
    whole = {base.anatomy.embedding_name, base.anatomy.head_name}
    places = {place: name for name, place in places_of(base, [*others, *stacks]).items()}
    places.update({name: name for name in whole})
    listed = {n for n in whole for m in config.get("modules_to_save") or () if n == m or n.endswith("." + m)}
    rank, alpha = int(_positive(folder, config, "r")), _positive(folder, config, "lora_alpha")

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
            if place in whole and place not in listed:
                _check_copy(base, folder, place, tensor)
                continue
        misplaced = match is not None and match.group(2) in _OF_VOCABULARY and place not in whole
        if match is None or place not in places or misplaced:
            raise AdapterError(
                f"{folder}: tensor '{key}' fits no layer of this base{nearest(place or path, places)} "
                "Is it another architecture's adapter?"
            )
        grouped[places[place]][match.group(2).removesuffix(".weight")] = tensor

    plan = Plan(
        rank=rank,
        alpha=alpha,
        rank_stabilized=bool(config.get("use_rslora")),
        dropout=float(config.get("lora_dropout") or 0.0),
        dora=bool(config.get("use_dora")),
        whole=tuple(config.get("modules_to_save") or ()),
    )
    slots: dict[str, Slot] = {}
    for name in dict.fromkeys([*stored, *sorted(whole)]):
        parts = grouped.get(name)
        if not parts:
            continue
        if len(parts) > 1 and not parts.keys().isdisjoint(_OF_VOCABULARY):
            raise AdapterError(f"{folder}: '{name}' is adapted in two ways at once: {', '.join(sorted(parts))}")
        if "weight" in parts:
            if name == base.anatomy.head_name and name not in stored:
                raise AdapterError(
                    f"{folder}: '{name}' is a {type(base.anatomy.head).__name__}, which computes more than a linear layer; "
                    "Graft does not take one from an adapter"
                )
            slots[name] = _whole(base, folder, name, parts["weight"])
        elif _ROWS in parts:
            slots[name] = _rows(base, folder, config, name, parts[_ROWS])
        elif name not in stored:
            raise AdapterError(
                f"{folder}: a low-rank adapter on '{name}' is not supported; its rows can be trained instead"
            )
        else:
            slots[name] = _low_rank(base, folder, config, plan, name, stored[name], parts)
    _complete(base, folder, config, slots)
    return Adapter(plan, slots)


def _placed(base: Base, tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.to(base.device, torch.float32))


def _positive(folder: Path, config: Mapping[str, Any], key: str) -> float:
    """A number of the config that must be above zero and finite."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise AdapterError(f"{folder}/{CONFIG}: {key} is {value!r}, expected a number above 0; the adapter is damaged")
    return value


def _check_copy(base: Base, folder: Path, name: str, weight: Tensor) -> None:
    """PEFT saves the embedding and the head beside an adapter that touches them; an unchanged copy says nothing new."""
    own: Any = base.model.get_submodule(name).weight
    if weight.shape != own.shape or not torch.equal(weight.to(own.device, own.dtype), own.detach()):
        raise AdapterError(
            f"{folder}: tensor '{name}.weight' is another one than this base's, and modules_to_save does not name it"
        )


def _whole(base: Base, folder: Path, name: str, weight: Tensor) -> Whole:
    own: Any = base.model.get_submodule(name).weight
    if weight.shape != own.shape:
        raise AdapterError(f"{folder}: '{name}' has shape {tuple(weight.shape)}, expected {tuple(own.shape)}")
    return Whole(_placed(base, weight))


def _rows(base: Base, folder: Path, config: dict[str, Any], name: str, values: Tensor) -> Rows:
    given = config.get("trainable_token_indices")
    if isinstance(given, dict):
        given = next((ids for module, ids in given.items() if name == module or name.endswith("." + module)), None)
    indices = [int(i) for i in given or ()]
    vocabulary, width = base.model.get_submodule(name).weight.shape
    if tuple(values.shape) != (len(indices), width):
        raise AdapterError(
            f"{folder}: token rows of '{name}' have shape {tuple(values.shape)}, and {len(indices)} trainable_token_indices "
            f"of width {width} are expected"
        )
    if len(set(indices)) < len(indices) or not all(0 <= i < vocabulary for i in indices):
        raise AdapterError(f"{folder}: trainable_token_indices {indices} must differ and lie below {vocabulary}")
    return Rows(tuple(indices), _placed(base, values), vocabulary=vocabulary)


def _low_rank(
    base: Base, folder: Path, config: dict[str, Any], plan: Plan, name: str, module: Stored, parts: dict[str, Tensor]
) -> LowRank:
    if "lora_A" not in parts or "lora_B" not in parts:
        missing = "lora_A" if "lora_A" not in parts else "lora_B"
        raise AdapterError(f"{folder}: layer '{name}' has no {missing}; the adapter is incomplete")
    A, B = parts["lora_A"], parts["lora_B"]
    patterns = {
        "r": _of_peft_pattern(name, config.get("rank_pattern"), plan.rank),
        "lora_alpha": _of_peft_pattern(name, config.get("alpha_pattern"), plan.alpha),
    }
    rank, alpha = int(_positive(folder, patterns, "r")), _positive(folder, patterns, "lora_alpha")
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
        dropout=plan.dropout, key=hash_words("dropout", name), experts=experts,
        magnitude=None if magnitude is None else _placed(base, magnitude.reshape(-1)),
    )  # fmt: skip


def _complete(base: Base, folder: Path, config: dict[str, Any], slots: Mapping[str, Slot]) -> None:
    """Every layer that the config names must have its tensors."""
    targets = config.get("target_modules") or []
    head = base.anatomy.head_name
    expected: set[str] = set()
    for name, module in layers(base).items():
        is_module = isinstance(base.model.get_submodule(name), StoredLinear)
        if isinstance(targets, str):
            every = targets.lower() == "all-linear"
            hit = is_module and (name != head if every else re.fullmatch(targets, name) is not None)
        else:
            hit = is_module and any(name == t or name.endswith("." + t) for t in targets)
        parameter = name if isinstance(module, StoredStack) else f"{name}.weight"
        hit = hit or any(parameter == t or parameter.endswith("." + t) for t in config.get("target_parameters") or [])
        if hit:
            expected.add(name)
    for key in ("modules_to_save", "trainable_token_indices"):
        for module in _modules_of(base, config.get(key)):
            full = next(
                (n for n in (base.anatomy.embedding_name, head) if n == module or n.endswith("." + module)), None
            )
            if full is None:
                raise AdapterError(f"{folder}/{CONFIG}: {key} '{module}' is neither this base's embedding nor its head")
            if not isinstance(slots.get(full), Whole if key == "modules_to_save" else Rows):
                raise AdapterError(
                    f"{folder}: {key} names '{module}', and its tensor is missing; the adapter is incomplete"
                )
    missing = sorted(expected - set(slots))
    if missing:
        raise AdapterError(
            f"{folder}: {len(missing)} of {len(expected)} target layers have no tensors, the first is '{missing[0]}'; "
            "the adapter is incomplete"
        )
    if not slots:
        raise AdapterError(f"{folder}: the adapter holds no tensors")


def _modules_of(base: Base, value: Any) -> list[str]:
    """The modules that `modules_to_save` or `trainable_token_indices` names; plain indices mean the embedding."""
    if not value:
        return []
    if isinstance(value, list) and isinstance(value[0], int):
        return [base.anatomy.embedding_name]
    return [value] if isinstance(value, str) else list(value)
