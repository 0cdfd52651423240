"""The application that every command joins, and what commands share: flags from configs, errors, JSON."""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

import typer
from typer.core import TyperGroup

from graftlm import progress, terminal
from graftlm.config import Config
from graftlm.config.answers import ANSWERS
from graftlm.config.fields import flag_name
from graftlm.config.translate import foreign_names
from graftlm.errors import GraftError, Stopped

# Help and the errors of the command line itself are typer's, which frames them; into a pipe they go plain, as all else.
with contextlib.suppress(ImportError):
    from typer import rich_utils

    rich_utils.Console = terminal.help_console  # pyright: ignore


class _Root(TyperGroup):
    """An option of another program is answered with what to write here."""

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
    """`--batch_size` is `--batch-size`; the dashes in front are not passed."""
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


def options(
    config_class: type[Config], *, positional: str | Sequence[str] = (), file: bool = False
) -> Callable[[Any], Any]:
    """Give a command one flag for each field of a config; the command gets the built config and its own arguments.

    `positional` names fields that are given without a flag, in their order; `file` adds an optional YAML file in front.
    """
    places = (positional,) if isinstance(positional, str) else tuple(positional)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        keyword = inspect.Parameter.KEYWORD_ONLY
        if file:
            given = Annotated[
                Path | None, typer.Argument(help="YAML file of options; flags win over it", show_default=False)
            ]
            parameters.append(inspect.Parameter("config_file", keyword, annotation=given, default=None))
        fields = config_class.model_fields
        for name, spec in [*((n, fields[n]) for n in places), *((n, f) for n, f in fields.items() if n not in places)]:
            kind, repeated = _flag_type(spec.annotation)
            wanted: Any = list[kind] | None if repeated else kind | None
            extra: Any = spec.json_schema_extra or {}
            text = spec.description or ""
            if get_origin(_plain(spec.annotation)) is Literal:
                text = f"{text} [dim]\\[{' | '.join(map(str, get_args(_plain(spec.annotation))))}][/dim]"
            shown = spec.default
            if not spec.is_required() and shown not in (None, False, "", (), {}):
                default = ", ".join(map(str, shown)) if isinstance(shown, tuple) else shown
                text = f"{text} [dim]\\[default: {default}][/dim]"
            if name in places:
                info: Any = typer.Argument(help=text, show_default=False)
            else:
                flag = f"--{flag_name(name)}"
                flag = f"{flag}/--no-{flag_name(name)}" if kind is bool else flag
                info = typer.Option(flag, help=text, show_default=False, rich_help_panel=extra.get("group") or None)
            needed = name in places and spec.is_required()
            wanted, default = (kind, inspect.Parameter.empty) if needed and not repeated else (wanted, None)
            parameters.append(inspect.Parameter(name, keyword, annotation=Annotated[wanted, info], default=default))
        parameters += _foreign(config_class)
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "config"]
        own = [p.replace(kind=keyword) for p in own]

        def run(**values: Any) -> None:
            mine = {p.name: values.pop(p.name) for p in own}
            path = values.pop("config_file", None)
            given: dict[str, Any] = {k: (v or None) if isinstance(v, list) else v for k, v in values.items()}
            given = {k: v for k, v in given.items() if v is not None or k not in config_class.ELSEWHERE}
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
    """Hidden flags for the names that options have elsewhere, and had before; `Config.read` knows what they mean, or what to
    answer."""
    found: list[inspect.Parameter] = []
    names = foreign_names(config_class.model_fields, config_class.command())
    for name, switch in {**names, **dict.fromkeys(config_class.ELSEWHERE, False)}.items():
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
    """Prints what a user can mend without a traceback, and sets the exit status."""

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
    """Around a command's imports: PyTorch and transformers take seconds, and from a cold disk more."""
    return progress.working("starting")


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
