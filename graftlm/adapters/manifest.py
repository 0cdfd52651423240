"""`graft.json`, the manifest of an adapter, and the digest that identifies an adapter by its content.

    digest      over everything below, and so, through `files`, over every byte of the folder
    files       size and SHA-256 of each other file
    base        name, fingerprint of the source checkpoint's tensors, precision trained on
    formula     the entries of PEFT's config that change the result: rank, alpha, targets, ...
    tensors     each tensor's shape and dtype
    golden      token ids of a fixed chat and a fixed text, and the tokens that end an answer
    canary      prompts, projected logits with and without the adapter, and the tolerances
    lineage     digests of the adapters that this one was made from
    data, method, seed, steps, template, tokenizer_digest, evaluation, versions

The digest is SHA-256 over the manifest as canonical JSON (sorted keys, no spaces) without the digest itself. A PEFT folder
has no manifest; its digest is that of its `files` entry.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from graftlm.config import ComputeDtype, Precision
from graftlm.config.aliases import former_value
from graftlm.errors import AdapterError
from graftlm.files import sha256
from graftlm.jsonfile import read_json

CONFIG, TENSORS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "graft.json"
FORMAT = 2
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Ids = list[Annotated[int, Field(ge=0, lt=1 << 31)]]


def _day(text: str) -> str:
    datetime.date.fromisoformat(text)  # ValueError for an invalid date
    return text


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Base(_Section):
    name: str
    fingerprint: str
    precision: Precision
    compute_dtype: Annotated[
        ComputeDtype,
        BeforeValidator(lambda value: former_value("compute_dtype", value)),
        Field(validation_alias=AliasChoices("compute_dtype", "compute")),  # its former name
    ]


class _Tensor(_Section):
    shape: list[Annotated[int, Field(ge=0)]]
    dtype: str


class _FileEntry(_Section):
    bytes: Annotated[int, Field(ge=0)]
    sha256: Digest


class _Golden(_Section):
    chat: _Ids | None
    text: _Ids
    stop: _Ids


_Logits = list[Annotated[float, Field(ge=-3.5e38, le=3.5e38, allow_inf_nan=False)]]
"""Values in float32's range, so that no sum over them overflows."""


class _Canary(_Section):
    prompts: Annotated[list[Annotated[_Ids, Field(min_length=1, max_length=64)]], Field(min_length=1, max_length=64)]
    base: _Logits
    adapter: _Logits
    tolerance: dict[Precision, Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    products: ComputeDtype | None = None
    """The compute dtype of the canary; None in older manifests: that of training."""


class _Trained(_Section):
    digest: str | None = None
    formats: dict[str, int] | None = None


class _Data(_Section):
    train: _Trained | None = None
    train_on: str | None = None


class _Template(_Section):
    date: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\d$"), AfterValidator(_day)] | None = None


class _Evaluation(_Section):
    before: float | None = None
    after: float | None = None


class _Lineage(_Section):
    parents: list[Digest] = []


class _Manifest(_Section):
    """The entries that Graft reads; the others are for people."""

    format: Annotated[int, Field(ge=1)]
    digest: Digest
    files: dict[str, _FileEntry]
    base: _Base
    formula: dict[str, Any]
    tensors: dict[str, _Tensor]
    golden: _Golden
    canary: _Canary
    lineage: _Lineage = _Lineage()
    data: _Data | None = None
    template: _Template | None = None
    evaluation: _Evaluation | None = None


def trained_compute_dtype(base: Mapping[str, Any]) -> ComputeDtype:
    """The compute dtype of training; `base` is that entry of a manifest."""
    return former_value("compute_dtype", base.get("compute_dtype", base.get("compute")))


def digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 over a manifest without its digest, 64 hexadecimal digits; the order of its keys does not matter.

    Raises ValueError for a number that is not finite.
    """
    plain = {key: value for key, value in content.items() if key != "digest"}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_entries(files: list[Path]) -> dict[str, dict[str, Any]]:
    """The `files` entry of these files: size and SHA-256 by name."""
    return {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(files)}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """An adapter's manifest with its entries validated, not yet compared with the folder; None if there is none (PEFT).

    Raises AdapterError for a missing or malformed entry, naming it, and for a newer format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    found = read_json(path, AdapterError)
    number = found.get("format")
    if isinstance(number, int) and number > FORMAT:
        raise AdapterError(f"{path} is of format {number}, this Graft reads up to {FORMAT}; update graftlm")
    try:
        _Manifest.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise AdapterError(
            f"{path}: {place}: {first['msg']}, found {str(first['input'])[:80]}; it is damaged"
        ) from None
    try:
        digest_of(found)
    except ValueError:
        raise AdapterError(f"{path} holds a number that is not finite; it is damaged") from None
    odd = [name for name in found["files"] if not _FILE_NAME.fullmatch(name) or name == MANIFEST]
    if odd:
        raise AdapterError(f"{path} lists a file named {odd[0]!r}, which is not a plain file name; it is damaged")
    return found


def check_files(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise AdapterError for the first listed file that is missing, of another size, or changed by a byte."""
    for name, entry in entries.items():
        file = folder / name
        if not file.is_file():
            raise AdapterError(f"{folder} has no {name}, which its {MANIFEST} lists; the adapter is incomplete")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise AdapterError(f"{file} has {size:,} bytes, {entry['bytes']:,} were written; the adapter is damaged")
        if sha256(file) != entry["sha256"]:
            raise AdapterError(f"{file} has changed since it was written; the adapter is damaged")
