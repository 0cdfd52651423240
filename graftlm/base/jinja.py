"""The Jinja environment of chat templates, with a fixed date, and the plain template for models without one.

It has the same functions and filters as transformers (tests compare the texts), in Jinja's sandbox. transformers cannot fix the
date: it reduces values passed to a template to plain data, so a `strftime_now` of ours would become a string. The text between
`{% generation %}` and `{% endgeneration %}` is rendered between two marks, which `unmark` removes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

PLAIN_TEMPLATE = """\
{%- if tools %}{{- '### Tools:\\n' }}{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}{{- '\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- '### Assistant:\\n' }}
{%- generation %}
{%- if message['reasoning_content'] %}{{- '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n' }}{%- endif %}
{%- if message['content'] %}{{- message['content'] }}{%- endif %}
{%- for call in message['tool_calls'] or [] %}
{%- if message['content'] or not loop.first %}{{- '\\n' }}{%- endif %}
{{- '<tool_call>' + (call['function'] if call['function'] is defined else call) | tojson + '</tool_call>' }}
{%- endfor %}
{{- eos_token }}
{%- endgeneration %}
{%- if not loop.last or add_generation_prompt %}{{- '\\n\\n' }}{%- endif %}
{%- else %}
{{- '### ' + message['role'] | capitalize + ':\\n' + message['content'] + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Assistant:\\n' }}{%- endif %}
"""
"""The template of a model without one: headings, the text, and the tokenizer's end token after each answer."""

# Unicode reserves these two code points for use inside a program; they are never text.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
MARKS = re.compile(f"[{OPEN}{CLOSE}]")


def unmark(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Remove the generation marks from a rendered text; returns it with the ranges between them."""
    if OPEN not in text:
        return text, []
    clean: list[str] = []
    spans: list[tuple[int, int]] = []
    opened: list[int] = []
    length = 0
    for piece in re.split(f"([{OPEN}{CLOSE}])", text):
        if piece == OPEN:
            opened.append(length)
        elif piece == CLOSE:
            spans.append((opened.pop(), length))
        else:
            clean.append(piece)
            length += len(piece)
    return "".join(clean), spans


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: puts the block's output between two marks."""

    tags = {"generation"}  # noqa: RUF012  (Jinja reads it from the class)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return OPEN + caller() + CLOSE


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that reach into Python."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template may not set {name!r} on a namespace")
        super().__setitem__(name, value)


def _namespace(*pairs: Any, **values: Any) -> _Namespace:
    for name in dict(*pairs, **values):
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template may not set {name!r} on a namespace")
    return _Namespace(*pairs, **values)


def environment(strftime: Callable[[str], str]) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """A sandbox with the functions that templates expect; `strftime_now` calls `strftime`."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def make_dict(*pairs: Any, **values: Any) -> dict[Any, Any]:
        return dict(*pairs, **values)

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    sandbox.filters["tojson"] = tojson
    names: dict[str, Any] = sandbox.globals
    names.update(raise_exception=refuse, strftime_now=strftime, dict=make_dict, namespace=_namespace)
    return sandbox
