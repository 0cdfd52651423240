"""Every option of every command, once: its type, unit, default and one line of help.

The command line, the YAML file, the documentation (`docs/options.md`) and `config.json` of a run are all made from
these classes. A config is frozen and checked where it is built; an unknown key is refused with the nearest known one.

    TrainConfig      graft train       which base, which data, what is trained, how
    GenerateConfig   graft generate    a prompt through a base and, if asked, an adapter
    CheckConfig      graft check       what would be trained on, before anything is
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from graftlm.errors import ConfigError, nearest

Method = Literal["full", "lora", "qlora"]
Precision = Literal["float32", "bfloat16", "int8", "nf4"]
Compute = Literal["float32", "bfloat16"]


def _split(value: Any) -> Any:
    """`a,b` and repeated options mean the same list; commas inside brackets of a pattern do not split."""
    if value is None:
        return value
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)):
        return value
    out: list[Any] = []
    for part in parts:
        out.extend(re.split(r",(?![^\[({]*[\])}])", part) if isinstance(part, str) else [part])
    return tuple(p.strip() if isinstance(p, str) else p for p in out if p != "")


def _mapping(value: Any) -> Any:
    """`q_proj=8,mlp=32` or a YAML mapping."""
    if value is None or isinstance(value, dict):
        return value
    if not isinstance(value, (str, list, tuple)):
        raise ValueError(f"expected PATTERN=NUMBER or a mapping of patterns to numbers, found {value!r}")
    parts = [p for item in ([value] if isinstance(value, str) else value) for p in str(item).split(",") if p]
    pairs: dict[str, str] = {}
    for part in parts:
        name, equals, number = part.rpartition("=")
        if not equals:
            raise ValueError(f"expected PATTERN=NUMBER, found '{part}'")
        pairs[name.strip()] = number.strip()
    return pairs


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, (str, Path)) else value


def _no_weight(eval_data: str | None) -> None:
    """Held-out rows are each read once, so a weight as training data have it (`FILE:2`) would do nothing."""
    path, colon, weight = (eval_data or "").rpartition(":")
    number = re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", weight, re.IGNORECASE)
    if colon and number and not Path(eval_data or "").exists():
        raise ValueError(f"eval-data '{eval_data}' has a weight, and every held-out row counts once; give '{path}'")


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Sources = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
Tokens = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]  # as they are: a token may hold commas and spaces
Ranks = Annotated[dict[str, int], BeforeValidator(_mapping)]
Alphas = Annotated[dict[str, float], BeforeValidator(_mapping)]


class Config(BaseModel):
    """What all configs share: frozen, no unknown keys, hyphens and underscores both read."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def build(cls, values: dict[str, Any]) -> Self:
        """Make a config from option names and values.

        Raises ConfigError that names each wrong option, the value found and what was expected.
        """
        cleaned: dict[str, Any] = {}
        for key, value in values.items():
            name = str(key).replace("-", "_")
            if name not in cls.model_fields:
                known = [field.replace("_", "-") for field in cls.model_fields]
                raise ConfigError(f"unknown option '{key}'{nearest(str(key).replace('_', '-'), known)}")
            if name in cleaned:
                raise ConfigError(f"option '{key}' is given twice; keep one of '{name}' and '{name.replace('_', '-')}'")
            if value is not None:
                cleaned[name] = value
        try:
            return cls(**cleaned)
        except pydantic.ValidationError as error:
            lines: list[str] = []
            for problem in error.errors():
                where = "-".join(str(p) for p in problem["loc"][:1]).replace("_", "-")
                message = problem["msg"].removeprefix("Value error, ").replace("Input should", "must")
                missing = problem["type"] == "missing"
                said = missing or problem["type"] == "value_error"  # our own messages name what they found
                found = f", found {problem['input']!r}" if where and not said else ""
                lines.append(
                    f"{where}: required, give --{where}" if missing else f"{where}: {message}{found}".strip(": ")
                )
            raise ConfigError("\n".join(lines)) from None

    @classmethod
    def read(cls, path: str | Path | None, overrides: dict[str, Any]) -> Self:
        """Read a YAML (or JSON) file of options; `overrides` that are not None win over the file."""
        values: dict[str, Any] = {}
        if path is not None:
            file = Path(path)
            if not file.is_file():
                raise ConfigError(f"no such config file: {file}")
            try:
                loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ConfigError(f"{file} is not YAML: {error}") from None
            if not isinstance(loaded, dict):
                raise ConfigError(f"{file} must hold `option: value` lines, found {type(loaded).__name__}")
            values = {str(key): value for key, value in loaded.items()}
        given = {key.replace("-", "_"): value for key, value in overrides.items() if value is not None}
        kept = {key: value for key, value in values.items() if key.replace("-", "_") not in given}
        return cls.build({**kept, **given})

    def to_json(self) -> dict[str, Any]:
        """Every option, resolved, as plain JSON values."""
        return self.model_dump(mode="json")


def option(default: Any, help: str, *, group: str = "", **limits: Any) -> Any:
    """A field with its help text and the group it is listed under."""
    return Field(default, description=help, json_schema_extra={"group": group}, **limits)


class TrainConfig(Config):
    """Options of `graft train`."""

    # The base and the method
    model: str = option(..., "base model: a directory, a hub id, or `demo` for the bundled one", group="base")
    method: Method = option("lora", "what is trained: full, lora, or qlora (lora on an nf4 base)", group="base")
    precision: Precision | None = option(
        None, "how the base is stored; default float32 for full, bfloat16 for lora, nf4 for qlora", group="base"
    )
    compute: Compute | None = option(
        None, "type in which products run; default bfloat16 where the hardware has it, else float32", group="base"
    )
    init: Literal["pretrained", "random"] = option(
        "pretrained", "random starts full training from fresh weights of the model's config", group="base"
    )
    trust_remote_code: bool = option(False, "run Python code that comes with the model", group="base")
    device: str | None = option(None, "cpu, cuda, cuda:1, ...; default the first GPU, else the CPU", group="base")
    save_precision: Literal["float32", "bfloat16"] | None = option(
        None, "type of the saved model of a full run; default the precision it was trained in", group="base"
    )

    # Data
    data: Sources = option(
        ...,
        "training data: FILE[:weight] (jsonl, json, csv, parquet), a hub id, or `demo`; repeat to mix",
        group="data",
    )
    eval_data: str | None = option(
        None, "held-out data: a file, `demo`, or a share of the training rows such as 5%", group="data"
    )
    train_on: Literal["all", "last"] = option("all", "which assistant turns of a chat are trained", group="data")
    max_tokens_per_document: int | None = option(
        None, "length limit in tokens; default the model's longest position", group="data", ge=2
    )
    too_long: Literal["error", "drop", "cut"] = option(
        "error", "what happens to a document over the limit", group="data"
    )
    template_date: str = option(
        "2026-01-01", "the date that a chat template is told, YYYY-MM-DD", group="data", pattern=r"^\d{4}-\d{2}-\d{2}$"
    )

    # The adapter
    rank: int = option(16, "rank r of A (r, in) and B (out, r)", group="adapter", ge=1)
    alpha: float | None = option(None, "scale numerator: s = alpha / r; default 2 x rank", group="adapter", gt=0)
    rank_stabilized: bool = option(False, "scale s = alpha / sqrt(r) (rsLoRA)", group="adapter")
    dropout: float = option(
        0.0, "share of an adapter's input features dropped in training", group="adapter", ge=0, lt=1
    )
    dora: bool = option(False, "train each output's magnitude beside the direction (DoRA)", group="adapter")
    targets: Names = option(
        ("all-linear",), "all-linear (the head excluded), attention, mlp, or name patterns", group="adapter"
    )
    rank_pattern: Ranks = option({}, "rank of the layers that a pattern names, as PATTERN=RANK", group="adapter")
    alpha_pattern: Alphas = option({}, "alpha of the layers that a pattern names, as PATTERN=ALPHA", group="adapter")
    modules_to_save: Names = option(
        (), "modules trained whole beside the adapter: `embeddings`, `head`, or their names", group="adapter"
    )
    train_tokens: Tokens = option(
        (),
        "a token whose embedding row is trained, taken as it is, commas and spaces too; repeat for several; "
        "new ones are added where the matrix has room",
        group="adapter",
    )

    # Optimization
    learning_rate: float | None = option(
        None, "peak learning rate; default 2e-4 for lora and qlora, 2e-5 for full", group="optimization", gt=0
    )
    b_learning_rate_ratio: float = option(1.0, "learning rate of B over that of A (LoRA+)", group="optimization", gt=0)
    schedule: Literal["cosine", "linear", "constant"] = option("cosine", "after the warm-up", group="optimization")
    warmup: float = option(
        0.03, "share of the steps over which the learning rate rises", group="optimization", ge=0, lt=1
    )
    epochs: float | None = option(
        None, "passes over the data; default 1 when steps is not given", group="optimization", gt=0
    )
    steps: int | None = option(None, "optimizer steps, instead of epochs", group="optimization", ge=1)
    batch_size: int = option(16, "documents in one optimizer step; this decides the result", group="optimization", ge=1)
    weight_decay: float = option(0.0, "decoupled weight decay, on matrices only", group="optimization", ge=0)
    beta1: float = option(0.9, "AdamW's decay of the mean", group="optimization", ge=0, lt=1)
    beta2: float = option(0.999, "AdamW's decay of the mean square", group="optimization", ge=0, lt=1)
    epsilon: float = option(1e-8, "AdamW's epsilon", group="optimization", gt=0)
    max_grad_norm: float = option(1.0, "clip the gradient's norm to this; 0 turns it off", group="optimization", ge=0)
    seed: int = option(0, "the one seed of order, initial A and dropout", group="optimization", ge=0, lt=1 << 31)

    # Memory and speed: no effect on the result
    tokens_per_pass: int | None = option(
        None, "most tokens in one forward pass; memory and speed only; default 4096", group="memory and speed", ge=1
    )
    activation_checkpointing: bool = option(
        False, "run layers again in the backward pass instead of keeping their activations", group="memory and speed"
    )

    # The run
    out: Path = option(..., "run folder to write", group="run")
    resume: bool = option(False, "go on from the newest valid checkpoint in --out", group="run")
    eval_every: int | None = option(
        None, "evaluate every N steps; default at most ten times, a quarter of the time", group="run", ge=1
    )
    save_every: int | None = option(
        None, "write a checkpoint every N steps; default only when stopped", group="run", ge=1
    )
    keep_checkpoints: int = option(2, "newest checkpoints kept beside the best", group="run", ge=1)
    track: Names = option((), "also log to tensorboard, wandb, mlflow", group="run")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.method == "qlora" and self.precision not in (None, "nf4"):
            raise ValueError(
                f"method qlora is lora on an nf4 base, found precision {self.precision}; "
                f"take --method lora --precision {self.precision}, or leave --precision out"
            )
        if self.method == "full" and self.precision in ("int8", "nf4"):
            raise ValueError(
                f"method full trains every weight and needs 16 or 32 bits, found precision {self.precision}; "
                "take float32 or bfloat16, or --method qlora"
            )
        if self.method == "full" and self.modules_to_save:
            raise ValueError("method full trains every module already; leave --modules-to-save out")
        if self.method == "full" and self.train_tokens:
            raise ValueError("method full trains every token's row already; leave --train-tokens out")
        if self.method == "full":
            adapter_only = {
                **{name: name in self.model_fields_set for name in ("rank", "alpha", "targets")},
                "dropout": self.dropout, "dora": self.dora, "rank-stabilized": self.rank_stabilized,
                "rank-pattern": self.rank_pattern, "alpha-pattern": self.alpha_pattern,
                "b-learning-rate-ratio": self.b_learning_rate_ratio != 1,
            }  # fmt: skip
            for name, given in adapter_only.items():
                if given:
                    raise ValueError(f"--{name} is for an adapter and method full has none; leave it out, or take lora")
        if self.method != "full" and self.init == "random":
            raise ValueError(f"--init random trains every weight and needs --method full, found {self.method}")
        if self.method != "full" and self.save_precision is not None:
            raise ValueError("--save-precision is for --method full; an adapter is saved in float32")
        if self.eval_every is not None and self.eval_data is None:
            raise ValueError("--eval-every needs held-out rows; give --eval-data, such as 5%, or leave it out")
        _no_weight(self.eval_data)
        if "" in self.train_tokens:
            raise ValueError("train-tokens holds an empty token; leave it out")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"give --steps or --epochs, not both; found steps {self.steps} and epochs {self.epochs}")
        for name, rank in self.rank_pattern.items():
            if rank < 1:
                raise ValueError(f"rank-pattern '{name}' must be at least 1, found {rank}")
        for name, alpha in self.alpha_pattern.items():
            if alpha <= 0:
                raise ValueError(f"alpha-pattern '{name}' must be above 0, found {alpha:g}")
        if not self.targets and self.method != "full":
            raise ValueError("targets is empty; take all-linear, attention, mlp, or name patterns")
        if not self.data:
            raise ValueError("data is empty; give at least one file")
        unknown = [name for name in self.track if name not in ("tensorboard", "wandb", "mlflow")]
        if unknown:
            known = ("tensorboard", "wandb", "mlflow")
            raise ValueError(f"unknown tracker '{unknown[0]}'{nearest(unknown[0], known)} known: {', '.join(known)}")
        return self

    def to_json(self) -> dict[str, Any]:
        """Every option as plain JSON values; what is for an adapter is null in a full run, which has none."""
        values = super().to_json()
        if self.method == "full":
            values.update(dict.fromkeys(_ADAPTER_ONLY))
        return values

    @property
    def stored_precision(self) -> Precision:
        """How the base is stored, with the method's default filled in."""
        if self.precision is not None:
            return self.precision
        defaults: dict[Method, Precision] = {"full": "float32", "lora": "bfloat16", "qlora": "nf4"}
        return defaults[self.method]

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate, with the method's default: LoRA's is about ten times full's (Schulman et al. 2025)."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-5 if self.method == "full" else 2e-4

    @property
    def scale_numerator(self) -> float:
        """Alpha, with its default of twice the rank."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


_ADAPTER_ONLY = (
    "rank", "alpha", "rank_stabilized", "dropout", "dora", "targets", "rank_pattern", "alpha_pattern", "modules_to_save",
    "train_tokens", "b_learning_rate_ratio",
)  # fmt: skip


class GenerateConfig(Config):
    """Options of `graft generate`."""

    model: str = option(..., "base model: a directory, a hub id, or `demo`")
    adapter: Path | None = option(None, "folder of an adapter to use")
    prompt: str = option(..., "what to answer; `-` reads standard input")
    system: str | None = option(None, "system message in front of a chat prompt")
    format: Literal["auto", "chat", "text"] = option(
        "auto", "chat puts the prompt through the chat template; auto follows what the adapter was trained on"
    )
    max_tokens: int = option(128, "most tokens to write", ge=1)
    temperature: float = option(0.0, "0 takes the likeliest token each time", ge=0)
    top_p: float = option(1.0, "sample from the likeliest tokens that hold this probability", gt=0, le=1)
    seed: int = option(0, "seed of sampling", ge=0)
    precision: Precision | None = option(
        None, "how the base is stored; default what the adapter was trained on, else the checkpoint's own type"
    )
    compute: Compute | None = option(None, "type in which products run; default by hardware")
    trust_remote_code: bool = option(False, "run Python code that comes with the model")
    device: str | None = option(None, "cpu, cuda, ...; default the first GPU, else the CPU")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("top_p", "seed"):
            if self.temperature == 0 and name in self.model_fields_set:
                raise ValueError(
                    f"--{name.replace('_', '-')} is for sampling, and temperature 0 takes the likeliest token each time; "
                    "give --temperature, such as 0.7, or leave it out"
                )
        return self


class CheckConfig(Config):
    """Options of `graft check`."""

    data: Sources = option(..., "data to check: FILE[:weight], a hub id, or `demo`")
    model: str = option(..., "base model whose tokenizer and template are used")
    eval_data: str | None = option(None, "held-out data, checked for overlap with the training data")
    train_on: Literal["all", "last"] = option("all", "which assistant turns of a chat are trained")
    max_tokens_per_document: int | None = option(
        None, "length limit in tokens; default the model's longest position", ge=2
    )
    too_long: Literal["error", "drop", "cut"] = option("error", "what training will do with a document over the limit")
    template_date: str = option("2026-01-01", "the date that a chat template is told", pattern=r"^\d{4}-\d{2}-\d{2}$")
    trust_remote_code: bool = option(False, "run Python code that comes with the model")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _no_weight(self.eval_data)
        return self
