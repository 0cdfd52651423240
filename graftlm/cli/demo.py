"""`graft demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from graftlm.cli.app import Json, app, errors, print_json


@app.command(epilog="Example:  graft demo --steps 80 --out runs/demo")
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each method.")] = 80,
    out: Annotated[Path, typer.Option(help="Folder for the three runs.")] = Path("runs/demo"),
    json: Json = False,
) -> None:
    """Train full, LoRA and QLoRA for real on the bundled base and data, and compare what each cost and gave."""
    from graftlm.experiments.demonstration import demonstrate

    with errors():
        result = demonstrate(steps, out, Console(stderr=json))
        if json:
            print_json(result)
