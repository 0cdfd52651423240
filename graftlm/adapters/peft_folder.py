"""An adapter's folder, checked without a base: PEFT's config and tensors, and `graft.json` where there is one.

`inspect_folder` compares every file with the manifest and every tensor with the plan. Whether the adapter fits a base is for
`peft_format.load` to check.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graftlm.adapters import canary
from graftlm.adapters.manifest import (
    CONFIG,
    MANIFEST,
    TENSORS,
    check_files,
    digest_of,
    file_entries,
    read_manifest,
)
from graftlm.adapters.targets import Targets
from graftlm.errors import AdapterError
from graftlm.formatting import QUOTED, quote
from graftlm.jsonfile import read_json
from graftlm.tensorfile import TensorInfo, read_header

_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip

# Keys of PEFT's config that change the formula, with the only value that Graft supports.
_ELSEWHERE: dict[str, Any] = {
    "alora_invocation_tokens": None, "arrow_config": None, "bias": "none", "layer_replication": None, "lora_bias": False,
    "megatron_config": None, "monteclora_config": None, "use_bdlora": None, "use_qalora": False, "velora_config": None,
    "kasa_config": None,
}  # fmt: skip
# Values of init_lora_weights that leave the base's weights unchanged; others (pissa, olora, corda, ...) change them.
_BASE_UNTOUCHED = (True, False, None, "gaussian", "eva", "orthogonal")
FORMULA = (
    "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters",
    "modules_to_save", "trainable_token_indices", "exclude_modules", "layers_to_transform", "layers_pattern",
)  # fmt: skip
"""Keys that define the formula; the manifest has a copy of their values."""
_NEUTRAL = {
    *FORMULA, "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip


@dataclass(frozen=True)
class AdapterFolder:
    """A checked adapter folder; whether it fits a base is not checked yet."""

    path: Path
    digest: str
    """Identifies the adapter by content, 64 hexadecimal digits, whatever the folder's path."""
    manifest: dict[str, Any] | None
    """`graft.json`, checked; None for an adapter that PEFT saved."""
    config: dict[str, Any]
    """`adapter_config.json`."""
    tensors: dict[str, TensorInfo]
    """Type and shape of each tensor, by PEFT's key."""
    files: tuple[str, ...]
    """Names of the files that belong to it; other files in the folder are ignored."""
    bytes: int
    """Size of these files."""

    @property
    def parents(self) -> tuple[str, ...]:
        """Digests of the adapters that it was made from."""
        return tuple((self.manifest or {}).get("lineage", {}).get("parents", ()))


def inspect_folder(path: Path) -> AdapterFolder:
    """Check an adapter's folder without a base: every file against the manifest, every tensor against the plan.

    Reads every file once, for its checksum; no tensor stays in memory. Without `graft.json` (PEFT's own) only the two files are
    checked. Raises AdapterError that names the file, the entry or the tensor.
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
        raise AdapterError(f"{file}: tensor '{odd[0]}' has dtype {odd[1]}; an adapter's are F32, BF16, F16 or F64")
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
    """Raise AdapterError for the first tensor that is missing, extra, or has another shape or dtype than the manifest's."""
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
    """Raise AdapterError if PEFT's config has another formula than the manifest."""
    trained: dict[str, Any] = manifest["formula"]
    for key in FORMULA:
        if config.get(key) != trained.get(key):
            place, found, before = _first_difference(key, config.get(key), trained.get(key))
            raise AdapterError(
                f"{folder}/{CONFIG}: {place} is {quote(found)}, and the adapter was trained with {quote(before)}; "
                "put it back, or take the adapter from where it came from"
            )


def _first_difference(place: str, found: Any, before: Any) -> tuple[str, Any, Any]:
    """Where two JSON values first differ, and the two values there."""
    if isinstance(found, dict) and isinstance(before, dict):
        name = next(k for k in (*found, *before) if found.get(k) != before.get(k))
        return _first_difference(f"{place}[{quote(name)}]", found.get(name), before.get(name))
    if isinstance(found, list) and isinstance(before, list) and len(found) == len(before):
        index = next(i for i in range(len(found)) if found[i] != before[i])
        return _first_difference(f"{place}[{index}]", found[index], before[index])
    return place, found, before


_Words = list[str] | str | None
_Numbers = dict[str, int | float] | None
_Tokens = list[Annotated[int, Field(ge=0)]]


class _Config(BaseModel):
    """The types of the entries of PEFT's config that `assign_tensors` reads; it checks r and lora_alpha itself."""

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
    """PEFT's config. Raises AdapterError for an entry that Graft does not support."""
    if not folder.is_dir():
        raise AdapterError(f"no adapter folder at {folder}")
    path = folder / CONFIG
    if not path.is_file():
        hint = f"; did you mean {folder / 'adapter'}?" if (folder / "adapter" / CONFIG).is_file() else ""
        raise AdapterError(f"{folder} has no {CONFIG}, so it is not an adapter{hint}")
    config = read_json(path, AdapterError)
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {quote(config.get('peft_type'))}; Graft reads LORA")
    for key, neutral in _ELSEWHERE.items():
        if config.get(key, neutral) not in (neutral, None, [], {}):
            raise AdapterError(f"{path}: {key} = {quote(config[key])} is a formula that Graft does not compute")
    start = config.get("init_lora_weights")
    if start not in _BASE_UNTOUCHED:
        raise AdapterError(
            f"{path}: init_lora_weights = {quote(start)} changes the base's weights when PEFT loads it, and Graft "
            "leaves them as they are; convert the adapter with PEFT: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=FOLDER_OF_THE_UNTRAINED_ADAPTER)"
        )
    known = _NEUTRAL | _ELSEWHERE.keys()
    unknown = [key for key in config if key not in known and config[key] not in (None, False, [], {})]
    if unknown:
        raise AdapterError(
            f"{path}: unknown key '{unknown[0][:QUOTED]}' = {quote(config[unknown[0]])} may change what the adapter computes"
        )
    try:
        _Config.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        found = repr(config[str(first["loc"][0])])[:200]
        raise AdapterError(f"{path}: {first['loc'][0]} is {found}: {first['msg']}") from None
    Targets(config, str(path))
    return config
