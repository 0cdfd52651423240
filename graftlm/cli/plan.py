"""`graft plan`."""

from __future__ import annotations

from graftlm import terminal
from graftlm.cli.app import Json, app, options, print_json, starting
from graftlm.config import PlanConfig


@app.command(
    epilog="Examples:\n\ngraft plan llama-2-7b llama-2-13b llama-2-70b\n\ngraft plan Qwen/Qwen3-8B --gpu rtx-4090\n\n"
    "graft plan demo --data train.jsonl --max-length 0 --batch-size 16"
)
@options(PlanConfig)
def plan(config: PlanConfig, json: Json = False) -> None:
    """Predict memory and time of full, LoRA and QLoRA from a config alone, and recommend one."""
    with starting():
        from graftlm.commands.plan import plan

    report = plan(config)
    if json:
        print_json(report.to_json())
        return
    from graftlm.planning.report import render

    render(report, terminal.console())
