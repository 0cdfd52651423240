"""An adapter as files: PEFT's two, which everybody reads, and a manifest of ours that PEFT ignores.

    adapter_config.json          PEFT's: rank, alpha, targets, and the switches of the formula
    adapter_model.safetensors    base_model.model.<layer>.lora_A.weight (r, in) and .lora_B.weight (out, r)
    graft.json                   which base, in which precision, from which data, and how good it was

Stacked experts follow PEFT's nesting of parameter wrappers: of n adapted stacks in one module the first one's tensors lie
below n - 1 times `base_layer.`, the last one's below none. Loading is strict: what does not fit is an error, never ignored.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graftlm.adapters.attach import Adapter, Plan, adaptable, kept_as_parameters
from graftlm.adapters.bank import LowRank, Rows, Slot, Whole, scale_of
from graftlm.base.linear import Stored, StoredLinear, StoredStack
from graftlm.base.load import Base
from graftlm.errors import AdapterError, nearest
from graftlm.files import write_json
from graftlm.kernels.counter import hash_words

CONFIG, TENSORS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "graft.json"
_PREFIX = "base_model.model."
_ROWS = "token_adapter.trainable_tokens_delta"
_OF_VOCABULARY = ("weight", _ROWS)
"""What only the embedding and the head have: a weight of their own, or some rows of it."""

# Keys of PEFT's config that change what the adapter computes, with the only value that Graft's formula covers.
_FORMULA: dict[str, Any] = {
    "alora_invocation_tokens": None, "arrow_config": None, "bias": "none", "layer_replication": None, "lora_bias": False,
    "megatron_config": None, "monteclora_config": None, "use_bdlora": None, "use_qalora": False, "velora_config": None,
    "kasa_config": None, "exclude_modules": None, "layers_to_transform": None,
}  # fmt: skip
# Where A and B may have started while the base stayed as it was; the other ways (pissa, olora, corda, ...) change it.
_BASE_UNTOUCHED = (True, False, None, "gaussian", "eva", "orthogonal")
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "alpha_pattern",
    "revision", "runtime_config", "target_modules", "target_parameters", "task_type", "trainable_token_indices", "use_dora",
    "use_rslora",
}  # fmt: skip


def _layers(base: Base) -> dict[str, Stored]:
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


def _places(base: Base, names: list[str]) -> dict[str, str]:
    """Where PEFT keeps each adapted layer's tensors: layer name -> path in front of `lora_A.weight`."""
    places = {name: name for name in names}
    for module, stacks in _stack_groups(base, names).items():
        for index, name in enumerate(stacks):
            places[name] = module + ".base_layer" * (len(stacks) - 1 - index)
    return places


def tensors(base: Base, adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's keys, on the CPU in float32."""
    places = _places(base, list(adapter.slots))
    found: dict[str, Tensor] = {}
    for layer, slot in adapter.slots.items():
        for name, tensor in slot.named().items():
            found[f"{_PREFIX}{places[layer]}.{name}"] = tensor.detach().to("cpu", torch.float32).contiguous()
    return found


def _targets(base: Base, names: list[str]) -> list[str]:
    """The shortest honest list for PEFT: last name parts where exactly these modules have them, else full names."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    covered = {n for n, _ in base.model.named_modules() if n.rpartition(".")[2] in ends}
    return ends if covered == set(names) else sorted(names)


def peft_config(base: Base, adapter: Adapter) -> dict[str, Any]:
    """PEFT's `adapter_config.json` for this adapter."""
    plan = adapter.plan
    low = {name: slot for name, slot in adapter.slots.items() if isinstance(slot, LowRank)}
    stored = _layers(base)
    parameters = kept_as_parameters(base, list(low))
    linears = [n for n in low if n not in parameters]
    turned = any(stored[n].turned for n in linears)
    rows = {name: list(s.tokens) for name, s in adapter.slots.items() if isinstance(s, Rows)}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": plan.rank,
        "lora_alpha": plan.alpha,
        "lora_dropout": plan.dropout,
        "use_rslora": plan.rank_stabilized,
        "use_dora": plan.dora,
        "rank_pattern": {re.escape(n): s.rank for n, s in low.items() if s.rank != plan.rank},
        "alpha_pattern": {re.escape(n): s.alpha for n, s in low.items() if s.alpha != plan.alpha},
        "target_modules": _targets(base, linears) if linears else [],
        "target_parameters": sorted(n if isinstance(stored[n], StoredStack) else f"{n}.weight" for n in parameters)
        or None,
        "modules_to_save": sorted(n for n, s in adapter.slots.items() if isinstance(s, Whole)) or None,
        "trainable_token_indices": _indices(base, rows),
        "bias": "none",
        "fan_in_fan_out": turned,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _indices(base: Base, rows: dict[str, list[int]]) -> list[int] | dict[str, list[int]] | None:
    """Trained token rows as PEFT writes them: a list means the embedding."""
    if not rows:
        return None
    return rows[base.anatomy.embedding_name] if list(rows) == [base.anatomy.embedding_name] else rows


def save(base: Base, adapter: Adapter, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the adapter into an existing folder; `manifest` is what `graft.json` says beside the tensors' plan."""
    named = tensors(base, adapter)
    save_file(named, folder / TENSORS, metadata={"format": "pt"})
    write_json(folder / CONFIG, peft_config(base, adapter))
    plan = {name: {"shape": list(t.shape), "dtype": "float32"} for name, t in sorted(named.items())}
    write_json(folder / MANIFEST, {**manifest, "tensors": plan})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Our manifest, or None for an adapter that has none (PEFT's own)."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path} is not JSON ({error}); the adapter is damaged") from None


def load(base: Base, folder: Path) -> Adapter:
    """Read an adapter, PEFT's or ours, and check it against the base it is to sit on.

    Raises AdapterError for another base than it was trained on, for missing, unknown, wrongly shaped or not finite
    tensors, and for switches of PEFT's that change the formula in a way that Graft does not compute.
    """
    config, named = _read(folder)
    manifest = read_manifest(folder)
    if manifest is not None:
        trained_on = manifest.get("base", {}).get("fingerprint")
        if trained_on and trained_on != base.fingerprint:
            raise AdapterError(
                f"{folder} was trained on base {trained_on[:12]} ({manifest['base'].get('name')}); "
                f"this base is {base.fingerprint[:12]} ({base.name}). Load that base, or train again on this one"
            )
    for key, neutral in _FORMULA.items():
        if config.get(key, neutral) not in (neutral, None, [], {}):
            raise AdapterError(f"{folder}/{CONFIG}: {key} = {config[key]!r} is a formula that Graft does not compute")
    start = config.get("init_lora_weights")
    if start not in _BASE_UNTOUCHED:
        raise AdapterError(
            f"{folder}/{CONFIG}: init_lora_weights = {start!r} changes the base's weights when PEFT loads it, and Graft "
            "leaves them as they are; convert the adapter with PEFT: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=FOLDER_OF_THE_UNTRAINED_ADAPTER)"
        )
    unknown = [k for k in config if k not in _NEUTRAL and k not in _FORMULA and config[k] not in (None, False, [], {})]
    if unknown:
        raise AdapterError(
            f"{folder}/{CONFIG}: unknown key '{unknown[0]}' = {config[unknown[0]]!r} may change what the adapter computes"
        )
    return _fit(base, folder, config, named)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not folder.is_dir():
        raise AdapterError(f"no adapter folder at {folder}")
    path = folder / CONFIG
    if not path.is_file():
        hint = f"; did you mean {folder / 'adapter'}?" if (folder / "adapter" / CONFIG).is_file() else ""
        raise AdapterError(f"{folder} has no {CONFIG}, so it is not an adapter{hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path} is not JSON: {error}") from None
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {config.get('peft_type')!r}; Graft reads LORA")
    file = folder / TENSORS
    if not file.is_file():
        pickled = (
            " (adapter_model.bin is a pickle, which is never read)" if (folder / "adapter_model.bin").is_file() else ""
        )
        raise AdapterError(f"{folder} has no {TENSORS}{pickled}")
    try:
        return config, load_file(file)
    except (SafetensorError, ValueError, OSError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from None


def _of_peft_pattern(name: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """PEFT's own matching: the first pattern that, as a regular expression, fits the name or its end after a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _fit(base: Base, folder: Path, config: dict[str, Any], named: dict[str, Tensor]) -> Adapter:
    """Sort the tensors into slots; every one must have its place and its shape."""
    stored = _layers(base)
    wanted_parameters = config.get("target_parameters") or []
    stacks = [
        n for n, m in stored.items()
        if isinstance(m, StoredStack) and any(n == t or n.endswith("." + t) for t in wanted_parameters)
    ]  # fmt: skip
    others = [n for n, m in stored.items() if not isinstance(m, StoredStack)]
    whole = {base.anatomy.embedding_name, base.anatomy.head_name}
    places = {place: name for name, place in _places(base, [*others, *stacks]).items()}
    places.update({name: name for name in whole})
    listed = {n for n in whole for m in config.get("modules_to_save") or () if n == m or n.endswith("." + m)}
    rank, alpha = int(_positive(folder, config, "r")), _positive(folder, config, "lora_alpha")

    grouped: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in named.items():
        if not key.startswith(_PREFIX):
            raise AdapterError(f"{folder}: tensor '{key}' does not start with '{_PREFIX}'")
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{folder}: tensor '{key}' holds values that are not finite; the adapter is broken")
        path = key.removeprefix(_PREFIX)
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
    return Adapter(plan, slots, base.fingerprint)


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
    for name, module in _layers(base).items():
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
