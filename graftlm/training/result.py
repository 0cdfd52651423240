"""What a finished run leaves: adapter/ or model/ with a manifest of what made it, evaluation.jsonl, and the summary."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import Adapter
from graftlm.base.chat import Encoder
from graftlm.base.loading import Base
from graftlm.base.precision import DTYPES
from graftlm.base.saving import save_model
from graftlm.config import TrainConfig
from graftlm.data.dataset import Dataset
from graftlm.files import atomic_folder, write_json
from graftlm.training import checkpoint
from graftlm.training.pages import release_memory
from graftlm.training.resume import RunIdentity
from graftlm.training.run_folder import environment, write_lines
from graftlm.training.trial import Trial
from graftlm.training.view import View

SO_FAR = "{}-so-far"
"""What the result of an interrupted run is called: `adapter-so-far` or `model-so-far`."""


def about(
    config: TrainConfig, base: Base, encoder: Encoder, dataset: Dataset, eval_dataset: Dataset | None
) -> dict[str, Any]:
    """What the run folder and the adapter's manifest say about data and base."""

    def counted(data: Dataset) -> dict[str, Any]:
        return {
            "sources": [{"name": p.name, "weight": p.weight, "rows": len(p.examples)} for p in data.parts],
            "rows": data.rows, "tokens": data.tokens, "target_tokens": data.target_tokens, "longest": data.longest,
            "dropped": data.dropped, "truncated": data.truncated, "formats": dict(data.kinds), "digest": data.digest,
        }  # fmt: skip

    return {
        "data": {
            "train": counted(dataset),
            "eval": None if eval_dataset is None else counted(eval_dataset),
            "template_date": config.template_date,
            "template_digest": encoder.template_digest,
            "train_on": config.train_on,
        },
        "base": {
            "name": config.model,
            "fingerprint": base.fingerprint,
            "precision": base.precision,
            "compute_dtype": base.compute_dtype,
            "architecture": type(base.model).__name__,
            "parameters": base.parameters,
        },
    }


def finish(
    config: TrainConfig, base: Base, adapter: Adapter | None, trial: Trial, encoder: Encoder, facts: dict[str, Any],
    identity: RunIdentity, view: View,
) -> dict[str, Any]:  # fmt: skip
    """Put the best step back, write its result, and take away the checkpoint that stood for it; returns what was saved.

    A checkpoint of the last step is written first, so that a run whose result cannot be written is not lost. Raises OSError
    and SafetensorError.
    """
    try:  # one more is kept, for this one goes again once the result is there
        checkpoint.save(config.out, trial, identity.to_json(), config.keep_checkpoints + 1)
    except (OSError, SafetensorError) as error:  # the result is smaller and may still find room
        view.note(f"no checkpoint could be written at the end ({error}); saving the result")
    trial.optimizer.forget()  # writing the result takes memory of its own
    release_memory()
    trouble = checkpoint.take_best(config.out, trial)
    if trouble is not None:
        view.note(trouble)
    step = trial.best.step if trial.best is not None else trial.step
    checkpoint.name_best(config.out, trial)
    saved = save_result(config, base, adapter, trial, encoder, {**facts, "steps": step, "changes": identity.changes})
    checkpoint.remove(config.out, trial.step)
    for kind in ("adapter", "model"):  # what an interruption before had saved
        shutil.rmtree(config.out / SO_FAR.format(kind), ignore_errors=True)
    return {**saved, "saved_step": step}


def save_so_far(
    config: TrainConfig, base: Base, adapter: Adapter | None, trial: Trial, encoder: Encoder, facts: dict[str, Any],
    identity: RunIdentity, view: View,
) -> dict[str, Any]:  # fmt: skip
    """Save the best step of a run that is interrupted beside its checkpoints, which stay; returns what was saved.

    Nothing goes on with `trial` after this: it holds the best step then. Raises OSError and SafetensorError.
    """
    trouble = checkpoint.take_best(config.out, trial)
    if trouble is not None:
        view.note(trouble)
    step = trial.best.step if trial.best is not None else trial.step
    facts = {**facts, "steps": step, "changes": identity.changes}
    return {**save_result(config, base, adapter, trial, encoder, facts, SO_FAR), "saved_step": step}


def manifest_of(
    config: TrainConfig, encoder: Encoder, facts: dict[str, Any], before: float | None, after: float | None
) -> dict[str, Any]:
    """What the manifest of a result says of how it was made; `before` and `after` are eval losses in nats a target token."""
    return {
        **facts,
        "method": config.method,
        "seed": config.seed,
        "template": {"digest": encoder.template_digest, "own": encoder.has_own_template, "date": config.template_date},
        "evaluation": {"before": before, "after": after},
        "versions": environment()["versions"],
    }


def save_result(
    config: TrainConfig, base: Base, adapter: Adapter | None, trial: Trial, encoder: Encoder, facts: dict[str, Any],
    name: str = "{}",
) -> dict[str, Any]:  # fmt: skip
    """Write adapter/ or model/, called `name`, and evaluation.jsonl; returns their places and sizes.

    Raises OSError, SafetensorError.
    """
    if trial.first is not None and trial.best is not None:
        after = {r.row: r for r in trial.best.rows}
        lines = (
            {"row": r.row, "target_tokens": r.target_tokens, "loss_before": r.loss, "loss_after": after[r.row].loss}
            for r in trial.first.rows
        )
        write_lines(config.out / "evaluation.jsonl", lines)
    losses = (trial.first.loss if trial.first else None, trial.best.loss if trial.best else None)
    manifest = manifest_of(config, encoder, facts, *losses)
    if adapter is not None:
        place = config.out / name.format("adapter")
        with atomic_folder(place) as folder:
            adapter_format.save(base, adapter, folder, manifest)
        return {
            "adapter_folder": str(place),
            "adapter_digest": adapter_format.inspect_folder(place).digest,
            "saved_bytes": (place / adapter_format.TENSORS).stat().st_size,
        }
    place = config.out / name.format("model")
    with atomic_folder(place) as folder:
        save_model(base.model, str(folder), DTYPES[config.save_precision or base.precision])
        base.tokenizer.save_pretrained(str(folder))
        write_json(folder / "graft.json", {"format": 1, **manifest, "tokenizer_digest": encoder.tokenizer_digest})
    return {"model_folder": str(place), "saved_bytes": _bytes(place)}


def _bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))
