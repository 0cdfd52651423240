"""An adapter as files: PEFT's two, which everybody reads, and a manifest of ours that PEFT ignores.

    adapter_config.json          PEFT's: rank, alpha, targets, and the switches of the formula
    adapter_model.safetensors    base_model.model.<layer>.lora_A.weight (r, in) and .lora_B.weight (out, r)
    graft.json                   what it was trained on, how it answered, and a digest over all of it (manifest.py)
    tokenizer.json, ...          only where tokens of its own were trained

`save` writes them. `inspect_folder` says whether a folder is whole in itself. `load` is the one way from files to an adapter
on a base, for training on, generating, merging and serving; what it cannot vouch for it refuses, and names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save_file
from torch import Tensor

from graftlm.adapters import canary
from graftlm.adapters.attach import Adapter, Origin, as_target_parameters
from graftlm.adapters.bank import LowRank, ModulesToSave, TrainableTokens
from graftlm.adapters.manifest import (
    CONFIG,
    FORMAT,
    MANIFEST,
    TENSORS,
    check_files,
    digest_of,
    file_entries,
    read_manifest,
)
from graftlm.adapters.peft_tensors import PREFIX, assign_tensors, tensor_prefixes
from graftlm.adapters.targets import Targets, key_of, layers
from graftlm.base.chat import Encoder
from graftlm.base.loading import Base, load_tokenizer
from graftlm.base.meta_base import MetaBase
from graftlm.errors import AdapterError, ConfigError, ModelError
from graftlm.files import write_json
from graftlm.jsonfile import read_json
from graftlm.tensorfile import TensorInfo, read_header

_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip

# Keys of PEFT's config that change what the adapter computes, with the only value that Graft's formula covers.
_ELSEWHERE: dict[str, Any] = {
    "alora_invocation_tokens": None, "arrow_config": None, "bias": "none", "layer_replication": None, "lora_bias": False,
    "megatron_config": None, "monteclora_config": None, "use_bdlora": None, "use_qalora": False, "velora_config": None,
    "kasa_config": None,
}  # fmt: skip
# Where A and B may have started while the base stayed as it was; the other ways (pissa, olora, corda, ...) change it.
_BASE_UNTOUCHED = (True, False, None, "gaussian", "eva", "orthogonal")
_FORMULA = (
    "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters",
    "modules_to_save", "trainable_token_indices", "exclude_modules", "layers_to_transform", "layers_pattern",
)  # fmt: skip
"""What decides the mathematics that Graft does compute; the manifest keeps it a second time."""
_NEUTRAL = {
    *_FORMULA, "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- writing


def tensors(base: Base, adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's keys, on the CPU in float32."""
    places = tensor_prefixes(base, list(adapter.slots))
    found: dict[str, Tensor] = {}
    for layer, slot in adapter.slots.items():
        for name, tensor in slot.named().items():
            found[f"{PREFIX}{places[layer]}.{name}"] = tensor.detach().to("cpu", torch.float32).contiguous()
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
    stored = layers(base)
    parameters = as_target_parameters(base, list(low))
    linears = [n for n in low if n not in parameters]
    keys = {n: re.escape(key_of(n, stored[n], n in parameters)) for n in low}
    transposed = any(stored[n].transposed for n in linears)
    rows = {name: list(s.tokens) for name, s in adapter.slots.items() if isinstance(s, TrainableTokens)}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": plan.rank,
        "lora_alpha": plan.alpha,
        "lora_dropout": plan.dropout,
        "use_rslora": plan.rank_stabilized,
        "use_dora": plan.dora,
        "rank_pattern": {keys[n]: s.rank for n, s in low.items() if s.rank != plan.rank},
        "alpha_pattern": {keys[n]: s.alpha for n, s in low.items() if s.alpha != plan.alpha},
        "target_modules": _targets(base, linears) if linears else [],
        "target_parameters": sorted(key_of(n, stored[n], True) for n in parameters) or None,
        "modules_to_save": sorted(n for n, s in adapter.slots.items() if isinstance(s, ModulesToSave)) or None,
        "trainable_token_indices": _indices(base, rows),
        "bias": "none",
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _indices(base: Base, rows: dict[str, list[int]]) -> list[int] | dict[str, list[int]] | None:
    """Trained token rows as PEFT writes them: a list means the embedding."""
    if not rows:
        return None
    return rows[base.structure.embedding_name] if list(rows) == [base.structure.embedding_name] else rows


def save(base: Base, adapter: Adapter, folder: Path, about: Mapping[str, Any]) -> None:
    """Write the adapter into an existing folder.

    `about` is what the manifest says beside what is known here: data, method, seed, evaluation, the template's date. One
    forward pass takes the canary. Raises AdapterError for tensors that are not finite, and OSError.
    """
    named = tensors(base, adapter)
    bad = next((name for name, tensor in named.items() if not tensor.isfinite().all()), None)
    if bad is not None:
        raise AdapterError(f"tensor '{bad}' holds values that are not finite; the adapter is not saved")
    save_file(named, folder / TENSORS, metadata={"format": "pt"})
    config = peft_config(base, adapter)
    write_json(folder / CONFIG, config)
    own_tokens = any(isinstance(slot, TrainableTokens) for slot in adapter.slots.values())
    if own_tokens or (adapter.origin is not None and adapter.origin.tokenizer is not None):
        base.tokenizer.save_pretrained(str(folder))
    encoder = Encoder(base.tokenizer, date=(about.get("template") or {}).get("date"))
    golden = canary.golden(encoder)
    content = {
        **about,
        "format": FORMAT,
        "base": {
            "name": base.name,
            "fingerprint": base.fingerprint,
            "precision": base.precision,
            "compute_dtype": base.compute_dtype,
            **about.get("base", {}),
        },
        "formula": {key: config[key] for key in _FORMULA if key in config},
        "tensors": {name: {"shape": list(t.shape), "dtype": "F32"} for name, t in sorted(named.items())},
        "tokenizer_digest": encoder.tokenizer_digest,
        "golden": golden,
        "canary": canary.take(base, adapter, golden["text"]),
        "lineage": {"parents": [adapter.origin.digest] if adapter.origin is not None else []},
        "files": file_entries([path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST]),
    }
    write_json(folder / MANIFEST, {"digest": digest_of(content), **content})


# ------------------------------------------------------------------------------------------------------- the folder


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter's folder that is whole in itself; whether it fits a base is for `load` to say."""

    path: Path
    digest: str
    """Names the adapter by content, 64 hexadecimal digits: the same wherever the folder lies and whatever it is called."""
    manifest: dict[str, Any] | None
    """`graft.json`, checked; None for PEFT's own."""
    config: dict[str, Any]
    """`adapter_config.json`."""
    tensors: dict[str, TensorInfo]
    """Type and shape of each tensor, by PEFT's key."""
    files: tuple[str, ...]
    """Names of the files that belong to it, to copy when it is copied; others in the folder mean nothing."""
    bytes: int
    """Size of these files."""

    @property
    def parents(self) -> tuple[str, ...]:
        """Digests of the adapters that it was made from."""
        return tuple((self.manifest or {}).get("lineage", {}).get("parents", ()))


def inspect_folder(path: Path) -> AdapterFolder:
    """Check an adapter's folder without a base: every file against the manifest, every tensor against the plan.

    Reads all of it once, for its checksums; no tensor is kept. A folder without `graft.json` (PEFT's own) is held against
    what its two files say of themselves. Raises AdapterError that names the file, the entry or the tensor.
    """
    folder = Path(path)
    config = _read_config(folder)
    file = folder / TENSORS
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = " (adapter_model.bin is a pickle, which is never read)" if pickled else ""
        raise AdapterError(f"{folder} has no {TENSORS}{hint}")
    header = read_header(file, AdapterError)
    odd = next(((n, t.dtype) for n, t in header.items() if t.dtype not in ("F64", "F32", "F16", "BF16")), None)
    if odd is not None:
        raise AdapterError(f"{file}: tensor '{odd[0]}' is of type {odd[1]}; an adapter's are F32, BF16, F16 or F64")
    manifest = read_manifest(folder)
    if manifest is None:
        names = [CONFIG, TENSORS, *(name for name in _TOKENIZER if (folder / name).is_file())]
        entries = file_entries([folder / name for name in names])
        digest = digest_of({"files": entries})
    else:
        entries: dict[str, dict[str, Any]] = manifest["files"]
        for name in (CONFIG, TENSORS):
            if name not in entries:
                raise AdapterError(f"{folder}/{MANIFEST} does not list {name}; it is damaged")
        _same_plan(folder, manifest, header)
        _same_formula(folder, manifest, config)
        canary.check_kept(f"{folder}/{MANIFEST}", manifest["canary"], manifest["base"]["precision"])
        check_files(folder, entries)
        digest = digest_of(manifest)
        if digest != manifest["digest"]:
            raise AdapterError(
                f"{folder}/{MANIFEST} has changed since it was written: its digest is {digest[:12]}, and it says "
                f"{manifest['digest'][:12]}; take the adapter from where it came from"
            )
        names = [*entries, MANIFEST]
    size = sum((folder / name).stat().st_size for name in names)
    return AdapterFolder(folder, digest, manifest, config, header, tuple(sorted(names)), size)


def _same_plan(folder: Path, manifest: Mapping[str, Any], header: Mapping[str, TensorInfo]) -> None:
    """Raise AdapterError for the first tensor that is missing, extra, or of another shape or type than was planned."""
    planned: dict[str, dict[str, Any]] = manifest["tensors"]
    missing, extra = (sorted(a.keys() - b.keys()) for a, b in ((planned, header), (header, planned)))
    if missing:
        raise AdapterError(
            f"{folder}: {len(missing)} of {len(planned)} tensors are missing, the first is '{missing[0]}'; "
            "the adapter is incomplete"
        )
    if extra:
        raise AdapterError(f"{folder}: tensor '{extra[0]}' is not in the plan of {MANIFEST}; the adapter is damaged")
    for name, info in header.items():
        expected = planned[name]["dtype"], tuple(planned[name]["shape"])
        if (info.dtype, info.shape) != expected:
            raise AdapterError(
                f"{folder}: tensor '{name}' is {info.dtype} of shape {info.shape}, expected {expected[0]} {expected[1]}"
            )


def _same_formula(folder: Path, manifest: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise AdapterError where PEFT's config says another mathematics than was trained."""
    trained: dict[str, Any] = manifest["formula"]
    for key in _FORMULA:
        if config.get(key) != trained.get(key):
            raise AdapterError(
                f"{folder}/{CONFIG}: {key} is {config.get(key)!r}, and the adapter was trained with {trained.get(key)!r}; "
                "put it back, or take the adapter from where it came from"
            )


_Words = list[str] | str | None
_Numbers = dict[str, int | float] | None
_Tokens = list[Annotated[int, Field(ge=0)]]


class _Config(BaseModel):
    """Of PEFT's config the kinds of what `fit` reads; r and lora_alpha say more about themselves there."""

    model_config = ConfigDict(strict=True, extra="allow")
    target_modules: _Words = None
    exclude_modules: _Words = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: _Words = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    ensure_weight_tying: bool | None = None
    rank_pattern: _Numbers = None
    alpha_pattern: _Numbers = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None


def _read_config(folder: Path) -> dict[str, Any]:
    """PEFT's config, where Graft computes what it says. Raises AdapterError that names the entry."""
    if not folder.is_dir():
        raise AdapterError(f"no adapter folder at {folder}")
    path = folder / CONFIG
    if not path.is_file():
        hint = f"; did you mean {folder / 'adapter'}?" if (folder / "adapter" / CONFIG).is_file() else ""
        raise AdapterError(f"{folder} has no {CONFIG}, so it is not an adapter{hint}")
    config = read_json(path, AdapterError)
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {config.get('peft_type')!r}; Graft reads LORA")
    for key, neutral in _ELSEWHERE.items():
        if config.get(key, neutral) not in (neutral, None, [], {}):
            raise AdapterError(f"{path}: {key} = {config[key]!r} is a formula that Graft does not compute")
    start = config.get("init_lora_weights")
    if start not in _BASE_UNTOUCHED:
        raise AdapterError(
            f"{path}: init_lora_weights = {start!r} changes the base's weights when PEFT loads it, and Graft "
            "leaves them as they are; convert the adapter with PEFT: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=FOLDER_OF_THE_UNTRAINED_ADAPTER)"
        )
    known = _NEUTRAL | _ELSEWHERE.keys()
    unknown = [key for key in config if key not in known and config[key] not in (None, False, [], {})]
    if unknown:
        raise AdapterError(
            f"{path}: unknown key '{unknown[0]}' = {config[unknown[0]]!r} may change what the adapter computes"
        )
    try:
        _Config.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        found = repr(config[str(first["loc"][0])])[:200]
        raise AdapterError(f"{path}: {first['loc'][0]} is {found}: {first['msg']}") from None
    Targets(config, str(path))
    return config


# ------------------------------------------------------------------------------------------------------- loading


def load(base: Base, folder: Path | AdapterFolder) -> Adapter:
    """Read an adapter, ours or PEFT's, for the base it is to sit on: the one loader of training, generating, merging, serving.

    `folder` is a path, or what `inspect_folder` or a version's `opened()` gave. Costs a read of the files, and one small
    forward pass. What a user should know comes in `adapter.origin.notes`: another precision than trained on, and for PEFT's
    own what could not be checked. Attached is nothing yet.

    Raises AdapterError for files that are others than when they were inspected; for another base than it was trained on; for
    missing, extra, wrongly shaped or not finite tensors and files changed since; for layers that the config names or leaves
    out otherwise; for entries of PEFT's config that mean
    another formula or rank or alpha than trained; for B zero in every tensor; for a tokenizer or template that renders the
    fixed chat otherwise; and where the canary's logits are off.
    """
    before = folder if isinstance(folder, AdapterFolder) else None
    found = inspect_folder(folder.path if isinstance(folder, AdapterFolder) else folder)
    if before is not None and before.digest != found.digest:
        raise AdapterError(
            f"{found.path} holds adapter {found.digest[:12]} now and {before.digest[:12]} before; try again"
        )
    manifest = found.manifest
    if manifest is not None:
        _same_base(base, found.path, manifest["base"])
    try:
        # Not `load_file`: of a file that it opens itself safetensors 0.8 keeps two objects for each tensor, for good.
        named = load_bytes((found.path / TENSORS).read_bytes())
    except (SafetensorError, ValueError, OSError) as error:
        raise AdapterError(f"{found.path / TENSORS} cannot be read: {error}") from None
    adapter = assign_tensors(base, found.path, found.config, named)
    _refuse_no_effect(found.path, adapter)
    tokenizer = load_tokenizer(found.path) if "tokenizer.json" in found.files else None
    if manifest is None:
        if not isinstance(base, MetaBase):
            canary.check_finite(str(found.path), base, adapter)
        notes = _unchecked(base, found.config)
    else:
        notes = _behaves(base, found.path, manifest, adapter, tokenizer or base.tokenizer)
    origin = Origin(folder=found.path, digest=found.digest, manifest=manifest, tokenizer=tokenizer, notes=tuple(notes))
    return replace(adapter, origin=origin)


def _same_base(base: Base, folder: Path, trained: Mapping[str, Any]) -> None:
    if trained["fingerprint"] != base.fingerprint:
        raise AdapterError(
            f"{folder} was trained on base {trained['fingerprint'][:12]} ({trained['name']}); "
            f"this base is {base.fingerprint[:12]} ({base.name}). Load that base, or train again on this one"
        )


def _refuse_no_effect(folder: Path, adapter: Adapter) -> None:
    """B zero everywhere, and nothing else that was trained: as saved before the first step, or by a failed conversion."""
    slots = adapter.slots.values()
    if all(isinstance(slot, LowRank) and slot.magnitude is None and not slot.B.any() for slot in slots):
        raise AdapterError(
            f"{folder}: B is zero in all of its {len(adapter.slots)} layers, so the adapter changes nothing; it was saved "
            "before it was trained, or lost in a conversion"
        )


def _behaves(base: Base, folder: Path, manifest: Mapping[str, Any], adapter: Adapter, tokenizer: Any) -> list[str]:
    """Ask and hear it as when it was saved; returns what is other and allowed. Raises AdapterError."""
    notes: list[str] = []
    template: dict[str, Any] = manifest.get("template") or {}
    try:
        encoder = Encoder(tokenizer, date=template.get("date"))
    except (ModelError, ConfigError) as error:
        raise AdapterError(f"{folder} cannot be used with this base's tokenizer: {error}") from None
    formats = ((manifest.get("data") or {}).get("train") or {}).get("formats") or {"chat": 1}
    canary.check_golden(str(folder), manifest["golden"], encoder, chats="chat" in formats)
    if manifest.get("tokenizer_digest") not in (None, encoder.tokenizer_digest):
        notes.append("the tokenizer's file is another one than in training; the fixed chat gives the same tokens")
    if isinstance(base, MetaBase):
        return [
            *notes,
            "its canary was not run, which takes the running model, and here the base's weights are only read; by their "
            "fingerprint they are those that it was trained on",
        ]
    off = canary.check(str(folder), base, adapter, manifest["canary"], manifest["base"])
    trained = manifest["base"]["precision"]
    if trained != base.precision:
        notes.append(
            f"the adapter was trained on a base in {trained} and runs on {base.precision}: its logits differ by {off:.1%} "
            "of their size from those it was saved with, so answers may differ"
        )
    return notes


def _unchecked(base: Base, config: Mapping[str, Any]) -> list[str]:
    """What a manifest would have said."""
    name = config.get("base_model_name_or_path")
    other = f" It says that it was trained on '{name}', and this base is '{base.name}'." if name != base.name else ""
    return [
        f"the adapter has no {MANIFEST} (PEFT's own): names, shapes and values were checked, but not whether this is the "
        f"base, the precision, the tokenizer and the chat template it was trained with.{other}"
    ]
