"""Render messages with a chat template, in the form that the template expects.

Templates expect contents as text or as lists of parts, tool arguments as objects or as JSON text, a missing content or None.
`TemplateRenderer` finds a template's form once, by trying.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2

from graftlm.base.jinja import MARKS, environment
from graftlm.errors import DataError, ModelError
from graftlm.jsonfile import parse_json

Message = dict[str, Any]
Tools = Sequence[Mapping[str, Any]]


class TemplateRenderer:
    """A compiled template; the arguments are those of `template.Template`.

    `special` finds the tokenizer's special tokens in a text, `notes` has notes for the user about this template.
    Raises ModelError if the template is not valid Jinja.
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
        self.special = re.compile("|".join(map(re.escape, known)) or "(?!)")
        self.parts = False  # contents as lists of {"type": "text"} (templates of vision models)
        self._arguments_as_text = False  # tool calls' arguments as JSON text (templates that concatenate them)
        self._null_content = False  # with tool calls, content None instead of missing
        self._probe_forms()

    def render(self, messages: Sequence[Message], tools: Tools | None = None, *, prompt: bool = False) -> str:
        """The text of a conversation; `prompt` adds the generation prompt. Raises DataError."""
        return MARKS.sub("", self.render_marked(self.prepare(messages), tools, prompt))

    def render_marked(self, messages: Sequence[Message], tools: Tools | None, prompt: bool) -> str:
        """The text with its generation marks, of `messages` from `prepare`."""
        hint = ""
        if any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
            hint = ". It may not know tool calls: use a model whose template does, or write them into the contents"
        try:
            return self._compiled.render(
                # A template must not change the messages; the sandbox prevents it.
                messages=[_for_template(message, self.parts) for message in messages],
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=prompt,
                **self.variables,
            )
        except jinja2.UndefinedError as error:
            raise DataError(
                f"the model's chat template needs something this conversation lacks: {error}{hint}"
            ) from error
        except jinja2.TemplateError as error:
            raise DataError(f"the model's chat template refuses this conversation: {error}{hint}") from error
        except RecursionError:
            raise DataError(f"the model's chat template calls itself without end on this conversation{hint}") from None
        except (TypeError, KeyError, AttributeError, ValueError, IndexError) as error:
            name = type(error).__name__
            raise DataError(f"the model's chat template fails on this conversation ({name}: {error}){hint}") from error

    def prepare(self, messages: Sequence[Message]) -> list[Message]:
        """Drop empty keys, since templates test for missing ones, and convert tool arguments to the template's form."""
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
        """Find the template's form of contents and tool arguments, by trying."""
        user, answer = probe_text(0), probe_text(1)
        conversation: list[Message] = [message_of("user", user), message_of("assistant", answer)]
        for parts in (False, True):
            self.parts = parts
            text = self.attempt(conversation)
            if text is not None and user in text and answer in text:
                break
        else:
            self.parts = False
        call = [message_of("user", user), {"role": "assistant", "tool_calls": [probe_call()]}]
        for self._null_content, self._arguments_as_text in itertools.product((False, True), repeat=2):
            text = self.attempt(call)
            if text is not None and probe_text(8) in text and "Undefined" not in text:
                return
        self._null_content = self._arguments_as_text = False

    def attempt(self, messages: Sequence[Message], tools: Tools | None = None, *, prompt: bool = False) -> str | None:
        """The text of a conversation, or None if the template refuses it."""
        try:
            return self.render(messages, tools, prompt=prompt)
        except DataError:
            return None

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def message_of(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def probe_text(number: int) -> str:
    return f"qy{number}probe{number}yq"


def probe_call() -> Message:
    function = {"name": probe_text(9), "arguments": {"a": probe_text(8)}}
    return {"id": "call_1", "type": "function", "function": function}


def _with_arguments(call: Message, as_text: bool) -> Message:
    """A tool call with its arguments as an object (Hugging Face's form), or as JSON text if the template needs it."""
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
    """The message in the template's form: thinking under both of its names, the content optionally as parts."""
    shown = dict(message)
    if shown.get("reasoning_content") is not None:
        shown = {"thinking": shown["reasoning_content"], **shown}
    if parts and isinstance(shown.get("content"), str):
        shown["content"] = [{"type": "text", "text": shown["content"]}]
    return shown


def shortened(value: str, limit: int = 60) -> str:
    return repr(value if len(value) <= limit else value[: limit - 3] + "...")
