"""Write a merged model as a folder that plain transformers loads: the base's files, with adapters merged shard by shard.

The shards keep the base's names and order. The folder is created atomically.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.adapters.merge import Merger
from graftlm.base import bnb_nf4
from graftlm.base.checkpoint_layout import Checkpoint
from graftlm.base.modules import StoredLinear
from graftlm.base.precision import quantize
from graftlm.base.safetensors_writer import INDEX, TensorSpec, total, write_index, write_tensors
from graftlm.errors import AdapterError, ModelError
from graftlm.files import atomic_folder, write_json
from graftlm.gguf.folder import POINTER
from graftlm.jsonfile import read_json
from graftlm.kernels import Nf4
from graftlm.progress import working

_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "NOTICE*")
_NOT_COPIED = {"config.json", "graft.json", "manifest.json", INDEX, POINTER}
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


@dataclass
class MergeResult:
    """What was written."""

    folder: Path
    bytes: int = 0
    shards: list[str] = field(default_factory=list[str])
    dtypes: dict[str, int] = field(default_factory=dict[str, int])
    """Number of tensors of each dtype."""


def write_merged_model(
    merger: Merger, out: Path, manifest: dict[str, Any], *, save_dtype: torch.dtype | None = None
) -> MergeResult:
    """Write the merged model; `manifest` becomes its `graft.json`, with the measured rounding added.

    `save_dtype` is the dtype of all floating tensors, default each one's own. Raises AdapterError or ModelError if the model
    cannot be written this way, and OSError; `out` is then not created.
    """
    plan = _Plan(merger, save_dtype)
    written = MergeResult(out)
    size = sum(total(specs.values()) for specs in plan.files.values())
    with atomic_folder(out) as folder, working("writing the merged model", size, "bytes") as task:
        _copy_files(merger, folder)
        _write_config(merger, folder, plan)
        file_of: dict[str, str] = {}
        for file, specs in plan.files.items():
            task.to(written.bytes, note=file)

            def value(name: str) -> Tensor:
                tensor = plan.value(name)
                task.to(task.done + tensor.nbytes)
                return tensor

            written.bytes += write_tensors(folder / file, specs, value)
            written.shards.append(file)
            file_of.update(dict.fromkeys(specs, file))
            for spec in specs.values():
                kind = str(spec.dtype).removeprefix("torch.")
                written.dtypes[kind] = written.dtypes.get(kind, 0) + 1
        if len(plan.files) > 1 or list(plan.files) != ["model.safetensors"]:
            write_index(folder, file_of, sum(total(s.values()) for s in plan.files.values()))
        write_json(folder / "graft.json", {**manifest, "rounding": rounding_of(merger)})
        _same_tensors(folder, plan)
    return written


def rounding_of(merger: Merger) -> dict[str, Any]:
    """The share of the updates that rounding lost, for `--json` and the manifest."""
    found = merger.rounding
    return {"lost": found.share, "unmoved": found.unmoved / found.changed if found.changed else 0.0}


def _same_tensors(folder: Path, plan: _Plan) -> None:
    """Check the written shards: names, dtypes and shapes are those that were planned."""
    found = Checkpoint(folder)
    planned = {n: tuple(s.shape) for specs in plan.files.values() for n, s in specs.items()}
    assert {n: t.shape for n, t in found.tensors.items()} == planned


class _Plan:
    """Which tensors each file holds, and how each is computed."""

    def __init__(self, merger: Merger, save_dtype: torch.dtype | None) -> None:
        self.merger, self.save_dtype = merger, save_dtype
        base = merger.base
        self.bnb_nf4 = self._four_bits() if merger.onto == "requantized" else set[str]()
        self._pending: dict[str, Tensor] = {}
        self._of: dict[str, str] = {}  # tensor of a 4-bit weight -> the weight
        self.files: dict[str, dict[str, TensorSpec]] = {}
        dropped = set(merger.head_copies) if not merger.unties else set[str]()
        for name, place in base.checkpoint.place.items():
            if name in dropped:
                continue  # it repeats the embedding, which may have changed
            specs = self.files.setdefault(place.name, {})
            if name in self.bnb_nf4:
                parts = bnb_nf4.specs(name, base.checkpoint.tensors[name].shape)
                specs.update(parts)
                self._of.update(dict.fromkeys(parts, name))
            else:
                specs[name] = TensorSpec(self.dtype(name), base.checkpoint.tensors[name].shape)
        if merger.unties and not merger.head_copies:
            beside = merger.spans[merger.embedding][0].tensor
            file = base.checkpoint.place[beside].name
            self.files[file][merger.head] = TensorSpec(self.dtype(beside), base.forms[merger.head].shape)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is written in."""
        own = self.merger.source_dtype(name)
        return self.save_dtype if self.save_dtype is not None and own.is_floating_point else own

    def value(self, name: str) -> Tensor:
        """The value to write for a tensor."""
        merger = self.merger
        if name in self._pending:
            return self._pending.pop(name)
        if name in self._of:
            whole = self._of[name]
            weight = quantize(merger.tensor(whole, torch.float32), "nf4")
            assert isinstance(weight, Nf4)
            self._pending = bnb_nf4.tensors(whole, weight, merger.source_dtype(whole))
            return self._pending.pop(name)
        if merger.unties and name in (merger.head, *merger.head_copies):
            return merger.weight(merger.head, self.dtype(merger.spans[merger.embedding][0].tensor))
        return merger.tensor(name, self.dtype(name))

    def _four_bits(self) -> set[str]:
        """The tensors to quantize to NF4 again. Raises AdapterError for one that transformers could not load in 4 bits."""
        base = self.merger.base
        if base.precision != "nf4":
            raise AdapterError(
                f"--onto requantized is for an adapter trained on nf4, this one was trained on {base.precision}; "
                "take original or dequantized"
            )
        found: set[str] = set()
        for weight, (form, precision) in base.stored_forms().items():
            if precision != "nf4":
                continue
            spans = self.merger.spans[weight]
            simple = len(spans) == 1 and not form.transposed and len(form.shape) == 2
            if not simple or base.checkpoint.tensors[spans[0].tensor].shape != form.shape:
                raise AdapterError(
                    f"'{weight}' is not a plain linear layer of the checkpoint, and only those can be written in 4 bits; "
                    "take --onto dequantized"
                )
            found.add(spans[0].tensor)
        return found

    def kept_modules(self) -> list[str]:
        """The linear modules of a 4-bit model that stay in 16 or 32 bits."""
        base = self.merger.base
        four = {w.removesuffix(".weight") for w, (_, p) in base.stored_forms().items() if p == "nf4"}
        linears = {n for n, m in base.plain.named_modules() if isinstance(m, torch.nn.Linear)}
        linears |= {n.removesuffix(".stored") for n, m in base.model.named_modules() if isinstance(m, StoredLinear)}
        return sorted(linears - four)


def _copy_files(merger: Merger, folder: Path) -> None:
    """Copy the base's files other than weights; the tokenizer is the adapters' own if they were trained with one."""
    source = merger.base.folder
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.is_file() and file.name not in _NOT_COPIED and not file.name.endswith(".safetensors.index.json"):
                shutil.copyfile(file, folder / file.name)
    own = tokenizer_folder(merger)
    if own is not None:
        for name in _TOKENIZER:
            if (own / name).is_file():
                shutil.copyfile(own / name, folder / name)


def tokenizer_folder(merger: Merger) -> Path | None:
    """The folder of the adapters' own tokenizer. Raises AdapterError if they have different ones."""
    found: dict[str, Path] = {}
    for given in merger.adapters:
        origin = given.adapter.origin
        if origin is not None and origin.tokenizer is not None:
            found[(origin.folder / "tokenizer.json").read_text(encoding="utf-8")] = origin.folder
    if len(found) > 1:
        raise AdapterError(
            f"these adapters have different tokenizers, so one model cannot hold both: {sorted(found.values())}"
        )
    return next(iter(found.values()), None)


def _write_config(merger: Merger, folder: Path, plan: _Plan) -> None:
    """Write the base's `config.json` with changed dtype, tied embeddings and quantization."""
    config = read_json(merger.base.folder / "config.json", ModelError)
    parts = [config, *(v for v in config.values() if isinstance(v, dict) and "model_type" in v)]
    for part in parts:
        if plan.save_dtype is not None:
            names = [n for n in ("dtype", "torch_dtype") if n in part] or (["dtype"] if part is config else [])
            part.update(dict.fromkeys(names, str(plan.save_dtype).removeprefix("torch.")))
        if merger.unties and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    if plan.bnb_nf4:
        kind = merger.source_dtype(next(iter(plan.bnb_nf4)))
        config["quantization_config"] = dict(bnb_nf4.config(plan.kept_modules(), kind))
    write_json(folder / "config.json", config)
