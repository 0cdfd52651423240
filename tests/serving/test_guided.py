"""Answers under a schema are JSON of that schema, whatever the model would rather say."""

from __future__ import annotations

import json
from pathlib import Path

import asking
import pytest
import tiny
import tiny_run

from graftlm.base.load import load_base
from graftlm.errors import RequestError
from graftlm.serving.guided import Guide
from graftlm.serving.request import Sampling

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


@pytest.fixture(scope="module")
def base() -> object:
    return load_base(str(tiny_run.folder()), precision="float32")


def test_every_answer_is_json_of_the_schema(base: object) -> None:
    engine = asking.engine_of(base, running=16)  # type: ignore[arg-type]
    guide = Guide(base.tokenizer, base.anatomy.vocabulary, {2})  # type: ignore[attr-defined]
    grammar = guide.json(SCHEMA)
    asks = base.tokenizer.encode("Describe: ", add_special_tokens=False)  # type: ignore[attr-defined]
    for i in range(6):
        sampling = Sampling(temperature=1.5 if i else 0.0, seed=i)
        engine.submit(
            asking.request(
                asks, 120, id=str(i), n=2 if i == 5 else 1, grammar=grammar, sampling=sampling, stop_ids=frozenset({2})
            )
        )
    texts: dict[tuple[str, int], str] = {}
    for piece in asking.drain(engine):
        texts[piece.id, piece.index] = texts.get((piece.id, piece.index), "") + piece.text
        assert piece.finish in (None, "stop")
    assert len(texts) == 7
    for text in texts.values():
        found = json.loads(text)
        assert set(found) == {"kind", "size", "tags"}
        assert found["kind"] in ("kettle", "lamp")
        assert 1 <= found["size"] <= 99
        assert len(found["tags"]) in (2, 3)
        assert all(isinstance(tag, bool) for tag in found["tags"])


def test_a_schema_that_cannot_be_followed_is_refused(base: object) -> None:
    guide = Guide(base.tokenizer, base.anatomy.vocabulary, {2})  # type: ignore[attr-defined]
    with pytest.raises(RequestError, match="the schema cannot be followed"):
        guide.json({"type": "nonsense"})
    with pytest.raises(RequestError, match="at most 100000 are taken"):
        guide.json({"enum": ["x" * 100_001]})


def test_a_tokenizer_whose_bytes_cannot_be_told_is_refused(tmp_path: Path) -> None:
    guide = Guide(tiny.tokenizer(), tiny.VOCABULARY, {2})
    with pytest.raises(RequestError, match="tokenizer cannot be guided"):
        guide.json({"type": "integer"})
