"""Where an assistant's turn begins and ends in a rendered conversation: after the generation prompt, and with its end marker.

Both are found by rendering prefixes of the conversation and comparing them with the full text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from graftlm.base.template_render import Message, TemplateRenderer, Tools, message_of, probe_call, probe_text, shortened
from graftlm.errors import DataError

# The unit of comparing headers: a tag with the white space after it, or the words up to the next tag. Comparing by character
# would take `<t` as common to `<think>` and `<tool_call>`.
_UNIT = re.compile(r"<[^<>\s]*>\s*|\[[^\[\]\s]*\]\s*|[^<\[]+|.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Place:
    """The position of a sentinel in a rendered skeleton."""

    start: int
    end: int
    message: int
    name: str


@dataclass(frozen=True, slots=True)
class Turn:
    message: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class RenderedSkeleton:
    """A conversation whose contents are sentinels, its text, and the position of each sentinel."""

    messages: Sequence[Message]
    tools: Tools | None
    text: str
    places: Sequence[Place]


class TurnFinder:
    """Finds the borders of turns in one template's texts."""

    def __init__(self, renderer: TemplateRenderer) -> None:
        self._renderer = renderer
        self._attempt = renderer.attempt

    def turn(self, rendered: RenderedSkeleton, index: int, previous_end: int) -> tuple[Turn, str, bool]:
        """The borders of the assistant turn messages[index], which begins after `previous_end`.

        Also returns the text to append if it is the last, and whether the end token must follow. Raises DataError if the
        borders cannot be found.
        """
        messages, text, places = rendered.messages, rendered.text, rendered.places
        own = [place for place in places if place.message == index]
        anchors = [place for place in places if place.message < index and place.name == "content"]
        anchor = anchors[-1] if anchors else None
        region = anchor.end if anchor else 0
        after = min((p.start for p in places if p.message > index and p.start >= region), default=len(text))
        if own and (own[0].start < region or own[-1].end > after):
            raise DataError(
                f"the chat template writes messages[{index}] and another message into each other. "
                "Put the content of a turn with tool calls into a message of its own"
            )
        first_own = own[0].start if own else after
        start = self._start(rendered, index, anchor, first_own, previous_end)
        if not own and not messages[index].get("tool_calls"):
            raise DataError(
                f"the chat template writes nothing of messages[{index}] (assistant). "
                "Give the turn a content besides its thinking, or take it out"
            )
        tail = own[-1].end if own else start
        if index == len(messages) - 1:
            end = max(tail, len(text.rstrip()))
            if text[tail:end].strip() and not (messages[index].get("tool_calls") and self._ends_bare):
                return Turn(index, start, end), "", False
            ending = self._ending(bool(messages[index].get("tool_calls")), rendered.tools)
            return Turn(index, start, end), ending, not ending
        end = self._end_within(rendered, index, tail, after, own)
        return Turn(index, start, end), "", False

    def _start(
        self, rendered: RenderedSkeleton, index: int, anchor: Place | None, first_own: int, previous_end: int
    ) -> int:
        """The start of the turn: after the part of the generation prompt that the turn begins with."""
        before, tools, text = rendered.messages[:index], rendered.tools, rendered.text
        region = anchor.end if anchor else 0
        sentinel = text[anchor.start : anchor.end] if anchor else ""
        prompted = self._attempt(before, tools, prompt=True) if index else None
        unprompted = self._attempt(before, tools) if index else None
        if prompted is not None and unprompted is not None:
            prompted_tail, unprompted_tail = _after(prompted, sentinel), _after(unprompted, sentinel)
            if prompted_tail is not None and unprompted_tail is not None:
                common = _common(prompted_tail, text[region:first_own])
                added = _common(prompted_tail, unprompted_tail)
                begins = common > added or (common == len(prompted_tail) and common >= added)
                if begins and region + common >= previous_end:
                    # Some templates have no generation prompt after a tool's reply, but still write a header.
                    again = text.startswith(self._header, region + common) if self._header else False
                    return region + common + (len(self._header) if again else 0)
        # The first message has no prompt before it, and some templates cannot render a system message alone.
        header = self._header
        found = text.rfind(header, max(region, previous_end), first_own) if header else -1
        if found >= 0:
            return found + len(header)
        if header and (found := text.rfind(header.rstrip(), max(region, previous_end), first_own)) >= 0:
            return found + len(header.rstrip())
        raise DataError(
            f"the chat template does not begin messages[{index}] (assistant) with the generation prompt "
            f"{shortened(header)}, so what the model writes there is not known. Begin conversations with a user message, "
            "or add {% generation %} marks to the template"
        )

    @cached_property
    def _header(self) -> str:
        """The generation prompt after a plain question."""
        prompted = self._attempt([message_of("user", probe_text(0))], prompt=True)
        unprompted = self._attempt([message_of("user", probe_text(0))])
        if prompted is None or unprompted is None:
            return ""
        prompted, unprompted = _after(prompted, probe_text(0)) or "", _after(unprompted, probe_text(0)) or ""
        return prompted[_common(prompted, unprompted) :]

    def _end_within(self, rendered: RenderedSkeleton, index: int, tail: int, after: int, own: Sequence[Place]) -> int:
        """The end of a turn that others follow: after the text that follows it both there and as the last turn."""
        text, message = rendered.text, rendered.messages[index]
        rest, calls = text[tail:after], bool(message.get("tool_calls"))
        alone = self._attempt(rendered.messages[: index + 1], rendered.tools)
        length = 0
        if calls:
            length = 0 if alone is None else self._length_of_calls(message, alone, rest)
        elif alone is not None:
            lone_tail = _after(alone, text[own[-1].start : own[-1].end] if own else "")
            length = _common(lone_tail, rest) if lone_tail and own else 0
        if not rest[:length].strip():
            marker = self._end_marker(rest, calls)
            length = marker if marker is not None else 0
        if not length and calls:
            raise DataError(
                f"the end of messages[{index}] (tool calls) cannot be told from the next message in this chat "
                "template. Add {% generation %} marks to the template"
            )
        return tail + len(rest[:length].rstrip())

    def _length_of_calls(self, message: Message, alone: str, rest: str) -> int:
        """Length of a message's tool calls at the start of `rest`; `alone` is a text that ends with them. 0 if none."""
        # The longest suffix of `alone` that occurs here too, by binary search: shorter suffixes of a match match too.
        low, high = 0, len(alone)
        while low < high:
            middle = (low + high + 1) // 2
            if alone[len(alone) - middle :] in rest:
                low = middle
            else:
                high = middle - 1
        call = message["tool_calls"][-1]
        name = str(call.get("function", call).get("name"))
        suffix = alone[len(alone) - low :]
        if not low or name not in suffix:
            return 0
        length = rest.find(suffix) + low
        if self._ends_bare and (special := self._renderer.special.search(rest, length)):
            length = special.end()
        return length

    def _end_marker(self, rest: str, calls: bool) -> int | None:
        """End of the first special token after a content, or of the known marker after a tool call."""
        if not calls:
            found = self._renderer.special.search(rest)
            return found.end() if found else None
        for marker in self._final_specials:
            if (at := rest.find(marker)) >= 0:
                return at + len(marker)
        return None

    @cached_property
    def _final_specials(self) -> list[str]:
        """The special tokens that follow the content of a last turn."""
        text = self._attempt([message_of("user", probe_text(0)), message_of("assistant", probe_text(1))])
        return self._renderer.special.findall(_after(text, probe_text(1)) or "") if text is not None else []

    @cached_property
    def _ends_bare(self) -> bool:
        """Whether the template writes nothing after the last turn (GLM: the next role ends a turn)."""
        text = self._attempt([message_of("user", probe_text(0)), message_of("assistant", probe_text(1))])
        return text is not None and not (_after(text, probe_text(1)) or "").strip()

    def _ending(self, calls: bool, tools: Tools | None) -> str:
        """The text that ends a turn within a conversation, for templates that omit it at the end; else empty."""
        question, answer = message_of("user", probe_text(0)), message_of("assistant", probe_text(1))
        if calls:
            turn = {"role": "assistant", "tool_calls": [probe_call()]}
            reply = {**message_of("tool", probe_text(2)), "tool_call_id": "call_1", "name": probe_text(9)}
            text = self._attempt([question, turn, reply, answer])
            rest = _between(text, probe_text(8), probe_text(2))
            found = self._renderer.special.findall(rest)
            alone = self._attempt([question, turn])
            own = self._renderer.special.findall(_after(alone, probe_text(8)) or "") if alone is not None else []
            return found[len(own)] if len(found) > len(own) else ""
        text = self._attempt(
            [question, answer, message_of("user", probe_text(2)), message_of("assistant", probe_text(3))]
        )
        found = self._renderer.special.search(_between(text, probe_text(1), probe_text(2)))
        return found[0] if found else ""

    def stop_strings(self) -> list[str]:
        """The special tokens that end the model's turn: those after a last turn, plain or a tool call."""
        stops = self._final_specials
        if self._ends_bare and (ending := self._ending(False, None)):
            stops = [ending]
        call = self._attempt([message_of("user", probe_text(0)), {"role": "assistant", "tool_calls": [probe_call()]}])
        if call is not None and probe_text(8) in call:
            if self._ends_bare:
                calls = [ending] if (ending := self._ending(True, None)) else []
            else:
                calls = self._renderer.special.findall(_after(call.rstrip(), probe_text(8)) or "")[-1:]
            stops += calls
        return list(dict.fromkeys(stops))


def _after(text: str, sentinel: str) -> str | None:
    """The text after the last `sentinel`; the full text for an empty one; None if it is missing."""
    if not sentinel:
        return text
    at = text.rfind(sentinel)
    return None if at < 0 else text[at + len(sentinel) :]


def _between(text: str | None, left: str, right: str) -> str:
    if text is None or left not in text or right not in text:
        return ""
    begin = text.rfind(left, 0, text.rfind(right)) + len(left)
    return text[begin : text.find(right, begin)]


def _common(left: str, right: str) -> int:
    """Length of the common prefix, in whole units (tags, words)."""
    at = 0
    for unit in _UNIT.findall(left):
        if not right.startswith(unit, at):
            break
        at += len(unit)
    return at
