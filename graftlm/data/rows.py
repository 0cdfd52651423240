"""A raw row becomes a typed example, or a list of faults that a person can mend.

Four formats are known by their columns; the first row of a file decides which one the file has, and a later row of
another format is a fault (a half-renamed column would otherwise pass as data of another kind):

    messages                       a conversation, with optional `tools`              -> Chat
    instruction, output [, input]  a task: one user message, one answer               -> Chat
    prompt, completion             two texts -> Completion; two lists of messages     -> Chat, completion trained
    text                           everything is trained                              -> Text

Other columns (an id, a source) are left alone, unless they look like a misspelt one.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from graftlm.base.template import Message
from graftlm.errors import DataError, nearest

Format = Literal["messages", "completion", "instruction", "text"]
Kind = Literal["chat", "completion", "text"]

ROLES = ("system", "developer", "user", "assistant", "tool")
_NEEDED: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
_OPTIONAL: dict[Format, tuple[str, ...]] = {
    "messages": ("tools",),
    "completion": ("tools",),
    "instruction": ("input",),
    "text": (),
}
_MESSAGE_KEYS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")
_KNOWN = tuple(dict.fromkeys(name for names in (*_NEEDED.values(), *_OPTIONAL.values()) for name in names))
_EXPECTED = "messages, prompt + completion, instruction + output, or text"
SHOWN = 20
"""Faults listed in one error."""


@dataclass(frozen=True, slots=True)
class Raw:
    """A row as it was read."""

    row: str  # "train.jsonl:17"
    columns: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one row, and how to mend it."""

    row: str
    field: str
    found: str
    expected: str
    mend: str

    def __str__(self) -> str:
        expected = f"; expected {self.expected}" if self.expected else ""
        mend = f". {self.mend[:1].upper()}{self.mend[1:]}" if self.mend else ""
        mend += "" if mend.endswith("?") else "."
        return f"{self.row}: {self.field}: {self.found}{expected}{mend}"


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; assistant messages from `first` on may be trained."""

    row: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    first: int = 0
    kind: Kind = "chat"


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt, and the text to be trained."""

    row: str
    prompt: str
    completion: str
    kind: Kind = "completion"


@dataclass(frozen=True, slots=True)
class Text:
    """A text to be trained as a whole."""

    row: str
    text: str
    kind: Kind = "text"


Example = Chat | Completion | Text


def refuse(faults: Sequence[Fault]) -> DataError:
    """One error for all faults: up to 20 in full, the rest counted."""
    rows = len({fault.row for fault in faults})
    lines = [f"{rows} row{'s' if rows != 1 else ''} cannot be trained on; nothing was trained:"]
    lines += [f"  {fault}" for fault in faults[:SHOWN]]
    if len(faults) > SHOWN:
        lines.append(f"  and {len(faults) - SHOWN} more")
    return DataError("\n".join(lines))


def format_of(raw: Raw) -> Format | Fault:
    """Which format a row's columns are, or the fault that names the nearest known column."""
    columns = raw.columns
    for form, needed in _NEEDED.items():
        if all(name in columns for name in needed):
            return form
    for needed in _NEEDED.values():  # one of two columns is there: the other one is missing or misspelt
        have = [name for name in needed if name in columns]
        if have:
            lacking = next(name for name in needed if name not in columns)
            others = [name for name in columns if name not in _KNOWN]
            close = difflib.get_close_matches(lacking, others, n=1, cutoff=0.5)
            mend = f"rename '{close[0]}' to '{lacking}'" if close else f"add the column '{lacking}'"
            return Fault(raw.row, "columns", _names(columns), f"'{lacking}' beside '{have[0]}'", mend)
    if "conversations" in columns:
        mend = (
            "rename 'conversations' to 'messages', 'from' to 'role' (human: user, gpt: assistant), 'value' to 'content'"
        )
        return Fault(raw.row, "columns", _names(columns), _EXPECTED, mend)
    near = next((hint for name in columns if (hint := nearest(name, _KNOWN))), "")
    wrong = next((name for name in columns if nearest(name, _KNOWN)), "")
    mend = f"'{wrong}'{near}" if wrong else "rename the columns to one of these"
    return Fault(raw.row, "columns", _names(columns), _EXPECTED, mend)


def parse(raw: Raw, form: Format) -> Example | list[Fault]:
    """A row of a file of this format, as an example, or everything that is wrong with it."""
    reader = _Reader(raw)
    missing = [name for name in _NEEDED[form] if name not in raw.columns]
    if missing:
        own = format_of(raw)
        if isinstance(own, Fault):
            return [own]
        mend = "put rows of different formats into files of their own and give each with --data"
        return [Fault(raw.row, "columns", f"a row of format '{own}'", f"'{form}', as the file's first row", mend)]
    known = (*_NEEDED[form], *_OPTIONAL[form])
    for name in raw.columns:
        if name in _KNOWN:
            continue
        close = _misspelt(name, tuple(k for k in known if k not in raw.columns))
        if close is not None:
            reader.fault(name, "an unknown column", f"'{close}'", f"rename '{name}' to '{close}', or remove it")
    example = _PARSERS[form](reader)
    return reader.faults if reader.faults or example is None else example


class _Reader:
    """One row being read, and its faults so far."""

    def __init__(self, raw: Raw) -> None:
        self.row = raw.row
        self.columns = raw.columns
        self.faults: list[Fault] = []

    def fault(self, field: str, found: str, expected: str, mend: str) -> None:
        self.faults.append(Fault(self.row, field, found, expected, mend))

    def text(self, field: str, value: Any, *, empty: bool = False) -> str:
        if not isinstance(value, str):
            self.fault(field, _shown(value), "a text", 'put it in quotes: "..."')
            return ""
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"half of a character ({value[error.start]!r}) at position {error.start}"
            self.fault(field, half, "whole characters", "repair the text; an emoji was cut in two")
            return ""
        if not empty and not value.strip():
            self.fault(field, _shown(value), "a text with something in it", "write the text, or remove the row")
        return value

    # -------------------------------------------------------------------------------------------- formats

    def read_completion(self) -> Example | None:
        prompt, completion = self.columns["prompt"], self.columns["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            before = self.messages("prompt", prompt)
            after = self.messages("completion", completion)
            self.needs_answer("completion", after)
            return Chat(self.row, (*before, *after), self.tools(), first=len(before))
        for field, value in (("prompt", prompt), ("completion", completion)):
            if isinstance(value, list):
                self.fault(field, "a list of messages", "the same form as the other column", "write both as lists")
                return None
        return Completion(self.row, self.text("prompt", prompt, empty=True), self.text("completion", completion))

    def read_instruction(self) -> Example | None:
        task = self.text("instruction", self.columns["instruction"])
        more = self.columns.get("input")
        if more is not None and self.text("input", more, empty=True).strip():
            task = f"{task}\n\n{more}"
        output = self.text("output", self.columns["output"])
        return Chat(self.row, ({"role": "user", "content": task}, {"role": "assistant", "content": output}))

    def read_text(self) -> Example | None:
        return Text(self.row, self.text("text", self.columns["text"]))

    def read_messages(self) -> Example | None:
        messages = self.messages("messages", self.columns["messages"])
        self.needs_answer("messages", messages)
        return Chat(self.row, messages, self.tools())

    # -------------------------------------------------------------------------------------------- messages

    def messages(self, field: str, value: Any) -> tuple[Message, ...]:
        if not isinstance(value, list) or not value:
            self.fault(field, _shown(value), "a list of messages", 'write [{"role": "user", "content": "..."}, ...]')
            return ()
        return tuple(self.message(f"{field}[{index}]", item) for index, item in enumerate(value))

    def needs_answer(self, field: str, messages: Sequence[Message]) -> None:
        if messages and not self.faults and not any(message["role"] == "assistant" for message in messages):
            roles = ", ".join(message["role"] for message in messages)
            self.fault(field, f"only {roles}", "at least one assistant message", "add the answer, or remove the row")

    def message(self, field: str, value: Any) -> Message:
        if not isinstance(value, dict):
            self.fault(field, _shown(value), "an object", 'write {"role": "user", "content": "..."}')
            return {"role": "?"}
        role = value.get("role")
        if role not in ROLES:
            near = nearest(role, ROLES) if isinstance(role, str) else ""
            mend = near.removeprefix(", ") or "use one of these"
            if role in ("human", "gpt", "model", "bot", "function"):
                names = {
                    "human": "user",
                    "gpt": "assistant",
                    "model": "assistant",
                    "bot": "assistant",
                    "function": "tool",
                }
                mend = f"rename it to '{names[role]}'"
            self.fault(f"{field}.role", _shown(role) if "role" in value else "missing", ", ".join(ROLES), mend)
            return {"role": "?"}
        message: Message = {key: inner for key, inner in value.items() if inner is not None}
        for key in message:
            if key in _MESSAGE_KEYS:
                continue
            close = _misspelt(key, tuple(k for k in _MESSAGE_KEYS if k not in message))
            if close is not None:
                self.fault(f"{field}.{key}", "an unknown key", f"'{close}'", f"rename '{key}' to '{close}'")
        if "thinking" in message and "reasoning_content" not in message:
            message["reasoning_content"] = message.pop("thinking")
        calls = message.get("tool_calls")
        if calls is not None:
            self.tool_calls(f"{field}.tool_calls", role, calls)
        if "reasoning_content" in message:
            if role != "assistant":
                self.fault(
                    f"{field}.reasoning_content", f"in a message of role '{role}'", "only assistants", "remove it"
                )
            message["reasoning_content"] = self.text(
                f"{field}.reasoning_content", message["reasoning_content"], empty=True
            )
        content = message.get("content")
        if isinstance(content, list):
            message["content"] = content = self.parts(f"{field}.content", content)
        if content is None:
            if not calls:
                self.fault(f"{field}.content", "missing", "a text", 'add "content": "..."')
        else:
            # An empty answer would train the end token alone; an empty system or tool text is harmless.
            message["content"] = self.text(f"{field}.content", content, empty=role != "assistant" or bool(calls))
        return message

    def parts(self, field: str, parts: list[Any]) -> str:
        """Contents as lists of parts, of which only texts can be trained on."""
        texts: list[str] = []
        for index, part in enumerate(parts):
            if isinstance(part, str):
                texts.append(part)
            elif isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
                texts.append(part["text"])
            else:
                mend = "remove the part, or the row: Graft trains on text only"
                self.fault(f"{field}[{index}]", _shown(part), '{"type": "text", "text": "..."}', mend)
        return "".join(texts)

    def tool_calls(self, field: str, role: str, calls: Any) -> None:
        if role != "assistant":
            self.fault(field, f"in a message of role '{role}'", "only assistants call tools", "remove it")
        if not isinstance(calls, list):
            self.fault(field, _shown(calls), "a list of calls", 'write [{"type": "function", "function": {...}}]')
            return
        for index, call in enumerate(calls):
            function = call.get("function", call) if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
                mend = 'write {"type": "function", "function": {"name": "...", "arguments": {...}}}'
                self.fault(f"{field}[{index}]", _shown(call), "a call with the function's name", mend)
            elif not isinstance(function.get("arguments", {}), dict | str):
                mend = 'write {"city": "Paris"} or the same as JSON text'
                self.fault(f"{field}[{index}].function.arguments", _shown(function["arguments"]), "an object", mend)

    def tools(self) -> tuple[dict[str, Any], ...] | None:
        value = self.columns.get("tools")
        if isinstance(value, str) and value.strip():
            try:  # the usual way to keep tools in a table of fixed columns
                value = json.loads(value)
            except json.JSONDecodeError:
                self.fault("tools", _shown(value), "a list of tool descriptions", "write it as a JSON list")
                return None
        if not value:
            return None
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            self.fault("tools", _shown(value), "a list of tool descriptions", 'write [{"type": "function", ...}]')
            return None
        return tuple(value)


_PARSERS = {
    "messages": _Reader.read_messages,
    "completion": _Reader.read_completion,
    "instruction": _Reader.read_instruction,
    "text": _Reader.read_text,
}


@functools.lru_cache
def _misspelt(name: str, known: tuple[str, ...]) -> str | None:
    """The known name that `name` is a slip of the pen away from."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return close[0] if close else None


def _names(columns: dict[str, Any]) -> str:
    return "has " + (", ".join(f"'{name}'" for name in list(columns)[:8]) or "no columns")


def _shown(value: Any, limit: int = 60) -> str:
    """A value as JSON writes it, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."
