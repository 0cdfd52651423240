"""The command line: arguments -> config -> one call. No logic of its own.

Options are made from the config classes, so a flag, a key of a YAML file and a line of the documentation are one
thing. Results go to standard output, everything else to standard error; `--json` makes the result one JSON object, and into a
pipe goes plain text (`terminal.py`). Exit status: 0 done, 2 something the user can mend, 128 + n stopped by signal n.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from graftlm import __version__
from graftlm.cli.app import app

# Each module joins its commands to the application as it is imported; help lists them in this order.
from graftlm.cli import train, generate, serve, chat, check, plan, compare, sweep, adapters, merge, demo as demo  # isort: skip

__all__ = ["COMMANDS", "app", "main"]

COMMANDS = (train, generate, serve, chat, check, plan, compare, sweep, adapters, merge, demo)


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
    # A server's steps are a few milliseconds with short pauses between: there a thread that sleeps is woken too late.
    if sys.argv[1:2] != ["serve"]:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    app()
