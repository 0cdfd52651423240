"""The typer application, and what all commands share: arguments and flags from configs, errors, JSON."""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

import typer
from typer.core import TyperGroup

from graftlm import progress, terminal
from graftlm.config import Config
from graftlm.config.answers import ANSWERS
from graftlm.config.fields import flag_name, is_argument
from graftlm.config.translate import foreign_names
from graftlm.errors import GraftError, Stopped

# typer draws boxes around help and usage errors; in a pipe they are plain text, like all other output.
with contextlib.suppress(ImportError):
    from typer import rich_utils

    rich_utils.Console = terminal.help_console  # pyright: ignore


class _Root(TyperGroup):
    """The root command: an option of another program is answered with what to write instead."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            name = str(getattr(error, "option_name", ""))
            answer = ANSWERS.get(name.lstrip("-").replace("-", "_"))
            if answer is None:
                raise
            fail(f"ConfigError: option '{name}' is not Graft's: {answer.text}", 2)


def _hyphens(flag: str) -> str:
    """Take `--batch_size` as `--batch-size`; click calls this without the leading dashes."""
    return flag.replace("_", "-")


app = typer.Typer(
    cls=_Root,
    help="Fine-tune language models in full, with LoRA or with QLoRA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": _hyphens},
)


def _flag_type(annotation: Any) -> tuple[Any, bool]:
    """The type of a flag for a field's annotation, and whether it may be repeated."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _flag_type(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return _flag_type(next(a for a in get_args(annotation) if a is not type(None)))
    if origin in (tuple, dict):
        return str, True
    if origin is Literal:
        return str, False
    return annotation, False


def options(config_class: type[Config]) -> Callable[[Any], Any]:
    """Give a command an argument or a flag for each field of a config; it gets the built config and its own arguments.

    A config that `takes_file` adds an optional YAML file as the first argument.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        keyword = inspect.Parameter.KEYWORD_ONLY
        if config_class.takes_file:
            argument = typer.Argument(
                help="YAML file of options; flags override it", metavar="FILE", show_default=False
            )
            given = Annotated[Path | None, argument]
            parameters.append(inspect.Parameter("config_file", keyword, annotation=given, default=None))
        for name, spec in sorted(config_class.model_fields.items(), key=lambda item: not is_argument(item[1])):
            kind, repeated = _flag_type(spec.annotation)
            wanted: Any = list[kind] | None if repeated else kind | None
            extra: Any = spec.json_schema_extra or {}
            text = spec.description or ""
            if get_origin(_plain(spec.annotation)) is Literal:
                text = f"{text} [dim]\\[{' | '.join(map(str, get_args(_plain(spec.annotation))))}][/dim]"
            shown = spec.default
            if not spec.is_required() and shown not in (None, False, "", (), {}):
                shown = ", ".join(map(str, shown)) if isinstance(shown, tuple) else shown
                text = f"{text} [dim]\\[default: {shown}][/dim]"
            if is_argument(spec):
                info: Any = typer.Argument(help=text, metavar=name.upper(), show_default=False)
            else:
                flag = f"--{flag_name(name)}"
                flag = f"{flag}/--no-{flag_name(name)}" if kind is bool else flag
                info = typer.Option(flag, help=text, show_default=False, rich_help_panel=extra.get("group") or None)
            default: Any = None
            if is_argument(spec) and spec.is_required():
                wanted, default = list[kind] if repeated else kind, inspect.Parameter.empty
            parameters.append(inspect.Parameter(name, keyword, annotation=Annotated[wanted, info], default=default))
        parameters += _foreign(config_class)
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "config"]
        own = [p.replace(kind=keyword) for p in own]

        def run(**values: Any) -> None:
            mine = {p.name: values.pop(p.name) for p in own}
            path = values.pop("config_file", None)
            given: dict[str, Any] = {k: (v or None) if isinstance(v, list) else v for k, v in values.items()}
            given = {k: v for k, v in given.items() if v is not None or k not in config_class.train_only}
            for name in foreign_names(config_class.model_fields, config_class.command()):
                value = given.get(name)
                if isinstance(value, list) and len(value) == 1:
                    given[name] = value[0]
            with errors(), progress.shown():
                command(config_class.read(path, given), **mine)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature([*parameters, *own])  # pyright: ignore[reportFunctionMemberAccess]
        run.__annotations__ = {p.name: p.annotation for p in [*parameters, *own]}
        return run

    return decorate


def _foreign(config_class: type[Config]) -> list[inspect.Parameter]:
    """Hidden flags for the names of other programs, former names, and options of other commands; `Config.read` translates
    or refuses them."""
    found: list[inspect.Parameter] = []
    names = foreign_names(config_class.model_fields, config_class.command())
    for name, switch in {**names, **dict.fromkeys(config_class.train_only, False)}.items():
        flag = f"--{flag_name(name)}"
        kind: Any = bool | None if switch else list[str] | None
        info = typer.Option(f"{flag}/--no-{flag_name(name)}" if switch else flag, hidden=True)
        found.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, info], default=None)
        )
    return found


def _plain(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        return next(a for a in get_args(annotation) if a is not type(None))
    return annotation


class errors:
    """Print errors that a user can fix without a traceback, and set the exit status."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, GraftError):
            fail(f"{type(error).__name__}: {error}", 2)
        if isinstance(error, Stopped):
            fail(str(error), 128 + error.signal_number)
        if isinstance(error, KeyboardInterrupt):
            fail("stopped", 130)


_LONGEST = 4000  # characters of a line: a name or a pattern out of a file may be of any length


def fail(message: str, status: int) -> NoReturn:
    terminal.console(stderr=True, soft_wrap=True).print(
        "\n".join(line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..." for line in message.splitlines()),
        style="red" if status == 2 else "",
        highlight=False,
        markup=False,
    )
    raise SystemExit(status)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.", show_default=False)]


def starting() -> AbstractContextManager[progress.Task]:
    """Show progress during a command's imports: PyTorch and transformers take seconds, from a cold disk more."""
    return progress.working("starting")


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
