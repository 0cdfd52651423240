"""The grammar of an answer that calls tools: the markup of the model's form as literals, the arguments as JSON of their schema.

It is written in llguidance's dialect of Lark. For two functions in Hermes' form:

    start: calls
    calls: "<tool_call>\\n{\\"name\\": \\"" call ("}\\n</tool_call>\\n<tool_call>\\n{\\"name\\": \\"" call)* "}\\n</tool_call>"
    call: "weather" "\\", \\"arguments\\": " %json {...} | "now" "\\", \\"arguments\\": " %json {...}

White space inside the arguments is that of Python's `json.dumps`, in which chat templates write them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftlm.serving.engine.answer_parser import CLOSE, OPEN
from graftlm.serving.engine.tool_call_forms import CALL_IDS, CallForm

_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class Function:
    """A function that may be called; its arguments are JSON of `schema`."""

    name: str
    schema: dict[str, Any]


@dataclass(frozen=True, slots=True)
class CallConstraint:
    """What an answer may be: calls of these functions, or with `optional` text as well, or JSON of a schema instead of text."""

    form: CallForm
    functions: Sequence[Function]
    parallel: bool = True
    """Whether there may be several calls."""
    optional: bool = False
    instead: dict[str, Any] | None = None


def json_rule(schema: dict[str, Any], options: Mapping[str, Any] = _JSON_OPTIONS) -> str:
    """JSON of a schema, as part of a grammar."""
    return f"%json {json.dumps({**schema, 'x-guidance': dict(options)})}"


def calls_grammar(wanted: CallConstraint, special: Mapping[str, int], *, opened: bool, thinks: bool) -> str:
    """The grammar of an answer. `special`: the tokens that llguidance does not read as text.

    `opened`: the prompt ends within reasoning, which goes on before anything else. `thinks`: there may be reasoning first.
    """
    form, markup = wanted.form, wanted.form.markup
    one = [f"{_literal(json.dumps(f.name)[1:-1], special)} {_literal(markup.middle, special)} {json_rule(f.schema)}"
           for f in wanted.functions]  # fmt: skip
    more = ""
    if wanted.parallel and markup.between is not None:
        more = f"({_literal(markup.between, special)} call)*"
    behind = f"call {more} {_literal(markup.closing, special)}"
    rules = [f"call: {' | '.join(one)}", "TEXT: /(.|\\n)*/"]
    calls = f"{_literal(markup.opening, special)} {behind}"
    if not wanted.optional:
        rules.append(f"answer: {calls}")
    elif wanted.instead is not None:
        rules.append(f"answer: {calls} | {json_rule(wanted.instead, {'whitespace_flexible': False})}")
    elif form.trigger:
        rules += [f"answer: begun {_literal(markup.opening.removeprefix(form.trigger), special)} {behind} | TEXT"]
        rules += [_lazy("begun", form.trigger, special)]
    else:  # a call is the whole answer, and text begins with another character
        rules += [f"answer: {calls} | FREE", "FREE: /(\\s*[^{\\s](.|\\n)*)?/"]
    return "\n".join(["%llguidance {}", *reasoning_rules("answer", special, opened=opened, thinks=thinks), *rules])


def reasoned_json(schema: dict[str, Any], special: Mapping[str, int], *, opened: bool, thinks: bool) -> str:
    """The grammar of JSON behind reasoning; `opened` and `thinks` as for calls."""
    rules = ["TEXT: /(.|\\n)*/", f"answer: {json_rule(schema, {'whitespace_flexible': False})}"]
    return "\n".join(["%llguidance {}", *reasoning_rules("answer", special, opened=opened, thinks=thinks), *rules])


def reasoning_rules(answer: str, special: Mapping[str, int], *, opened: bool, thinks: bool) -> list[str]:
    """Where a grammar starts: reasoning, as far as there is any, and then the answer."""
    if not thinks and not opened:
        return [f"start: {answer}"]
    thought = "thought /\\n*/"
    lead = thought if opened else f"({_literal(OPEN, special)} {thought})?"
    return [f"start: {lead} {answer}", _lazy("thought", CLOSE, special)]


def _lazy(rule: str, ending: str, special: Mapping[str, int]) -> str:
    """A rule for text up to its first `ending`."""
    if ending in special:  # a token of its own, which is no part of any text
        return f"{rule}: TEXT <[{special[ending]}]>"
    return f"{rule}[lazy]: TEXT {json.dumps(ending)}"


def _literal(text: str, special: Mapping[str, int]) -> str:
    """A text that is written as it is; where the id of a call belongs, any id."""
    among = sorted((*special, *CALL_IDS), key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, among))})", text)
    return " ".join(
        "/[A-Za-z0-9]{9}/" if part in CALL_IDS else f"<[{special[part]}]>" if part in special else json.dumps(part)
        for part in parts
        if part
    )
