"""`graft generate`: one prompt, through a base and, if one is named, an adapter."""

from __future__ import annotations

from typing import Any

from graftlm.config import GenerateConfig
from graftlm.serving.engine.generate import Show, generate_text


def generate(config: GenerateConfig, show: Show | None = None) -> dict[str, Any]:
    """Answer the config's prompt; `show` gets the text as it comes. Returns what `--json` prints. Raises GraftError."""
    return generate_text(config, show)
