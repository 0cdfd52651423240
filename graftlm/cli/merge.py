"""`graft merge`."""

from __future__ import annotations

from graftlm import terminal
from graftlm.cli.app import Json, app, options, print_json, starting
from graftlm.config import MergeConfig


@app.command(
    epilog="Examples:\n\ngraft merge --model Qwen/Qwen3-0.6B --adapter runs/q/adapter --out merged --max-drift 0.01\n\n"
    "graft merge --model demo --adapter formal@prod,playful:0.3 --out merged\n\n"
    "graft merge --model demo --adapter formal@prod --out merged --gguf formal.gguf"
)
@options(MergeConfig)
def merge(config: MergeConfig, json: Json = False) -> None:
    """Merge adapters into their base's weights: a plain model folder, and optionally a GGUF file."""
    with starting():
        from graftlm.adapters.store import tables as view
        from graftlm.commands.merge import MergeRefused
        from graftlm.commands.merge import merge as run

    try:
        done = run(config)
    except MergeRefused as refused:
        view.print_drift(terminal.console(stderr=True), refused.report)
        raise
    if json:
        print_json(done)
    else:
        view.print_merged(terminal.console(), done)
