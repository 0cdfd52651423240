"""`graft board`."""

from __future__ import annotations

from graftlm import terminal
from graftlm.cli.app import Json, app, options, print_json, starting
from graftlm.config import BoardConfig


@app.command(
    epilog="Examples:\n\ngraft board\n\ngraft board runs /mnt/cluster/runs --store ./adapters --server http://127.0.0.1:8000\n\n"
    "graft board runs --out board.html"
)
@options(BoardConfig)
def board(config: BoardConfig, json: Json = False) -> None:
    """Show runs, sweeps, comparisons and adapters on one page that follows them live; it only reads files."""
    console = terminal.console(stderr=True, soft_wrap=True)
    with starting():
        from graftlm.commands.board import board

    def ready(url: str) -> None:
        if json:
            print_json({"event": "ready", "url": url})
            return
        if config.host not in ("127.0.0.1", "localhost", "::1"):
            console.print(f"open       anybody who reaches {config.host} sees the board", highlight=False, markup=False)
        console.print(f"ready      {url}   (Ctrl-C ends it)", highlight=False, markup=False)

    written = board(config, ready)
    if written is not None and json:
        print_json({"out": str(written)})
    elif written is not None:
        print(written)
