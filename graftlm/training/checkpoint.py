"""Checkpoints: everything a run needs to go on as if it had never stopped, in safetensors and JSON.

    checkpoints/000040/  trainable.safetensors  optimizer.safetensors  state.json  manifest.json
    best.json            which step had the lowest held-out loss

There is no generator state: randomness follows from (seed, draw, position, layer). A checkpoint is whole or not there
(see `files.py`); the newest one that its manifest confirms is used. Old ones go only after a new one is complete.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from graftlm.errors import RunError
from graftlm.files import damage, whole_folder, write_json
from graftlm.training.trial import Evaluation, RowLoss, Trial


def save(run: Path, trial: Trial, identity: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint of `trial` after its current step; keeps the newest `keep` and the best."""
    place = run / "checkpoints" / f"{trial.step:06d}"
    for left in place.parent.glob(".*"):  # half-written, by a process that was killed; the run folder is ours alone
        shutil.rmtree(left, ignore_errors=True)
    with whole_folder(place, manifest=True) as folder:
        tensors = {n: p.detach().cpu().contiguous() for n, p in trial.parameters.items()}
        save_file(tensors, folder / "trainable.safetensors")
        save_file(
            {n: t.cpu().contiguous() for n, t in trial.optimizer.state().items()}, folder / "optimizer.safetensors"
        )
        state = {
            "step": trial.step,
            "optimizer_steps": trial.optimizer.steps,
            "tokens": trial.tokens,
            "trained_tokens": trial.trained_tokens,
            "evaluations": trial.evaluations,
            "first": _to_json(trial.first),
            "last": _to_json(trial.last),
            "best": _to_json(trial.best),
            "identity": identity,
        }
        write_json(folder / "state.json", state)
    name_best(run, trial)
    best = trial.best.step if trial.best is not None else -1
    for old in _folders(run)[:-keep]:
        if int(old.name) != best:
            shutil.rmtree(old, ignore_errors=True)
    return place


def remove(run: Path, step: int) -> None:
    """Take away the checkpoint of a step, and the folder of checkpoints when it was the only one."""
    shutil.rmtree(run / "checkpoints" / f"{step:06d}", ignore_errors=True)
    with contextlib.suppress(OSError):  # it holds others
        (run / "checkpoints").rmdir()


def name_best(run: Path, trial: Trial) -> None:
    """Write best.json."""
    if trial.best is not None:
        write_json(run / "best.json", {"step": trial.best.step, "loss": trial.best.loss})


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, or None when none was ever written; and what is wrong with newer ones.

    Raises RunError when there are some and every one is damaged.
    """
    problems: list[str] = []
    for folder in reversed(_folders(run)):
        problem = damage(folder)
        if problem is None:
            return folder, problems
        problems.append(f"{folder.name}: {problem}")
    if problems:
        raise RunError(f"{run}: no checkpoint is whole ({'; '.join(problems)}); start over in another --out")
    return None, problems


def load(folder: Path, trial: Trial, identity: dict[str, Any]) -> None:
    """Put a checkpoint back into `trial`; RunError names every option, data or base that is not the same any more."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    changed = [
        f"{key.replace('_', '-')} was {state['identity'].get(key)!r}, now {value!r}"
        for key, value in identity.items()
        if state["identity"].get(key) != value
    ]
    if changed:
        raise RunError(
            f"{folder} belongs to another run: {'; '.join(changed)}. Take the same options, or another --out"
        )
    load_parameters(folder, trial)
    trial.optimizer.load(load_file(folder / "optimizer.safetensors"), state["optimizer_steps"])
    trial.step, trial.tokens, trial.trained_tokens = state["step"], state["tokens"], state["trained_tokens"]
    trial.evaluations = [(int(step), float(loss)) for step, loss in state["evaluations"]]
    trial.first, trial.last, trial.best = (_from_json(state[key]) for key in ("first", "last", "best"))


def load_parameters(folder: Path, trial: Trial) -> None:
    """Put only the trained tensors of a checkpoint back."""
    tensors = load_file(folder / "trainable.safetensors")
    if set(tensors) != set(trial.parameters):
        odd = sorted(set(tensors) ^ set(trial.parameters))[0]
        raise RunError(f"{folder} holds other tensors than this run trains, for one '{odd}'")
    with torch.no_grad():
        for name, parameter in trial.parameters.items():
            parameter.copy_(tensors[name])


def take_best(run: Path, trial: Trial) -> str | None:
    """Put the best step's tensors into `trial`. Where its checkpoint is damaged the last step's stay: returns why."""
    if trial.best is None or trial.best.step == trial.step:
        return None
    folder = run / "checkpoints" / f"{trial.best.step:06d}"
    problem = damage(folder)
    if problem is None:
        load_parameters(folder, trial)
    else:
        trial.best = trial.last
    return problem and f"the best step's checkpoint {folder} cannot be used ({problem}); the last step is kept instead"


def _folders(run: Path) -> list[Path]:
    folder = run / "checkpoints"
    return sorted(p for p in folder.glob("*") if p.is_dir() and p.name.isdigit()) if folder.is_dir() else []


def _to_json(evaluation: Evaluation | None) -> Any:
    if evaluation is None:
        return None
    return {"step": evaluation.step, "rows": [[r.row, r.trained_tokens, r.loss] for r in evaluation.rows]}


def _from_json(value: Any) -> Evaluation | None:
    if value is None:
        return None
    return Evaluation(
        value["step"], tuple(RowLoss(row, int(tokens), float(loss)) for row, tokens, loss in value["rows"])
    )
