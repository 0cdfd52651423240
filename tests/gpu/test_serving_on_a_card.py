"""The engine on the fake card: what a prefill and a token of decode may ask of a card, and the memory of long contexts."""

from __future__ import annotations

from typing import Any

import pytest
from fake_trace import Budget
from fixtures import Worker

ONE = (0, 1)  # the host waits for a step's tokens, and for nothing else
SERVED: dict[str, tuple[dict[str, Any], Budget, Budget]] = {  # what is served, its prefill and its decode
    "base": (
        {}, Budget(launches=(47, 26), synchronisations=ONE), Budget(launches=(50, 35), synchronisations=ONE)
    ),
    "base in nf4": (
        {"precision": "nf4"},
        Budget(launches=(71, 26), synchronisations=ONE), Budget(launches=(67, 35), synchronisations=ONE),
    ),
    "two adapters": (
        {"adapters": 2},
        Budget(launches=(61, 30), synchronisations=ONE), Budget(launches=(64, 35), synchronisations=ONE),
    ),
    "sampled": (
        {"temperature": 0.7},
        Budget(launches=(47, 52), synchronisations=ONE), Budget(launches=(50, 61), synchronisations=ONE),
    ),
}  # fmt: skip


@pytest.mark.parametrize("served", SERVED)
def test_prefill_and_decode_stay_on_their_card_and_within_their_budgets(card: Worker, served: str) -> None:
    options, prefill, decode = SERVED[served]
    one, two = (card.traces("serve", layers=layers, **options) for layers in (1, 2))
    prefill.check(one["prefill"], two["prefill"])
    decode.check(one["decode"], two["decode"])


def test_attention_over_long_contexts_takes_bounded_memory_whatever_their_lengths(card: Worker) -> None:
    """Padded to the longest and with heads repeated, sixteen texts of 32k tokens would take 4 GiB for keys alone."""
    for lengths in ([32768] * 16, [32768] + [17] * 15, [100] * 256):
        trace = card.trace("attend", lengths=lengths)
        assert trace.peak_bytes < 300 << 20, lengths
        assert not trace.synchronisations
        assert not trace.copies


def test_a_long_prompt_over_a_cached_beginning_takes_bounded_memory(card: Worker) -> None:
    traces = card.traces("chunk", cached=30_000, length=1024)
    assert traces["plain"].peak_bytes < 400 << 20, traces["plain"]
    assert traces["soft cap"].peak_bytes < 900 << 20, traces["soft cap"]
