"""Answers under a schema are JSON of that schema, whatever the model would rather say."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tiny
import tiny_engine
import tiny_run
import torch

from graftlm.base.loading import load_base
from graftlm.errors import RequestError
from graftlm.serving.engine.request import SamplingParams
from graftlm.serving.engine.schema_endings import endless
from graftlm.serving.engine.structured_output import GrammarCompiler

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["kettle", "lamp"]},
        "size": {"type": "integer", "minimum": 1, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    },
    "required": ["kind", "size", "tags"],
    "additionalProperties": False,
}


ME: dict[str, Any] = {"$ref": "#"}
ENDLESS: list[dict[str, Any]] = [
    ME,
    {"$id": "http://a.b/c", "$ref": "http://a.b/c"},
    {"allOf": [ME]},
    {"anyOf": [ME, ME]},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"type": "object", "properties": {"a": ME}, "required": ["a"], "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "array", "items": ME, "minItems": 1}}, "required": ["a"]},
    {"type": "object", "additionalProperties": ME, "required": ["a"]},
    {"type": "object", "additionalProperties": ME, "minProperties": 1},
    {"type": "array", "items": ME, "minItems": 1},
    {"type": "array", "prefixItems": [{"type": "null"}, ME], "minItems": 2},
    {"type": ["object", "array"], "properties": {"a": ME}, "required": ["a"], "items": ME, "minItems": 2},
]
RECURSIVE: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": ME}, "additionalProperties": False},
    {
        "type": "object",
        "properties": {"a": {"anyOf": [ME, {"type": "null"}]}},
        "required": ["a"],
        "additionalProperties": False,
    },
    {"type": ["object", "null"], "properties": {"a": ME}, "required": ["a"], "additionalProperties": False},
    {"type": "array", "items": ME, "maxItems": 2},
    {"type": "array", "prefixItems": [{"type": "null"}, ME], "minItems": 1, "items": False},
    {"anyOf": [ME, {"type": "boolean"}]},
]


@pytest.fixture(scope="module")
def base() -> object:
    return load_base(str(tiny_run.folder()), precision="float32")


def test_every_answer_is_json_of_the_schema(base: object) -> None:
    engine = tiny_engine.engine_of(base, max_num_seqs=16)  # type: ignore[arg-type]
    grammar_compiler = GrammarCompiler(base.tokenizer, base.structure.vocabulary, {2})  # type: ignore[attr-defined]
    grammar = grammar_compiler.json(SCHEMA)
    asks = base.tokenizer.encode("Describe: ", add_special_tokens=False)  # type: ignore[attr-defined]
    for i in range(6):
        sampling = SamplingParams(temperature=1.5 if i else 0.0, seed=i)
        engine.add_request(
            tiny_engine.request(
                asks, 120, id=str(i), n=2 if i == 5 else 1, grammar=grammar, sampling=sampling, stop_ids=frozenset({2})
            )
        )
    texts: dict[tuple[str, int], str] = {}
    for output in tiny_engine.drain(engine):
        texts[output.id, output.index] = texts.get((output.id, output.index), "") + output.text
        assert output.finish_reason in (None, "stop")
    assert len(texts) == 7
    for text in texts.values():
        found = json.loads(text)
        assert set(found) == {"kind", "size", "tags"}
        assert found["kind"] in ("kettle", "lamp")
        assert 1 <= found["size"] <= 99
        assert len(found["tags"]) in (2, 3)
        assert all(isinstance(tag, bool) for tag in found["tags"])


def test_a_schema_that_cannot_be_followed_is_refused(base: object) -> None:
    grammar_compiler = GrammarCompiler(base.tokenizer, base.structure.vocabulary, {2})  # type: ignore[attr-defined]
    with pytest.raises(RequestError, match="the schema cannot be followed"):
        grammar_compiler.json({"type": "nonsense"})
    with pytest.raises(RequestError, match="at most 100000 are taken"):
        grammar_compiler.json({"enum": ["x" * 100_001]})


def test_a_grammar_that_cannot_go_on_ends_with_its_reason_and_not_as_if_it_were_complete(base: Any) -> None:
    many = {f"p{i}": {"type": "integer"} for i in range(1000)}  # llguidance gives up at 2000 states
    grammar_compiler = GrammarCompiler(base.tokenizer, base.structure.vocabulary, {2})
    grammar = grammar_compiler.json({"type": "object", "properties": many, "additionalProperties": False})
    engine = tiny_engine.engine_of(base)
    engine.add_request(tiny_engine.request([65, 66], 40, id="guided", grammar=grammar, stop_ids=frozenset({2})))
    engine.add_request(tiny_engine.request([65, 66], 40, id="free"))
    ends = {output.id: output for output in tiny_engine.drain(engine) if output.finish_reason is not None}
    assert (ends["guided"].finish_reason, ends["guided"].refused) == ("error", True)
    assert "cannot be followed to the end of an answer: no token may come next" in ends["guided"].error
    assert ends["free"].finish_reason == "length", "nobody else's answer ends with it"


@pytest.mark.parametrize("schema", ENDLESS, ids=str)
def test_a_schema_without_an_answer_that_ends_is_refused(base: Any, schema: dict[str, Any]) -> None:
    grammar_compiler = GrammarCompiler(base.tokenizer, base.structure.vocabulary, {2})
    with pytest.raises(RequestError, match=r"no answer that ends: \S+ needs itself again and again"):
        grammar_compiler.json(schema)


@pytest.mark.parametrize("schema", RECURSIVE, ids=str)
def test_a_schema_that_needs_itself_only_where_it_may_end_is_followed(base: Any, schema: dict[str, Any]) -> None:
    grammar = GrammarCompiler(base.tokenizer, base.structure.vocabulary, {2}).json(schema)
    ends = 0
    for seed in range(8):  # whichever of the allowed tokens is taken
        walk, text, random = grammar.start(), list[int](), Random(seed)
        for _ in range(300):
            row = torch.zeros(base.structure.vocabulary)
            walk.restrict(row)
            assert not walk.failure
            token = random.choice(row.isfinite().nonzero()[:, 0].tolist())
            text += [token] if token != 2 else []
            if walk.accept(token):
                json.loads(base.tokenizer.decode(text))
                ends += 1
                break
    assert ends > 0


def test_the_place_of_what_does_not_end_is_told() -> None:
    inner = {"type": "array", "items": {"$ref": "#/$defs/x~1y"}, "minItems": 1}
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/x~1y"}}, "$defs": {"x/y": inner}}
    assert endless(schema) == "#/$defs/x~1y"
    assert endless({"type": "integer", "$defs": {"unused": {"$ref": "#/$defs/unused"}}}) is None


def test_a_large_schema_is_followed_to_its_ends_without_recursion() -> None:
    chain = {f"n{i}": {"$ref": f"#/$defs/n{i + 1}"} for i in range(3000)}
    assert endless({"$ref": "#/$defs/n0", "$defs": {**chain, "n3000": {"type": "null"}}}) is None
    assert endless({"$ref": "#/$defs/n0", "$defs": {**chain, "n3000": {"$ref": "#"}}}) is not None
    wide = {f"k{i}": {"$ref": "#"} for i in range(3000)}
    assert endless({"type": "object", "properties": wide, "required": list(wide)}) is not None


def test_a_tokenizer_whose_bytes_cannot_be_told_is_refused(tmp_path: Path) -> None:
    grammar_compiler = GrammarCompiler(tiny.tokenizer(), tiny.VOCABULARY, {2})
    with pytest.raises(RequestError, match="tokenizer cannot be guided"):
        grammar_compiler.json({"type": "integer"})
