"""Checkpoints: everything a run needs to go on as if it had never stopped, in safetensors and JSON; and who may go on.

    checkpoints/000040/  trainable.safetensors  optimizer.safetensors  [rows-*]  state.json  manifest.json
    best.json            which step is the best, by eval loss or score

There is no generator state: randomness follows from (seed, draw, position, layer). A checkpoint is complete or not there
(see `files.py`); the newest one that its manifest confirms is used. Old ones go only after a new one is complete: what stays
is the newest `keep` and, for each of these, the best step as it was known then.

A run is identified by its options by value, and its base, data and first adapter by content (`RunIdentity`). A
checkpoint keeps these; a run that goes on with others is refused with both values, unless each is named with
`--allow-change`. What was changed, and at which step, stays with the checkpoints after it, in the metrics, and in the
manifest of the result.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftlm import kernels
from graftlm.adapters.attach import Adapter
from graftlm.base.loading import Base
from graftlm.config import ComputeDtype, TrainConfig
from graftlm.config.aliases import FORMER, renamed
from graftlm.data.dataset import Dataset
from graftlm.distributed.group import ALONE, Ranks
from graftlm.distributed.shard import is_split, local
from graftlm.errors import ConfigError, Diverged, RunError, nearest
from graftlm.files import atomic_folder, find_damage, remove_leftovers, write_json
from graftlm.jsonfile import read_json
from graftlm.training.saved_tensors import OPTIMIZER, TRAINABLE, SavedTensors, rows_file, write, written_by_all
from graftlm.training.trial import Evaluation, ExampleLoss, Trial

if TYPE_CHECKING:
    from graftlm.training.view import View

STATE = "state.json"
_MOST_RANKS = 1 << 16
_MOST_STATE_BYTES = 1 << 30  # it holds three numbers for each eval row
# Options that change neither what is trained nor the numbers, so a run may go on with others.
_FREE = {
    "activation_checkpointing", "allow_change", "deterministic", "device", "keep_checkpoints", "layout", "micro_batch_tokens",
    "offload_activations", "offload_layers", "offload_optimizer", "optimizer_in_backward", "out", "rank_timeout", "ranks",
    "resume", "save_every", "save_precision", "track", "trust_remote_code",
}  # fmt: skip
_ADDED_LATER: dict[str, Any] = {"best_by": "loss"}
"""Options that checkpoints written before them do not hold, with the value they stood for; null needs no entry."""


def finite(tensor: Tensor) -> bool:
    """Whether every value of a tensor is, found without a copy of it."""
    return not tensor.is_floating_point() or math.isfinite(float(kernels.sum_of_squares(tensor)))


def save(run: Path, trial: Trial, extra: Mapping[str, Any], keep: int, ranks: Ranks = ALONE) -> Path:
    """Write a checkpoint of `trial` after its current step, with `extra` in its state; keeps the newest `keep` and the best.

    Of several ranks each calls this: the first writes, and where ranks share what is trained, each its rows, those of a node
    if every node has all of them.

    Raises OSError or SafetensorError where it cannot be written (see `run_folder.writing`), RunError where another rank cannot,
    and Diverged for a tensor that is not finite; the older checkpoints are then as they were.
    """
    place = run / "checkpoints" / f"{trial.step:06d}"
    sharing = trial.optimizer.sharing
    if not ranks.first and sharing.size == 1:
        return place
    moments = trial.optimizer.state()
    split = {name for name, parameter in trial.parameters.items() if is_split(parameter)}
    tensors = {name: local(parameter) for name, parameter in trial.parameters.items()}
    _check_finite(trial, {**tensors, **moments})
    whole = {name: t for name, t in tensors.items() if name not in split}
    states = {key: t for key, t in moments.items() if key.partition(".")[2] not in split}
    if ranks.first:
        remove_leftovers(place.parent)  # half-written, by a process that was killed; the run folder is ours alone
    folder_of = atomic_folder(place, manifest=True) if sharing.size == 1 else written_by_all(place, sharing)
    with folder_of as folder:
        if split and sharing.counted:
            rows = {f"value.{name}": tensor for name, tensor in tensors.items() if name in split}
            rows |= {key: tensor for key, tensor in moments.items() if key not in states}
            write(folder / rows_file(sharing.part, sharing.parts), rows)
        if ranks.first:
            write(folder / TRAINABLE, whole)
            write(folder / OPTIMIZER, states)
            how = {} if sharing.size == 1 else {"ranks": sharing.parts}
            write_json(folder / STATE, {**_state_of(trial), **how, **extra})
    if ranks.first:
        write_best(run, trial)
        _remove_old(run, trial.step, keep)
    return place


def _check_finite(trial: Trial, tensors: Mapping[str, Tensor]) -> None:
    """Raise Diverged, on every rank, for a tensor that is not finite; of split ones each rank looks at its rows."""
    bad = trial.optimizer.sharing.total([float(not finite(tensor)) for tensor in tensors.values()])
    for name, found in zip(tensors, bad):
        if found:
            raise Diverged(f"{trial.name}: '{name}' is not finite after step {trial.step}; lower --learning-rate")


def _state_of(trial: Trial) -> dict[str, Any]:
    return {
        "step": trial.step,
        "optimizer_steps": trial.optimizer.steps,
        "tokens": trial.tokens,
        "target_tokens": trial.target_tokens,
        "evaluations": trial.evaluations,
        "scores": trial.scores,
        "first": _to_json(trial.first_evaluation),
        "last": _to_json(trial.last_evaluation),
        "best": _to_json(trial.best_evaluation),
    }


def _remove_old(run: Path, step: int, keep: int) -> None:
    """Remove what the checkpoint of `step`, just written, has replaced.

    Later ones are of a future that was given up: damaged, and skipped when the run went on from an earlier one.
    """
    found = _folders(run)
    kept = [folder for folder in found if int(folder.name) <= step][-keep:]
    wanted = {folder.name for folder in kept}
    for folder in kept:
        with contextlib.suppress(RunError, KeyError, TypeError):  # a damaged one keeps nothing
            wanted.add(f"{read_state(folder)['best']['step']:06d}")
    for folder in found:
        if folder.name not in wanted:
            shutil.rmtree(folder, ignore_errors=True)


def remove(run: Path, step: int) -> None:
    """Remove the checkpoint of a step, and the folder of checkpoints when it was the only one."""
    shutil.rmtree(run / "checkpoints" / f"{step:06d}", ignore_errors=True)
    with contextlib.suppress(OSError):  # it holds others
        (run / "checkpoints").rmdir()


def write_best(run: Path, trial: Trial) -> None:
    """Write best.json. Raises OSError."""
    if trial.best_evaluation is not None:
        score = {} if trial.best_evaluation.score is None else {"eval_score": trial.best_evaluation.score}
        write_json(
            run / "best.json", {"step": trial.best_evaluation.step, "eval_loss": trial.best_evaluation.loss, **score}
        )


Newest = tuple[Path | None, list[str]]
"""The newest checkpoint that is complete, or None when none was ever written; and what is wrong with newer ones."""


def newest(run: Path, ranks: Ranks = ALONE) -> Newest:
    """The newest checkpoint that is complete. Of several ranks, which all call this, each reads a share of its files.

    Raises RunError, on every rank, when there are some and every one is damaged.
    """
    problems: list[str] = []
    names: list[str] = ranks.from_first(lambda: [folder.name for folder in reversed(_folders(run))])
    for name in names:
        folder = run / "checkpoints" / name
        problem = _damage(folder, ranks)
        if problem is None:
            return folder, problems
        problems.append(f"{name}: {problem}")
    with ranks.agreeing():
        if problems:
            raise RunError(f"{run}: no checkpoint is whole ({'; '.join(problems)}); start over in another --out")
    return None, problems


def _damage(folder: Path, ranks: Ranks) -> str | None:
    """What is wrong with a checkpoint, the same on every rank: each reads a share of its files, about equally many bytes."""
    found = ranks.of_all(find_damage(folder, ranks.own))
    return next((problem for problem in found if problem is not None), None)


def describe_newest(run: Path) -> str:
    """The checkpoint that a failed run would go on from, as the end of a sentence."""
    try:
        found, _ = newest(run)
    except RunError as error:
        return str(error)
    return "no checkpoint was written" if found is None else f"the newest checkpoint is {found}"


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's numbers, and the `extra` it was saved with. Raises RunError."""
    state = read_json(folder / STATE, RunError, most=_MOST_STATE_BYTES)
    if "trained_tokens" in state:  # as it was called before
        state["target_tokens"] = state.pop("trained_tokens")
    return state


def load(folder: Path, trial: Trial) -> None:
    """Put a checkpoint back into `trial`. Raises RunError for one that holds something else than this trial has."""
    state = read_state(folder)
    load_parameters(folder, trial)
    saved = _tensors_of(folder)
    try:
        trial.optimizer.load(_moments_of(saved, trial), int(state["optimizer_steps"]))
        trial.step, trial.tokens, trial.target_tokens = (int(state[k]) for k in ("step", "tokens", "target_tokens"))
        trial.evaluations = [(int(step), float(loss)) for step, loss in state["evaluations"]]
        trial.scores = [(int(step), float(score)) for step, score in state.get("scores", ())]
        trial.first_evaluation, trial.last_evaluation, trial.best_evaluation = (
            _from_json(state[key]) for key in ("first", "last", "best")
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise RunError(
            f"{folder} is of another version of Graft, or damaged ({what}); start over in another --out"
        ) from None


def _tensors_of(folder: Path) -> SavedTensors:
    ranks = read_state(folder).get("ranks", 1)
    if not isinstance(ranks, int) or not 1 <= ranks <= _MOST_RANKS:
        raise RunError(f"{folder}/{STATE}: ranks is {ranks!r}, expected a number of ranks; start over in another --out")
    return SavedTensors(folder, ranks)


def _moments_of(saved: SavedTensors, trial: Trial) -> dict[str, Tensor]:
    """This rank's part of the optimizer's states. Raises ValueError for states of other tensors."""
    found: dict[str, Tensor] = {}
    for name in sorted(saved.with_moments):
        if name not in trial.parameters:
            raise ValueError(f"the states hold '{name}', which is not trained")
        for kind, tensor in saved.own_moments(name, trial.parameters[name]).items():
            found[f"{kind}.{name}"] = tensor
    return found


def load_parameters(folder: Path, trial: Trial) -> None:
    """Put only the trained tensors of a checkpoint back. Raises RunError for other names, shapes or types."""
    saved = _tensors_of(folder)
    if saved.names != set(trial.parameters):
        odd = sorted(saved.names ^ set(trial.parameters))[0]
        raise RunError(
            f"{folder} holds other tensors than this run trains, for one '{odd}'; start over in another --out"
        )
    for name, parameter in trial.parameters.items():
        own, other = saved.kind(name), (tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."))
        if own != other:
            raise RunError(
                f"{folder} holds '{name}' as {own[1]} of shape {own[0]}, this run trains it as {other[1]} of shape {other[0]}; "
                "start over in another --out"
            )
    with torch.no_grad():
        for name, parameter in trial.parameters.items():
            local(parameter).copy_(saved.own_rows(name, parameter))


def restore_best(run: Path, trial: Trial) -> str | None:
    """Put the best step's tensors into `trial`. Where its checkpoint is damaged the last step's stay: returns why."""
    if trial.best_evaluation is None or trial.best_evaluation.step == trial.step:
        return None
    folder = run / "checkpoints" / f"{trial.best_evaluation.step:06d}"
    problem = _damage(folder, trial.optimizer.sharing)
    if problem is None:
        load_parameters(folder, trial)
    else:
        trial.best_evaluation = trial.last_evaluation
    return problem and f"the best step's checkpoint {folder} cannot be used ({problem}); the last step is kept instead"


def _folders(run: Path) -> list[Path]:
    folder = run / "checkpoints"
    found = (
        [p for p in folder.glob("*") if p.is_dir() and p.name.isascii() and p.name.isdigit()] if folder.is_dir() else []
    )
    return sorted(found, key=lambda p: int(p.name))


def _to_json(evaluation: Evaluation | None) -> Any:
    if evaluation is None:
        return None
    rows = [[r.row_name, r.target_tokens, r.loss] for r in evaluation.example_losses]
    return {"step": evaluation.step, "rows": rows, "score": evaluation.score}


def _from_json(value: Any) -> Evaluation | None:
    if value is None:
        return None
    score = value.get("score")  # checkpoints that were written before there were scores have none
    return Evaluation(
        value["step"],
        tuple(ExampleLoss(row, int(tokens), float(loss)) for row, tokens, loss in value["rows"]),
        None if score is None else float(score),
    )


# ---- going on with a run ---------------------------------------------------------------------------------------------


@dataclass
class RunIdentity:
    """What makes a run this run, and what of it was changed on the way."""

    values: dict[str, Any]
    """Options by value; `model`, `data`, `eval_data` and `from_adapter` by digest."""
    changes: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """What --allow-change accepted: step, key, was, now."""

    def to_json(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        return {"identity": self.values, "changes": self.changes}


def identify(
    resolved: dict[str, Any], base: Base, adapter: Adapter | None, dataset: Dataset, eval_dataset: Dataset | None
) -> RunIdentity:
    """The identity of a run, from its resolved options and what they led to."""
    origin = adapter.origin if adapter is not None else None
    by_content = {
        "model": base.fingerprint,
        "data": dataset.digest,
        "eval_data": eval_dataset.digest if eval_dataset else None,
        "from_adapter": origin.digest if origin else None,
    }
    return RunIdentity({**{name: value for name, value in resolved.items() if name not in _FREE}, **by_content})


def compute_dtype_of(config: TrainConfig, found: Newest | None = None) -> ComputeDtype | None:
    """The compute dtype of a run: the one asked for, else, where it goes on, the one it began with, as its newest checkpoint
    says; `found` where that was looked for already.

    None leaves it to the processor; so does a dtype that this one does not have, and `resume_from_checkpoint` then reports
    the difference.
    """
    if config.compute_dtype is not None or not config.resume:
        return config.compute_dtype
    folder, _ = found or newest(config.out)
    began = None if folder is None else renamed(read_state(folder).get("identity") or {}).get("compute_dtype")
    return None if began == "bf16-mixed" and not kernels.has_bf16_matmul() else began


def resume_from_checkpoint(
    config: TrainConfig, trial: Trial, identity: RunIdentity, view: View, known: Newest | None = None
) -> bool:
    """Put the newest complete checkpoint, `known` where it was looked for already, into `trial`; False where none was ever
    written.

    Raises RunError when there are some and none is complete, and for options, data or a base that are not the same any more;
    ConfigError for an --allow-change that names nothing.
    """
    allowed = _allowed(config.allow_change, identity)
    found, damaged = known or newest(config.out)
    for problem in damaged:
        view.note(f"passed over the damaged checkpoint {problem}")
    if found is None:
        view.note("no checkpoint was written yet; starting from the beginning")
        return False
    state = read_state(found)
    before = {**_ADDED_LATER, **renamed(state.get("identity") or {})}
    changed = [key for key, value in identity.values.items() if before.get(key) != value]
    refused = [key for key in changed if key not in allowed]
    if refused:
        differences = "; ".join(
            f"{_flag(key)} was {before.get(key)!r}, now {identity.values[key]!r}" for key in refused
        )
        flags = " ".join(f"--allow-change {_flag(key)}" for key in refused)
        raise RunError(
            f"{found} belongs to another run: {differences}. Take the same options, another --out, or accept it with {flags}"
        )
    load(found, trial)
    identity.changes[:] = [*(state.get("changes") or [])]
    for key in changed:
        change = {"step": trial.step, "key": _flag(key), "was": before.get(key), "now": identity.values[key]}
        identity.changes.append(change)
        view.note(f"going on with another {change['key']}: {change['was']!r} before, {change['now']!r} from here")
    if "eval_data" in changed:  # losses on other rows cannot be compared with these
        trial.first_evaluation = trial.last_evaluation = trial.best_evaluation = None
        trial.evaluations, trial.scores = [], []
    _forget_other_scores(trial, changed)
    view.note(f"going on from {found}")
    return True


def _forget_other_scores(trial: Trial, changed: Sequence[str]) -> None:
    """Drop scores that cannot be compared with those from here on (another score, other prompts), and a best step chosen by
    them or by another rule."""
    other = {"score", "score_prompts", "score_max_tokens"} & set(changed)
    if other:
        trial.scores = []
        trial.first_evaluation, trial.last_evaluation, trial.best_evaluation = (
            None if found is None else replace(found, score=None)
            for found in (trial.first_evaluation, trial.last_evaluation, trial.best_evaluation)
        )
    if "best_by" in changed or (other and trial.best_by == "score"):
        trial.best_evaluation = None


def _flag(key: str) -> str:
    return key.replace("_", "-")


def _field(name: str) -> str:
    field = name.replace("-", "_")
    return FORMER.get(field, field)


def _allowed(names: Sequence[str], identity: RunIdentity) -> set[str]:
    known = [_flag(key) for key in identity.values]
    for name in names:
        if _flag(_field(name)) not in known:
            raise ConfigError(
                f"--allow-change {name}: a run is not told apart by that{nearest(_flag(name), known)} "
                f"known: {', '.join(sorted(known))}"
            )
    return {_field(name) for name in names}
