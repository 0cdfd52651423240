"""A template's text is transformers', and a template gets nothing but the conversation."""

from __future__ import annotations

import datetime

import pytest
import transformers
from packaging.version import Version
from trl_templates import (
    CALL,
    CONVERSATIONS,
    FOLDER,
    NAMES,
    TOOLS,
    assistant,
    encoder_of,
    mark,
    tokenizer_with,
    user,
)

from graftlm.base.chat import Encoder
from graftlm.base.template_render import TemplateRenderer
from graftlm.errors import DataError, ModelError


@pytest.mark.parametrize("name", NAMES)
def test_the_text_of_a_conversation_is_what_transformers_renders(name: str) -> None:
    encoder = encoder_of(name)
    template = encoder._template
    compared = 0
    for messages, tools in CONVERSATIONS.values():
        for prompt in (False, True):
            given = messages
            if Version(transformers.__version__) < Version("5.21"):  # later ones give thinking both of its names
                given = [{"thinking": m["reasoning_content"], **m} if "reasoning_content" in m else m for m in messages]
            if template.renderer.parts:
                given = [
                    {**m, "content": [{"type": "text", "text": m["content"]}]} if "content" in m else m for m in given
                ]
            try:
                expected = encoder.tokenizer.apply_chat_template(
                    given,
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    date_string=datetime.date.today().strftime("%d %b %Y"),
                )
            except Exception:  # what transformers cannot render, we may render (deepseek's tool calls) or refuse
                continue
            assert template.render(messages, tools, prompt=prompt) == expected
            compared += 1
    assert compared >= 6


def test_the_date_is_the_one_given_and_not_todays() -> None:
    for name, expected in (
        ("llama3_1", "Today Date: 03 Feb 2021"),
        ("llama3_2", "Today Date: 03 Feb 2021"),
        ("gptoss", "Current date: 2021-02-03"),
        ("muse_glimmer", "Current date: 2021-02-03"),
    ):
        encoder = Encoder(tokenizer_with((FOLDER / f"{name}.jinja").read_text()), date="2021-02-03")
        assert expected in encoder.mark_chat([user("Hi"), assistant("Hello")]).text
        assert expected in encoder.tokenizer.decode(encoder.prompt([user("Hi")]))


def test_a_template_that_is_not_jinja_is_refused() -> None:
    with pytest.raises(ModelError, match="line 1"):
        TemplateRenderer("{% for m in messages %}", {}, [], "2026-01-01")


def test_a_template_that_calls_itself_without_end_refuses_the_conversation() -> None:
    source = "{% macro m(x) %}{{ m(x) }}{% endmacro %}{% if messages[0].content == 'deep' %}{{ m(1) }}{% endif %}"
    template = TemplateRenderer(source, {}, (), "2024-07-26")
    assert template.render([{"role": "user", "content": "flat"}]) == ""
    with pytest.raises(DataError, match="calls itself without end"):
        template.render([{"role": "user", "content": "deep"}])


def test_a_template_cannot_reach_into_python() -> None:
    for attack in (
        "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__init__=1) }}",
        "{{ cycler.__init__.__globals__ }}",
    ):
        template = TemplateRenderer(attack, {}, [], "2026-01-01")
        with pytest.raises(DataError):
            template.render([user("Hi")])


def test_a_template_does_not_change_the_callers_messages() -> None:
    for name in ("deepseekv3", "gptoss", "smolvlm"):
        messages = [user("Rain?"), {"role": "assistant", "content": None, "tool_calls": [dict(CALL)]}]
        before = repr(messages)
        mark(name, (messages, TOOLS))
        assert repr(messages) == before
