"""A conversation's skeleton: its text with every content replaced by a sentinel, a word that occurs nowhere else.

It shows where each content goes: a row's text must be the skeleton's literal parts with the contents put back. It depends on
roles, tools and tool calls but not on contents, so one skeleton serves all conversations of the same form.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from graftlm.base.jinja import unmark
from graftlm.base.template_render import Message, TemplateRenderer, Tools, message_of, probe_call, probe_text, shortened
from graftlm.base.template_turns import Place, RenderedSkeleton, Turn, TurnFinder
from graftlm.errors import DataError

_SENTINEL = re.compile(r"qz7([0-9]{6})7zq")
_KEPT = 1024  # skeletons


@dataclass(frozen=True, slots=True)
class Field:
    """One piece of a message's text that a sentinel replaces."""

    message: int
    name: str  # "content" or "reasoning_content"
    value: str


@dataclass(frozen=True, slots=True)
class Skeleton:
    literals: tuple[str, ...]  # one more than fields
    fields: tuple[int, ...]  # index into the row's fields, in the order of the text
    turns: tuple[Turn, ...]  # in skeleton positions
    blocks: tuple[int, ...]  # for templates with marks: the message that each marked block belongs to
    ending: str  # text to append after the last turn, if the template omits its end marker
    eos: bool  # no end marker is known: the tokenizer's end token is appended


class SkeletonCache:
    """The skeletons of one template. `marks`: whether its generation marks are used."""

    def __init__(self, renderer: TemplateRenderer, turns: TurnFinder, marks: bool) -> None:
        self._renderer, self._turns, self._marks = renderer, turns, marks
        self._skeletons: OrderedDict[str, Skeleton] = OrderedDict()

    def skeleton(self, messages: list[Message], tools: Tools | None) -> tuple[Skeleton, list[Field]]:
        """The skeleton of a conversation's form (cached for the next row of that form), and the row's own fields."""
        fields: list[Field] = []
        bare: list[Message] = []
        for index, message in enumerate(messages):
            bones = dict(message)
            for name in ("content", "reasoning_content"):
                value = message.get(name)
                if isinstance(value, str) and value.strip():  # white space alone stays: templates ignore it
                    bones[name] = f"qz7{len(fields):06d}7zq"
                    fields.append(Field(index, name, value))
            bare.append(bones)
        key = json.dumps([bare, tools], ensure_ascii=False, default=str)
        skeleton = self._skeletons.get(key)
        if skeleton is None:
            skeleton = self._build(bare, fields, tools)
            self._skeletons[key] = skeleton
            if len(self._skeletons) > _KEPT:
                self._skeletons.popitem(last=False)
        return skeleton, fields

    def _build(self, bare: list[Message], fields: list[Field], tools: Tools | None) -> Skeleton:
        text, blocks = unmark(self._renderer.render_marked(bare, tools, prompt=False))
        places = _places(text, fields)
        self._check_complete(bare, fields, tools, text, places)
        rendered = RenderedSkeleton(bare, tools, text, places)
        turns: list[Turn] = []
        ending, eos = "", False
        owners: tuple[int, ...] = ()
        if self._marks:
            owners = tuple(_owner(block, places, bare) for block in blocks)
        else:
            for index, message in enumerate(bare):
                if message["role"] != "assistant":
                    continue
                previous = turns[-1].end if turns else 0
                turn, turn_ending, turn_eos = self._turns.turn(rendered, index, previous)
                turns.append(turn)
                if index == len(bare) - 1:
                    ending, eos = turn_ending, turn_eos
        for index, message in enumerate(bare):
            if self._marks:
                written = "".join(text[a:b] for (a, b), owner in zip(blocks, owners, strict=True) if owner == index)
            else:
                written = "".join(text[turn.start : turn.end] for turn in turns if turn.message == index)
            _check_calls(index, message, written)
        literals: list[str] = []
        at = 0
        for place in places:
            literals.append(text[at : place.start])
            at = place.end
        literals.append(text[at:])
        order = tuple(int(match[1]) for match in _SENTINEL.finditer(text))
        return Skeleton(tuple(literals), order, tuple(turns), owners, ending, eos)

    def _check_complete(
        self,
        bare: list[Message],
        fields: list[Field],
        tools: Tools | None,
        text: str,
        places: list[Place],
    ) -> None:
        """Refuse a template that leaves out a content, a tool, or the thinking of the last turn."""
        seen = {(place.message, place.name) for place in places}
        last_turn = max((i for i, m in enumerate(bare) if m["role"] == "assistant"), default=-1)
        drops_thinking = False
        for field in fields:
            if (field.message, field.name) in seen:
                continue
            where = f"messages[{field.message}].{field.name}"
            if field.name == "content":
                role = bare[field.message]["role"]
                raise DataError(
                    f"the chat template leaves out {where} (role '{role}'). "
                    f"Take that message out, or move its text to a role that the template writes"
                )
            if field.message == last_turn or not self.writes_thinking:
                raise DataError(
                    f"the chat template leaves out {where}. "
                    "Take the thinking out of the row, or use a model whose template writes it"
                )
            drops_thinking = True
        if drops_thinking:
            self._renderer.note(
                "the chat template leaves out the thinking of earlier turns; only the last turn's is trained"
            )
        for index, tool in enumerate(tools or ()):
            name = tool.get("function", tool).get("name")
            if isinstance(name, str) and name not in text:
                raise DataError(
                    f"the chat template leaves out tools[{index}] ('{name}'). "
                    "Use a model whose template writes tools, or describe them in the system message"
                )

    @cached_property
    def writes_thinking(self) -> bool:
        """Whether the template writes an assistant's thinking, at least in the last turn."""
        thought = probe_text(2)
        for turn in (
            {**message_of("assistant", probe_text(1)), "reasoning_content": thought},
            {"role": "assistant", "reasoning_content": thought, "tool_calls": [probe_call()]},
        ):
            text = self._renderer.attempt([message_of("user", probe_text(0)), turn])
            if text is not None and thought in text:
                return True
        return False


def align(text: str, skeleton: Skeleton, fields: Sequence[Field]) -> list[int]:
    """Match `text` with the skeleton and its contents; returns where each literal part starts. Raises DataError."""
    literals, order = skeleton.literals, skeleton.fields
    furthest = 0

    def place(index: int, at: int) -> list[int] | None:
        # Literal `index` is at `at`; then its field, then the rest.
        nonlocal furthest
        furthest = max(furthest, index)  # what fails from here on is the text before or of field `index`
        if not text.startswith(literals[index], at):
            return None
        end = at + len(literals[index])
        if index == len(order):
            return [at] if end == len(text) else None
        for form in _forms(fields[order[index]].value):
            if text.startswith(form, end) and (rest := place(index + 1, end + len(form))) is not None:
                return [at, *rest]
        return None

    try:
        starts = place(0, 0)
    except RecursionError:
        raise DataError(f"the conversation has too many messages ({len(order)}); split it") from None
    if starts is not None:
        return starts
    if furthest < len(order):
        field = fields[order[furthest]]
        where, value = f"messages[{field.message}].{field.name}", field.value
        raise DataError(
            f"the chat template changes {where}: it does not write {shortened(value)} as it is. "
            "Take out what the template treats specially (its own tags, thinking inside the content)"
        )
    raise DataError("the chat template adds text after the conversation that depends on its contents")


def moved(position: int, skeleton: Skeleton, starts: Sequence[int]) -> int:
    """Map a position in a literal part of the skeleton to the same character in the row's text."""
    at = 0
    for literal, start in zip(skeleton.literals, starts, strict=True):
        if at <= position <= at + len(literal):
            return start + position - at
        at += len(literal) + len("qz70000007zq")
    raise AssertionError("a turn's border lies inside a sentinel")


def _places(text: str, fields: Sequence[Field]) -> list[Place]:
    places: list[Place] = []
    for match in _SENTINEL.finditer(text):
        field = fields[int(match[1])]
        places.append(Place(match.start(), match.end(), field.message, field.name))
    return places


def _owner(block: tuple[int, int], places: Sequence[Place], messages: Sequence[Message]) -> int:
    """The assistant message that a marked block belongs to."""
    inside = [p.message for p in places if block[0] <= p.start < block[1] and _is_assistant(messages, p.message)]
    if inside:
        return inside[-1]
    before = max((p.message for p in places if p.end <= block[0]), default=-1)
    following = (i for i in range(max(before, 0), len(messages)) if _is_assistant(messages, i))
    return next(following, len(messages) - 1)


def _is_assistant(messages: Sequence[Message], index: int) -> bool:
    return messages[index]["role"] == "assistant"


def _forms(value: str) -> list[str]:
    """The forms in which templates write a content: unchanged, stripped, or as JSON."""
    stripped = (value, value.strip(), value.strip("\n"), value.lstrip(), value.rstrip())
    stripped += (value.lstrip("\n"), value.rstrip("\n"))
    escaped = (json.dumps(form, ensure_ascii=plain)[1:-1] for form in stripped[:2] for plain in (False, True))
    return list(dict.fromkeys((*stripped, *escaped)))


def _check_calls(index: int, message: Message, written: str) -> None:
    """Refuse a turn whose tool calls are not all written: the model would learn a wrong answer."""
    names = [str(call.get("function", call).get("name")) for call in message.get("tool_calls") or []]
    for name in names:
        if written.count(name) < names.count(name):
            which = "leaves out" if written.count(name) == 0 else "writes only some of"
            raise DataError(
                f"the chat template {which} messages[{index}].tool_calls ('{name}'). Use a model whose template writes "
                "such calls, give each call a message of its own, or write the call into the content"
            )
