"""What a step takes on a GPU, and how many tokens one has where memory is scarce. `tests/gpu` traces what is estimated here."""

from __future__ import annotations

from typing import Any

import pytest

from graftlm.planning.models import find
from graftlm.serving.engine.step_memory import LEAST_TOKENS, fitting, step_memory

GIVEN: dict[str, Any] = {"sequences": 128, "value_bytes": 2, "graphs": True}


def test_a_step_takes_one_layers_states_and_graphs_those_of_the_largest_captured_step() -> None:
    shape = find("llama-2-7b").shape
    found = step_memory(shape, tokens=4096, **GIVEN)
    assert found.step == (3 * 11008 + 4 * 4096) * 2 * 4096
    assert found.graphs == (3 * 11008 + 4 * 4096) * 2 * 128
    assert found.bytes == found.step + found.graphs
    assert step_memory(shape, tokens=4096, **{**GIVEN, "graphs": False}).graphs == 0
    assert (
        step_memory(shape, tokens=4096, **{**GIVEN, "sequences": 4096}).graphs == 4 * found.graphs
    )  # 512 rows at most
    assert step_memory(shape, tokens=1, **GIVEN).step == 4 * 4 * 128 * 32000  # logits


@pytest.mark.parametrize("room", [0, 50 << 20, 120 << 20, 1 << 30])
def test_a_step_has_as_many_tokens_as_fit_and_not_fewer_than_the_least(room: int) -> None:
    shape = find("llama-2-7b").shape
    found = fitting(shape, room, tokens=4096, **GIVEN)
    assert LEAST_TOKENS <= found.tokens <= 4096
    assert found.bytes <= room or found.tokens == LEAST_TOKENS
    if found.tokens < 4096:
        assert step_memory(shape, tokens=2 * found.tokens, **GIVEN).bytes > room
    assert fitting(shape, 0, tokens=4096, **{**GIVEN, "sequences": 1000}).tokens == 1000
