"""`graft demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftlm import progress, terminal
from graftlm.cli.app import Json, app, errors, print_json, starting


@app.command(epilog="Example:  graft demo --steps 80 --out runs/demo")
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each run.")] = 40,
    out: Annotated[Path, typer.Option(help="Folder for the comparison and the voices.")] = Path("runs/demo"),
    json: Json = False,
) -> None:
    """Plan, compare full, LoRA and QLoRA on the bundled base, and train three voices as adapters."""
    with errors(), progress.shown():
        with starting():
            from graftlm.commands.demo import demonstrate

        result = demonstrate(steps, out, terminal.console(stderr=json))
        if json:
            print_json(result)
