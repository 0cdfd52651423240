"""`graft generate`."""

from __future__ import annotations

import sys

from graftlm import terminal
from graftlm.cli.app import Json, app, options, print_json, starting
from graftlm.config import GenerateConfig


@app.command(
    epilog='Examples:\n\ngraft generate --model demo --adapter runs/first/adapter --prompt "..." --max-tokens 64\n\n'
    'graft generate --model demo --adapter formal@prod --prompt "..."'
)
@options(GenerateConfig)
def generate(config: GenerateConfig, json: Json = False) -> None:
    """Answer a prompt with a base model, and with an adapter on it if one is given."""
    with starting():
        from graftlm.commands.generate import generate

    if config.prompt == "-":
        config = config.model_copy(update={"prompt": sys.stdin.read()})

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    result = generate(config, None if json else show)
    if json:
        print_json(result)
    else:
        sys.stdout.write("\n")
        for note in result["notes"]:
            terminal.console(stderr=True).print(f"note: {note}", highlight=False, markup=False)
