"""The run folder: what a run was asked, with what data, on what machine, and its result.

config.json        every option, resolved        plan.json       bytes and time, and what was measured
environment.json   versions, hardware, dates     data.json       digest, rows, tokens, target tokens, template date
metrics.jsonl      one object a line: step, kind (train | eval | event), loss or eval_loss, epoch, num_tokens, ...
samples.jsonl      with --score: step, row, prompt, references and answer of a few eval prompts, at each evaluation
evaluation.jsonl   per evaluation row: row id, target tokens, summed loss before and after
checkpoints/       best.json                     adapter/ or model/
summary.json       what the run was and did, as `graft train --json` prints it
"""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from graftlm import __version__, kernels
from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import Adapter
from graftlm.base.chat import Encoder
from graftlm.base.loading import Base
from graftlm.base.precision import DTYPES
from graftlm.base.saving import save_model, save_split_model
from graftlm.config import TrainConfig
from graftlm.data.dataset import Dataset
from graftlm.errors import RunError
from graftlm.files import atomic_folder, write_json
from graftlm.training import checkpoint
from graftlm.training.run_files import LOCK, write_lines
from graftlm.training.trial import Trial


def environment() -> dict[str, Any]:
    """Versions, hardware and the time, as they are now."""
    versions = {"graftlm": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "tokenizers", "safetensors", "datasets", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions,
        "machine": platform.machine(),
        "system": platform.system(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "kernels": kernels.backend("cuda" if gpus else "cpu"),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def check_free(out: Path, resume: bool) -> None:
    """Refuse an output folder that already holds something, unless its run is to go on; and a run that has ended.

    Call it while the folder is `locked`, so that no other process fills it meanwhile.
    """
    filled = out.is_dir() and any(entry.name != LOCK for entry in out.iterdir())
    known_run = (out / "config.json").is_file()
    ended = next((result for result in ("adapter", "model") if known_run and (out / result).exists()), None)
    if filled and ended is not None:
        more = "--from-adapter" if ended == "adapter" else "--model"
        formula = ", and without what an adapter is made of, such as --rank" if ended == "adapter" else ""
        began = f"--resume: the run in {out}" if resume else f"--out {out} already holds a run; it"
        raise RunError(
            f"{began} has ended, its result is {out / ended}. More steps are a new run that begins there: give "
            f"{more} {out / ended} and another --out, without --resume{formula}"
        )
    if filled and not resume:
        known = "a run" if known_run else "other files"
        raise RunError(f"--out {out} already holds {known}; take another folder, or --resume to go on with it")
    if filled and resume and not known_run:
        raise RunError(f"--resume: {out} holds files and no run (there is no config.json); take another folder")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold a run folder, made where there is none, for this process; RunError while another living process has it.

    The system takes the lock away with the process, however that ends, so none is ever left behind.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"--out {out} is a file; name a folder")
    lock = out / LOCK
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise RunError(f"--out {out} cannot be written to: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(descriptor, 20).decode(errors="replace").strip() or "of unknown number"
        os.close(descriptor)
        raise RunError(f"{out} is in use by process {owner}; wait for it, or take another --out") from None
    try:
        try:
            os.truncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        except OSError as error:
            raise RunError(f"--out {out} cannot be written to: {error.strerror}") from None
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raise RunError, with the checkpoint to go on from, instead of the OSError or SafetensorError of a failed write."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{out} could not be written to ({error}); {checkpoint.describe_newest(out)}. "
            "Make room, and go on with the same command and --resume"
        ) from None


# ---- the result ------------------------------------------------------------------------------------------------------


def describe_inputs(
    config: TrainConfig, base: Base, encoder: Encoder, dataset: Dataset, eval_dataset: Dataset | None
) -> dict[str, Any]:
    """What the run folder and the result's manifest say about data and base."""

    def describe(data: Dataset) -> dict[str, Any]:
        return {
            "sources": [{"name": p.name, "weight": p.weight, "rows": len(p.examples)} for p in data.parts],
            "rows": data.rows, "tokens": data.tokens, "target_tokens": data.target_tokens, "longest": data.longest,
            "dropped": data.dropped, "truncated": data.truncated, "formats": dict(data.kinds), "digest": data.digest,
        }  # fmt: skip

    return {
        "data": {
            "train": describe(dataset),
            "eval": None if eval_dataset is None else describe(eval_dataset),
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


def manifest_of(
    config: TrainConfig, encoder: Encoder, description: dict[str, Any], before: float | None, after: float | None
) -> dict[str, Any]:
    """How a result was made, for its manifest; `before` and `after` are eval losses in nats a target token."""
    return {
        **description,
        "method": config.method,
        "seed": config.seed,
        "template": {"digest": encoder.template_digest, "own": encoder.has_own_template, "date": config.template_date},
        "evaluation": {"before": before, "after": after},
        "versions": environment()["versions"],
    }


def save_result(
    config: TrainConfig, base: Base, adapter: Adapter | None, trial: Trial, encoder: Encoder, description: dict[str, Any],
    name: str = "{}",
) -> dict[str, Any]:  # fmt: skip
    """Write adapter/ or model/, called `name`, and evaluation.jsonl; returns their places and sizes.

    Raises OSError, SafetensorError.
    """
    if trial.first_evaluation is not None and trial.best_evaluation is not None:
        after = {r.row_name: r for r in trial.best_evaluation.example_losses}
        lines = (
            {
                "row": r.row_name,
                "target_tokens": r.target_tokens,
                "loss_before": r.loss,
                "loss_after": after[r.row_name].loss,
            }
            for r in trial.first_evaluation.example_losses
        )
        write_lines(config.out / "evaluation.jsonl", lines)
    losses = (
        trial.first_evaluation.loss if trial.first_evaluation else None,
        trial.best_evaluation.loss if trial.best_evaluation else None,
    )
    manifest = manifest_of(config, encoder, description, *losses)
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
        dtype = DTYPES[config.save_precision or base.precision]
        if base.structure.weights is None:
            save_model(base.model, str(folder), dtype)
        else:
            save_split_model(base.model, folder, dtype)
        base.tokenizer.save_pretrained(str(folder))
        write_json(folder / "graft.json", {"format": 1, **manifest, "tokenizer_digest": encoder.tokenizer_digest})
    return {"model_folder": str(place), "saved_bytes": _bytes(place)}


def _bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))
