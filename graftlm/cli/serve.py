"""`graft serve`."""

from __future__ import annotations

import sys
from typing import Any

from graftlm import terminal
from graftlm.cli.app import Json, app, options, print_json, starting
from graftlm.config import ServeConfig


@app.command(
    epilog="Examples:\n\ngraft serve --model demo --store ./adapters --port 8000\n\n"
    "graft serve --model Qwen/Qwen3-0.6B --base-precision nf4 --store ./adapters --adapter formal@prod --api-keys keys.yaml\n\n"
    "graft serve --model Qwen/Qwen3-0.6B --store ./adapters --engine vllm --out ./exported\n\n"
    "graft serve --model Qwen/Qwen3-0.6B --store ./adapters --engine vllm --out ./exported --follow http://127.0.0.1:8000"
)
@options(ServeConfig)
def serve(config: ServeConfig, json: Json = False) -> None:
    """Serve one base with all of its adapters over OpenAI's API; each request names its adapter."""
    console = terminal.console(stderr=True, soft_wrap=True)

    def note(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    with starting():
        from graftlm.commands.serve import serve

    def ready(url: str, summary: dict[str, Any]) -> None:
        if config.follow is not None:
            print_exported(summary)
            note(f"following  {url}: its adapters are kept in step with {config.store}")
            return
        if json:
            print_json({"event": "ready", "url": url, **summary})
            return
        note(f"ready      {url}   (a page to try adapters on; OpenAI's interface under {url}/v1)")

    def print_exported(exported: dict[str, Any]) -> None:
        if json:
            print_json(exported)
        else:
            print(exported["command"])
        sys.stdout.flush()

    exported = serve(config, note, ready)
    if exported is not None:
        print_exported(exported)
