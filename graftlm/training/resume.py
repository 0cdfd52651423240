"""What must be the same for a run to go on, and going on.

A run is its options by value, and its base, data and first adapter by content. A checkpoint keeps these; a run that goes on
with others is refused with both values, unless each is named with `--allow-change`. What was changed, and at which step,
stays with the checkpoints after it, in the metrics, and in the manifest of what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from graftlm import kernels
from graftlm.adapters.attach import Adapter
from graftlm.base.loading import Base
from graftlm.config import ComputeDtype, TrainConfig
from graftlm.config.aliases import FORMER, renamed
from graftlm.data.dataset import Dataset
from graftlm.errors import ConfigError, RunError, nearest
from graftlm.training import checkpoint
from graftlm.training.trial import Trial
from graftlm.training.view import View

# Options that change neither what is trained nor the numbers, so a run may go on with others.
_FREE = {
    "activation_checkpointing", "allow_change", "device", "keep_checkpoints", "offload_optimizer", "optimizer_in_backward",
    "out", "resume", "save_every", "save_precision", "micro_batch_tokens", "track", "trust_remote_code",
}  # fmt: skip


_BEFORE: dict[str, Any] = {"best_by": "loss"}
"""Options that came later, as they were in runs before them; those that are null there need no entry."""


@dataclass
class RunIdentity:
    """What a run is, and how it became that."""

    values: dict[str, Any]
    """Options by value; `model`, `data`, `eval_data` and `from_adapter` by digest."""
    changes: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """What --allow-change let in: step, key, was, now."""

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


def compute_dtype_of(config: TrainConfig) -> ComputeDtype | None:
    """The type of products that a run takes: the one asked for, else, where it goes on, the one it began with.

    None leaves it to the processor; so does a type that this one does not have, and `resume_from_checkpoint` then says
    what is different.
    """
    if config.compute_dtype is not None or not config.resume:
        return config.compute_dtype
    found, _ = checkpoint.newest(config.out)
    began = None if found is None else renamed(checkpoint.read_state(found).get("identity") or {}).get("compute_dtype")
    return None if began == "bf16-mixed" and not kernels.has_bf16_matmul() else began


def resume_from_checkpoint(config: TrainConfig, trial: Trial, identity: RunIdentity, view: View) -> bool:
    """Put the newest whole checkpoint into `trial`; False where none was ever written.

    Raises RunError when there are some and none is whole, and for options, data or a base that are not the same any more;
    ConfigError for an --allow-change that names nothing.
    """
    allowed = _allowed(config.allow_change, identity)
    found, damaged = checkpoint.newest(config.out)
    for problem in damaged:
        view.note(f"passed over the damaged checkpoint {problem}")
    if found is None:
        view.note("no checkpoint was written yet; starting from the beginning")
        return False
    state = checkpoint.read_state(found)
    before = {**_BEFORE, **renamed(state.get("identity") or {})}
    changed = [key for key, value in identity.values.items() if before.get(key) != value]
    refused = [key for key in changed if key not in allowed]
    if refused:
        said = "; ".join(f"{_flag(key)} was {before.get(key)!r}, now {identity.values[key]!r}" for key in refused)
        flags = " ".join(f"--allow-change {_flag(key)}" for key in refused)
        raise RunError(
            f"{found} belongs to another run: {said}. Take the same options, another --out, or accept it with {flags}"
        )
    checkpoint.load(found, trial)
    identity.changes[:] = [*(state.get("changes") or [])]
    for key in changed:
        change = {"step": trial.step, "key": _flag(key), "was": before.get(key), "now": identity.values[key]}
        identity.changes.append(change)
        view.note(f"going on with another {change['key']}: {change['was']!r} before, {change['now']!r} from here")
    if "eval_data" in changed:  # losses on other rows say nothing beside these
        trial.first = trial.last = trial.best = None
        trial.evaluations, trial.scores = [], []
    _forget_other_scores(trial, changed)
    view.note(f"going on from {found}")
    return True


def _forget_other_scores(trial: Trial, changed: Sequence[str]) -> None:
    """Scores of another kind, or of other prompts, do not compare with those from here on, nor does a best step by another
    rule."""
    other = {"score", "score_prompts", "score_max_tokens"} & set(changed)
    if other:
        trial.scores = []
        trial.first, trial.last, trial.best = (
            None if found is None else replace(found, score=None) for found in (trial.first, trial.last, trial.best)
        )
    if "best_by" in changed or (other and trial.best_by == "score"):
        trial.best = None


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
