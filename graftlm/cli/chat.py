"""`graft chat`."""

from __future__ import annotations

from graftlm import terminal
from graftlm.cli.app import app, options, starting
from graftlm.config import ChatConfig


@app.command(
    epilog="Examples:\n\ngraft chat --model demo\n\ngraft chat --model M --adapter formal@prod --beside playful\n\n"
    "graft chat --model M --adapter runs/first/adapter --beside base"
)
@options(ChatConfig)
def chat(config: ChatConfig) -> None:
    """Talk to a base or an adapter in the terminal, or to two of them side by side."""
    with starting():
        from graftlm.commands.chat import chat

    chat(config, terminal.console())
