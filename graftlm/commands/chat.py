"""`graft chat`: a conversation in the terminal, with a base or an adapter, or with two of them side by side.

Each side has its own conversation, with its own answers in it. One engine serves both, so the base is in memory once. A model
of plain texts gets each line alone. A side that fails shows its error, and the line is no part of its conversation.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from graftlm import terminal
from graftlm.adapters.peft_format import AdapterFolder
from graftlm.base.caches import prove_decoding
from graftlm.commands.generate import load_with_adapters, sampling_of
from graftlm.config import ChatConfig
from graftlm.errors import ConfigError, GraftError
from graftlm.serving.engine.engine import Engine
from graftlm.serving.engine.generate import NO_LIMIT, AdapterPrompt, stream
from graftlm.serving.engine.kv_cache import cache_size
from graftlm.serving.engine.prompts import PromptEncoder, PromptEncoderCache
from graftlm.serving.engine.scheduler import EngineLimits

BASE = "base"


@dataclass
class Side:
    """A base or an adapter, and its conversation."""

    label: str
    encoder: PromptEncoder
    digest: str = ""
    folder: Path | None = None
    messages: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def encode(self, line: str) -> list[int]:
        """The tokens of the conversation with a new line; a model of texts gets the line alone. Raises DataError."""
        if self.encoder.style == "text":
            system = [str(m["content"]) for m in self.messages if m["role"] == "system"]
            return self.encoder.text("\n".join([*system, line]))
        return self.encoder.chat([*self.messages, {"role": "user", "content": line}])

    def add_turn(self, line: str, answer: str) -> None:
        """Add a line and its answer to the conversation."""
        self.messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]


def _side(
    label: str, found: AdapterFolder | None, encoders: PromptEncoderCache, messages: list[dict[str, Any]]
) -> Side:
    if found is None:
        return Side(label, encoders.base, messages=messages)
    return Side(
        label, encoders.of(found.digest, found.path, lambda: found.manifest), found.digest, found.path, messages
    )


@dataclass
class SideAnswer:
    """A side's answer to a line so far."""

    text: str = ""
    tokens: int = 0
    finish_reason: str = ""
    error: str = ""


class Conversation:
    """A base with its sides, ready for lines."""

    def __init__(self, config: ChatConfig) -> None:
        """Load the base and find the adapters. Raises GraftError."""
        self.config = config
        names = [config.adapter or BASE, *([config.beside] if config.beside else [])]
        self.base, found = load_with_adapters(config, [None if name == BASE else name for name in names])
        encoders = PromptEncoderCache(self.base, config.format)
        decoding = prove_decoding(self.base)
        limits = EngineLimits(
            max_num_seqs=2, cache_tokens=cache_size(self.base, decoding.layers, 2).tokens, max_loras=2, adapter_bytes=NO_LIMIT,
        )  # fmt: skip
        self.engine = Engine(self.base, limits, decoding=decoding)
        system = [{"role": "system", "content": config.system}] if config.system else []
        self.sides = [_side(name, given, encoders, list(system)) for name, given in zip(names, found)]

    def ask(self, line: str) -> Iterator[list[SideAnswer]]:
        """Answer a line on every side; yields all answers whenever one has grown. Raises GraftError."""
        answers = [SideAnswer() for _ in self.sides]
        prompts = [AdapterPrompt(s.encode(line), s.encoder.encoder, s.digest, s.folder) for s in self.sides]
        limit = self.engine.runner.max_model_len
        max_tokens = [min(self.config.max_tokens, limit - len(prompt.ids)) for prompt in prompts]
        for prompt, most in zip(prompts, max_tokens):
            if most < 1:
                raise ConfigError(
                    f"the conversation has {len(prompt.ids)} tokens, and {limit} fit; begin anew with /new"
                )
        for output in stream(self.engine, prompts, max_tokens, sampling_of(self.config)):
            answer = answers[int(output.id)]
            answer.text += output.text
            answer.tokens += len(output.tokens)
            answer.finish_reason, answer.error = output.finish_reason or "", output.error
            yield answers
        for side, answer in zip(self.sides, answers):
            if not answer.error:
                side.add_turn(line, answer.text)

    def forget(self) -> None:
        """Begin anew."""
        for side in self.sides:
            side.messages = [m for m in side.messages if m["role"] == "system"]


def render(sides: Sequence[Side], answers: Sequence[SideAnswer]) -> RenderableType:
    """The answers, side by side where there are two."""
    panels: list[Panel] = []
    for side, answer in zip(sides, answers):
        how = {"length": ", cut at the limit", "stop": "", "error": ", then it failed"}.get(answer.finish_reason, " …")
        said = Text(answer.text.strip())
        if answer.error:
            said.append(("\n" if said else "") + answer.error, style="red")
        panels.append(
            Panel(
                said, title=Text(side.label, style="bold"), title_align="left",
                subtitle=Text(f"{answer.tokens} tokens{how}", style="dim"), subtitle_align="right",
            )
        )  # fmt: skip
    if len(panels) == 1:
        return panels[0]
    grid = Table.grid(expand=True, padding=(0, 1))
    for _ in panels:
        grid.add_column(ratio=1)
    grid.add_row(*panels)
    return grid


def plainly(sides: Sequence[Side], answers: Sequence[SideAnswer]) -> str:
    """The answers as text for a pipe: that of one side as it is, those of two with their names in front."""
    texts = [answer.text.strip() for answer in answers]
    if len(sides) == 1:
        return texts[0]
    return "\n".join(f"{side.label}: {text}" for side, text in zip(sides, texts))


def chat(config: ChatConfig, console: Console) -> None:
    """Read lines and answer them until the end of input. Raises GraftError for what prevents the first question.

    On a terminal there are frames and a prompt. Elsewhere `console` gets the answers and nothing else; what is said about them
    goes to standard error.
    """
    aside = console if console.is_terminal else terminal.console(stderr=True)
    with console.status("loading"):
        conversation = Conversation(config)
    labels = " | ".join(side.label for side in conversation.sides)
    hint = Text("/new begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer", style="dim")
    aside.print(Group(Text(f"{config.model} as {conversation.base.precision}: {labels}"), hint))
    try:
        while True:
            try:
                line = console.input("[bold]> [/bold]") if console.is_terminal else input()
            except EOFError:
                aside.print()
                return
            command = line.strip()
            if command in ("/exit", "/quit"):
                return
            if command == "/new":
                conversation.forget()
                aside.print(Text("a new conversation", style="dim"))
            elif command:  # a model that was taught texts may need the space at the end
                _show(conversation, line, console, aside)
    finally:
        conversation.engine.close()


def _show(conversation: Conversation, line: str, console: Console, aside: Console) -> None:
    """Answer one line: on a screen as it comes, into a pipe once it is there."""
    answers: list[SideAnswer] = []
    screen = Live(console=console, refresh_per_second=12, transient=True) if console.is_terminal else None
    try:
        with _interruptions() as interrupted, screen or nullcontext():
            for answers in conversation.ask(line):
                if screen is not None:
                    screen.update(render(conversation.sides, answers))
                if interrupted():
                    break
        if screen is not None:
            console.print(render(conversation.sides, answers))
        else:
            console.print(Text(plainly(conversation.sides, answers)), soft_wrap=True)
            for side, answer in zip(conversation.sides, answers):
                if answer.error:
                    aside.print(Text(f"{side.label}: {answer.error}"), soft_wrap=True)
        if interrupted():
            aside.print(Text("stopped; it is not part of the conversation", style="dim"))
    except GraftError as error:
        aside.print(Text(str(error), style="red"))


@contextmanager
def _interruptions() -> Iterator[Callable[[], bool]]:
    """Meanwhile Ctrl-C only sets a flag, so that no step of the engine is cut in half; a second one is as ever."""
    told: list[int] = []

    def hear(number: int, frame: object) -> None:
        told.append(number)
        if len(told) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, hear)
    try:
        yield lambda: bool(told)
    finally:
        signal.signal(signal.SIGINT, before)
