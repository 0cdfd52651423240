"""What all config classes share: their base class, `option` for a field, and the types that several of them use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin
from urllib.parse import urlsplit

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

from graftlm.config.translate import translated
from graftlm.errors import ConfigError, nearest
from graftlm.yamlfile import read_yaml

Method = Literal["full", "lora", "qlora"]


def is_gguf(model: str) -> bool:
    """Whether a model's name means a GGUF file."""
    return model.lower().endswith(".gguf")


Precision = Literal["float32", "bfloat16", "int8", "nf4", "gguf"]
ComputeDtype = Literal["float32", "bfloat16", "bf16-mixed"]
Metric = Literal["exact-match", "bleu", "rouge-l"]
"""Task scores of answers against references (`scores.py`)."""
TrainOn = Literal["all-assistant", "last-assistant", "everything"]
TRAIN_ON_HELP = (
    "tokens that the loss counts: all assistant messages and completions, the last assistant message only, or everything "
    "(prompts and template tokens too)"
)
COMPUTE_DTYPE_NAMES: dict[ComputeDtype, str] = {
    "float32": "float32", "bfloat16": "bfloat16", "bf16-mixed": "bfloat16 summed in float32",
}  # fmt: skip
"""How a message names the dtype of matmuls."""

ISO_DATE = "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"
_NUMBER = re.compile(r"\s*[-+]?((\d+\.?\d*|\.\d+)(e[-+]?\d+)?|inf|nan)\s*", re.IGNORECASE | re.ASCII)


def plain_number(text: str) -> float:
    """A number as options write it, in the digits 0 to 9; `float` takes the digits of every script. Raises ValueError."""
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"'{text}' is no number")
    return float(text)


def server_address(value: str, key: str) -> str:
    """The address of a server, without a final `/v1`, as OpenAI's clients are given it; `key` says where its key is given.

    Raises ValueError for what is none, and for one with a user or a password in it, which would be shown and kept.
    """
    if "@" in value:  # before anything that would show it
        raise ValueError(f"the address holds a password; leave it out, and {key}")
    try:
        place = urlsplit(value)
        good = place.scheme in ("http", "https") and bool(place.hostname) and place.port != 0
    except ValueError:  # a port that is no number, brackets that do not close
        good = False
        place = urlsplit("")
    if not good or place.query or place.fragment or any(c <= " " or c == "\x7f" for c in value):
        raise ValueError(f"'{value[:200]}' is not the address of a server; give one such as http://127.0.0.1:8000")
    return value.rstrip("/").removesuffix("/v1").rstrip("/")


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


def refuse_eval_weight(eval_data: str | None) -> None:
    """Refuse a weight on eval data (`FILE:2`): each eval row is read once, so the weight would do nothing."""
    path, colon, weight = (eval_data or "").rpartition(":")
    number = re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", weight, re.IGNORECASE)
    if colon and number and not Path(eval_data or "").exists():
        raise ValueError(f"eval-data '{eval_data}' has a weight, and every eval row counts once; give '{path}'")


LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-5, 100.0
"""Below the first, decoding is greedy (vLLM's bound); above the second, the distribution is nearly uniform."""


def refuse_unused_sampling_options(temperature: float, given: set[str]) -> None:
    """Refuse `top_p` and `seed` among the fields that were `given`: at temperature 0 decoding is greedy and ignores them."""
    for name in ("top_p", "seed"):
        if temperature < LEAST_TEMPERATURE and name in given:
            raise ValueError(
                f"--{name.replace('_', '-')} is for sampling, and temperature {temperature:g} is greedy decoding; "
                "give --temperature, such as 0.7, or leave it out"
            )


def _count_or_auto(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    raise ValueError(f"expected a whole number, from 0 on, or auto, found {value!r}")


CountOrAuto = Annotated[Literal["auto"] | int, BeforeValidator(_count_or_auto)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Sources = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
Tokens = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]  # as they are: a token may hold commas and spaces
Ranks = Annotated[dict[str, int], BeforeValidator(_mapping)]
Alphas = Annotated[dict[str, float], BeforeValidator(_mapping)]


class Config(BaseModel):
    """What all configs share: frozen, no unknown keys, hyphens and underscores both read, and aliases."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
    takes_file: ClassVar[bool] = False
    """Whether the command reads a YAML file of options, `graft train run.yaml`."""
    train_only: ClassVar[Mapping[str, str]] = {}
    """Options of `graft train` that this command does not have, with what to do instead."""

    @classmethod
    def build(cls, values: dict[str, Any]) -> Self:
        """Make a config from option names and values.

        Raises ConfigError that names each wrong option, the value found and what was expected.
        """
        cleaned = cls.named(values)
        for key in cleaned:
            if key not in cls.model_fields:
                instead = cls.train_only.get(str(key).replace("-", "_"))
                if instead is not None:
                    flag = flag_name(str(key))
                    raise ConfigError(
                        f"--{flag} is an option of graft train; graft {cls.command()} has none: {instead}"
                    )
                known = [flag_name(field) for field in cls.model_fields]
                raise ConfigError(f"unknown option '{key}'{nearest(str(key).replace('_', '-'), known)}")
        try:
            return cls(**cleaned)
        except pydantic.ValidationError as error:
            lines: list[str] = []
            for problem in error.errors():
                where = "-".join(str(p) for p in problem["loc"][:1]).rstrip("_").replace("_", "-")
                message = problem["msg"].removeprefix("Value error, ").replace("Input should", "must")
                if problem["type"] == "missing":
                    lines.append(f"{where}: required, give {cls._written(str(problem['loc'][0]))}")
                    continue
                own_message = problem["type"] == "value_error"  # it names what it found
                found = f", found {_short(problem['input'])}" if where and not own_message else ""
                lines.append(f"{where}: {message}{found}".strip(": "))
            raise ConfigError("\n".join(lines)) from None

    @classmethod
    def read(cls, path: str | Path | None, overrides: dict[str, Any]) -> Self:
        """Read a YAML (or JSON) file of options; `overrides` that are not None win over the file."""
        values: dict[str, Any] = {}
        if path is not None:
            file = Path(path)
            if not file.is_file():
                raise ConfigError(f"no such config file: {file}")
            loaded = read_yaml(file, ConfigError)
            if not isinstance(loaded, dict):
                raise ConfigError(f"{file} must hold `option: value` lines, found {type(loaded).__name__}")
            values = {str(key): value for key, value in loaded.items()}
        own = {key: value for key, value in overrides.items() if key in cls.model_fields and value is not None}
        kept = cls.named({k: v for k, v in values.items() if k.replace("-", "_") not in own}, beside=own)
        given = cls.named(overrides, beside=kept)
        return cls.build({**kept, **given})

    @classmethod
    def named(cls, values: Mapping[str, Any], *, beside: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Options by field, from any name that is taken (`translate.py`); None is left out. Raises ConfigError."""
        return translated(values, cls.model_fields, cls.command(), beside or {})

    @classmethod
    def command(cls) -> str:
        """What the command is called: `train` of TrainConfig."""
        return cls.__name__.removesuffix("Config").lower()

    @classmethod
    def _written(cls, name: str) -> str:
        """How a field is given on the command line: `--data`, or `DATA...`."""
        field = cls.model_fields[name]
        return metavar(name, field) if is_argument(field) else f"--{flag_name(name)}"

    def to_json(self) -> dict[str, Any]:
        """Every option, resolved, as plain JSON values."""
        return self.model_dump(mode="json")


def _short(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def flag_name(field: str) -> str:
    """What a field is called on the command line and in a file: `batch_size` -> `batch-size`, `for_` -> `for`."""
    return field.rstrip("_").replace("_", "-")


def option(default: Any, help: str, *, group: str = "", argument: bool = False, **limits: Any) -> Any:
    """A field with its help text and the group it is listed under; an `argument` is given on the command line by position."""
    return Field(default, description=help, json_schema_extra={"group": group, "argument": argument}, **limits)


def is_argument(field: FieldInfo) -> bool:
    """Whether a field is given on the command line by its position, without a flag."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("argument"))


def metavar(name: str, field: FieldInfo) -> str:
    """How a usage line shows an argument: `DATA...` if it may be repeated, in brackets if it may be left out."""
    shown = name.upper() if field.is_required() else f"[{name.upper()}]"
    plain = next((a for a in get_args(field.annotation) if a is not type(None)), field.annotation)
    return f"{shown}..." if tuple in (get_origin(field.annotation), get_origin(plain)) else shown


def temperature_option() -> Any:
    """The temperature of sampling."""
    help = "sampling temperature; 0, or less than 0.00001, is greedy decoding"
    return option(0.0, help, ge=0, le=MOST_TEMPERATURE)


def workers_option(what: str) -> Any:
    """How many processes train at once."""
    place = "one on each of this machine's GPUs, as CUDA_VISIBLE_DEVICES names them; with --device cpu they share the processor"
    help = f"{what}, {place}"
    return option(1, help, group="memory and speed", ge=1)


def refuse_one_gpu(workers: int, device: str | None) -> None:
    """Refuse `--device cuda:1` for several workers, each of which takes a GPU."""
    if workers > 1 and device is not None and ":" in device:
        raise ValueError(
            f"--device {device} is one GPU, found --workers {workers}, each of which takes one; "
            f"give --device {device.partition(':')[0]}, or leave it out; CUDA_VISIBLE_DEVICES chooses among them"
        )
