"""`graft compare`."""

from __future__ import annotations

from graftlm import terminal
from graftlm.cli.app import Json, app, options, print_json, starting
from graftlm.config import CompareConfig


@app.command(
    epilog="Examples:\n\ngraft compare --model Qwen/Qwen3-0.6B --data train.jsonl --out runs/which\n\n"
    "graft compare --model demo --data demo --eval-data demo --steps 80 --learning-rate full=1e-3,lora=1e-2,qlora=1e-2\n\n"
    "graft compare --model demo --data demo --methods lora,lora:rank=64,full --metric rouge-l"
)
@options(CompareConfig)
def compare(config: CompareConfig, json: Json = False) -> None:
    """Train full, LoRA and QLoRA on the same rows with several seeds, and recommend one, if the data can show it."""
    with starting():
        from graftlm.commands.compare import compare
        from graftlm.experiments.compare.view import CompareView

    view = CompareView(terminal.console(stderr=True))
    found = compare(config, view)
    view.comparison(found)
    view.say(f"\nreport: {config.out / 'report.html'} and report.md")
    if json:
        print_json(found.to_json())
