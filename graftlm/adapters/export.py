"""Export a version as a plain PEFT folder, or converted for vLLM, or for llama.cpp (`gguf_adapter.py`).

What vLLM's loader (`vllm/lora/peft_helper.py`, `lora_model.py`) supports, and what the export does:

    one lora_alpha / r for all modules, patterns ignored     per-module scales go into B, then alpha = r
    ranks up to a --max-lora-rank of 8, 16, ... 256          all padded with zeros to the least of these that fits
    no DoRA, no modules_to_save, no token rows, no bias      refused: they are not low-rank updates; merge instead
    the checkpoint's module names, experts one by one        a stack's A and B are split by expert
    stacks that the checkpoint stores as stacks              PEFT's nested form, which vLLM reads for these models

Letters: r rank, R padded rank, E experts.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import Adapter
from graftlm.adapters.gguf_adapter import for_llama_cpp, without_place, write_gguf_adapter
from graftlm.adapters.layer_adapter import LowRank
from graftlm.adapters.patterns import refused_by_peft
from graftlm.adapters.peft_tensors import PREFIX, tensor_prefixes
from graftlm.adapters.store import open_adapter
from graftlm.base.meta_base import MetaBase, load_meta_base
from graftlm.base.modules import StoredStack
from graftlm.config import ExportConfig
from graftlm.config.fields import is_gguf
from graftlm.errors import AdapterError, ConfigError, RunError
from graftlm.files import atomic_folder, write_json
from graftlm.gguf.layout import layout_for
from graftlm.jsonfile import read_json

RANKS = (8, 16, 32, 64, 128, 256)
# Architectures of transformers for which vLLM's list of supported models (read in November 2026) has no LoRA. Architectures
# that are not listed at all get a note, since vLLM may run them through transformers.
_CONVERTER = "export a PEFT folder (--for peft) and convert it with llama.cpp's convert_lora_to_gguf.py"
_WITHOUT_LORA = {
    "BloomForCausalLM", "DbrxForCausalLM", "FalconForCausalLM", "FalconMambaForCausalLM", "FlexOlmoForCausalLM",
    "GPT2LMHeadModel", "GPTJForCausalLM", "GPTNeoXForCausalLM", "Jais2ForCausalLM", "MambaForCausalLM",
    "Mamba2ForCausalLM", "MptForCausalLM", "OlmoeForCausalLM", "StableLmForCausalLM", "Zamba2ForCausalLM",
    "Gemma3nForCausalLM",
}  # fmt: skip


def export_adapter(config: ExportConfig, opened: adapter_format.AdapterFolder | None = None) -> dict[str, Any]:
    """Write a version for PEFT, vLLM or llama.cpp; returns what `--json` prints. Raises GraftError; nothing is written then.

    `opened` is the version if it has been opened already.
    """
    out = config.out
    if out.exists() and (config.for_ == "gguf" or not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already; name a new {'file' if config.for_ == 'gguf' else 'folder'}")
    found = opened or open_adapter(config.version, config.store, config.base)
    folder = found.path
    summary = {"version": config.version, "digest": found.digest, "for": config.for_, "out": str(out)}
    if config.for_ == "peft":
        _readable(found)
        with atomic_folder(out) as temporary:
            for name in found.files:
                shutil.copyfile(folder / name, temporary / name)
        rank, alpha = found.config["r"], float(found.config["lora_alpha"])
        return {**summary, "rank": rank, "alpha": alpha, "tensors": len(found.tensors), "notes": []}
    name = (
        config.model
        or ((found.manifest or {}).get("base") or {}).get("name")
        or found.config.get("base_model_name_or_path")
    )
    if not name:
        raise ConfigError(f"{folder} does not say on which base it was trained; name it with --model")
    base = load_meta_base(name, trust_remote_code=config.trust_remote_code)
    adapter = adapter_format.load(base, found)
    if config.for_ == "gguf":
        return {**summary, **_write_gguf(config, base, adapter, found)}
    made = for_vllm(base, adapter)
    with atomic_folder(out) as temporary:
        save_file(made.tensors, temporary / adapter_format.TENSORS, metadata={"format": "pt"})
        write_json(temporary / adapter_format.CONFIG, made.config)
        for file in found.files:
            if "token" in file or file in ("chat_template.jinja", "vocab.json", "merges.txt"):
                shutil.copyfile(folder / file, temporary / file)
        _check(base, adapter, temporary)
    return {
        **summary, "rank": made.config["r"], "alpha": float(made.config["lora_alpha"]), "tensors": len(made.tensors),
        "notes": made.notes,
    }  # fmt: skip


def _write_gguf(
    config: ExportConfig, base: MetaBase, adapter: Adapter, found: adapter_format.AdapterFolder
) -> dict[str, Any]:
    """Write the file for llama.cpp; returns its part of the summary. Raises AdapterError, RunError."""
    layout = layout_for(base.plain.config, AdapterError, _CONVERTER)
    parts = _low_rank(base, adapter, "llama.cpp", lambda layer: without_place(base, layout, layer))
    made = for_llama_cpp(layout, parts, config.gguf_type)
    try:
        size = write_gguf_adapter(made, base.name, config.out, config.gguf_type)
    except OSError as error:
        raise RunError(f"{config.out} cannot be written: {error.strerror or error}; nothing is left of it") from None
    from_gguf = is_gguf(base.name)
    model = base.name if from_gguf else "BASE.gguf"
    notes = [f"use it with: {shlex.join(['llama-cli', '-m', model, '--lora', str(config.out)])}"]
    if not from_gguf:
        notes.append(f"BASE.gguf must be made of {base.name}: llama.cpp compares only architecture and shapes")
    trained = ((found.manifest or {}).get("base") or {}).get("precision")
    if trained in ("int8", "nf4") or (trained == "gguf" and not from_gguf):
        notes.append(f"it was trained on a base in {trained}, and a GGUF file has other weights, so answers may differ")
    if any("token" in name for name in found.files):
        notes.append("it has a tokenizer of its own, and llama.cpp uses the base file's tokenizer and chat template")
    return {
        "rank": max(part.rank for part in parts.values()), "alpha": made.alpha, "tensors": len(made.tensors), "notes": notes,
        "architecture": made.architecture, "type": config.gguf_type, "bytes": size, "rescaled_layers": made.rescaled,
    }  # fmt: skip


def _readable(found: adapter_format.AdapterFolder) -> None:
    """Raise AdapterError for an adapter on layers that PEFT refuses to adapt."""
    kind = str(((found.manifest or {}).get("base") or {}).get("architecture"))
    layers = (name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in found.tensors)
    odd = next((layer for layer in layers if refused_by_peft(kind, layer)), None)
    if odd is not None:
        raise AdapterError(
            f"{found.path} adapts '{odd}', and PEFT refuses adapters on out_proj of a {kind}; train without it "
            "(--targets all-linear leaves it out), or merge the adapter: graft merge"
        )


@dataclass(frozen=True)
class VllmAdapter:
    """An adapter in vLLM's form."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: list[str]


def for_vllm(base: MetaBase, adapter: Adapter) -> VllmAdapter:
    """Convert an adapter for vLLM: one rank, one scale, the checkpoint's names. Raises AdapterError with the reason."""
    parts = _servable(base, adapter)
    most = max(part.rank for part in parts.values())
    rank = next((r for r in RANKS if r >= most), 0)
    if not rank:
        raise AdapterError(
            f"the adapter's rank is {most}, and vLLM serves at most {RANKS[-1]}; train it with a lower --rank, or merge it"
        )
    scales = {part.scale for part in parts.values()}
    common = scales.pop() if len(scales) == 1 else 1.0
    alpha = common * rank
    if alpha != int(alpha):  # vLLM's field is an integer
        common, alpha = 1.0, float(rank)
    tensors: dict[str, Tensor] = {}
    for layer, part in parts.items():
        factor = part.scale / common
        for name, A, B in _named(base, layer, part, rank, list(parts)):
            tensors[f"{PREFIX}{name}.lora_A.weight"] = A.contiguous()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = (B * factor if factor != 1 else B).contiguous()
    names = {n.removeprefix(PREFIX).rpartition(".lora_")[0] for n in tensors}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base.name, "r": rank,
        "lora_alpha": int(alpha), "lora_dropout": 0.0, "target_modules": sorted({n.rpartition(".")[2] for n in names}),
        "bias": "none", "use_rslora": False, "use_dora": False, "modules_to_save": None, "fan_in_fan_out": False,
        "init_lora_weights": True, "inference_mode": True,
    }  # fmt: skip
    notes = [f"serve it with: vllm serve {base.name} --enable-lora --max-lora-rank {rank}"]
    if any(n.endswith((".gate", ".router")) for n in names):
        notes.append("it adapts a mixture's router; this needs a vLLM version with LoRA on the router layer")
    return VllmAdapter(config, tensors, notes)


def _servable(base: MetaBase, adapter: Adapter) -> dict[str, LowRank]:
    """The adapter's low-rank layers. Raises AdapterError for layers that vLLM does not support."""
    kind = type(base.plain).__name__
    if kind in _WITHOUT_LORA:
        raise AdapterError(f"vLLM has no LoRA for {kind}; serve it merged: {_merge(base, adapter)}")

    def reason(layer: str) -> str | None:
        if base.forms[base.parameter_of(layer)].transposed and not isinstance(base.stored().get(layer), StoredStack):
            return f"'{layer}' is a transposed layer (Conv1D), which vLLM does not adapt"
        if layer == base.structure.head_name and base.tied:
            return "it adapts a head that is tied to the embedding, and vLLM keeps them tied"
        return None

    return _low_rank(base, adapter, "vLLM", reason)


def _low_rank(base: MetaBase, adapter: Adapter, server: str, reason: Callable[[str], str | None]) -> dict[str, LowRank]:
    """The adapter's layers as low-rank pairs. Raises AdapterError for a layer that is none, or that `server` refuses."""
    found: dict[str, LowRank] = {}
    for layer, part in adapter.layers.items():
        if not isinstance(part, LowRank):
            why = f"'{layer}' is trained in full or by token rows, and {server} serves low-rank updates only"
        elif part.magnitude is not None:
            why = "it is a DoRA adapter, whose magnitude is not a low-rank update"
        else:
            found[layer], why = part, reason(layer)
        if why is not None:
            more = ["--gguf", "merged.gguf"] if server == "llama.cpp" else []
            raise AdapterError(
                f"the adapter cannot be served by {server}: {why}; merge it into a model: {_merge(base, adapter, more)}"
            )
    return found


def _merge(base: MetaBase, adapter: Adapter, more: Sequence[str] = ()) -> str:
    """The command that merges the adapter instead."""
    folder = adapter.origin.folder if adapter.origin is not None else "ADAPTER"
    return shlex.join(["graft", "merge", "--model", base.name, "--adapter", str(folder), "--out", "merged", *more])


def _named(base: MetaBase, layer: str, part: LowRank, rank: int, layers: list[str]) -> list[tuple[str, Tensor, Tensor]]:
    """(module name in the checkpoint, A (R, in), B (out, R)) of a layer; for a stack, one for each of its tensors."""
    parameter = base.parameter_of(layer)
    spans = base.spans()[parameter]
    form = base.forms[parameter]
    if len(form.shape) == 2:
        name = spans[0].tensor
        if len(spans) > 1 or base.checkpoint.tensors[name].shape != form.shape:
            raise AdapterError(
                f"'{layer}' is assembled from other layers of the checkpoint, and vLLM adapts only those"
            )
        A, B = _padded(*part.factors(None), rank)
        return [(name.removesuffix(".weight"), A, B)]
    if len(base.checkpoint.tensors[spans[0].tensor].shape) == 3:
        return [_nested(base, layer, part, rank, layers)]
    parts: dict[str, list[Tensor]] = {}
    factors_A: dict[str, Tensor] = {}
    for span in spans:
        expert, first = divmod(span.row, form.out)
        pair = _padded(*part.factors(expert), rank)
        name = span.tensor.removesuffix(".weight")
        factors_A[name] = pair[0]
        parts.setdefault(name, []).append(pair[1][first : first + span.count])
    return [(name, factors_A[name], torch.cat(pieces)) for name, pieces in parts.items()]


def _nested(base: MetaBase, layer: str, part: LowRank, rank: int, layers: list[str]) -> tuple[str, Tensor, Tensor]:
    """A stack that the checkpoint stores as one tensor, in PEFT's nested form, padded expert by expert."""
    module = layer.rpartition(".")[0]
    both = [n for n in base.stored() if n.rpartition(".")[0] == module and isinstance(base.stored()[n], StoredStack)]
    missing = [n for n in both if n not in layers]
    if missing:
        raise AdapterError(
            f"'{layer}' is adapted and '{missing[0]}' is not; vLLM needs adapters on all stacks of a mixture, or on none"
        )
    pairs = [_padded(*part.factors(e), rank) for e in range(part.experts)]
    A = torch.cat([a for a, _ in pairs])  # (E R, in)
    B = torch.stack([b for _, b in pairs], dim=2).flatten(1)  # (out, R E), the expert running fastest
    return tensor_prefixes(base, layers)[layer], A, B


def _padded(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) padded with zeros to rank R; B A stays the same."""
    more = rank - A.shape[0]
    below, beside = A.new_zeros(more, A.shape[1]), B.new_zeros(B.shape[0], more)
    return torch.cat([A.detach(), below]), torch.cat([B.detach(), beside], dim=1)


@torch.no_grad()
def _check(base: MetaBase, adapter: Adapter, folder: Path) -> None:
    """Read the written files as vLLM does, and compare every update with the adapter's own on random vectors."""
    config = read_json(folder / adapter_format.CONFIG, AdapterError)
    named = load_file(folder / adapter_format.TENSORS)
    scale, rank = config["lora_alpha"] / config["r"], config["r"]
    generator = torch.Generator().manual_seed(0)
    for layer, part in adapter.layers.items():
        assert isinstance(part, LowRank)
        parameter = base.parameter_of(layer)
        form = base.forms[parameter]
        x = torch.randn(form.shape[-1], generator=generator)
        nested = len(form.shape) == 3 and len(base.checkpoint.tensors[base.spans()[parameter][0].tensor].shape) == 3
        for span in base.spans()[parameter]:
            expert, first = divmod(span.row, form.out) if len(form.shape) == 3 else (None, span.row)
            name = tensor_prefixes(base, list(adapter.layers))[layer] if nested else span.tensor.removesuffix(".weight")
            factors = named[f"{PREFIX}{name}.lora_A.weight"], named[f"{PREFIX}{name}.lora_B.weight"]
            begin = span.first
            if nested:
                padded = replace(part, A=torch.nn.Parameter(factors[0]), B=torch.nn.Parameter(factors[1]), rank=rank)
                factors, begin = padded.factors(expert), first
            ours, theirs = part.factors(expert)
            wanted = part.scale * (theirs[first : first + span.count] @ (ours @ x))
            found = scale * (factors[1][begin : begin + span.count] @ (factors[0] @ x))
            assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max() + 1e-30)), layer
