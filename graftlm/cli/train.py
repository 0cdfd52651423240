"""`graft train`."""

from __future__ import annotations

from graftlm.cli.app import Json, app, options, print_json, starting
from graftlm.config import TrainConfig


@app.command(
    epilog="Examples:\n\ngraft train --model demo --data demo --out runs/first\n\n"
    "graft train --model Qwen/Qwen3-0.6B --data train.jsonl --method qlora --out runs/q\n\ngraft train run.yaml"
)
@options(TrainConfig)
def train(config: TrainConfig, json: Json = False) -> None:
    """Fine-tune a base model: all of it, or an adapter on a frozen 16-bit (lora) or 4-bit (qlora) base."""
    with starting():
        from graftlm.commands.ranks import train_over_ranks

    summary = train_over_ranks(config)
    if json and summary:  # of several ranks that torchrun started, the first has one
        print_json(summary)
