"""The command line: arguments -> config -> one call, without logic of its own.

Arguments and options are made from the config classes, which also make the YAML keys and the documentation. Results go to
standard output, everything else to standard error; `--json` prints the result as one JSON object, and a pipe gets plain text
(`terminal.py`). Exit status: 0 done, 2 an error that the user can fix, 128 + n stopped by signal n.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from graftlm import __version__
from graftlm.cli.app import app

# Each module adds its commands to the application on import; help lists them in this order.
from graftlm.cli import train, generate, serve, chat, check, plan, compare, sweep, adapters, board, merge, demo as demo  # isort: skip

__all__ = ["COMMANDS", "app", "main"]

COMMANDS = (train, generate, serve, chat, check, plan, compare, sweep, adapters, board, merge, demo)


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
    # Threads that wait by spinning are up to 20 times slower on a machine that does other work as well.
    # A server's steps take a few milliseconds with short pauses: there a sleeping thread wakes up too late.
    if sys.argv[1:2] != ["serve"]:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    app()
