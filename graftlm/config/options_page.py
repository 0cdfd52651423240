"""`docs/options.md`, made from the config classes: usage, arguments and options of every command.

    python -m graftlm.config.options_page > docs/options.md

A test checks that the file in the repository is what this prints.
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
from graftlm.config.fields import flag_name, is_argument, metavar
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
    ("graft board", configs.BoardConfig),
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

Arguments are given by position, options as flags (`--learning-rate 5e-4`). A command with `[FILE]` in its usage line
also reads options from a YAML file: `graft train run.yaml` with lines such as `learning-rate: 5e-4` (or
`learning_rate`). Flags override the file. A list is given as `a,b`, by repeating the flag, or as a YAML list; a mapping
as `NAME=VALUE,...` or a YAML mapping. An option that does not exist is an error. Most commands also take `--json`,
which prints the result as one JSON object.
"""

_OTHER = """
# Names in other programs

Options of TRL, PEFT, Axolotl, LLaMA-Factory and vLLM are accepted under their own names and with their own values, and
so are former names of Graft's options. An option that is given under two names is refused.

"""
_ANSWERED = """
Other options of these programs have no counterpart. If the value asks for what Graft does anyway, the option is
dropped; otherwise the error says what to write instead. These are known:
"""


def type_name(annotation: Any) -> str:
    """The values that an option takes, in words: `full` / `lora`, number, list."""
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
    """The default as a user would write it; a dash where the help text gives the default or there is none."""
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
        arguments = {name: field for name, field in config.model_fields.items() if is_argument(field)}
        flags = {name: field for name, field in config.model_fields.items() if not is_argument(field)}
        parts.append(f"\n## {command}\n\nUsage: `{usage(command, config)}`\n")
        if arguments:
            parts.append("\n### Arguments\n\n| argument | value | default | meaning |\n|---|---|---|---|\n")
            parts += [_row(f"`{name.upper()}`", field) for name, field in arguments.items()]
        for group, fields in groupby(flags.items(), lambda item: _group_of(item[1])):
            parts.append(
                f"\n### {group.capitalize() or 'Options'}\n\n| option | value | default | meaning |\n|---|---|---|---|\n"
            )
            parts += [_row(f"`--{flag_name(name)}`", field) for name, field in fields]
    return "".join([*parts, *_other_names()])


def usage(command: str, config: type[Config]) -> str:
    """The usage line: `graft check [OPTIONS] DATA...`."""
    file = ["[FILE]"] if config.takes_file else []
    arguments = [metavar(name, field) for name, field in config.model_fields.items() if is_argument(field)]
    return " ".join([command, "[OPTIONS]", *file, *arguments])


def _group_of(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    return str(extra.get("group", "")) if isinstance(extra, dict) else ""


def _row(name: str, field: FieldInfo) -> str:
    kind = type_name(field.annotation) + limits(field)
    return f"| {name} | {kind} | {default_text(field)} | {field.description} |\n".replace("\\", "\\\\")


def _other_names() -> list[str]:
    """The sections on names of TRL, PEFT, Axolotl, LLaMA-Factory and vLLM, and on former names."""
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
        "| accepted name | option |\n|---|---|\n",
        *lines,
        _ANSWERED,
        ", ".join(f"`{name}`" for name in ANSWERS),
        ".\n",
    ]


if __name__ == "__main__":
    sys.stdout.write(options_markdown())
