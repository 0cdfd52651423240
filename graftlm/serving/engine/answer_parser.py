"""What an answer consists of: reasoning, content and tool calls, told apart in its text while it is written.

    <think>\nThe user asks for rain.\n</think>\n\nLet me look.<tool_call>{"name": "weather", ...}</tool_call>
            reasoning                            content      tool call

Reasoning is what stands between `<think>` and `</think>`. A template may open it in the prompt already; then the answer begins
within it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graftlm.serving.engine.detokenizer import overlap
from graftlm.serving.engine.tool_call_parser import CallDelta, ToolCallParser

OPEN, CLOSE = "<think>", "</think>"
ReasoningName = Literal["qwen3", "deepseek_r1"]


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of reasoning."""

    text: str


Piece = str | Reasoning | CallDelta
"""Content is text."""


class ReasoningParser:
    """Tells reasoning from what follows it. `opened`: whether the answer begins within it."""

    def __init__(self, opened: bool) -> None:
        self._state: Literal["start", "thinking", "behind", "content"] = "thinking" if opened else "start"
        self._held = ""
        self._begun = not opened  # whether `<think>` was seen, or some reasoning
        self._sent = False

    def push(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """What is certain now of reasoning and of content; with `last` all of it."""
        self._held += text
        reasoning = content = ""
        if self._state == "start":
            self._start(last)
        if self._state == "thinking":
            reasoning = self._think(last)
        if self._state == "behind":
            self._held = self._held.lstrip("\n")
            if self._held:
                self._state = "content"
        if self._state == "content":
            content, self._held = self._held, ""
        return reasoning, content

    def _start(self, last: bool) -> None:
        bare = self._held.lstrip()
        if bare.startswith(OPEN):
            self._held, self._state = bare[len(OPEN) :], "thinking"
        elif last or (bare and overlap(bare, (OPEN,)) < len(bare)):
            self._state = "content"

    def _think(self, last: bool) -> str:
        if not self._begun:  # the prompt has opened it, and the model may do so again
            bare = self._held.lstrip()
            if not last and overlap(bare, (OPEN,)) == len(bare):
                return ""
            self._held = bare.removeprefix(OPEN)
            self._begun = True
        if not self._sent:
            self._held = self._held.lstrip("\n")
        at = self._held.find(CLOSE)
        if at >= 0:
            found, self._held = self._held[:at].rstrip("\n"), self._held[at + len(CLOSE) :]
            self._state = "behind"
            return found
        whole = self._held[: len(self._held) - (0 if last else overlap(self._held, (CLOSE,)))]
        found = whole if last else whole.rstrip("\n")
        self._held = self._held[len(found) :]
        self._sent = self._sent or bool(found)
        return found


class AnswerParser:
    """The pieces of one answer. Without a parser of its kind nothing is reasoning, or a call."""

    def __init__(self, reasoning: ReasoningParser | None, calls: ToolCallParser | None) -> None:
        self._reasoning, self._calls = reasoning, calls

    @property
    def called(self) -> bool:
        """Whether the answer had a call that is not broken."""
        return self._calls is not None and self._calls.calls > 0

    def push(self, text: str, *, last: bool = False) -> list[Piece]:
        """What is certain with more of the text; with `last` all of it."""
        pieces: list[Piece] = []
        content = text
        if self._reasoning is not None:
            thought, content = self._reasoning.push(text, last=last)
            if thought:
                pieces.append(Reasoning(thought))
        if self._calls is None:
            return [*pieces, content] if content else pieces
        pieces += self._calls.push(content)
        if last:
            pieces += self._calls.finish()
        return pieces
