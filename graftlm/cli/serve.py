"""`graft serve`."""

from __future__ import annotations

from graftlm import terminal
from graftlm.cli.app import Json, app, options, print_json, starting
from graftlm.config import ServeConfig
from graftlm.errors import ConfigError


@app.command(
    epilog="Examples:\n\ngraft serve --model demo --store ./adapters --port 8000\n\n"
    "graft serve --model Qwen/Qwen3-0.6B --base-precision nf4 --store ./adapters --adapter formal@prod --api-keys keys.yaml\n\n"
    "graft serve --model Qwen/Qwen3-0.6B --store ./adapters --engine vllm --out ./exported"
)
@options(ServeConfig, file=True)
def serve(config: ServeConfig, json: Json = False) -> None:
    """Serve one base with all of its adapters over OpenAI's HTTP interface, each request with its own."""
    console = terminal.console(stderr=True, soft_wrap=True)

    def note(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    if config.engine == "vllm":
        from graftlm.serving.vllm import export_for_vllm

        found = export_for_vllm(config, note)
        if json:
            print_json(found)
        else:
            print(found["command"])
        return
    try:
        with starting():
            from graftlm.serving.http.server import BuiltServer, serve
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client", "starlette"):
            raise
        raise ConfigError(f"graft serve needs {error.name}; install it with: pip install 'graftlm[serve]'") from None

    def ready(url: str, built: BuiltServer) -> None:
        if json:
            print_json({"event": "ready", "url": url, **built.summary})
            return
        note(f"ready      {url}   (a page to try adapters on; OpenAI's interface under {url}/v1)")

    serve(config, note, ready)
