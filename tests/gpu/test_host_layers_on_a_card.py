"""Layers whose rows wait on the host, on the fake card: what lies where. Whether copies come in time, no trace can say."""

from __future__ import annotations

from typing import Any

import pytest
from fake_trace import Trace
from fixtures import Worker

FULL = {"method": "full", "precision": "bfloat16", "optimizer": "adamw-8bit"}
METHODS: dict[str, dict[str, Any]] = {
    "qlora": {"method": "qlora", "precision": "nf4"},
    "full": FULL,
    "steps in backward": {**FULL, "optimizer_in_backward": True, "max_grad_norm": 0.0},
}


@pytest.mark.parametrize("method", ["qlora", pytest.param("full", marks=pytest.mark.prove), "steps in backward"])
def test_rows_and_states_of_a_layer_on_the_host_are_there_and_all_others_on_the_card(card: Worker, method: str) -> None:
    found = card.ask("host_layers", layers=2, host_layers=1, **METHODS[method])
    assert (found["host"], found["card"], found["whole"]) == (["cpu"], ["cuda"], ["cuda"])
    assert found["device"] == "cuda"
    assert found["pinned"] >= found["host_bytes"] > 100_000  # else each copy would wait
    trained = METHODS[method]["method"] == "full"
    assert found["host_states"] == (["cpu"] if trained else [])
    assert found["card_states"] == (["cuda"] if trained else [])
    assert not Trace.from_json(found["trace"]).astray
