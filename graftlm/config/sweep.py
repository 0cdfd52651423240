"""Options of `graft sweep`, and the search space that `--search` describes.

    rank=4..64                 a whole number within a range        learning-rate=1e-5..1e-2      a number
    lora-dropout=0..0.2:0.05        in steps of 0.05                     targets=attention|all-linear  one of these
    data=a.jsonl|a.jsonl+b.jsonl:0.5                                `+` joins the items of one choice

Trials that are trained together share the base, the way data is read, and the micro-batches. Everything else may differ between
trials. Options that are not searched are those of `graft train`, the same for all trials.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, TypeAdapter, ValidationError, model_validator

from graftlm.config.aliases import FORMER
from graftlm.config.compare import shared
from graftlm.config.fields import (
    ComputeDtype,
    Config,
    Method,
    Names,
    Precision,
    Sources,
    TrainOn,
    flag_name,
    option,
    refuse_eval_weight,
    refuse_one_gpu,
    workers_option,
)
from graftlm.config.train import SCORE_OPTIONS, TrainConfig
from graftlm.errors import ConfigError, nearest

SEARCHED = (
    "rank",
    "alpha",
    "rank_stabilized",
    "lora_dropout",
    "targets",
    "learning_rate",
    "loraplus_lr_ratio",
    "lr_scheduler",
    "warmup_ratio",
    "epochs",
    "steps",
    "batch_size",
    "weight_decay",
    "beta1",
    "beta2",
    "epsilon",
    "max_grad_norm",
    "seed",
    "data",
)
"""Options that may differ between trials."""
_LISTS = ("targets", "data")
_BY_RATIO = 4.0
"""A range that starts above zero and spans at least this factor is searched on a log scale."""

Sampler = Literal["tpe", "random", "grid"]
Pruner = Literal["none", "asha", "hyperband"]
Value = bool | int | float | str


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    whole: bool
    step: float | None = None

    @property
    def log(self) -> bool:
        """Whether the range is searched on a log scale."""
        return self.step is None and self.low > 0 and self.high / self.low >= _BY_RATIO

    @property
    def values(self) -> tuple[Value, ...] | None:
        """All values of the range; None if there are infinitely many."""
        if self.whole:
            return tuple(range(int(self.low), int(self.high) + 1, int(self.step or 1)))
        if self.step is None:
            return None
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return tuple(round(self.low + i * self.step, 12) for i in range(count))

    @property
    def ends(self) -> tuple[Value, Value]:
        """The lowest and the highest value, in the option's own type."""
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)


@dataclass(frozen=True)
class Choice:
    """A list of values; an item of a list option is kept as written, `attention+mlp`."""

    values: tuple[Value, ...]


Space = dict[str, Range | Choice]
"""The search space: field of `TrainConfig` -> range or choices."""


def read_space(pairs: dict[str, str]) -> Space:
    """Read `{option: range or choices}`.

    Raises ConfigError for an option that does not exist (with the nearest name) or cannot vary within one sweep, for a
    range that is empty or reversed, and for a value that the option does not take.
    """
    return {name: found for text, spec in pairs.items() for name, found in [_entry(text, str(spec))]}


def _entry(text: str, spec: str) -> tuple[str, Range | Choice]:
    name = text.strip().replace("-", "_")
    name = FORMER.get(name, name)
    flag = flag_name(name)
    known = [flag_name(field) for field in SEARCHED]
    if name not in TrainConfig.model_fields:
        raise ConfigError(f"search: unknown option '{text}'{nearest(flag, known)} searchable: {', '.join(known)}")
    if name not in SEARCHED:
        raise ConfigError(
            f"search: '{flag}' is the same for all trials of a sweep, which share one base and its micro-batches; give it "
            f"as --{flag}, and start another sweep for another value. Searchable: {', '.join(known)}"
        )
    if not spec.strip():
        raise ConfigError(f"search: '{flag}' has no values; give {flag}=LOW..HIGH or {flag}=A|B")
    if ".." in spec and "|" not in spec and name not in _LISTS:
        return name, _range(name, flag, spec)
    values = [part.strip() for part in spec.split("|")]
    if "" in values:
        raise ConfigError(f"search: '{flag}={spec}' has an empty choice")
    twice = next((v for v in values if values.count(v) > 1), None)
    if twice is not None:
        raise ConfigError(f"search: '{flag}={spec}' names '{twice}' twice")
    if len(values) == 1:
        raise ConfigError(f"search: '{flag}={spec}' leaves nothing to search; give it as --{flag} {spec}")
    return name, Choice(tuple(v if name in _LISTS else _checked(name, flag, v) for v in values))


def _range(name: str, flag: str, spec: str) -> Range:
    body, _, step_text = spec.partition(":")
    low_text, _, high_text = body.partition("..")
    low, high = (_checked(name, flag, part.strip()) for part in (low_text, high_text))
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)) or isinstance(low, bool):
        raise ConfigError(f"search: '{flag}' is no number, so it has no range; name its values, {flag}=A|B")
    whole = isinstance(low, int) and isinstance(high, int)
    step: float | None = None
    if step_text:
        try:
            if not step_text.isascii():  # `int` takes the digits of every script
                raise ValueError
            step = int(step_text) if whole else float(step_text)
        except ValueError:
            raise ConfigError(f"search: the step of '{flag}={spec}' is no number: '{step_text}'") from None
        if not step > 0:
            raise ConfigError(f"search: the step of '{flag}={spec}' must be above 0, found {step:g}")
    if low > high:
        raise ConfigError(
            f"search: the range of '{flag}' is reversed, {low:g} to {high:g}; write {high_text}..{low_text}"
        )
    if low == high or (step is not None and low + step > high):
        raise ConfigError(f"search: the range '{flag}={spec}' holds one value alone; give it as --{flag} {low_text}")
    return Range(low, high, whole, step)


def _checked(name: str, flag: str, text: str) -> Value:
    """A value in the option's type and within its limits. Raises ConfigError."""
    field = TrainConfig.model_fields[name]
    kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation  # pyright: ignore
    adapter: TypeAdapter[Value] = TypeAdapter(kind)
    try:
        return adapter.validate_python(text)
    except ValidationError as error:
        message = error.errors()[0]["msg"].replace("Input should", "must")
        raise ConfigError(f"search: {flag} {message}, found '{text}'") from None


def _pairs(value: Any) -> Any:
    """`rank=4..64,learning-rate=1e-5..1e-2`, repeated options, or a YAML mapping whose values may be lists."""
    if value is None:
        return value
    if isinstance(value, dict):
        return {str(k): "|".join(map(str, v)) if isinstance(v, (list, tuple)) else str(v) for k, v in value.items()}
    found: dict[str, str] = {}
    last = ""
    for part in ",".join(map(str, value if isinstance(value, (list, tuple)) else [value])).split(","):
        name, equals, spec = part.partition("=")
        if not equals and last:  # a comma within a choice
            found[last] += f",{part}"
            continue
        if not equals:
            raise ValueError(f"expected OPTION=LOW..HIGH or OPTION=A|B, found '{part}'")
        last = name.strip()
        if last in found:
            raise ValueError(f"'{last}' is searched twice; give it once")
        found[last] = spec
    return found


class SweepConfig(Config):
    """Options of `graft sweep`."""

    takes_file = True
    train_only = dict.fromkeys(
        SCORE_OPTIONS,
        "trials are ranked by their eval loss. Train the best one again with a score: graft train TRIAL/config.json --out OUT "
        "--score NAME",
    )

    # The sweep
    search: Annotated[dict[str, str], BeforeValidator(_pairs)] = option(
        {}, "search space: OPTION=LOW..HIGH[:STEP] or OPTION=A|B, separated by commas", group="sweep"
    )
    trials: int = option(16, "number of trials, over all workers", group="sweep", ge=1, le=100_000)
    sampler: Sampler = option("tpe", "Optuna sampler that chooses the next trial", group="sweep")
    pruner: Pruner = option("none", "Optuna pruner that ends poor trials early", group="sweep")
    at_once: int | None = option(
        None, "most trials that a worker trains at once; default as many as memory holds, at most 8 and its part of --trials",
        group="sweep", ge=1,
    )  # fmt: skip
    storage: str | None = option(
        None, "Optuna storage: a journal file, sqlite:///FILE or postgresql://...; default a journal in --out",
        group="sweep",
    )  # fmt: skip
    name: str | None = option(None, "name of the study in the storage; default the name of --out", group="sweep")
    search_seed: int = option(0, "seed of the sampler", group="sweep", ge=0, lt=1 << 31)
    publish: str | None = option(None, "publish the best adapter under this name when the sweep is done", group="sweep")
    store: Path = option(Path("adapters"), "store to publish in", group="sweep")

    # The base and the method
    model: str = shared("model")
    method: Method = shared("method")
    base_precision: Precision | None = shared("base_precision")
    compute_dtype: ComputeDtype | None = shared("compute_dtype")
    trust_remote_code: bool = shared("trust_remote_code")
    device: str | None = shared("device")

    # Data
    data: Sources = option((), "training data, as `graft train` takes it; may be searched", group="data")
    eval_data: str = option(
        "10%", "eval data that ranks the trials: a file, `demo`, or a share of the training rows", group="data"
    )
    train_on: TrainOn = shared("train_on")
    max_length: int | None = shared("max_length")
    overlong: Literal["error", "drop", "truncate"] = shared("overlong")
    template_date: str = shared("template_date")

    # Options that are not searched
    rank: int = shared("rank")
    alpha: float | None = shared("alpha")
    rank_stabilized: bool = shared("rank_stabilized")
    lora_dropout: float = shared("lora_dropout")
    dora: bool = shared("dora")
    targets: Names = shared("targets")
    learning_rate: float | None = shared("learning_rate")
    loraplus_lr_ratio: float = shared("loraplus_lr_ratio")
    lr_scheduler: Literal["cosine", "linear", "constant"] = shared("lr_scheduler")
    warmup_ratio: float = shared("warmup_ratio")
    epochs: float | None = shared("epochs")
    steps: int | None = shared("steps")
    batch_size: int = shared("batch_size")
    weight_decay: float = shared("weight_decay")
    beta1: float = shared("beta1")
    beta2: float = shared("beta2")
    epsilon: float = shared("epsilon")
    optimizer: Literal["adamw", "adamw-8bit"] = shared("optimizer")
    max_grad_norm: float = shared("max_grad_norm")
    seed: int = shared("seed")

    # Memory and speed
    micro_batch_tokens: int | None = shared("micro_batch_tokens")
    activation_checkpointing: bool = shared("activation_checkpointing")
    workers: int = workers_option("workers on the search")

    # The sweep's own folder
    out: Path = option(Path("runs/sweep"), "folder of the sweep; the same command continues it", group="run")
    eval_every: int | None = shared("eval_every")
    save_every: int | None = shared("save_every")
    keep_checkpoints: int = shared("keep_checkpoints")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.method == "full":
            raise ValueError(
                "method full trains the base itself, which the trials of a sweep share; take lora or qlora, or compare full "
                "runs with graft compare"
            )
        refuse_eval_weight(self.eval_data)
        refuse_one_gpu(self.workers, self.device)
        if not self.search:
            raise ValueError("search is empty; name at least one option, such as --search learning-rate=1e-5..1e-2")
        space = self.space
        given = [name for name in space if name in self.model_fields_set]
        if given:
            flag = flag_name(given[0])
            raise ValueError(f"--{flag} is given and searched; leave one of the two out")
        lengths = [name for name in ("steps", "epochs") if name in space or getattr(self, name) is not None]
        if len(lengths) > 1:
            raise ValueError("give or search steps or epochs, not both: each sets the length of a trial")
        if "data" not in space and not self.data:
            raise ValueError("data: required, give --data, or search it: --search data=a.jsonl|b.jsonl")
        if "data" in space and self.eval_data.strip().endswith("%"):
            raise ValueError(
                f"eval-data is {self.eval_data} of the training rows and data is searched, so trials would be judged by "
                "different rows; give --eval-data FILE"
            )
        if self.sampler == "grid":
            endless = [flag_name(n) for n, s in space.items() if isinstance(s, Range) and s.step is None]
            if endless:
                raise ValueError(
                    f"sampler grid needs a list for every option, and '{endless[0]}' is a range; name its values, "
                    f"{endless[0]}=A|B, or give it a step, {endless[0]}=LOW..HIGH:STEP"
                )
        for end in (0, -1):
            self.training({name: self._end(name, end) for name in space}, out=self.out)
        return self

    def _end(self, name: str, end: int) -> Value:
        searched = self.space[name]
        return (searched.ends if isinstance(searched, Range) else searched.values)[end]

    @property
    def space(self) -> Space:
        """The search space. Raises ConfigError."""
        return read_space(self.search)

    @property
    def identity(self) -> dict[str, Any]:
        """The options that define the sweep: all but its folder, its number of trials and how it is run."""
        return {name: value for name, value in self.to_json().items() if name not in _FREE}

    def training(self, own: dict[str, Value], *, out: Path, resume: bool = False) -> TrainConfig:
        """The TrainConfig of one trial; `own` holds its searched values. Raises ConfigError."""
        values: dict[str, Any] = {name: getattr(self, name) for name in TrainConfig.model_fields if name in _PASSED}
        values.update({n: str(v).split("+") if n in _LISTS else v for n, v in own.items()})
        values.update(out=out, resume=resume)
        try:
            return TrainConfig.build({n: v for n, v in values.items() if v is not None and v != ()})
        except ConfigError as error:
            searched = ", ".join(f"{flag_name(n)}={v}" for n, v in own.items())
            raise ConfigError(f"a trial with {searched} could not be trained: {error}") from None


_PASSED = set(SweepConfig.model_fields) & set(TrainConfig.model_fields) - {"out", "store"}  # both a sweep's own
_FREE = {
    "at_once", "device", "keep_checkpoints", "name", "out", "publish", "save_every", "search_seed", "storage", "store",
    "micro_batch_tokens", "activation_checkpointing", "trials", "trust_remote_code", "workers",
}  # fmt: skip


class ShowSweepConfig(Config):
    """Options of `graft sweep show`."""

    folder: Path = option(..., "folder of a sweep", argument=True)
    storage: str | None = option(
        None, "its Optuna storage, if the folder does not name it (an address with a password)", group="sweep"
    )


__all__ = [
    "SEARCHED",
    "Choice",
    "Pruner",
    "Range",
    "Sampler",
    "ShowSweepConfig",
    "Space",
    "SweepConfig",
    "Value",
    "read_space",
]
