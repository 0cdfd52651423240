"""Parse a raw row into a typed row, or a list of faults.

The first row's columns decide a file's format (`columns.py`):

    messages                       a conversation                                     -> ChatRow
    instruction, output [, input]  a user message and its answer                      -> ChatRow
    prompt, completion             two texts                                          -> CompletionRow
                                   two lists of messages                              -> ChatRow, completion in the loss
    text                           everything in the loss                             -> TextRow

A conversation may have `tools`, and a `system` column instead of a system message; `instruction` rows may also have a
`history`. Other columns are reported as not used (`unused.py`), unless they look like misspelt names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from graftlm.base.template_render import Message
from graftlm.data.columns import KNOWN, NEEDED, Fault, Format, RawRow, columns_of, format_of, misspelt, shown
from graftlm.errors import nearest
from graftlm.jsonfile import parse_json

Kind = Literal["chat", "completion", "text"]

ROLES = ("system", "developer", "user", "assistant", "tool")
_MESSAGE_KEYS = (
    "role",
    "content",
    "reasoning_content",
    "tool_calls",
    "tool_call_id",
    "name",
    "weight",
    "function_call",
)
_THINKING = ("thinking", "reasoning")
"""Other names of `reasoning_content`."""


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation; its assistant messages, or everything, are in the loss."""

    row: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    masked: frozenset[int] = frozenset()
    """Indices of messages with weight 0, which are not in the loss."""
    prompt: int = 0
    """How many of the first messages are a prompt, which is in the loss only with `train_on` everything."""
    dropped: tuple[str, ...] = ()
    """Keys of the row's messages that are not passed to the template."""
    kind: Kind = "chat"


@dataclass(frozen=True, slots=True)
class CompletionRow:
    """A prompt, and its completion, which is in the loss."""

    row: str
    prompt: str
    completion: str
    kind: Kind = "completion"


@dataclass(frozen=True, slots=True)
class TextRow:
    """A text, all of it in the loss."""

    row: str
    text: str
    kind: Kind = "text"


ParsedRow = ChatRow | CompletionRow | TextRow


def parse(raw: RawRow, form: Format) -> ParsedRow | list[Fault]:
    """Parse a row of this format; returns the row, or all of its faults."""
    reader = _Reader(raw)
    missing = [name for name in NEEDED[form] if name not in raw.columns]
    if missing:
        own = format_of(raw)
        if isinstance(own, Fault):
            return [own]
        mend = "put rows of different formats into files of their own and give each with --data"
        return [Fault(raw.row, "columns", f"a row of format '{own}'", f"'{form}', as the file's first row", mend)]
    known = columns_of(form)
    for name in raw.columns:
        if name in KNOWN:
            continue
        close = misspelt(name, tuple(k for k in known if k not in raw.columns))
        if close is not None:
            reader.fault(name, "an unknown column", f"'{close}'", f"rename '{name}' to '{close}', or remove it")
    reader.refuse_unheard()
    parsed = _PARSERS[form](reader)
    return reader.faults if reader.faults or parsed is None else parsed


class _Reader:
    """Parses one row and collects its faults."""

    def __init__(self, raw: RawRow) -> None:
        self.row = raw.row
        self.columns = raw.columns
        self.faults: list[Fault] = []
        self.dropped: dict[str, None] = {}

    def fault(self, field: str, found: str, expected: str, mend: str) -> None:
        self.faults.append(Fault(self.row, field, found, expected, mend))

    def refuse_unheard(self) -> None:
        """Refuse columns that would change the meaning of a row and are not supported."""
        if self.columns.get("chat_template_kwargs"):
            value = shown(self.columns["chat_template_kwargs"])
            mend = "remove the column, or put what it switches into the chat template itself (chat_template.jinja)"
            self.fault("chat_template_kwargs", value, "nothing: every row is rendered alike", mend)

    def without(self, names: Sequence[str], mend: str) -> None:
        """Refuse columns that only a conversation can have."""
        for name in names:
            if self.columns.get(name):
                self.fault(name, shown(self.columns[name]), "no such column beside plain texts", mend)

    def chat(self, messages: Sequence[Message], prompt: int = 0) -> ChatRow:
        """A conversation of these messages, the first `prompt` of them a prompt, with the row's system message first."""
        out = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        places = {i for i, message in enumerate(messages) if message.get("weight") == 0}
        system = self.columns.get("system")
        if system is not None and self.text("system", system, empty=True).strip():
            if out and out[0]["role"] in ("system", "developer"):
                mend = "keep one of the two"
                self.fault("system", "a text", f"none beside the first message, of role '{out[0]['role']}'", mend)
            out.insert(0, {"role": "system", "content": system})
            places = {place + 1 for place in places}
            prompt += bool(prompt)
        return ChatRow(self.row, tuple(out), self.tools(), frozenset(places), prompt, tuple(self.dropped))

    def text(self, field: str, value: Any, *, empty: bool = False) -> str:
        if not isinstance(value, str):
            self.fault(field, shown(value), "a text", 'put it in quotes: "..."')
            return ""
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"half of a character ({value[error.start]!r}) at position {error.start}"
            self.fault(field, half, "whole characters", "repair the text; an emoji was cut in two")
            return ""
        if not empty and not value.strip():
            self.fault(field, shown(value), "a text with something in it", "write the text, or remove the row")
        return value

    # -------------------------------------------------------------------------------------------- formats

    def read_completion(self) -> ParsedRow | None:
        prompt, completion = self.columns["prompt"], self.columns["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            before = self.messages("prompt", prompt)
            after = self.messages("completion", completion)
            self.needs_answer("completion", after)
            return self.chat((*before, *after), len(before))
        for field, value in (("prompt", prompt), ("completion", completion)):
            if isinstance(value, list):
                self.fault(field, "a list of messages", "the same form as the other column", "write both as lists")
                return None
        mend = "rename 'prompt' to 'instruction' and 'completion' to 'output', which is a conversation; or remove it"
        self.without(("system", "history", "tools"), mend)
        return CompletionRow(self.row, self.text("prompt", prompt, empty=True), self.text("completion", completion))

    def read_instruction(self) -> ParsedRow | None:
        task = self.text("instruction", self.columns["instruction"])
        more = self.columns.get("input")
        if more is not None and self.text("input", more, empty=True).strip():
            task = f"{task}\n\n{more}"
        output = self.text("output", self.columns["output"])
        turns = (("user", task), ("assistant", output))
        return self.chat([*self.history(), *({"role": role, "content": text} for role, text in turns)])

    def history(self) -> list[Message]:
        """Earlier turns, as pairs of question and answer."""
        value = self.columns.get("history")
        if isinstance(value, str) and value.strip():
            with contextlib.suppress(ValueError):  # reported below
                value = parse_json(value)
        if not value:
            return []
        expected, mend = "a list of pairs of texts", 'write [["question", "answer"], ...]'
        if not isinstance(value, list):
            self.fault("history", shown(value), expected, mend)
            return []
        messages: list[Message] = []
        for index, pair in enumerate(value):
            if not isinstance(pair, list) or len(pair) != 2:
                self.fault(f"history[{index}]", shown(pair), expected, mend)
                continue
            for place, role in enumerate(("user", "assistant")):
                messages.append({"role": role, "content": self.text(f"history[{index}][{place}]", pair[place])})
        return messages

    def read_text(self) -> ParsedRow | None:
        self.without(("system", "tools"), "write it into the text, or remove it")
        return TextRow(self.row, self.text("text", self.columns["text"]))

    def read_messages(self) -> ParsedRow | None:
        messages = self.messages("messages", self.columns["messages"])
        self.needs_answer("messages", messages)
        if self.columns.get("history"):
            mend = "put them into 'messages' as user and assistant messages"
            self.fault("history", shown(self.columns["history"]), "no earlier turns beside 'messages'", mend)
        return self.chat(messages)

    # -------------------------------------------------------------------------------------------- messages

    def messages(self, field: str, value: Any) -> tuple[Message, ...]:
        if not isinstance(value, list) or not value:
            self.fault(field, shown(value), "a list of messages", 'write [{"role": "user", "content": "..."}, ...]')
            return ()
        return tuple(self.message(f"{field}[{index}]", item) for index, item in enumerate(value))

    def needs_answer(self, field: str, messages: Sequence[Message]) -> None:
        if messages and not self.faults and not any(message["role"] == "assistant" for message in messages):
            roles = ", ".join(message["role"] for message in messages)
            self.fault(field, f"only {roles}", "at least one assistant message", "add the answer, or remove the row")

    def message(self, field: str, value: Any) -> Message:
        if not isinstance(value, dict):
            self.fault(field, shown(value), "an object", 'write {"role": "user", "content": "..."}')
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
            self.fault(f"{field}.role", shown(role) if "role" in value else "missing", ", ".join(ROLES), mend)
            return {"role": "?"}
        message: Message = {key: inner for key, inner in value.items() if inner is not None}
        for key in message:
            if key in _MESSAGE_KEYS:
                continue
            close = misspelt(key, tuple(k for k in _MESSAGE_KEYS if k not in message))
            if close is not None:
                self.fault(f"{field}.{key}", "an unknown key", f"'{close}'", f"rename '{key}' to '{close}'")
        self.weight(f"{field}.weight", role, message)
        for other in _THINKING:
            if other in message and "reasoning_content" in message:
                self.fault(f"{field}.{other}", "beside 'reasoning_content'", "one of the two", "remove one")
            elif other in message:
                message["reasoning_content"] = message.pop(other)
        if "function_call" in message:  # OpenAI's older form, with one call
            if "tool_calls" in message:
                self.fault(f"{field}.function_call", "beside 'tool_calls'", "one of the two", "remove one")
            message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
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
            # An empty answer would have the end token as its only target; an empty system or tool text is harmless.
            message["content"] = self.text(f"{field}.content", content, empty=role != "assistant" or bool(calls))
        return message

    def weight(self, field: str, role: str, message: Message) -> None:
        """OpenAI's `weight` of a message: 0 excludes it from the loss, 1 is the default of assistant messages."""
        weight = message.get("weight", 1)
        if type(weight) not in (int, float) or weight not in (0, 1):
            self.fault(field, shown(weight), "0 (read, not trained) or 1 (trained)", "write 0 or 1, or remove it")
        elif "weight" in message and role != "assistant" and weight != 0:
            mend = "remove it; --train-on everything trains every message"
            self.fault(field, f"1 in a message of role '{role}'", "0: only assistants' messages are trained", mend)

    def parts(self, field: str, parts: list[Any]) -> str:
        """Content as a list of parts; only text parts are supported."""
        texts: list[str] = []
        for index, part in enumerate(parts):
            if isinstance(part, str):
                texts.append(part)
            elif isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
                texts.append(part["text"])
                self.dropped |= {f"content[].{key}": None for key in part if key not in ("type", "text")}
            else:
                mend = "remove the part, or the row: Graft trains on text only"
                self.fault(f"{field}[{index}]", shown(part), '{"type": "text", "text": "..."}', mend)
        return "".join(texts)

    def tool_calls(self, field: str, role: str, calls: Any) -> None:
        if role != "assistant":
            self.fault(field, f"in a message of role '{role}'", "only assistants call tools", "remove it")
        if not isinstance(calls, list):
            self.fault(field, shown(calls), "a list of calls", 'write [{"type": "function", "function": {...}}]')
            return
        for index, call in enumerate(calls):
            function = call.get("function", call) if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
                mend = 'write {"type": "function", "function": {"name": "...", "arguments": {...}}}'
                self.fault(f"{field}[{index}]", shown(call), "a call with the function's name", mend)
            elif call.get("type", "function") != "function":
                self.fault(
                    f"{field}[{index}].type", shown(call["type"]), "'function'", "write it as a function, or remove it"
                )
            elif not isinstance(function.get("arguments", {}), dict | str):
                mend = 'write {"city": "Paris"} or the same as JSON text'
                self.fault(f"{field}[{index}].function.arguments", shown(function["arguments"]), "an object", mend)

    def tools(self) -> tuple[dict[str, Any], ...] | None:
        value = self.columns.get("tools")
        older = self.columns.get("functions")
        if older and value:
            self.fault("functions", shown(older), "nothing beside 'tools'", "keep one of the two")
        elif isinstance(older, list) and all(isinstance(function, dict) for function in older):
            value = [{"type": "function", "function": function} for function in older]
        elif older:
            self.fault("functions", shown(older), "a list of function descriptions", "rename it to 'tools'")
        if isinstance(value, str) and value.strip():
            try:  # tables with fixed columns usually store tools as JSON
                value = parse_json(value)
            except ValueError:
                self.fault("tools", shown(value), "a list of tool descriptions", "write it as a JSON list")
                return None
        if not value:
            return None
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            self.fault("tools", shown(value), "a list of tool descriptions", 'write [{"type": "function", ...}]')
            return None
        return tuple(value)


_PARSERS = {
    "messages": _Reader.read_messages,
    "completion": _Reader.read_completion,
    "instruction": _Reader.read_instruction,
    "text": _Reader.read_text,
}
