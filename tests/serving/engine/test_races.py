"""Answers do not depend on what the loader's thread does beside them: it runs adapters through the same base.

The adapters' canary is one forward pass in the loader's thread. Interleavings come by chance, with the interpreter switching
threads a hundred times as often as it does, and by force, with the loader held inside the embedding's own code.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_engine
import torch

from graftlm.adapters import canary
from graftlm.adapters.attach import Adapter
from graftlm.base.loading import Base
from graftlm.serving.engine.engine import Engine
from graftlm.serving.engine.scheduler import EngineLimits

ADAPTERS = 6
PROMPTS = [tuple(tiny.ids(4 + i, seed=50 + i).tolist()) for i in range(3)]


def adapters_of(base: Base) -> dict[str, Adapter]:
    kinds: list[dict[str, Any]] = [{}, {"trainable_tokens": (4, 9, 11)}, {"dora": True}]
    return {f"a{i}": tiny_engine.adapter_of(base, 2 + i, **kinds[i % 3]) for i in range(ADAPTERS)}


@contextmanager
def switching(seconds: float) -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Answered:
    """An engine whose adapters come and go, with two places for six, and how it answered."""

    def __init__(self, base: Base, adapters: dict[str, Adapter], *, checks: bool) -> None:
        self.base, self.adapters, self.checks = base, adapters, checks
        given = canary.prompts(base, PROMPTS[0] * 4)
        self.first = {name: canary.summaries(base, adapter, given) for name, adapter in adapters.items()}
        self.given, self.loads, self.steps, self.wrong = given, 0, 0, list[str]()
        self.engine = Engine(
            base, EngineLimits(max_num_seqs=4, max_num_batched_tokens=24, cache_tokens=512, max_loras=2), load=self.load
        )

    def load(self, folder: Path) -> Adapter:
        adapter = self.adapters[folder.name]
        if self.checks:
            assert threading.current_thread() is not threading.main_thread()
            if canary.summaries(self.base, adapter, self.given) != self.first[folder.name]:
                self.wrong.append(f"canary of {folder.name}")
        self.loads += 1
        return adapter

    def ask(self, round: int) -> dict[tuple[str, int], list[int]]:
        """Every prompt through every adapter and the bare base, all at once; then every adapter leaves memory."""
        waiting = [(name, i) for name in ("", *self.adapters) for i in range(len(PROMPTS))]
        requests = {key: tiny_engine.request(PROMPTS[key[1]], 6, adapter=key[0]) for key in waiting}
        found: dict[str, list[int]] = {one.id: [] for one in requests.values()}
        for (name, _), one in requests.items():
            self.engine.add_request(one, Path(name) if name else None)
        while self.engine.busy:
            outputs = self.engine.step()
            self.steps += 1
            if not outputs:
                time.sleep(0.0005)
            for output in outputs:
                assert output.finish_reason in (None, "stop", "length"), output
                found[output.id] += output.tokens
        assert all(self.engine.adapter_cache.evict_if_idle(name) for name in self.adapters)
        return {key: found[one.id] for key, one in requests.items()}


@pytest.mark.parametrize(
    "architecture", ["llama", "gemma3"]
)  # one call for all layers; the model's own code, scaled rows
def test_answers_stay_the_same_for_thousands_of_steps_while_adapters_are_loaded_checked_and_evicted(
    architecture: str,
) -> None:
    base = tiny_engine.base_of(architecture, "bfloat16")
    adapters = adapters_of(base)
    expected = Answered(base, adapters, checks=False).ask(0)
    assert len({tuple(answer) for answer in expected.values()}) > ADAPTERS
    busy = Answered(base, adapters, checks=True)
    with switching(1e-5):
        rounds = 0
        while busy.steps < 1500:
            assert busy.ask(rounds) == expected
            rounds += 1
    assert busy.loads >= rounds * ADAPTERS
    assert busy.wrong == []


def test_answers_stay_the_same_with_the_loader_held_inside_the_embeddings_own_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tiny_engine.base_of("gemma3", "bfloat16")
    adapters = adapters_of(base)
    expected = Answered(base, adapters, checks=False).ask(0)
    busy = Answered(base, adapters, checks=True)
    kind = type(tiny.plain(tiny.folder("gemma3")).get_input_embeddings())
    own, held = kind.forward, list[int]()

    def slow(self: Any, ids: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread():
            held.append(len(ids))
            time.sleep(0.002)
        return own(self, ids)

    monkeypatch.setattr(kind, "forward", slow)
    for round in range(3):
        assert busy.ask(round) == expected
    assert len(held) >= 3 * ADAPTERS
    assert busy.wrong == []
