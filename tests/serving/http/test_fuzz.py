"""Whatever the server's own description allows, and much that it does not, is answered or refused: never a 500."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny_server
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

ADMIN = "admin-key-1"
FUNCTIONS: list[Any] = [
    {"name": "f"}, {"name": "g", "parameters": {"type": "object", "properties": {"a": {"enum": [1]}}}, "strict": True},
    {"name": "h", "parameters": {"$ref": "#"}}, {"name": "i", "parameters": {"required": 5}}, {"name": ""}, 5,
]  # fmt: skip
TOOLS: tuple[dict[str, Any], ...] = (
    {},
    *({"tools": [{"type": "function", "function": one} for one in FUNCTIONS[:count]]} for count in (1, 2, 3, 4, 5, 6)),
    {"tools": [{"type": "function", "function": FUNCTIONS[1]}], "tool_choice": "required", "parallel_tool_calls": False},
    {"tools": [{"type": "function", "function": FUNCTIONS[3]}], "tool_choice": "required"},
    {"tools": [{"type": "function", "function": FUNCTIONS[0]}], "tool_choice": {"type": "function", "function": {"name": "f"}}},
)  # fmt: skip
MODELS = ("base", "alpha", "says@prod", "says@2", "beta@1")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tiny_server.Loopback]:
    place = tmp_path_factory.mktemp("fuzz")
    keys = tiny_server.keys_file(
        place, {"name": "admin", "key": ADMIN, "admin": True}, {"name": "other", "key": "other-key-1"}
    )
    options = {"format": "chat", "max_output_tokens": 6, "max_queue": 40, "request_timeout": 20}
    with tiny_server.serving(store=str(tiny_server.new_store(place)), api_keys=str(keys), **options) as one:
        yield one


def known(case: Any, model: str, tools: dict[str, Any]) -> None:
    """Name what is there, in whatever field a body has for it: nonsense alone gets no further than a 404."""
    if isinstance(case.body, dict):
        if "messages" in case.body:
            case.body |= tools
        for field in {"model", "adapter"} & case.body.keys():
            case.body[field] = model
        if "name" in case.body and "alias" in case.body:
            case.body |= {"name": "says", "alias": "prod"}


PARTS = 4


def fuzz(server: tiny_server.Loopback, examples: int, seed: bool, part: int | None = None) -> int:
    """Ask `examples` things of each operation, or of every fourth; returns how many were answered with 200."""
    description = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    checks = schemathesis.checks
    wanted = [checks.not_a_server_error, checks.status_code_conformance, checks.response_schema_conformance]
    answered = 0

    def one(case: Any, model: str | None, tools: dict[str, Any]) -> None:
        nonlocal answered
        if model is not None:
            known(case, model, tools)
        response = case.call(headers={"Authorization": f"Bearer {ADMIN}"}, timeout=60)
        case.validate_response(response, checks=wanted)
        answered += response.status_code == 200

    rules = settings(
        max_examples=examples, deadline=None, database=None, derandomize=seed, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    models = st.one_of(st.none(), st.sampled_from(MODELS))
    for number, found in enumerate(description.get_all_operations()):
        if part is not None and number % PARTS != part:
            continue
        for mode in schemathesis.GenerationMode:
            with contextlib.suppress(*([Unsatisfiable] if mode is schemathesis.GenerationMode.NEGATIVE else [])):
                # Of what takes nothing at all nothing wrong can be asked.
                cases = found.ok().as_strategy(generation_mode=mode)
                rules(given(case=cases, model=models, tools=st.sampled_from(TOOLS))(one))()
    with server.client(ADMIN) as client:
        assert client.get("/readyz").status_code == 200
    assert server.built.state.async_engine.failures == 0, "no step of the engine failed"
    assert server.engine.num_running == server.engine.num_waiting == 0
    return answered


def test_a_few_things_of_every_kind_are_no_500(server: tiny_server.Loopback) -> None:
    assert fuzz(server, examples=8, seed=True) > 40


@pytest.mark.prove
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(PARTS))
def test_hundreds_of_things_of_every_kind_are_no_500(
    server: tiny_server.Loopback, part: int, record_property: Callable[[str, object], None]
) -> None:
    answered = fuzz(server, examples=250, seed=False, part=part)
    record_property("answered_with_200", answered)
    assert answered > 100
