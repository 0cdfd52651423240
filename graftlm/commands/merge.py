"""From adapters and a base to a plain model: check, measure each way of merging beside the live model, choose, write.

An adapter was trained on the base as it was stored then. Added to other weights it does something else, and nobody would be
told: so for an adapter of a 4- or 8-bit base each target is measured on eval rows before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from rich.console import Console

from graftlm import terminal
from graftlm.adapters import gguf
from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import attach, detach
from graftlm.adapters.combine import MergeRecipe
from graftlm.adapters.merge import Merger, WeightedAdapter
from graftlm.adapters.merge_drift import (
    Drift,
    EvalRow,
    LiveLogits,
    compare,
    limit_rows,
    load_merged_weights,
    measure_live,
)
from graftlm.adapters.merge_writer import rounding_of, tokenizer_folder, write_merged_model
from graftlm.adapters.peft_format import AdapterFolder
from graftlm.adapters.store import open_adapter
from graftlm.adapters.store.tables import print_merged
from graftlm.base.chat import Encoder
from graftlm.base.loading import Base, load_base, load_tokenizer
from graftlm.base.meta_base import MetaBase, load_meta_base
from graftlm.config import MergeConfig, Precision
from graftlm.config.aliases import former_value
from graftlm.config.merge import Onto
from graftlm.data.dataset import load, split
from graftlm.data.sources import named_source, share, token_limit
from graftlm.errors import AdapterError, ConfigError, DataError, RunError
from graftlm.jsonfile import read_json

_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class MergeReport(dict[str, Any]):
    """What `graft merge --json` prints; shown, how far each way of merging is from the live model, and what was written."""

    def __repr__(self) -> str:
        return terminal.as_text(self._draw)

    def _repr_html_(self) -> str:
        return terminal.as_html(self._draw)

    def _draw(self, where: Console) -> None:
        print_merged(where, self)


def merge(config: MergeConfig) -> MergeReport:
    """Merge as the config says; returns what `--json` prints. Raises GraftError, and then nothing is written."""
    _free(config.out, config.gguf)
    found = [(open_adapter(name, config.store, model=config.model), weight) for name, weight in config.weighted()]
    manifests = [given.manifest for given, _ in found]
    precision = _trained_on(manifests, [given.path for given, _ in found])
    base = load_meta_base(config.model, precision=precision or "float32", trust_remote_code=config.trust_remote_code)
    adapters = [WeightedAdapter(adapter_format.load(base, given), weight) for given, weight in found]
    compressed = precision in ("int8", "nf4")
    onto: Onto = config.onto or ("dequantized" if compressed else "original")
    if onto != "original" and precision is None:
        raise AdapterError(
            f"--onto {onto} needs the precision that the adapter was trained on, and it does not say; take original"
        )
    recipe = MergeRecipe(config.combine, config.density or 1.0, config.seed)
    targets = _targets(base, onto, compressed)
    mergers: dict[Onto, Merger] = {kind: Merger(base, adapters, recipe, kind) for kind in targets}
    if config.gguf is not None:
        gguf.check_gguf(base.folder, tokenizer_folder(mergers[onto]), unties=mergers[onto].unties)
    save_dtype = _TYPES[config.save_precision] if config.save_precision else None

    notes: list[str] = []
    live, drifts = None, list[Drift]()
    rows = _rows(config, base, found, manifests, compressed)
    if rows:
        live, drifts = _measure(config, mergers, found[0][0], precision or "float32", rows, save_dtype)
        chosen = next(d for d in drifts if d.onto == onto)
        if config.max_drift is not None and chosen.relative > config.max_drift:
            raise MergeRefused(_too_far(config, onto, drifts), report(config, onto, live, drifts))
    else:
        told = [note for given in adapters if given.adapter.origin for note in given.adapter.origin.notes]
        notes += dict.fromkeys(told)
        if len(adapters) > 1 and not config.unmeasured:
            notes.append(
                "the drift was not measured: no live model runs several adapters by weight; try it on eval rows"
            )

    merger = mergers[onto] = Merger(base, adapters, recipe, onto)  # a fresh count of what rounding takes
    manifest = _manifest(config, base, adapters, manifests, onto, drifts)
    try:
        written = write_merged_model(merger, config.out, manifest, save_dtype=save_dtype)
        done = {
            **report(config, onto, live, drifts), "out": str(config.out), "bytes": written.bytes, "shards": written.shards,
            "dtypes": written.dtypes, "rounding": rounding_of(merger), "unties": merger.unties, "notes": notes,
        }  # fmt: skip
    except OSError as error:
        raise RunError(f"{config.out} cannot be written: {error.strerror or error}; nothing is left of it") from None
    if config.gguf is not None:
        try:
            file = gguf.write_gguf(config.out, config.gguf, config.gguf_type, base.folder)
        except OSError as error:
            raise RunError(
                f"{config.gguf} cannot be written: {error.strerror or error}; {config.out} is whole"
            ) from None
        done |= {"gguf": file, "notes": [*notes, *file["notes"]]}
    return MergeReport(done)


class MergeRefused(AdapterError):
    """A merged model is too far from the live one; carries what was measured."""

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report


def report(config: MergeConfig, onto: Onto, live: LiveLogits | None, drifts: Sequence[Drift]) -> dict[str, Any]:
    """What was measured, for `--json` and the table."""
    return {
        "model": config.model,
        "adapters": [{"adapter": name, "weight": weight} for name, weight in config.weighted()],
        "onto": onto,
        "combine": config.combine,
        "live": None if live is None else {"loss": live.loss, "rows": len(live.rows), "tokens": live.tokens},
        "drift": [d.to_json() for d in drifts],
    }


def _free(out: Path, file: Path | None) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is there already; name a folder that is not")
    if file is not None and file.exists():
        raise ConfigError(f"--gguf {file} is there already; name a file that is not")


def _trained_on(manifests: Sequence[dict[str, Any] | None], folders: Sequence[Path]) -> Precision | None:
    """How the base was stored when the adapters were trained; None where one of them does not say. Raises AdapterError."""
    found = [str(m["base"]["precision"]) if m else None for m in manifests]
    known = {p for p in found if p in get_args(Precision)}
    if len(known) > 1:
        told = ", ".join(f"{folder}: {p}" for folder, p in zip(folders, found))
        raise AdapterError(
            f"these adapters were trained on bases stored in different precisions, so they share none: {told}"
        )
    if known == {"gguf"}:
        return "float32"  # the values of its blocks
    return cast(Precision, next(iter(known))) if known and None not in found else None


def _targets(base: MetaBase, onto: Onto, compressed: bool) -> list[Onto]:
    """The ways of merging that are worth a look: what was asked for, and for a compressed base the others too."""
    if not compressed:
        return [onto]
    plain = all(len(f.shape) == 2 and not f.transposed for f, p in base.stored_forms().values() if p == "nf4")
    every: list[Onto] = ["original", "dequantized", *(["requantized"] if base.precision == "nf4" and plain else [])]
    return every if onto in every else [*every, onto]


# ---- eval rows ---------------------------------------------------------------------------------------------------


def _rows(
    config: MergeConfig, base: MetaBase, adapters: Sequence[tuple[AdapterFolder, float]],
    manifests: Sequence[dict[str, Any] | None], compressed: bool,
) -> list[EvalRow]:  # fmt: skip
    """Eval rows to measure on; none where nothing has to be measured. Raises GraftError where they are missing."""
    if config.unmeasured or not adapters:
        return []
    wanted = config.eval_data is not None or config.max_drift is not None
    if not wanted and not compressed:
        return []
    if len(adapters) > 1 or adapters[0][1] != 1:
        if wanted:
            raise ConfigError(
                "the drift is measured beside one adapter with weight 1, as it runs; leave --max-drift and --eval-data out"
            )
        return []
    folder, manifest = adapters[0][0].path, manifests[0] or {}
    sources = _sources(config, folder)
    if sources is None:
        trained = (manifest.get("base") or {}).get("precision")
        why = (
            f"the adapter was trained on {trained}, where it matters what it is merged onto"
            if compressed
            else "--max-drift is given"
        )
        raise ConfigError(
            f"{why}, and there are no eval rows to measure on; give --eval-data FILE, or --unmeasured to write anyway"
        )
    tokenizer = base.tokenizer
    adapter_tokenizer = folder / "tokenizer.json"
    if adapter_tokenizer.is_file():
        tokenizer = load_tokenizer(folder)
    train_on = former_value("train_on", (manifest.get("data") or {}).get("train_on")) or "all-assistant"
    encoder = Encoder(tokenizer, train_on=train_on, date=(manifest.get("template") or {}).get("date"))
    limit = token_limit(None, base.structure.max_positions)
    data, eval_data = sources
    if share(eval_data) is not None:
        whole = load([named_source(text, "train") for text in data], encoder, max_tokens=limit, overlong="truncate")
        _, eval_dataset = split(whole, share(eval_data) or 0.0)
    else:
        eval_dataset = load([named_source(eval_data, "valid")], encoder, max_tokens=limit, overlong="truncate")
    found = [
        EvalRow(torch.from_numpy(d.ids.astype(np.int64)), torch.from_numpy(np.flatnonzero(d.loss_mask[1:])))
        for d in eval_dataset.examples if d.loss_mask[1:].any()
    ]  # fmt: skip
    if not found:
        raise DataError(f"the eval rows of '{eval_data}' hold no target token to measure on")
    return limit_rows(found, base.structure.vocabulary, config.eval_rows)


def _sources(config: MergeConfig, folder: Path) -> tuple[list[str], str] | None:
    """(training data, eval data) as a run names them: what is asked for, else what the adapter's own run had."""
    if config.eval_data is not None:
        if share(config.eval_data) is not None:
            raise ConfigError(f"--eval-data '{config.eval_data}' is a share of training rows; name eval rows here")
        return [], config.eval_data
    run: dict[str, Any] = {}
    for place in (folder / "run.json", folder.parent / "config.json"):
        try:
            read = read_json(place, RunError)
        except RunError:
            continue
        run = read.get("config", read)
        break
    eval_data = run.get("eval_data")
    if not eval_data:
        return None
    data = [str(d) for d in run.get("data") or ()]
    named = data if share(eval_data) is not None else [str(eval_data)]
    gone = [
        n for n in named if n != "demo" and not Path(n.partition(":")[0]).exists() and "/" in n and n.count("/") != 1
    ]
    return None if gone else (data, str(eval_data))


# ---- measuring -------------------------------------------------------------------------------------------------------


def _measure(
    config: MergeConfig, mergers: dict[Onto, Merger], adapter: AdapterFolder, precision: Precision,
    rows: Sequence[EvalRow], save_dtype: torch.dtype | None,
) -> tuple[LiveLogits, list[Drift]]:  # fmt: skip
    """The live model on the rows, then each merged one, put together in memory as it would be read back."""
    base = _loaded(config, precision)
    loaded = adapter_format.load(base, adapter)  # with its canary, which a skeleton cannot run
    attach(base, loaded, slot=1)
    live = measure_live(base, 1, rows)
    detach(base, slot=1)
    found: dict[str, Drift] = {}
    if "requantized" in mergers:
        load_merged_weights(base, mergers["requantized"], torch.bfloat16)
        found["requantized"] = compare(base, "requantized", live)
    del base
    first = next(iter(mergers.values()))
    own = first.source_dtype(first.spans[first.embedding][0].tensor)
    dtype = save_dtype or (own if own.is_floating_point else torch.bfloat16)
    dense: Precision = "bfloat16" if dtype == torch.bfloat16 else "float32"
    for kind, merger in mergers.items():
        if kind != "requantized":
            base = _loaded(config, dense)
            load_merged_weights(base, merger, dtype)
            found[kind] = compare(base, kind, live)
            del base
    return live, [found[kind] for kind in mergers]


def _loaded(config: MergeConfig, precision: Precision) -> Base:
    return load_base(
        config.model, precision=precision, compute_dtype=config.compute_dtype, device=config.device,
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip


def _too_far(config: MergeConfig, onto: str, drifts: Sequence[Drift]) -> str:
    chosen = next(d for d in drifts if d.onto == onto)
    better = [d for d in drifts if config.max_drift is not None and d.relative <= config.max_drift]
    way = (
        f"take --onto {min(better, key=lambda d: d.relative).onto} ({min(d.relative for d in better):.4f})"
        if better
        else "raise --max-drift, write in another type with --save-precision, or serve the adapter on its base"
    )
    return (
        f"merged onto {onto} the logits differ from the live model's by {chosen.relative:.4f} of their size, above --max-drift "
        f"{config.max_drift:g}; nothing was written. {way[0].upper()}{way[1:]}"
    )


def _manifest(
    config: MergeConfig, base: MetaBase, adapters: Sequence[WeightedAdapter], manifests: Sequence[dict[str, Any] | None],
    onto: Onto, drifts: Sequence[Drift],
) -> dict[str, Any]:  # fmt: skip
    """The merged model's `graft.json`: what it was made of, and how it is asked."""
    first = manifests[0] if manifests else None
    kept = {
        key: (first or {}).get(key)
        for key in ("data", "template", "tokenizer_digest", "golden")
        if (first or {}).get(key)
    }
    parts = [
        {"digest": a.adapter.origin.digest if a.adapter.origin else None, "weight": a.weight, "name": name}
        for a, (name, _) in zip(adapters, config.weighted())
    ]
    return {
        "format": 1,
        "method": "merge",
        "base": {"name": base.name, "fingerprint": base.fingerprint},
        "adapters": parts,
        "onto": onto,
        "combine": {"kind": config.combine, "density": config.density, "seed": config.seed},
        "drift": [d.to_json() for d in drifts],
        **kept,
    }


__all__ = ["MergeRefused", "merge", "report"]
