"""Save and load adapters: PEFT's two files, and a manifest of ours that PEFT ignores.

    adapter_config.json          PEFT's: rank, alpha, targets, and the switches of the formula
    adapter_model.safetensors    base_model.model.<layer>.lora_A.weight (r, in) and .lora_B.weight (out, r)
    graft.json                   base, data, behaviour, and a digest over all of it (manifest.py)
    tokenizer.json, ...          only if the adapter has trained tokens of its own

`save` writes them. `inspect_folder` (`peft_folder.py`) checks a folder without a base. `load` reads an adapter for a base; all
of training, generating, merging and serving use it. It refuses an adapter that it cannot verify, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
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
    digest_of,
    file_entries,
)
from graftlm.adapters.peft_folder import FORMULA, AdapterFolder, inspect_folder
from graftlm.adapters.peft_tensors import PREFIX, assign_tensors, tensor_prefixes
from graftlm.adapters.targets import key_of, layers
from graftlm.base.chat import Encoder
from graftlm.base.loading import Base, load_tokenizer
from graftlm.base.meta_base import MetaBase
from graftlm.errors import AdapterError, ConfigError, ModelError
from graftlm.files import write_json

# ------------------------------------------------------------------------------------------------------- writing


def tensors(base: Base, adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's keys, on the CPU in float32."""
    prefixes = tensor_prefixes(base, list(adapter.layers))
    found: dict[str, Tensor] = {}
    for layer, part in adapter.layers.items():
        for name, tensor in part.named().items():
            found[f"{PREFIX}{prefixes[layer]}.{name}"] = tensor.detach().to("cpu", torch.float32).contiguous()
    return found


def _targets(base: Base, names: list[str]) -> list[str]:
    """The shortest exact list for PEFT: last parts of names if exactly these modules have them, else full names."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    covered = {n for n, _ in base.model.named_modules() if n.rpartition(".")[2] in ends}
    return ends if covered == set(names) else sorted(names)


def peft_config(base: Base, adapter: Adapter) -> dict[str, Any]:
    """PEFT's `adapter_config.json` for this adapter."""
    plan = adapter.plan
    low = {name: part for name, part in adapter.layers.items() if isinstance(part, LowRank)}
    stored = layers(base)
    parameters = as_target_parameters(base, list(low))
    linears = [n for n in low if n not in parameters]
    keys = {n: re.escape(key_of(n, stored[n], n in parameters)) for n in low}
    transposed = any(stored[n].transposed for n in linears)
    rows = {name: list(s.tokens) for name, s in adapter.layers.items() if isinstance(s, TrainableTokens)}
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
        "modules_to_save": sorted(n for n, s in adapter.layers.items() if isinstance(s, ModulesToSave)) or None,
        "trainable_token_indices": _indices(base, rows),
        "bias": "none",
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _indices(base: Base, rows: dict[str, list[int]]) -> list[int] | dict[str, list[int]] | None:
    """Indices of trained token rows in PEFT's form: a list means the embedding."""
    if not rows:
        return None
    return rows[base.structure.embedding_name] if list(rows) == [base.structure.embedding_name] else rows


def prove(base: Base, adapter: Adapter, encoder: Encoder) -> tuple[dict[str, Any], dict[str, Any]]:
    """The golden ids and the canary; ranks that share the base's weights all compute it. Raises AdapterError."""
    golden = canary.golden(encoder)
    return golden, canary.take(base, adapter, golden["text"])


def save(base: Base, adapter: Adapter, folder: Path, about: Mapping[str, Any]) -> None:
    """Write the adapter into an existing folder.

    `about` has the manifest's entries that are not known here: data, method, seed, evaluation, the template's date. The canary
    needs one forward pass. Raises AdapterError for tensors that are not finite, and OSError.
    """
    named = tensors(base, adapter)
    bad = next((name for name, tensor in named.items() if not tensor.isfinite().all()), None)
    if bad is not None:
        raise AdapterError(f"tensor '{bad}' holds values that are not finite; the adapter is not saved")
    save_file(named, folder / TENSORS, metadata={"format": "pt"})
    config = peft_config(base, adapter)
    write_json(folder / CONFIG, config)
    own_tokens = any(isinstance(part, TrainableTokens) for part in adapter.layers.values())
    if own_tokens or (adapter.origin is not None and adapter.origin.tokenizer is not None):
        base.tokenizer.save_pretrained(str(folder))
    encoder = Encoder(base.tokenizer, date=(about.get("template") or {}).get("date"))
    golden, behaviour = prove(base, adapter, encoder)
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
        "formula": {key: config[key] for key in FORMULA if key in config},
        "tensors": {name: {"shape": list(t.shape), "dtype": "F32"} for name, t in sorted(named.items())},
        "tokenizer_digest": encoder.tokenizer_digest,
        "golden": golden,
        "canary": behaviour,
        "lineage": {"parents": [adapter.origin.digest] if adapter.origin is not None else []},
        "files": file_entries([path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST]),
    }
    write_json(folder / MANIFEST, {"digest": digest_of(content), **content})


# ------------------------------------------------------------------------------------------------------- loading


def load(base: Base, folder: Path | AdapterFolder) -> Adapter:
    """Read an adapter, Graft's or PEFT's, for a base; it is not attached yet.

    `folder` is a path, or the result of `inspect_folder` or of a version's `opened()`. Reads the files once and runs one small
    forward pass. `adapter.origin.notes` has notes for the user: another precision than in training, and for PEFT's own adapters
    what could not be checked.

    Raises AdapterError if the files have changed since they were inspected; for another base than in training; for missing,
    extra, wrongly shaped or not finite tensors; for layers that do not match the config; for entries of PEFT's config that
    change the formula, the rank or alpha; if B is zero in every layer; for a tokenizer or template that renders the fixed chat
    differently; and if the canary's logits differ too much.
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
        # Not `load_file`: safetensors 0.8 leaks two objects for each tensor of a file that it opens itself.
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
    """Refuse B zero in every layer with nothing else trained: saved before the first step, or a failed conversion."""
    parts = adapter.layers.values()
    if all(isinstance(part, LowRank) and part.magnitude is None and not part.B.any() for part in parts):
        raise AdapterError(
            f"{folder}: B is zero in all of its {len(adapter.layers)} layers, so the adapter changes nothing; it was saved "
            "before it was trained, or lost in a conversion"
        )


def _behaves(base: Base, folder: Path, manifest: Mapping[str, Any], adapter: Adapter, tokenizer: Any) -> list[str]:
    """Check golden ids and canary; returns notes about allowed differences. Raises AdapterError."""
    notes: list[str] = []
    template: dict[str, Any] = manifest.get("template") or {}
    try:
        encoder = Encoder(tokenizer, date=template.get("date"))
    except (ModelError, ConfigError) as error:
        raise AdapterError(f"{folder} cannot be used with this base's tokenizer: {error}") from None
    formats = ((manifest.get("data") or {}).get("train") or {}).get("formats") or {"chat": 1}
    canary.check_golden(str(folder), manifest["golden"], encoder, chats="chat" in formats)
    if manifest.get("tokenizer_digest") not in (None, encoder.tokenizer_digest):
        notes.append("the tokenizer's file differs from training; the fixed chat gives the same tokens")
    if isinstance(base, MetaBase):
        return [
            *notes,
            "its canary was not run, since no base is loaded here; the base's fingerprint is that of the one it was trained on",
        ]
    off = canary.check(str(folder), base, adapter, manifest["canary"], manifest["base"])
    trained = manifest["base"]["precision"]
    if trained != base.precision:
        notes.append(
            f"the adapter was trained on a base in {trained} and runs on {base.precision}: its logits differ by {off:.1%} "
            "of their norm from those in training, so answers may differ"
        )
    return notes


def _unchecked(base: Base, config: Mapping[str, Any]) -> list[str]:
    """Notes about what could not be checked without a manifest."""
    name = config.get("base_model_name_or_path")
    other = f" It says that it was trained on '{name}', and this base is '{base.name}'." if name != base.name else ""
    return [
        f"the adapter has no {MANIFEST} (PEFT's own): names, shapes and values were checked, but not whether this is the "
        f"base, the precision, the tokenizer and the chat template it was trained with.{other}"
    ]
