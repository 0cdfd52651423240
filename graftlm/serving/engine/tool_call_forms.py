"""The forms in which models write tool calls, and which of them a base's chat template has.

    hermes        <tool_call>\\n{"name": "weather", "arguments": {"city": "Paris"}}\\n</tool_call>       Hermes, Qwen
    llama3_json   {"name": "weather", "parameters": {"city": "Paris"}}                                  Llama 3
    mistral       [TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris"}}]                     Mistral
                  [TOOL_CALLS]weather[ARGS]{"city": "Paris"}                                            later ones

The names are those of vLLM's parsers. A template's form is found by trying: it renders an answer with one call and with two,
and what it writes around names and arguments is the markup, white space included. So a constrained answer has the markup that
training has shown the model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from graftlm.base.chat import Encoder
from graftlm.base.template_render import Message, message_of, probe_text

FormName = Literal["hermes", "llama3_json", "mistral"]
FORM_NAMES: tuple[FormName, ...] = get_args(FormName)
CALL_IDS = ("qyprobe01", "qyprobe02")
"""What stands in a markup where the id of a call belongs: nine letters and digits, as Mistral's templates want them."""


@dataclass(frozen=True, slots=True)
class CallMarkup:
    """The text around an answer's calls: `opening` name `middle` arguments (`between` name `middle` arguments)* `closing`.

    `between` is None where an answer has one call.
    """

    opening: str
    middle: str
    between: str | None
    closing: str


@dataclass(frozen=True, slots=True)
class CallForm:
    """A form and its markup."""

    name: FormName
    markup: CallMarkup

    @property
    def trigger(self) -> str:
        """What begins a call within a text; empty where a call is the whole answer."""
        return _TRIGGERS[self.name]


_TRIGGERS: dict[FormName, str] = {"hermes": "<tool_call>", "llama3_json": "", "mistral": "[TOOL_CALLS]"}
_USUAL: dict[FormName, CallMarkup] = {
    "hermes": CallMarkup(
        '<tool_call>\n{"name": "', '", "arguments": ', '}\n</tool_call>\n<tool_call>\n{"name": "', "}\n</tool_call>"
    ),
    "llama3_json": CallMarkup('{"name": "', '", "parameters": ', None, "}"),
    "mistral": CallMarkup('[TOOL_CALLS][{"name": "', '", "arguments": ', '}, {"name": "', "}]"),
}
_OBJECT_OPENING = re.compile(r'(?:\[\s*)?\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"\Z')
_OBJECT_MIDDLE = re.compile(r'"\s*,\s*"(?:arguments|parameters)"\s*:\s*')
_NAMED_MIDDLE = re.compile(r"(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*")


def writes_tools(encoder: Encoder) -> bool:
    """Whether a chat template tells the model which tools there are."""
    text = encoder.attempt([message_of("user", probe_text(0))], [_tool(probe_text(7))], prompt=True)
    return text is not None and probe_text(7) in text


def usual_form(name: FormName) -> CallForm:
    """A form with the markup that most models have who write it."""
    return CallForm(name, _USUAL[name])


def find_form(encoder: Encoder) -> CallForm | None:
    """The form in which a chat template writes tool calls; None where it writes none, or in a form that is not known."""
    question, tools = message_of("user", probe_text(0)), [_tool(probe_text(7))]
    one, prompt = (encoder.attempt([question, *more], tools, prompt=not more) for more in ([_calling(1)], []))
    found = _around(1).search(one) if one is not None else None
    if one is None or found is None:
        return None
    start, name = _begin(one[: found.start()], found["middle"], prompt or "")
    if name is None:
        return None
    closing = one[found.end() :]
    ends = [at for stop in encoder.stop_texts if (at := closing.find(stop)) >= 0]
    two = encoder.attempt([question, _calling(2)], tools)
    both = _around(2).search(two) if two is not None else None
    return CallForm(
        name,
        CallMarkup(
            opening=one[start : found.start()],
            middle=found["middle"],
            between=both["between"] if both is not None else None,
            closing=closing[: min(ends)] if ends else closing.rstrip(),
        ),
    )


def _begin(before: str, middle: str, prompt: str) -> tuple[int, FormName | None]:
    """Where a call begins in the text before its function's name, and its form."""
    named = _NAMED_MIDDLE.fullmatch(middle) is not None
    opening = _OBJECT_OPENING.search(before)
    if opening is not None and _OBJECT_MIDDLE.fullmatch(middle) is None:
        return 0, None
    for name, trigger in _TRIGGERS.items():
        start = before.rfind(trigger) if trigger else -1
        if start < 0:
            continue
        behind = start + len(trigger)
        if opening is not None and not before[behind : opening.start()].strip():
            return start, name
        if name == "mistral" and named and not before[behind:].strip():
            return start, name
    if opening is not None and opening[0][0] == "{" and before[: opening.start()].rstrip() == prompt.rstrip():
        return opening.start(), "llama3_json"
    return 0, None


def _tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"a": {"type": "string", "description": "a"}}, "required": ["a"]}
    return {"type": "function", "function": {"name": name, "description": "a", "parameters": parameters}}


def _calling(count: int) -> Message:
    """An answer with some calls; the tools' names are others, so that a name stands where its call is."""
    calls = [
        {
            "id": CALL_IDS[i],
            "type": "function",
            "function": {"name": probe_text(i + 1), "arguments": {"a": probe_text(i + 3)}},
        }
        for i in range(count)
    ]
    return {"role": "assistant", "tool_calls": calls}


def _around(count: int) -> re.Pattern[str]:
    """Finds the names and arguments of `_calling(count)`, and what is between them."""
    arguments = [rf'\{{\s*"a"\s*:\s*"{probe_text(i + 3)}"\s*\}}' for i in range(count)]
    text = rf"{probe_text(1)}(?P<middle>.{{0,40}}?){arguments[0]}"
    if count == 2:
        text += rf"(?P<between>.{{1,80}}?){probe_text(2)}.{{0,40}}?{arguments[1]}"
    return re.compile(text, re.DOTALL)
