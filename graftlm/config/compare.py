"""Options of `graft compare`, and its variants.

A variant is a method with options of its own: `lora`, `qlora`, `lora:rank=64`, `lora:targets=attention+mlp:rank=32`. Data,
order, batch size and steps are the same for all variants, so that only the method differs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, model_validator

from graftlm.config.aliases import FORMER
from graftlm.config.fields import (
    ComputeDtype,
    Config,
    Method,
    Metric,
    Names,
    Sources,
    TrainOn,
    option,
    plain_number,
    refuse_eval_weight,
    refuse_one_gpu,
    workers_option,
)
from graftlm.config.train import SCORE_OPTIONS, TrainConfig
from graftlm.errors import ConfigError, nearest

METHODS: tuple[Method, ...] = get_args(Method)
Cost = Literal["memory", "size", "time"]


def _known(kind: str, known: tuple[str, ...]) -> BeforeValidator:
    """Refuse a name that is none of `known`, with the nearest one."""

    def check(value: Any) -> Any:
        if value is not None and value not in known:
            raise ValueError(f"unknown {kind} '{value}'{nearest(str(value), known)} known: {', '.join(known)}")
        return value

    return BeforeValidator(check)


def _rates(value: Any) -> Any:
    """`lora=2e-4,full=2e-5`, a YAML mapping, or one number for every method."""
    if value is None or isinstance(value, dict):
        return value
    parts = [p.strip() for one in (value if isinstance(value, (list, tuple)) else [value]) for p in str(one).split(",")]
    pairs = {p.rpartition("=")[0]: p.rpartition("=")[2] for p in parts if p}
    if len(pairs) < len([p for p in parts if p]):
        raise ValueError(
            f"expected METHOD=NUMBER once for each method, or one number for all, found '{','.join(parts)}'"
        )
    return pairs


def shared(name: str, group: str | None = None) -> Any:
    """An option of `graft train` with the same default, limits and help."""
    field = TrainConfig.model_fields[name]
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    own = option(field.default, field.description or "", group=group or str(extra.get("group", "")))
    own.metadata = list(field.metadata)
    return own


@dataclass(frozen=True)
class Variant:
    """One method with its options: a line of the comparison."""

    name: str
    """The text that was given, such as `lora:rank=64`."""
    method: Method
    own: dict[str, Any]
    """Options that differ from the comparison's."""

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return re.sub(r"[^A-Za-z0-9=._-]", "-", self.name)

    @property
    def adapter(self) -> bool:
        return self.method != "full"


# Options that a variant may set: what is trained and how, but not the data or the number of steps.
_OWN_GROUPS = ("adapter", "optimization", "memory and speed")
_NEVER_OWN = {
    "trainable_tokens",
    "epochs",
    "steps",
    "batch_size",
    "seed",
    "ranks",
    "rank_timeout",
    "layout",
    "offload_layers",
}


def _ownable() -> tuple[str, ...]:
    found = ["base_precision", "save_precision"]
    for name, field in TrainConfig.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("group") in _OWN_GROUPS and name not in _NEVER_OWN:
            found.append(name)
    return tuple(name.replace("_", "-") for name in found)


def parse_variant(text: str) -> Variant:
    """Read `METHOD[:OPTION=VALUE]...`. Raises ConfigError for an unknown method or option, with the nearest one."""
    method, *settings = text.split(":")
    found: Method | None = next((m for m in METHODS if m == method), None)
    if found is None:
        raise ConfigError(f"unknown method '{method}'{nearest(method, METHODS)} known: {', '.join(METHODS)}")
    own: dict[str, Any] = {}
    known = _ownable()
    for setting in settings:
        name, equals, value = setting.partition("=")
        name = name.strip().replace("-", "_")
        name = FORMER.get(name, name).replace("_", "-")
        if not equals or not value:
            raise ConfigError(f"methods '{text}': expected OPTION=VALUE after the colon, found '{setting}'")
        if name not in known:
            why = (
                "belongs to the whole comparison"
                if name.replace("-", "_") in TrainConfig.model_fields
                else "is unknown"
            )
            raise ConfigError(
                f"methods '{text}': option '{name}' {why}{nearest(name, known)} a variant's own: {', '.join(known)}"
            )
        key = name.replace("-", "_")
        own[key] = value.split("+") if key in ("targets", "modules_to_save") else value
    return Variant(text, found, own)


class CompareConfig(Config):
    """Options of `graft compare`."""

    takes_file = True
    train_only = dict.fromkeys(
        SCORE_OPTIONS,
        "it scores the answers of every trained model with --metric exact-match, bleu or rouge-l, and saves the step of the "
        "lowest eval loss",
    )

    # The base, and what is compared on it
    model: str = shared("model")
    compute_dtype: ComputeDtype | None = shared("compute_dtype")
    trust_remote_code: bool = shared("trust_remote_code")
    device: str | None = shared("device")
    methods: Names = option(
        ("full", "lora", "qlora"),
        "methods to compare: full, lora, qlora, optionally with options such as lora:rank=64",
        group="comparison",
    )
    seeds: int = option(
        3, "runs of each method; one seed cannot separate a difference from noise", group="comparison", ge=1, le=50
    )
    learning_rate: Annotated[dict[str, float], BeforeValidator(_rates)] = option(
        {}, "learning rates as METHOD=RATE,...; the others are searched for", group="comparison"
    )
    search_steps: int | None = option(
        None,
        "steps of each run in the learning-rate search; default a quarter of a run's, 20 to 100",
        group="comparison",
        ge=1,
    )
    margin: float = option(
        2.0,
        "percent of the best method's gain that a cheaper method may lose and still be recommended",
        group="comparison",
        gt=0,
        le=100,
    )
    cost: Annotated[Cost, _known("cost", get_args(Cost))] = option(
        "memory", "cost by which methods are ranked: peak memory, saved size, or training time", group="comparison"
    )
    metric: Annotated[Metric, _known("metric", get_args(Metric))] | None = option(
        None, "task metric on eval prompts: exact-match, bleu or rouge-l; the last two need the extra `compare`",
        group="comparison",
    )  # fmt: skip
    metric_prompts: int = option(50, "most eval prompts generated for the metric", group="comparison", ge=1)
    general_data: str = option(
        "general", "text on which forgetting is measured: a file, `general` for the bundled one, or `none`",
        group="comparison",
    )  # fmt: skip

    # Data
    data: Sources = shared("data")
    eval_data: str = option(
        "10%", "eval data: a file, `demo`, or a share of the training rows such as 5%", group="data"
    )
    train_on: TrainOn = shared("train_on")
    max_length: int | None = shared("max_length")
    overlong: Literal["error", "drop", "truncate"] = shared("overlong")
    template_date: str = shared("template_date")

    # Shared by all methods
    rank: int = shared("rank")
    alpha: float | None = shared("alpha")
    lora_dropout: float = shared("lora_dropout")
    targets: Names = shared("targets")
    lr_scheduler: Literal["cosine", "linear", "constant"] = shared("lr_scheduler")
    warmup_ratio: float = shared("warmup_ratio")
    epochs: float | None = shared("epochs")
    steps: int | None = shared("steps")
    batch_size: int = shared("batch_size")
    weight_decay: float = shared("weight_decay")
    max_grad_norm: float = shared("max_grad_norm")
    micro_batch_tokens: int | None = shared("micro_batch_tokens")
    activation_checkpointing: bool = shared("activation_checkpointing")
    workers: int = workers_option("runs at once")

    # The comparison's own folder
    out: Path = option(
        Path("runs/compare"), "folder of the comparison; the same command continues an unfinished one", group="run"
    )
    eval_every: int | None = shared("eval_every")
    save_every: int | None = shared("save_every")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        refuse_eval_weight(self.eval_data)
        refuse_one_gpu(self.workers, self.device)
        if not self.methods:
            raise ValueError("methods is empty; name at least one of full, lora, qlora")
        twice = [name for name in self.methods if self.methods.count(name) > 1]
        if twice:
            raise ValueError(f"methods names '{twice[0]}' twice; name each once")
        variants = self.variants
        folders = [v.folder for v in variants]
        clash = [v.name for v in variants if folders.count(v.folder) > 1]
        if clash:
            raise ValueError(f"methods '{clash[0]}' and '{clash[1]}' would share a folder; write one of them otherwise")
        known = tuple(dict.fromkeys([*self.methods, *(v.method for v in variants)]))
        for name, rate in self.learning_rate.items():
            if name and name not in known:
                raise ValueError(f"learning-rate names '{name}'{nearest(name, known)} compared: {', '.join(known)}")
            if not 0 < rate < float("inf"):
                raise ValueError(f"learning-rate of '{name or 'all'}' must be above 0, found {rate:g}")
        for variant in variants:
            self.training(variant, seed=0, rate=None, out=self.out)
        return self

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The variants, in the order given. Raises ConfigError."""
        return tuple(parse_variant(text) for text in self.methods)

    def given_rate(self, variant: Variant) -> float | None:
        """The learning rate given for a variant: in its own options, by its name, by its method, or for all."""
        if "learning_rate" in variant.own:
            return plain_number(str(variant.own["learning_rate"]))
        names = (variant.name, variant.method, "")
        return next((self.learning_rate[name] for name in names if name in self.learning_rate), None)

    def training(self, variant: Variant, *, seed: int, rate: float | None, out: Path, **changes: Any) -> TrainConfig:
        """The TrainConfig of one run of the comparison. Raises ConfigError."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _PASSED}
        if variant.adapter:
            values.update({name: getattr(self, name) for name in _ADAPTER})
        values.update(variant.own, method=variant.method, seed=seed, out=out, **changes)
        if rate is not None:
            values["learning_rate"] = rate
        try:
            return TrainConfig.build({name: value for name, value in values.items() if value is not None})
        except ConfigError as error:
            raise ConfigError(f"methods '{variant.name}': {error}") from None


_PASSED = (
    "model",
    "data",
    "eval_data",
    "train_on",
    "max_length",
    "overlong",
    "template_date",
    "lr_scheduler",
    "warmup_ratio",
    "epochs",
    "steps",
    "batch_size",
    "weight_decay",
    "max_grad_norm",
    "compute_dtype",
    "micro_batch_tokens",
    "activation_checkpointing",
    "trust_remote_code",
    "device",
    "eval_every",
    "save_every",
)
_ADAPTER = ("rank", "alpha", "lora_dropout", "targets")
