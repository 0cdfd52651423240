"""`graft serve`: one base with all of its adapters over HTTP, by the own engine or by vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graftlm.config import ServeConfig
from graftlm.errors import ConfigError
from graftlm.serving.vllm import export_for_vllm

Ready = Callable[[str, dict[str, Any]], None]


def serve(
    config: ServeConfig, note: Callable[[str], None] = lambda text: None, ready: Ready = lambda url, summary: None
) -> None:
    """Serve until a signal; `ready` is told the address, and what is served. Raises GraftError.

    Raises ConfigError where the extra `serve` is not installed.
    """
    try:
        from graftlm.serving.http.server import BuiltServer
        from graftlm.serving.http.server import serve as run
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client", "starlette"):
            raise
        raise ConfigError(f"graft serve needs {error.name}; install it with: pip install 'graftlm[serve]'") from None

    def told(url: str, built: BuiltServer) -> None:
        ready(url, built.summary)

    run(config, note, told)


def export(config: ServeConfig, note: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Write what vLLM would serve (`--engine vllm`); returns its command and what was written. Raises GraftError."""
    return export_for_vllm(config, note)
