"""The command line: arguments -> config -> one call. No logic of its own.

Options are made from the config classes, so a flag, a key of a YAML file and a line of the documentation are one
thing. Results go to standard output, everything else to standard error; `--json` makes the result one JSON object. Exit
status: 0 done, 2 something the user can mend, 128 + n stopped by signal n.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

import typer
from rich.console import Console

from graftlm import __version__
from graftlm.config import CheckConfig, Config, GenerateConfig, TrainConfig
from graftlm.errors import GraftError, Stopped

app = typer.Typer(
    help="Fine-tune language models in full, with LoRA or with QLoRA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
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


def options(config_class: type[Config], *, positional: str | None = None, file: bool = False) -> Callable[[Any], Any]:
    """Give a command one flag for each field of a config; the command gets the built config and its own arguments.

    `positional` names a field that may also be given without its flag; `file` adds an optional YAML file in front.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        keyword = inspect.Parameter.KEYWORD_ONLY
        if file:
            given = Annotated[
                Path | None, typer.Argument(help="YAML file of options; flags win over it", show_default=False)
            ]
            parameters.append(inspect.Parameter("config_file", keyword, annotation=given, default=None))
        for name, spec in config_class.model_fields.items():
            kind, repeated = _flag_type(spec.annotation)
            wanted: Any = list[kind] | None if repeated else kind | None
            extra: Any = spec.json_schema_extra or {}
            text = spec.description or ""
            if get_origin(_plain(spec.annotation)) is Literal:
                text = f"{text} [dim]\\[{' | '.join(map(str, get_args(_plain(spec.annotation))))}][/dim]"
            shown = spec.default
            if not spec.is_required() and shown not in (None, False, (), {}):
                default = ", ".join(map(str, shown)) if isinstance(shown, tuple) else shown
                text = f"{text} [dim]\\[default: {default}][/dim]"
            if name == positional:
                info: Any = typer.Argument(help=text, show_default=False)
            else:
                flag = f"--{name.replace('_', '-')}"
                flag = f"{flag}/--no-{name.replace('_', '-')}" if kind is bool else flag
                info = typer.Option(flag, help=text, show_default=False, rich_help_panel=extra.get("group") or None)
            parameters.append(inspect.Parameter(name, keyword, annotation=Annotated[wanted, info], default=None))
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "config"]
        own = [p.replace(kind=keyword) for p in own]

        def run(**values: Any) -> None:
            mine = {p.name: values.pop(p.name) for p in own}
            path = values.pop("config_file", None)
            given = {k: (v or None) if isinstance(v, list) else v for k, v in values.items()}
            with _errors():
                command(config_class.read(path, given), **mine)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature([*parameters, *own])  # pyright: ignore[reportFunctionMemberAccess]
        run.__annotations__ = {p.name: p.annotation for p in [*parameters, *own]}
        return run

    return decorate


def _plain(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        return next(a for a in get_args(annotation) if a is not type(None))
    return annotation


class _errors:
    """Prints what a user can mend without a traceback, and sets the exit status."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, GraftError):
            _fail(f"{type(error).__name__}: {error}", 2)
        if isinstance(error, Stopped):
            _fail(str(error), 128 + error.signal_number)
        if isinstance(error, KeyboardInterrupt):
            _fail("stopped", 130)


def _fail(message: str, status: int) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(
        message, style="red" if status == 2 else "", highlight=False, markup=False
    )
    raise SystemExit(status)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.", show_default=False)]


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


@app.command(
    epilog="Examples:\n\ngraft train --model demo --data demo --out runs/first\n\n"
    "graft train --model Qwen/Qwen3-0.6B --data train.jsonl --method qlora --out runs/q\n\ngraft train run.yaml"
)
@options(TrainConfig, file=True)
def train(config: TrainConfig, json: Json = False) -> None:
    """Fine-tune a base model: all of it, or an adapter on a frozen 16-bit (lora) or 4-bit (qlora) base."""
    from graftlm.training.run import run
    from graftlm.training.view import View

    summary = run(config, View())
    if json:
        _print_json(summary)


@app.command(epilog='Example:  graft generate --model demo --adapter runs/first/adapter --prompt "..." --max-tokens 64')
@options(GenerateConfig)
def generate(config: GenerateConfig, json: Json = False) -> None:
    """Answer a prompt with a base model, and with an adapter on it if one is given."""
    from graftlm.serving.generate import generate_text

    if config.prompt == "-":
        config = config.model_copy(update={"prompt": sys.stdin.read()})

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    result = generate_text(config, None if json else show)
    if json:
        _print_json(result)
    else:
        sys.stdout.write("\n")
        for note in result["notes"]:
            Console(stderr=True).print(f"note: {note}", highlight=False, markup=False)


@app.command(epilog="Example:  graft check train.jsonl --model Qwen/Qwen3-0.6B --eval-data valid.jsonl")
@options(CheckConfig, positional="data")
def check(config: CheckConfig, json: Json = False) -> None:
    """Read every row and show what would be trained on, before anything is."""
    from graftlm.data.inspection import check_data

    report = check_data(config)
    if json:
        _print_json(report.to_json())
    else:
        report.render(Console())
    if not report.good:
        raise SystemExit(2)


@app.command(epilog="Example:  graft demo --steps 80 --out runs/demo")
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each method.")] = 80,
    out: Annotated[Path, typer.Option(help="Folder for the three runs.")] = Path("runs/demo"),
    json: Json = False,
) -> None:
    """Train full, LoRA and QLoRA for real on the bundled base and data, and compare what each cost and gave."""
    from graftlm.experiments.demonstration import demonstrate

    with _errors():
        result = demonstrate(steps, out, Console(stderr=json))
        if json:
            _print_json(result)


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"graft {__version__}\n")
        raise SystemExit(0)


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Fine-tune language models in full, with LoRA or with QLoRA."""


def main() -> None:
    """The command `graft`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Threads that wait for each other by spinning are up to 20 times slower on a machine that does other work as well.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    app()


if __name__ == "__main__":
    main()
