"""`docs/options.md`, made from the config classes: every option of every command with its type, default and meaning.

    python -m graftlm.config.options_page > docs/options.md

A test sees that the file in the repository is what this prints.
"""

from __future__ import annotations

import sys
import types
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from graftlm import config as configs
from graftlm.config import CheckConfig, Config, GenerateConfig, MergeConfig, TrainConfig
from graftlm.config.aliases import ALIASES
from graftlm.config.answers import ANSWERS
from graftlm.config.fields import flag_name
from graftlm.config.translate import JOINT

COMMANDS: tuple[tuple[str, type[Config]], ...] = (
    ("graft train", TrainConfig),
    ("graft generate", GenerateConfig),
    ("graft serve", configs.ServeConfig),
    ("graft chat", configs.ChatConfig),
    ("graft check", CheckConfig),
    ("graft plan", configs.PlanConfig),
    ("graft compare", configs.CompareConfig),
    ("graft sweep", configs.SweepConfig),
    ("graft sweep show", configs.ShowSweepConfig),
    ("graft merge", MergeConfig),
    ("graft adapters publish", configs.PublishConfig),
    ("graft adapters list", configs.ListConfig),
    ("graft adapters show", configs.ShowConfig),
    ("graft adapters diff", configs.DiffConfig),
    ("graft adapters verify", configs.VerifyConfig),
    ("graft adapters alias", configs.AliasConfig),
    ("graft adapters rollback", configs.RollbackConfig),
    ("graft adapters remove", configs.RemoveConfig),
    ("graft adapters import", configs.ImportConfig),
    ("graft adapters export", configs.ExportConfig),
    ("graft adapters push", configs.PushConfig),
    ("graft adapters pull", configs.PullConfig),
)
_HEAD = """\
# Options

Made by `python -m graftlm.config.options_page` from the classes in `graftlm/config/`; change them there.

An option is a flag (`--learning-rate 5e-4`) or a line of a YAML file (`learning-rate: 5e-4`, or `learning_rate`):
`graft train run.yaml` reads one, and flags win over it. A list is given as `a,b`, by repeating the flag, or as a YAML
list; a mapping as `NAME=VALUE,...` or a YAML mapping. An option that does not exist is an error.
"""

_OTHER = """
# Names of other programs

A line of a configuration of TRL, PEFT, Axolotl or LLaMA-Factory, and a flag of vLLM, may be written as it is there, with its
values; so may the names that Graft's own options had before. An option that is given under two names is refused.

"""
_ANSWERED = """
Names that have no option here are answered with what to write instead, and dropped where they ask for what happens anyhow:
"""


def type_name(annotation: Any) -> str:
    """What may be given, in words: `full` / `lora`, number, list."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(inner[0])
    if origin in (Union, types.UnionType):
        return " / ".join(type_name(a) for a in inner if a is not type(None))
    if origin is Literal:
        return " / ".join(f"`{value}`" for value in inner)
    if origin is tuple:
        return "list"
    if origin is dict:
        return f"pattern = {type_name(inner[1])}"
    return {int: "whole number", float: "number", bool: "yes / no", str: "text", Path: "path"}[annotation]


def limits(field: FieldInfo) -> str:
    """The range of a number, such as `>= 1`."""
    signs = {Ge: ">= ", Gt: "> ", Le: "<= ", Lt: "< "}
    rules = [(rule, sign) for rule in field.metadata for kind, sign in signs.items() if isinstance(rule, kind)]
    found = [f"{sign}{getattr(rule, type(rule).__name__.lower()):g}" for rule, sign in rules]
    return ", " + " and ".join(found) if found else ""


def default_text(field: FieldInfo) -> str:
    """The default as it would be written; a dash where the text says what it is or nothing is meant."""
    if field.is_required():
        return "required"
    value = field.default
    if value is None or value == () or value == {}:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"`{', '.join(value)}`" if isinstance(value, tuple) else f"`{value}`"


def options_markdown() -> str:
    """The whole page."""
    parts = [_HEAD]
    for command, config in COMMANDS:
        parts.append(f"\n## {command}\n")

        def group_of(item: tuple[str, FieldInfo]) -> str:
            extra = item[1].json_schema_extra
            return str(extra.get("group", "")) if isinstance(extra, dict) else ""

        for group, fields in groupby(config.model_fields.items(), group_of):
            parts.append(f"\n### {group.capitalize()}\n\n" if group else "\n")
            parts.append("| option | value | default | meaning |\n|---|---|---|---|\n")
            for name, field in fields:
                flag = f"`--{flag_name(name)}`"
                kind = type_name(field.annotation) + limits(field)
                parts.append(
                    f"| {flag} | {kind} | {default_text(field)} | {field.description} |\n".replace("\\", "\\\\")
                )
    return "".join([*parts, *_other_names()])


def _other_names() -> list[str]:
    """What options are called in TRL, PEFT, Axolotl, LLaMA-Factory and vLLM, and were called before."""
    named: dict[str, list[str]] = {}
    for name, meanings in ALIASES.items():
        for alias in meanings:
            named.setdefault(alias.field, []).append(name)
    for name, field in JOINT.items():
        named.setdefault(field, []).append(name)
    lines = [
        f"| {', '.join(f'`{name}`' for name in names)} | `--{flag_name(field)}` |\n" for field, names in named.items()
    ]
    return [
        _OTHER,
        "| name there | option |\n|---|---|\n",
        *lines,
        _ANSWERED,
        ", ".join(f"`{name}`" for name in ANSWERS),
        ".\n",
    ]


if __name__ == "__main__":
    sys.stdout.write(options_markdown())
