"""An answer that must call a function has the markup of the model's form and arguments of the function's schema."""

from __future__ import annotations

import json
from collections import Counter
from random import Random
from typing import Any

import pytest
import tiny_run
import torch
from tokenizers import AddedToken

from graftlm.errors import RequestError
from graftlm.serving.engine.answer_parser import AnswerParser, Reasoning, ReasoningParser
from graftlm.serving.engine.structured_output import GrammarCompiler, JsonGrammar
from graftlm.serving.engine.tool_call_forms import CallForm, CallMarkup, usual_form
from graftlm.serving.engine.tool_call_parser import CallDelta, ToolCallParser
from graftlm.serving.engine.tool_grammar import CallConstraint, Function

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
NONE = {"type": "object", "properties": {}, "additionalProperties": False}
FUNCTIONS = [Function("weather", SCHEMA), Function("now", NONE)]
NAMED = CallForm("mistral", CallMarkup("[TOOL_CALLS]", "[ARGS]", "[TOOL_CALLS]", ""))
WITH_ID = CallForm("mistral", CallMarkup(
    '[TOOL_CALLS] [{"name": "', '", "arguments": ', ', "id": "qyprobe01"}, {"name": "', ', "id": "qyprobe02"}]',
))  # fmt: skip
FORMS = [usual_form("hermes"), usual_form("llama3_json"), usual_form("mistral"), NAMED, WITH_ID]
CALLS = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>',
    "llama3_json": '{"name": "weather", "parameters": {"city": "Paris", "days": 3}}',
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris", "days": 3}}]',
}


@pytest.fixture(scope="module", params=[False, True], ids=["markup is text", "markup is tokens"])
def compiler(request: pytest.FixtureRequest) -> GrammarCompiler:
    tokenizer = tiny_run.byte_tokenizer()
    if request.param:
        markup = ("[TOOL_CALLS]", "[ARGS]", "<tool_call>", "</tool_call>", "<think>", "</think>")
        tokenizer.add_tokens([AddedToken(text, special=text[0] == "[", normalized=False) for text in markup])
    found = GrammarCompiler(tokenizer, len(tokenizer), {2})
    found.tokenizer = tokenizer  # type: ignore[attr-defined]
    return found


def written(compiler: Any, grammar: JsonGrammar, seed: int, most: int = 400) -> str | None:
    """An answer by whichever of the allowed tokens; None for one without end."""
    walk, ids, random = grammar.start(), list[int](), Random(seed)
    for _ in range(most):
        row = torch.zeros(len(compiler.tokenizer))
        walk.restrict(row)
        assert not walk.failure
        allowed = row.isfinite().nonzero()[:, 0].tolist()
        token = 2 if 2 in allowed and random.random() < 0.5 else random.choice(allowed)
        ids += [token] if token != 2 else []
        if walk.accept(token):
            return compiler.tokenizer.decode(ids)
    return None


def allows(compiler: Any, grammar: JsonGrammar, text: str) -> bool:
    """Whether an answer may be this text."""
    walk = grammar.start()
    for token in [*compiler.tokenizer.encode(text, add_special_tokens=False), 2]:
        row = torch.zeros(len(compiler.tokenizer))
        walk.restrict(row)
        if walk.failure or not row[token].isfinite():
            return False
        if walk.accept(token):
            return True
    return False


def calls_of(form: CallForm, text: str) -> list[tuple[str, Any]]:
    """What a client gets of an answer, which has nothing but calls."""
    parser = ToolCallParser(form.name, {"weather", "now"})
    found: dict[int, list[str]] = {}
    for part in [*parser.push(text), *parser.finish()]:
        assert isinstance(part, CallDelta), part
        assert not part.broken
        found.setdefault(part.index, [part.name, ""])[1] += part.arguments
    return [(name, json.loads(arguments)) for name, arguments in found.values()]


@pytest.mark.parametrize("form", FORMS, ids=["hermes", "llama3_json", "mistral", "mistral, named", "mistral, with ids"])
def test_whatever_the_model_would_say_the_parser_reads_calls_of_the_schemas(compiler: Any, form: CallForm) -> None:
    names: Counter[str] = Counter()
    for parallel in (True, False):
        grammar = compiler.calls(CallConstraint(form, FUNCTIONS, parallel=parallel))
        for seed in range(12):
            text = written(compiler, grammar, seed)
            if text is None:
                continue
            calls = calls_of(form, text)
            assert calls
            assert len(calls) == 1 or (parallel and form.markup.between is not None)
            for name, arguments in calls:
                names[name] += 1
                assert (arguments == {}) if name == "now" else (arguments["city"] in ("Paris", "Oslo"))
                assert name == "now" or (1 <= arguments["days"] <= 9 and arguments.keys() == {"city", "days"})
    assert set(names) == {"weather", "now"}


@pytest.mark.parametrize("form", FORMS[:3], ids=lambda form: form.name)
def test_where_calls_are_free_text_is_too_and_a_call_has_its_schema(compiler: Any, form: CallForm) -> None:
    grammar = compiler.calls(CallConstraint(form, FUNCTIONS, optional=True))
    call = CALLS[form.name]
    assert allows(compiler, grammar, "It is raining.\nNo?")
    assert allows(compiler, grammar, call)
    assert not allows(compiler, grammar, call.replace("Paris", "Rome"))
    assert not allows(compiler, grammar, call.replace("weather", "delete"))
    assert allows(compiler, grammar, f"Well.\n{call}")
    if form.trigger:
        assert not allows(compiler, grammar, f"Well.\n{call.replace('Paris', 'Rome')}")


def test_an_answer_of_a_schema_may_be_a_call_instead(compiler: Any) -> None:
    instead = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    grammar = compiler.calls(CallConstraint(usual_form("hermes"), FUNCTIONS, optional=True, instead=instead))
    assert allows(compiler, grammar, '{"ok":true}')
    assert allows(compiler, grammar, CALLS["hermes"])
    assert not allows(compiler, grammar, "Well.")


def test_reasoning_that_the_prompt_opened_goes_first(compiler: Any) -> None:
    wanted = CallConstraint(usual_form("hermes"), FUNCTIONS)
    for opened, thinks, text, allowed in (
        (True, True, f"Hm {{\n</think>\n\n{CALLS['hermes']}", True),
        (True, True, CALLS["hermes"], False),
        (False, True, f"<think>Hm</think>{CALLS['hermes']}", True),
        (False, True, CALLS["hermes"], True),
        (False, False, f"<think>Hm</think>{CALLS['hermes']}", False),
    ):
        assert allows(compiler, compiler.calls(wanted, opened=opened, thinks=thinks), text) == allowed, (opened, text)
    for thinks, text, allowed in (
        (True, '<think>Hm</think>{"city":"Oslo","days":2}', True),
        (True, '{"city":"Oslo","days":2}', True),
        (False, '<think>Hm</think>{"city":"Oslo","days":2}', False),
    ):
        assert allows(compiler, compiler.json(SCHEMA, thinks=thinks), text) == allowed, (thinks, text)
    grammar = compiler.json(SCHEMA, opened=True)
    text = 'So, {"city"?\n</think>\n\n{"city":"Oslo","days":2}'
    assert allows(compiler, grammar, text)
    parts = AnswerParser(ReasoningParser(True), None).push(text, last=True)
    assert parts == [Reasoning('So, {"city"?'), '{"city":"Oslo","days":2}']


def test_the_white_space_of_arguments_is_that_of_training(compiler: Any) -> None:
    grammar = compiler.calls(CallConstraint(usual_form("hermes"), FUNCTIONS[:1]))
    assert allows(compiler, grammar, CALLS["hermes"])
    assert not allows(compiler, grammar, CALLS["hermes"].replace(": 3", ":3"))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "nonsense"}, 'tools: function "f": the schema cannot be followed'),
        ({"$ref": "#"}, 'tools: function "f": the schema has no answer that ends'),
        ({"type": "object", "not": {}}, "these keywords are not supported"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_with_its_functions_name(
    compiler: Any, schema: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        compiler.calls(CallConstraint(usual_form("hermes"), [*FUNCTIONS, Function("f", schema)]))
    assert caught.value.field == "tools"
