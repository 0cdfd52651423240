"""`graft check`."""

from __future__ import annotations

from graftlm import terminal
from graftlm.cli.app import Json, app, options, print_json, starting
from graftlm.config import CheckConfig


@app.command(epilog="Example:  graft check train.jsonl --model Qwen/Qwen3-0.6B --eval-data valid.jsonl")
@options(CheckConfig)
def check(config: CheckConfig, json: Json = False) -> None:
    """Read every row and show what training would read: examples, lengths, target tokens, and bad rows."""
    with starting():
        from graftlm.commands.check import check_data

    report = check_data(config)
    if json:
        print_json(report.to_json())
    else:
        report.render(terminal.console())
    if not report.good:
        raise SystemExit(2)
