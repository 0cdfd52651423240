"""Tool calls and reasoning are told apart from content as an answer is written, in whatever pieces it comes."""

from __future__ import annotations

import itertools
import json
from random import Random
from typing import Any

import pytest
import tiny_run
import trl_templates

from graftlm.base.chat import Encoder
from graftlm.errors import RequestError
from graftlm.serving.engine.answer_parser import AnswerParser, Piece, Reasoning, ReasoningParser
from graftlm.serving.engine.prompts import Parsers, PromptEncoder
from graftlm.serving.engine.tool_call_forms import CallMarkup, find_form, usual_form, writes_tools
from graftlm.serving.engine.tool_call_parser import CallDelta, ToolCallParser

NAMES = {"weather", "now"}
PARIS, EMPTY = '{"city": "Paris"}', "{}"
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
LLAMA = '{"name": "weather", "parameters": {"city": "Paris"}}'
LISTED = '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "now", "arguments": {}}]'
LISTED_WITH_IDS = LISTED.replace("}}", '}, "id": "abc123def"}').replace("CALLS]", "CALLS] ")
NAMED = '[TOOL_CALLS]weather[ARGS]{"city": "Paris"}'
ODD = '{"text": "a \\"quote\\", </tool_call> and {[", "n": [{"a": {}}, 1.5e-3, null]}'

Read = tuple[str, str, list[tuple[str, str]]]
GOOD: list[tuple[Any, str, str, list[tuple[str, str]]]] = [
    ("hermes", "Hello there", "Hello there", []),
    ("hermes", " two  words \n", " two  words \n", []),
    ("hermes", HERMES, "", [("weather", PARIS)]),
    ("hermes", f"{HERMES}\n{NOW}", "", [("weather", PARIS), ("now", EMPTY)]),
    ("hermes", f"Let me look.\n{HERMES}\n", "Let me look.", [("weather", PARIS)]),
    ("hermes", f"One.\n{HERMES}\nTwo.\n{NOW}", "One.Two.", [("weather", PARIS), ("now", EMPTY)]),
    ("hermes", HERMES.removesuffix("</tool_call>"), "", [("weather", PARIS)]),
    ("hermes", f'<tool_call>{{"name":"weather","arguments":{ODD}}}</tool_call>', "", [("weather", ODD)]),
    ("hermes", '<tool_call>{"name": "now", "parameters": {}}</tool_call>', "", [("now", EMPTY)]),
    ("hermes", '<tool_call>{"arguments": {"city": "Paris"}, "name": "weather"}</tool_call>', "", [("weather", PARIS)]),
    ("llama3_json", LLAMA, "", [("weather", PARIS)]),
    ("llama3_json", f"<|python_tag|>{LLAMA}", "", [("weather", PARIS)]),
    ("llama3_json", f'\n{LLAMA}; {{"name": "now", "parameters": {{}}}}', "", [("weather", PARIS), ("now", EMPTY)]),
    ("llama3_json", '{"type": "function", "name": "now", "parameters": {}}', "", [("now", EMPTY)]),
    ("llama3_json", f"Such as {LLAMA}", f"Such as {LLAMA}", []),
    ("mistral", LISTED, "", [("weather", PARIS), ("now", EMPTY)]),
    ("mistral", LISTED_WITH_IDS, "", [("weather", PARIS), ("now", EMPTY)]),
    ("mistral", NAMED, "", [("weather", PARIS)]),
    ("mistral", f"Well.{NAMED}[TOOL_CALLS]now[CALL_ID]abc123def[ARGS]{{}}", "Well.", [("weather", PARIS), ("now", EMPTY)]),
    ("mistral", "[TOOL_CALLS]now{}", "", [("now", EMPTY)]),
]  # fmt: skip
BAD = [
    ("hermes", "<tool_call>\nI shall call you.\n</tool_call>"),
    ("hermes", '<tool_call>\n{"name": "weather"}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": "Paris"}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "delete", "arguments": {}}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"name": 5, "arguments": {}}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"name": ["weather"], "arguments": {}}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"arguments": {}, "name": {"weather": 1}}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": }}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "city": "Oslo"}}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Par'),
    ("hermes", "<tool_call>"),
    ("hermes", "a <tool_ca"),
    ("llama3_json", '{"name": "delete", "parameters": {}}'),
    ("llama3_json", '{"answer": {"name": "weather", "parameters": {}}}'),
    ("llama3_json", '{"name": "weather", "parameters": {"city'),
    ("mistral", "[TOOL_CALLS]delete[ARGS]{}"),
    ("mistral", "[TOOL_CALLS] weather [ARGS] Paris"),
    ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": [1]}]'),
    ("mistral", "[TOOL_CALLS]"),
]


def pieces(text: str, seed: int | None) -> list[str]:
    """A text in pieces: one, single characters, or random ones."""
    if seed is None:
        return [text]
    random, found = Random(seed), list[str]()
    while text:
        size = random.choice((1, 2, 3, 7, 20)) if seed else 1
        found.append(text[:size])
        text = text[size:]
    return found


def put_together(parts: list[Piece]) -> tuple[str, str, list[tuple[str, str]], set[int]]:
    """Reasoning, content, calls with their arguments, and which of them are broken."""
    content = "".join(part for part in parts if isinstance(part, str))
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    calls: dict[int, list[str]] = {}
    for part in parts:
        if isinstance(part, CallDelta):
            if part.name:
                assert part.index == len(calls), "the name comes first, and calls are numbered in order"
                calls[part.index] = [part.name, ""]
            calls[part.index][1] += part.arguments
    broken = {part.index for part in parts if isinstance(part, CallDelta) and part.broken}
    return reasoning, content, [(name, arguments) for name, arguments in calls.values()], broken


def read(
    form: Any, text: str, seed: int | None, most: int | None = None
) -> tuple[str, list[tuple[str, str]], set[int]]:
    parser = AnswerParser(None, ToolCallParser(form, NAMES, most))
    found = [part for piece in pieces(text, seed) for part in parser.push(piece)]
    _, content, calls, broken = put_together([*found, *parser.push("", last=True)])
    assert parser.called == (len(calls) > len(broken))
    return content, calls, broken


@pytest.mark.parametrize(("form", "text", "content", "calls"), GOOD)
def test_calls_and_content_are_told_apart_in_whatever_pieces_they_come(
    form: Any, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    for seed in (None, *range(9)):
        assert read(form, text, seed) == (content, calls, set())
    for _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize(("form", "text"), BAD)
def test_what_is_no_call_is_content_every_character_of_it(form: Any, text: str) -> None:
    for seed in (None, *range(9)):
        content, calls, broken = read(form, text, seed)
        assert content == text
        assert len(broken) == len(calls) <= 1, "of what was told already it is told that it is broken"
        both = read(form, f"Well.\n{text}" if form != "llama3_json" else text, seed)
        assert both[0].endswith(text)


def test_a_good_call_behind_a_bad_one_is_found() -> None:
    for (form, bad), seed in itertools.product(BAD[:4], (None, 0, 1)):
        content, calls, broken = read(form, f"{bad}\n{HERMES}", seed)
        assert (content, calls, broken) == (bad, [("weather", PARIS)], set())


def test_arguments_in_any_order_of_keys_are_text_that_can_be_sent() -> None:
    parser = ToolCallParser("hermes", NAMES)
    text = '<tool_call>{"arguments": {"city": "\\ud83d", "q": "Köln"}, "name": "weather"}</tool_call>'
    parts = [part for part in [*parser.push(text), *parser.finish()] if isinstance(part, CallDelta)]
    arguments = "".join(part.arguments for part in parts)
    assert arguments.encode(), "half of a surrogate pair stays as JSON spells it"
    assert json.loads(arguments) == {"city": "\ud83d", "q": "Köln"}


def test_where_one_call_is_asked_for_the_first_is_returned() -> None:
    for text, form in ((f"{HERMES}\n{NOW}", "hermes"), (LISTED, "mistral")):
        for seed in (None, 0, 3):
            assert read(form, text, seed, most=1) == ("", [("weather", PARIS)], set())


def test_arguments_are_told_as_they_come_and_a_name_before_them() -> None:
    parser = ToolCallParser("hermes", NAMES)
    assert parser.push('Look.\n<tool_call>\n{"name": "weather", "argu') == ["Look."]
    assert parser.push('ments": {"ci') == [CallDelta(0, name="weather"), CallDelta(0, arguments='{"ci')]
    assert parser.push('ty": "Paris') == [CallDelta(0, arguments='ty": "Paris')]
    assert parser.push('"}}\n</tool_') == [CallDelta(0, arguments='"}')]
    assert parser.push("call>") == parser.finish() == []


THOUGHTS = [
    (False, "Hello", "", "Hello"),
    (False, "<think>\nHm <b>\n</think>\n\nHello", "Hm <b>", "Hello"),
    (False, "\n<think>Hm</think>Hello", "Hm", "Hello"),
    (False, "<think>\n\n</think>\n\n Hello\n", "", " Hello\n"),
    (False, "A <think>B</think>", "", "A <think>B</think>"),
    (False, "<thinner", "", "<thinner"),
    (False, "<thi", "", "<thi"),
    (True, "Hm\n\nhm\n</think>\n\nHello", "Hm\n\nhm", "Hello"),
    (True, "\n<think>\nHm\n</think>Hello", "Hm", "Hello"),
    (True, "Hm, </thin", "Hm, </thin", ""),
    (True, "", "", ""),
]


@pytest.mark.parametrize(("opened", "text", "reasoning", "content"), THOUGHTS)
def test_reasoning_is_told_from_content_also_where_the_prompt_opens_it(
    opened: bool, text: str, reasoning: str, content: str
) -> None:
    for seed in (None, *range(9)):
        parser = AnswerParser(ReasoningParser(opened), None)
        found = [part for piece in pieces(text, seed) for part in parser.push(piece)]
        assert put_together([*found, *parser.push("", last=True)])[:2] == (reasoning, content)


def test_a_call_behind_reasoning_is_found_and_one_within_it_is_reasoning() -> None:
    for seed in (None, 0, 1):
        parser = AnswerParser(ReasoningParser(False), ToolCallParser("hermes", NAMES))
        text = f"<think>\nI might say {NOW}\n</think>\n\n{HERMES}"
        found = [part for piece in pieces(text, seed) for part in parser.push(piece)]
        reasoning, content, calls, _ = put_together([*found, *parser.push("", last=True)])
        assert (reasoning, content, calls) == (f"I might say {NOW}", "", [("weather", PARIS)])


# ---- the form of a template ------------------------------------------------------------------------------------------

FORMS = {
    "qwen2_5": "hermes", "qwen3": "hermes", "qwen3_instruct_2507": "hermes",
    "qwen3_vl": "hermes", "llama3_1": "llama3_json", "llama3_2": "llama3_json",
}  # fmt: skip


def test_a_templates_form_is_found_by_trying() -> None:
    for name in trl_templates.NAMES:
        encoder = trl_templates.encoder_of(name)
        found = find_form(encoder) if writes_tools(encoder) else None
        assert (found.name if found is not None else None) == FORMS.get(name.removesuffix("_training")), name
        if found is not None:
            assert found == usual_form(found.name)


def test_the_plain_template_and_mistrals_have_their_own_markup() -> None:
    plain = find_form(Encoder(trl_templates.tokenizer_with(None)))
    assert plain is not None
    opening = '<tool_call>{"name": "'
    assert plain.markup == CallMarkup(opening, '", "arguments": ', "}</tool_call>\n" + opening, "}</tool_call>")
    for calls, middle, ends in (
        ("[TOOL_CALLS] [{% for c in m.tool_calls %}{% if not loop.first %}, {% endif %}{{ {'name': c.function.name, "
         "'arguments': c.function.arguments, 'id': c.id} | tojson }}{% endfor %}]",
         '", "arguments": ', ', "id": "qyprobe01"}]'),
        ("{% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}",
         "[ARGS]", ""),
    ):  # fmt: skip
        source = (
            "<s>{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}"
            "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.tool_calls %}" + calls + "</s>"
            "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
        )
        encoder = Encoder(trl_templates.tokenizer_with(source))
        found = find_form(encoder)
        assert found is not None
        assert found.name == "mistral"
        assert (found.markup.middle, found.markup.closing) == (middle, ends)
        text = encoder.attempt(
            [
                trl_templates.user("Rain?"),
                {"role": "assistant", "tool_calls": [trl_templates.CALL, trl_templates.OTHER_CALL]},
            ],
            trl_templates.TOOLS,
        )
        assert text is not None
        answer = text.partition("[/INST]")[2].removesuffix("</s>")
        assert read("mistral", answer, None)[1] == [("weather", PARIS), ("weather", '{"city": "Oslo"}')]


def test_a_template_that_writes_no_tools_is_told_apart() -> None:
    assert not writes_tools(trl_templates.encoder_of("phi3"))
    assert writes_tools(trl_templates.encoder_of("llama3_2"))
    assert writes_tools(trl_templates.encoder_of("glm4moe"))


def test_a_form_may_be_named_and_has_the_templates_own_markup_where_it_is_the_templates() -> None:
    tokenizer = trl_templates.tokenizer_with(None)
    assert PromptEncoder(tokenizer, None, "chat", Parsers("mistral")).call_form() == usual_form("mistral")
    own = PromptEncoder(tokenizer, None, "chat", Parsers("hermes")).call_form()
    assert own == PromptEncoder(tokenizer, None, "chat").call_form() != usual_form("hermes")
    with pytest.raises(RequestError, match="it is asked in plain text"):
        PromptEncoder(tokenizer, None, "text").call_form()


def test_reasoning_is_looked_for_where_the_template_has_it_or_by_name() -> None:
    def encoder(name: str, reasoning: Any = "auto") -> PromptEncoder:
        source = (trl_templates.FOLDER / f"{name}.jinja").read_text()
        return PromptEncoder(trl_templates.tokenizer_with(source), None, "auto", Parsers(reasoning=reasoning))

    question = [trl_templates.user("Hi")]
    for name, reasoning, thinks, opened in (
        ("qwen3", "auto", True, False), ("qwen3", "none", False, False), ("phi3", "auto", False, False),
        ("phi3", "qwen3", True, False), ("phi3", "deepseek_r1", True, True), ("qwen3_5_think", "auto", True, True),
        ("deepseek_r1_distill", "auto", True, True),
    ):  # fmt: skip
        one = encoder(name, reasoning)
        assert (one.thinks, one.opens_reasoning(one.chat(question))) == (thinks, opened), (name, reasoning)


@pytest.mark.parametrize("field", ["tool_calls", "reasoning_content"])
def test_plain_text_refuses_what_it_has_no_place_for(field: str) -> None:
    encoder = PromptEncoder(tiny_run.byte_tokenizer(), None, "text")
    messages: list[dict[str, Any]] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert encoder.chat(messages) == encoder.text("a\nb")
    messages[1][field] = [{"id": "x", "function": {"name": "f", "arguments": "{}"}}] if field == "tool_calls" else "Hm"
    with pytest.raises(RequestError, match=f"a message has {field}, and this model is asked in plain text") as error:
        encoder.chat(messages)
    assert error.value.field == "messages"


def test_what_training_shows_is_what_the_parser_reads() -> None:
    """An answer with two calls as each template renders it, cut out as its loss mask has it."""
    for name, form in FORMS.items():
        encoder = trl_templates.encoder_of(name)
        title = "tool call last" if form == "llama3_json" else "two tools"
        messages, tools = trl_templates.CONVERSATIONS[title]
        marked = encoder.mark_chat(messages[:2], tools)
        (answer,) = trl_templates.spans(marked)
        for stop in encoder.stop_texts:
            answer = answer.partition(stop)[0]
        parser = AnswerParser(ReasoningParser(False), ToolCallParser(form, NAMES))  # type: ignore[arg-type]
        _, content, calls, _ = put_together(parser.push(answer, last=True))
        assert content == ""
        expected = [("weather", PARIS), ("weather", '{"city": "Oslo"}')]
        assert calls == expected[: len(messages[1]["tool_calls"])], name
