"""A chat template turns messages into one text; this file finds which characters of that text the model itself writes.

Two ways lead there. Some templates say it: what stands between `{% generation %}` and `{% endgeneration %}` is the
model's. For all others the text T of a row is compared with a skeleton: the same conversation rendered once more with
every content replaced by a sentinel, a word that occurs nowhere else. The skeleton shows where each content went, so
that T must be its literal parts with the contents put back, exactly; a template that drops, shortens or moves a message
is thereby caught on the very row where it happens. An assistant turn then begins where the generation prompt ends (so
that an empty `<think></think>` block, the content and the tool calls are learnt, the header is not), and ends after the
end-of-turn marker, which is what follows the turn both when it is the last one and when another turn comes after it.

Prefixes of the conversation are rendered only to find these two borders, never to cut T: templates such as Qwen3's drop
the thinking of earlier turns, so that a prefix's text is not a prefix of T. A skeleton depends on roles, tools and tool
calls but not on contents, so a file of alike conversations needs one.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import json
import re
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2

from graftlm.base.jinja import MARKS, OPEN, environment, unmark
from graftlm.errors import DataError, ModelError
from graftlm.jsonfile import parse_json

Message = dict[str, Any]
Tools = Sequence[Mapping[str, Any]]
Span = tuple[int, int]

_SENTINEL = re.compile(r"qz7([0-9]{6})7zq")
# What a header is compared by: a tag with the white space after it, or the words up to the next tag. Comparing by
# character instead would take `<t` as common to `<think>` and `<tool_call>`.
_UNIT = re.compile(r"<[^<>\s]*>\s*|\[[^\[\]\s]*\]\s*|[^<\[]+|.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Marked:
    """A text and the character ranges of it that the model writes.

    `bos`: put the tokenizer's own first tokens before it (a chat template writes them itself). `eos`: the end token
    follows the last range, as a target token, unless the text ends with it already.
    """

    text: str
    spans: tuple[Span, ...]
    bos: bool = False
    eos: bool = False


@dataclass(frozen=True, slots=True)
class _Field:
    """One piece of a message's text that a sentinel stands for."""

    message: int
    name: str  # "content" or "reasoning_content"
    value: str


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a sentinel stands in a rendered skeleton."""

    start: int
    end: int
    message: int
    name: str


@dataclass(frozen=True, slots=True)
class _Turn:
    message: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Skeleton:
    literals: tuple[str, ...]  # one more than fields
    fields: tuple[int, ...]  # index into the row's fields, in the order of the text
    turns: tuple[_Turn, ...]  # in skeleton positions
    blocks: tuple[int, ...]  # for templates with marks: the message that each marked block belongs to
    ending: str  # text to append after the last turn, where the template leaves its end marker out
    eos: bool  # no end marker is known at all: the tokenizer's end token must follow


class Template:
    """One chat template, with the tokenizer's special tokens and the date it may print.

    `source`: the Jinja text. `variables`: what the template sees besides the messages (`bos_token`, `eos_token`, ...).
    `specials`: strings that are single tokens, among which an end-of-turn marker is looked for. `date`: ISO date that
    `strftime_now` and `date_string` give, so that the same row has the same tokens on every day.
    Raises ModelError where the template is not valid Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, str], specials: Iterable[str], date: str) -> None:
        self.source = source
        self.variables = dict(variables)
        self.notes: list[str] = []
        day = datetime.datetime.fromisoformat(date)
        self.variables["date_string"] = day.strftime("%d %b %Y")
        try:
            self._compiled = environment(day.strftime).from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"the model's chat template is not valid Jinja (line {error.lineno}: {error.message}). "
                "Repair chat_template.jinja in the model's folder."
            ) from error
        except RecursionError:
            raise ModelError("the model's chat template is nested too deep; repair chat_template.jinja") from None
        known = sorted({s for s in specials if s.strip()}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, known)) or "(?!)")
        self._skeletons: OrderedDict[str, _Skeleton] = OrderedDict()
        self._parts = False  # contents as lists of {"type": "text"} (templates of vision models)
        self._arguments_as_text = False  # tool calls' arguments as JSON text (templates that concatenate them)
        self._null_content = False  # beside tool calls, a content that is None instead of missing
        self._probe_forms()
        self._marks = self._marks_hold_the_end()

    # ------------------------------------------------------------------------------------------------ rendering

    def render(self, messages: Sequence[Message], tools: Tools | None = None, *, prompt: bool = False) -> str:
        """The text of a conversation; `prompt` adds what asks the model for the next turn. Raises DataError."""
        return MARKS.sub("", self._render(self._prepare(messages), tools, prompt))

    def _render(self, messages: Sequence[Message], tools: Tools | None, prompt: bool) -> str:
        """`messages` as `_prepare` gives them; the generation marks are left in."""
        hint = ""
        if any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
            hint = ". It may not know tool calls: use a model whose template does, or write them into the contents"
        try:
            return self._compiled.render(
                # A template may not write to its caller's messages, and the sandbox keeps it from doing so.
                messages=[_for_template(message, self._parts) for message in messages],
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=prompt,
                **self.variables,
            )
        except jinja2.UndefinedError as error:
            raise DataError(
                f"the model's chat template asks for something this conversation lacks: {error}{hint}"
            ) from error
        except jinja2.TemplateError as error:
            raise DataError(f"the model's chat template refuses this conversation: {error}{hint}") from error
        except (TypeError, KeyError, AttributeError, ValueError, IndexError) as error:
            name = type(error).__name__
            raise DataError(f"the model's chat template fails on this conversation ({name}: {error}){hint}") from error

    def _prepare(self, messages: Sequence[Message]) -> list[Message]:
        """Drop empty keys (a missing key is what templates test for) and bring tool arguments into the asked form."""
        prepared: list[Message] = []
        for message in messages:
            kept = {key: value for key, value in message.items() if value is not None}
            if kept.get("tool_calls"):
                kept["tool_calls"] = [_with_arguments(call, self._arguments_as_text) for call in kept["tool_calls"]]
                if self._null_content:
                    kept.setdefault("content", None)
            elif "tool_calls" in kept:
                del kept["tool_calls"]
            prepared.append(kept)
        return prepared

    def _probe_forms(self) -> None:
        """Learn in which form this template reads contents and tool arguments, by trying."""
        user, answer = _probe_text(0), _probe_text(1)
        conversation: list[Message] = [_message("user", user), _message("assistant", answer)]
        for parts in (False, True):
            self._parts = parts
            text = self._try(conversation)
            if text is not None and user in text and answer in text:
                break
        else:
            self._parts = False
        call = [_message("user", user), {"role": "assistant", "tool_calls": [_probe_call()]}]
        for self._null_content, self._arguments_as_text in itertools.product((False, True), repeat=2):
            text = self._try(call)
            if text is not None and _probe_text(8) in text and "Undefined" not in text:
                return
        self._null_content = self._arguments_as_text = False

    def _try(self, messages: Sequence[Message], tools: Tools | None = None, *, prompt: bool = False) -> str | None:
        try:
            return self.render(messages, tools, prompt=prompt)
        except DataError:
            return None

    # ------------------------------------------------------------------------------------------------ marking

    def mark(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        *,
        masked: Collection[int] = (),
        last_only: bool = False,
    ) -> Marked:
        """The text of a conversation and the ranges that the model writes, but in messages whose places are `masked`.

        `last_only`: only the last assistant message, if it is not masked. Raises DataError where the template leaves
        out or changes something of the conversation, with what it did and the way out.
        """
        for index, message in enumerate(messages):
            for name in ("content", "reasoning_content"):
                if (found := MARKS.search(str(message.get(name)))) is not None:
                    raise DataError(
                        f"messages[{index}].{name} holds U+{ord(found[0]):04X}, which Unicode reserves and no text "
                        "has; remove it"
                    )
        prepared = self._prepare(messages)
        apart = [_thinking_apart(message) for message in prepared]
        if apart == prepared:
            return self._mark(prepared, tools, masked, last_only)
        # Thinking written inside the content: a template that writes thinking is given it as thinking, and one that
        # takes contents apart is given them apart.
        forms = (apart, prepared) if self._writes_thinking else (prepared, apart)
        try:
            return self._mark(forms[0], tools, masked, last_only)
        except DataError:
            return self._mark(forms[1], tools, masked, last_only)

    def _mark(self, messages: list[Message], tools: Tools | None, masked: Collection[int], last_only: bool) -> Marked:
        text = self._render(messages, tools, prompt=False)
        skeleton, fields = self._skeleton(messages, tools)
        text, blocks = unmark(text)
        starts = self._align(text, skeleton, fields)
        assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        trained = set(assistants[-1:] if last_only else assistants) - set(masked)
        if self._marks:
            if len(blocks) != len(skeleton.blocks):
                raise DataError("the chat template marks other parts of this conversation as generated than its form")
            spans = [block for block, owner in zip(blocks, skeleton.blocks, strict=True) if owner in trained]
        else:
            turns = [
                (turn.message, (_moved(turn.start, skeleton, starts), _moved(turn.end, skeleton, starts)))
                for turn in skeleton.turns
            ]
            spans = [span for message, span in turns if message in trained]
            if turns and turns[-1][0] == len(messages) - 1 and (skeleton.ending or skeleton.eos):
                last, (start, end) = turns[-1]
                text = text[:end] + skeleton.ending
                if last in trained:
                    spans[-1] = (start, len(text))
                    return Marked(text, _not_empty(spans), eos=skeleton.eos)
        return Marked(text, _not_empty(spans))

    def _align(self, text: str, skeleton: _Skeleton, fields: Sequence[_Field]) -> list[int]:
        """Put the contents back into the skeleton; where each literal part starts in `text`. Raises DataError."""
        literals, order = skeleton.literals, skeleton.fields
        furthest = 0

        def place(index: int, at: int) -> list[int] | None:
            # literal `index` stands at `at`; then field, then the rest.
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
                f"the chat template changes {where}: it does not write {_short(value)} as it is. "
                "Take out what the template treats specially (its own tags, thinking inside the content)"
            )
        raise DataError("the chat template adds text after the conversation that depends on what it says")

    # ------------------------------------------------------------------------------------------------ skeletons

    def _skeleton(self, messages: list[Message], tools: Tools | None) -> tuple[_Skeleton, list[_Field]]:
        """The skeleton of a conversation's form (kept for the next row of that form), and the row's own fields."""
        fields: list[_Field] = []
        bare: list[Message] = []
        for index, message in enumerate(messages):
            bones = dict(message)
            for name in ("content", "reasoning_content"):
                value = message.get(name)
                if isinstance(value, str) and value.strip():  # white space alone stays: templates treat it as nothing
                    bones[name] = f"qz7{len(fields):06d}7zq"
                    fields.append(_Field(index, name, value))
            bare.append(bones)
        key = json.dumps([bare, tools], ensure_ascii=False, default=str)
        skeleton = self._skeletons.get(key)
        if skeleton is None:
            skeleton = self._build(bare, fields, tools)
            self._skeletons[key] = skeleton
            if len(self._skeletons) > 1024:
                self._skeletons.popitem(last=False)
        return skeleton, fields

    def _build(self, bare: list[Message], fields: list[_Field], tools: Tools | None) -> _Skeleton:
        text, blocks = unmark(self._render(bare, tools, prompt=False))
        places = _places(text, fields)
        self._check_complete(bare, fields, tools, text, places)
        turns: list[_Turn] = []
        ending, eos = "", False
        owners: tuple[int, ...] = ()
        if self._marks:
            owners = tuple(_owner(block, places, bare) for block in blocks)
        else:
            for index, message in enumerate(bare):
                if message["role"] != "assistant":
                    continue
                previous = turns[-1].end if turns else 0
                turn, turn_ending, turn_eos = self._turn(bare, index, tools, text, places, fields, previous)
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
        return _Skeleton(tuple(literals), order, tuple(turns), owners, ending, eos)

    def _check_complete(
        self,
        bare: list[Message],
        fields: list[_Field],
        tools: Tools | None,
        text: str,
        places: list[_Place],
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
            if field.message == last_turn or not self._writes_thinking:
                raise DataError(
                    f"the chat template leaves out {where}. "
                    "Take the thinking out of the row, or use a model whose template writes it"
                )
            drops_thinking = True
        if drops_thinking:
            self._note("the chat template leaves out the thinking of earlier turns; only the last turn's is trained")
        for index, tool in enumerate(tools or ()):
            name = tool.get("function", tool).get("name")
            if isinstance(name, str) and name not in text:
                raise DataError(
                    f"the chat template leaves out tools[{index}] ('{name}'). "
                    "Use a model whose template writes tools, or describe them in the system message"
                )

    @cached_property
    def _writes_thinking(self) -> bool:
        thought = _probe_text(2)
        for turn in (
            {**_message("assistant", _probe_text(1)), "reasoning_content": thought},
            {"role": "assistant", "reasoning_content": thought, "tool_calls": [_probe_call()]},
        ):
            text = self._try([_message("user", _probe_text(0)), turn])
            if text is not None and thought in text:
                return True
        return False

    def _turn(
        self,
        bare: list[Message],
        index: int,
        tools: Tools | None,
        text: str,
        places: list[_Place],
        fields: list[_Field],
        previous_end: int,
    ) -> tuple[_Turn, str, bool]:
        """The borders of one assistant turn in the skeleton's text, with what must be appended if it is the last."""
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
        start = self._start(bare, index, tools, text, region, anchor, own[0].start if own else after, previous_end)
        if not own and not bare[index].get("tool_calls"):
            raise DataError(
                f"the chat template writes nothing of messages[{index}] (assistant). "
                "Give the turn a content besides its thinking, or take it out"
            )
        tail = own[-1].end if own else start
        if index == len(bare) - 1:
            end = max(tail, len(text.rstrip()))
            if text[tail:end].strip() and not (bare[index].get("tool_calls") and self._ends_bare):
                return _Turn(index, start, end), "", False
            ending = self._ending(bool(bare[index].get("tool_calls")), tools)
            return _Turn(index, start, end), ending, not ending
        end = self._end_within(bare, index, tools, text, tail, after, own, start)
        return _Turn(index, start, end), "", False

    def _start(
        self,
        bare: list[Message],
        index: int,
        tools: Tools | None,
        text: str,
        region: int,
        anchor: _Place | None,
        first_own: int,
        previous_end: int,
    ) -> int:
        """Where the turn begins: after the generation prompt, as far as the turn really begins with it."""
        sentinel = text[anchor.start : anchor.end] if anchor else ""
        asked = self._try(bare[:index], tools, prompt=True) if index else None
        unasked = self._try(bare[:index], tools) if index else None
        if asked is not None and unasked is not None:
            asked_tail, unasked_tail = _after(asked, sentinel), _after(unasked, sentinel)
            if asked_tail is not None and unasked_tail is not None:
                common = _common(asked_tail, text[region:first_own])
                added = _common(asked_tail, unasked_tail)
                begins = common > added or (common == len(asked_tail) and common >= added)
                if begins and region + common >= previous_end:
                    # Some templates ask for no new header after a tool's reply, and then write one all the same.
                    again = text.startswith(self._header, region + common) if self._header else False
                    return region + common + (len(self._header) if again else 0)
        # The first message has no prompt before it, and some templates cannot render a lone system message.
        header = self._header
        found = text.rfind(header, max(region, previous_end), first_own) if header else -1
        if found >= 0:
            return found + len(header)
        if header and (found := text.rfind(header.rstrip(), max(region, previous_end), first_own)) >= 0:
            return found + len(header.rstrip())
        raise DataError(
            f"the chat template does not begin messages[{index}] (assistant) with the generation prompt "
            f"{_short(header)}, so what the model writes there is not known. Begin conversations with a user message, "
            "or add {% generation %} marks to the template"
        )

    @cached_property
    def _header(self) -> str:
        """The generation prompt after a plain question."""
        asked = self._try([_message("user", _probe_text(0))], prompt=True)
        unasked = self._try([_message("user", _probe_text(0))])
        if asked is None or unasked is None:
            return ""
        asked, unasked = _after(asked, _probe_text(0)) or "", _after(unasked, _probe_text(0)) or ""
        return asked[_common(asked, unasked) :]

    def _end_within(
        self,
        bare: list[Message],
        index: int,
        tools: Tools | None,
        text: str,
        tail: int,
        after: int,
        own: list[_Place],
        start: int,
    ) -> int:
        """Where a turn ends that others follow: what stands after it both there and where it is the last turn."""
        rest = text[tail:after]
        alone = self._try(bare[: index + 1], tools)
        length = 0
        if bare[index].get("tool_calls"):
            if alone is not None:
                # The longest end of the shorter text that occurs here too: containment shrinks with the suffix, so
                # halving finds it.
                low, high = 0, len(alone)
                while low < high:
                    middle = (low + high + 1) // 2
                    if alone[len(alone) - middle :] in rest:
                        low = middle
                    else:
                        high = middle - 1
                call = bare[index]["tool_calls"][-1]
                name = str(call.get("function", call).get("name"))
                suffix = alone[len(alone) - low :]
                if low and name in suffix:
                    length = rest.find(suffix) + low
                    if self._ends_bare and (special := self._special.search(rest, length)):
                        length = special.end()
        elif alone is not None:
            lone_tail = _after(alone, text[own[-1].start : own[-1].end] if own else "")
            length = _common(lone_tail, rest) if lone_tail and own else 0
        if not rest[:length].strip():
            marker = self._end_marker(rest, bool(bare[index].get("tool_calls")))
            length = marker if marker is not None else 0
        if not length and bare[index].get("tool_calls"):
            raise DataError(
                f"the end of messages[{index}] (tool calls) cannot be told from the next message in this chat "
                "template. Add {% generation %} marks to the template"
            )
        return tail + len(rest[:length].rstrip())

    def _end_marker(self, rest: str, calls: bool) -> int | None:
        """End of the first special token in what follows a content (in what follows a call: of the known marker)."""
        if not calls:
            found = self._special.search(rest)
            return found.end() if found else None
        for marker in self._final_specials:
            if (at := rest.find(marker)) >= 0:
                return at + len(marker)
        return None

    # ------------------------------------------------------------------------------------------------ end markers

    @cached_property
    def _final_specials(self) -> list[str]:
        """The special tokens that follow the content of a last turn."""
        text = self._try([_message("user", _probe_text(0)), _message("assistant", _probe_text(1))])
        return self._special.findall(_after(text, _probe_text(1)) or "") if text is not None else []

    @cached_property
    def _ends_bare(self) -> bool:
        """Whether the template writes nothing after the last turn (GLM: a turn is over when the next role begins)."""
        text = self._try([_message("user", _probe_text(0)), _message("assistant", _probe_text(1))])
        return text is not None and not (_after(text, _probe_text(1)) or "").strip()

    def _ending(self, calls: bool, tools: Tools | None) -> str:
        """What ends a turn within a conversation, for templates that leave it out at the end; empty if nothing does."""
        question, answer = _message("user", _probe_text(0)), _message("assistant", _probe_text(1))
        if calls:
            turn = {"role": "assistant", "tool_calls": [_probe_call()]}
            reply = {**_message("tool", _probe_text(2)), "tool_call_id": "call_1", "name": _probe_text(9)}
            text = self._try([question, turn, reply, answer])
            rest = _between(text, _probe_text(8), _probe_text(2))
            found = self._special.findall(rest)
            alone = self._try([question, turn])
            own = self._special.findall(_after(alone, _probe_text(8)) or "") if alone is not None else []
            return found[len(own)] if len(found) > len(own) else ""
        text = self._try([question, answer, _message("user", _probe_text(2)), _message("assistant", _probe_text(3))])
        found = self._special.search(_between(text, _probe_text(1), _probe_text(2)))
        return found[0] if found else ""

    def stop_strings(self) -> list[str]:
        """The special tokens at which the model's turn is over: what follows a last turn, plain or a tool call."""
        stops = self._final_specials
        if self._ends_bare and (ending := self._ending(False, None)):
            stops = [ending]
        call = self._try([_message("user", _probe_text(0)), {"role": "assistant", "tool_calls": [_probe_call()]}])
        if call is not None and _probe_text(8) in call:
            if self._ends_bare:
                calls = [ending] if (ending := self._ending(True, None)) else []
            else:
                calls = self._special.findall(_after(call.rstrip(), _probe_text(8)) or "")[-1:]
            stops += calls
        return list(dict.fromkeys(stops))

    def _marks_hold_the_end(self) -> bool:
        """Whether the template has generation marks that hold the end of the turn, without which none is learnt."""
        answer = _probe_text(1)
        try:
            marked = self._render([_message("user", _probe_text(0)), _message("assistant", answer)], None, prompt=False)
        except DataError:
            return OPEN in self.source or re.search(r"\{%-?\+?\s*generation\s*[-+]?%\}", self.source) is not None
        text, blocks = unmark(marked)
        blocks = _joined(blocks)
        if not blocks:
            return False
        if any(text[start:end].rstrip().endswith(answer) for start, end in blocks):
            self._note(
                "the chat template's {% generation %} marks leave out the end of the turn; "
                "its turns are found without them"
            )
            return False
        return True

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


# ---------------------------------------------------------------------------------------------------- plain functions


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _probe_text(number: int) -> str:
    return f"qy{number}probe{number}yq"


def _probe_call() -> Message:
    function = {"name": _probe_text(9), "arguments": {"a": _probe_text(8)}}
    return {"id": "call_1", "type": "function", "function": function}


def _places(text: str, fields: Sequence[_Field]) -> list[_Place]:
    places: list[_Place] = []
    for match in _SENTINEL.finditer(text):
        field = fields[int(match[1])]
        places.append(_Place(match.start(), match.end(), field.message, field.name))
    return places


def _owner(block: Span, places: Sequence[_Place], messages: Sequence[Message]) -> int:
    """The assistant message that a marked block belongs to."""
    inside = [p.message for p in places if block[0] <= p.start < block[1] and _is_assistant(messages, p.message)]
    if inside:
        return inside[-1]
    before = max((p.message for p in places if p.end <= block[0]), default=-1)
    following = (i for i in range(max(before, 0), len(messages)) if _is_assistant(messages, i))
    return next(following, len(messages) - 1)


def _is_assistant(messages: Sequence[Message], index: int) -> bool:
    return messages[index]["role"] == "assistant"


def _not_empty(spans: Iterable[Span]) -> tuple[Span, ...]:
    return tuple(span for span in spans if span[1] > span[0])


def _after(text: str, sentinel: str) -> str | None:
    """What follows the last `sentinel`; all of it for an empty one; None where it is missing."""
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
    """Characters of `left` that `right` begins with, counted in whole units (tags, words)."""
    at = 0
    for unit in _UNIT.findall(left):
        if not right.startswith(unit, at):
            break
        at += len(unit)
    return at


def _moved(position: int, skeleton: _Skeleton, starts: Sequence[int]) -> int:
    """A position in a literal part of the skeleton, as the position of the same character in the row's text."""
    at = 0
    for literal, start in zip(skeleton.literals, starts, strict=True):
        if at <= position <= at + len(literal):
            return start + position - at
        at += len(literal) + len("qz70000007zq")
    raise AssertionError("a turn's border lies inside a sentinel")


def _forms(value: str) -> list[str]:
    """The forms in which templates write a content: as it is, stripped, or as JSON."""
    stripped = (value, value.strip(), value.strip("\n"), value.lstrip(), value.rstrip())
    stripped += (value.lstrip("\n"), value.rstrip("\n"))
    escaped = (json.dumps(form, ensure_ascii=plain)[1:-1] for form in stripped[:2] for plain in (False, True))
    return list(dict.fromkeys((*stripped, *escaped)))


def _check_calls(index: int, message: Message, written: str) -> None:
    """Refuse a turn whose calls are not all written: it would teach nothing, or an untrue answer."""
    names = [str(call.get("function", call).get("name")) for call in message.get("tool_calls") or []]
    for name in names:
        if written.count(name) < names.count(name):
            which = "leaves out" if written.count(name) == 0 else "writes only some of"
            raise DataError(
                f"the chat template {which} messages[{index}].tool_calls ('{name}'). Use a model whose template writes "
                "such calls, give each call a message of its own, or write the call into the content"
            )


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Ranges that touch, as one."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _thinking_apart(message: Message) -> Message:
    """`<think>A</think>B` in an assistant's content, as the fields `reasoning_content` A and `content` B."""
    content = message.get("content")
    if message["role"] != "assistant" or "reasoning_content" in message or not isinstance(content, str):
        return message
    head, mark, tail = content.partition("</think>")
    if not mark or "</think>" in tail:
        return message
    thought = head.rpartition("<think>")[2].strip("\n")
    return {**message, "reasoning_content": thought, "content": tail.lstrip("\n")}


def _with_arguments(call: Message, as_text: bool) -> Message:
    """A tool call with its arguments as an object (Hugging Face's form), or as JSON text where a template needs it."""
    call = copy.deepcopy(call)
    function = call.get("function", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str) and not as_text:
        try:
            parsed = parse_json(arguments)
        except ValueError:
            return call
        function["arguments"] = parsed if isinstance(parsed, dict) else arguments
    elif as_text and arguments is not None and not isinstance(arguments, str):
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return call


def _for_template(message: Message, parts: bool) -> Message:
    """The message as a template reads it: thinking under both of its names, the content as parts where asked."""
    shown = dict(message)
    if shown.get("reasoning_content") is not None:
        shown = {"thinking": shown["reasoning_content"], **shown}
    if parts and isinstance(shown.get("content"), str):
        shown["content"] = [{"type": "text", "text": shown["content"]}]
    return shown


def _short(value: str, limit: int = 60) -> str:
    return repr(value if len(value) <= limit else value[: limit - 3] + "...")
