"""From an answer's text to its tool calls while it is written: content, and for each call a name and pieces of its arguments.

    parser = ToolCallParser("hermes", {"weather"})
    parser.push("Let me look.\n<tool_call>\n{\"na")    [content "Let me look."]
    parser.push('me": "weather", "arguments": {"ci')   [call 0 "weather"] [call 0 arguments '{"ci']
    parser.finish()

Content is held back while its end could begin a call, and white space before and behind calls is markup. A call is known by a
function that was offered, and its arguments are sent as they come; what is not a call after all is content, every character
of it. Where that shows only after arguments were sent, the call is also told to be broken (a text that ends within a call is
the usual case). So the content of an answer is the same in pieces and as a whole.

The parser is a generator over the text that has come: it yields where it needs more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Generator
from dataclasses import dataclass
from string import ascii_letters

from graftlm.jsonfile import parse_json
from graftlm.serving.engine.detokenizer import overlap
from graftlm.serving.engine.tool_call_forms import FormName, usual_form

_HEAD = re.compile(
    r'\{\s*(?:"(?:type|id)"\s*:\s*"[^"\\]*"\s*,\s*)*"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.){1,256}")\s*,\s*'
    r'"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_NAMED_HEAD = re.compile(r'(?P<name>[^\s\[\]{}"]{1,256})(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)')
_NAMED_PART = re.compile(r'[^\s\[\]{}"]{1,256}(?:\[[A-Z_]*\]?\w*)?(?:\[[A-Z]*\]?)?\s*')
_JSON = frozenset(' \t\r\n{}[],:"+-.0123456789' + ascii_letters)
_END, _PYTHON_TAG = "</tool_call>", "<|python_tag|>"

_Steps = Generator[None]
_Found = Generator[None, None, int | None]


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What is new of call `index`: first its name, then pieces of its arguments; `broken` where it is none after all."""

    index: int
    name: str = ""
    arguments: str = ""
    broken: bool = False


class ToolCallParser:
    """The tool calls of one answer.

    `names`: the functions that were offered. `most`: how many calls are returned, None for all; further ones are left out.
    """

    def __init__(self, form: FormName, names: Collection[str], most: int | None = None) -> None:
        self._form, self._names, self._most = form, names, most
        self._trigger = usual_form(form).trigger or _PYTHON_TAG
        self._bare = form == "llama3_json"  # whether a call may begin here without a trigger
        self._text, self._at, self._ended = "", 0, False
        self._out: list[str | CallDelta] = []
        self._space = ""  # white space that is content if no call follows
        self._behind_call = False
        self._index = -1  # of the call that is read; -1 for one that is left out
        self._started = 0
        self.calls = 0
        """How many calls were read that are not broken."""
        self._steps = self._parse()

    def push(self, text: str) -> list[str | CallDelta]:
        """What is certain with more of the text: content as text, and parts of calls."""
        self._text += text
        return self._go()

    def finish(self) -> list[str | CallDelta]:
        """What was held back, at the end of the answer."""
        self._ended = True
        return self._go()

    def _go(self) -> list[str | CallDelta]:
        next(self._steps, None)
        out, self._out = self._out, []
        return out

    # ---- content ----------------------------------------------------------------------------------------------------

    def _parse(self) -> _Steps:
        while (begin := (yield from self._find())) is not None:
            yield from self._read_calls(begin)
        if self._space:
            self._out.append(self._space)

    def _find(self) -> _Found:
        """Where a call may begin; what is before it is content. None at the end of the text."""
        while True:
            if self._bare:
                bare = yield from self._skip_space(self._at)
                if self._text.startswith("{", bare):
                    self._say(self._text[self._at : bare])
                    return bare
                self._bare = False
            at = self._text.find(self._trigger, self._at)
            keep = 0 if self._ended else overlap(self._text[self._at :], (self._trigger,))
            cut = at if at >= 0 else len(self._text) - keep
            self._say(self._text[self._at : cut])
            self._at = cut
            if at >= 0:
                return at
            if self._ended:
                return None
            yield

    def _say(self, text: str) -> None:
        """Content; white space at its end waits for what follows, and behind a call it is none."""
        if self._behind_call:
            text = text.lstrip()
            self._behind_call = not text
        text = self._space + text
        bare = text.rstrip()
        self._space = text[len(bare) :]
        if bare:
            self._out.append(bare)

    def _skip_space(self, at: int) -> Generator[None, None, int]:
        """The place of the next character that is no white space; the end of the text where none comes."""
        while True:
            while at < len(self._text) and self._text[at].isspace():
                at += 1
            if at < len(self._text) or self._ended:
                return at
            yield

    # ---- calls ------------------------------------------------------------------------------------------------------

    def _read_calls(self, begin: int) -> _Steps:
        """Read the calls that follow a trigger, or one another; what is none is left for content."""
        trigger = self._trigger if self._text.startswith(self._trigger, begin) else ""
        at = begin + len(trigger)
        listed = False
        if self._form == "mistral":
            at = yield from self._skip_space(at)
            listed = self._text.startswith("[", at)
            at += listed
        left = begin + len(trigger)  # what follows is content if it is no call
        self._bare = False
        while True:
            index = self._index = -1
            end = yield from self._call(at, named=self._form == "mistral" and not listed)
            index = self._index
            if end is None:
                if index >= 0:
                    self._out.append(CallDelta(index, broken=True))
                self._say(trigger)
                self._at = left
                return
            trigger, self._space, self._behind_call = "", "", True
            self.calls += 1
            self._at = left = end
            following = yield from self._next(end, listed)
            if following is None:
                return
            at = following

    def _next(self, end: int, listed: bool) -> _Found:
        """Where another call follows without a trigger; passes what closes the last one."""
        at = yield from self._skip_space(end)
        if self._form == "hermes":
            while not self._ended and overlap(self._text[at:], (_END,)) == len(self._text) - at:
                yield
            if self._text.startswith(_END, at):
                self._at = at + len(_END)
            return None
        if (self._form == "llama3_json" and self._text.startswith(";", at)) or (
            listed and self._text.startswith(",", at)
        ):
            return at + 1
        if listed and self._text.startswith("]", at):
            self._at = at + 1
        return None

    def _call(self, at: int, *, named: bool) -> _Found:
        """Read one call; returns where it ends, None for what is none."""
        at = yield from self._skip_space(at)
        named = named and not self._text.startswith("{", at)
        head = yield from (self._named_head(at) if named else self._object_head(at))
        if head is None:
            return None if named else self._whole_object(at)
        try:
            name = head["name"] if named else parse_json(head["name"])
        except ValueError:
            return None
        if name not in self._names:
            return None
        self._begin(name)
        arguments = _Nesting(head.end())
        end = yield from self._close(arguments, tell=True)
        if end is None or not _is_object(self._text[head.end() : end]):
            return None
        if named:
            return end
        whole = yield from self._close(_Nesting(end, depth=1))
        return whole if whole is not None and _is_object(self._text[at:whole]) else None

    def _begin(self, name: str) -> None:
        """Tell of a call, unless enough of them were told already."""
        if self._most is None or self.calls < self._most:
            self._index, self._started = self._started, self._started + 1
            self._out.append(CallDelta(self._index, name=name))

    def _whole_object(self, at: int) -> int | None:
        """A call whose object has its keys in another order: it is told at its end, which has come if it comes at all."""
        end = _Nesting(at).close(self._text) if self._text.startswith("{", at) else None
        try:
            found = parse_json(self._text[at:end]) if end is not None else None
        except ValueError:
            return None
        arguments = found.get("arguments", found.get("parameters")) if isinstance(found, dict) else None
        name = found.get("name") if isinstance(found, dict) else None
        if not isinstance(arguments, dict) or not isinstance(name, str) or name not in self._names:
            return None
        self._begin(name)
        if self._index >= 0:
            self._out.append(CallDelta(self._index, arguments=json.dumps(arguments)))
        return end

    def _object_head(self, at: int) -> Generator[None, None, re.Match[str] | None]:
        """The beginning of {"name": ..., "arguments": ... ."""
        nesting = _Nesting(at)
        while (head := _HEAD.match(self._text, at)) is None:
            if not self._text.startswith("{", at) or nesting.close(self._text) is not None:
                return None
            if nesting.invalid or self._ended:
                return None
            yield
        return head

    def _named_head(self, at: int) -> Generator[None, None, re.Match[str] | None]:
        """The beginning of name[ARGS]{ ."""
        while (head := _NAMED_HEAD.match(self._text, at)) is None:
            if self._ended or _NAMED_PART.fullmatch(self._text, at) is None:
                return None
            yield
        return head

    def _close(self, nesting: _Nesting, *, tell: bool = False) -> _Found:
        """Where the object ends; its text is told as arguments on the way. None where it does not end, or is no JSON."""
        while True:
            begin = nesting.at
            end = nesting.close(self._text)
            if tell and self._index >= 0 and nesting.at > begin:
                self._out.append(CallDelta(self._index, arguments=self._text[begin : nesting.at]))
            if end is not None:
                return end
            if nesting.invalid or self._ended:
                return None
            yield


class _Nesting:
    """Follows the brackets of JSON from `at` on, which is inside `depth` of them."""

    def __init__(self, at: int, depth: int = 0) -> None:
        self.at, self._depth = at, depth
        self._quoted = self._escaped = False
        self.invalid = False
        """Whether there is a character that JSON does not have outside of its strings."""

    def close(self, text: str) -> int | None:
        """Where the outermost bracket closes; None where it does not yet."""
        while self.at < len(text) and not self.invalid:
            character = text[self.at]
            if self._quoted:
                self._quoted = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
            elif character not in _JSON:
                self.invalid = True
                return None
            self.at += 1
            if not self._depth and not self._quoted:
                return self.at
        return None


def _is_object(text: str) -> bool:
    try:
        return isinstance(parse_json(text), dict)
    except ValueError:
        return False
