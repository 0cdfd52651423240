"""For the tests of this folder: engines over tiny bases with adapters in memory, and asking them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tiny

from graftlm.adapters.attach import Adapter, detach
from graftlm.base.load import Base, load_base
from graftlm.serving.engine import Engine, Limits
from graftlm.serving.request import Piece, Request

RANKS = (1, 3, 8, 16, 33, 64)
_numbers = itertools.count()


def base_of(architecture: str = "llama", precision: Any = "float32") -> Base:
    return load_base(str(tiny.folder(architecture)), precision=precision, compute="float32")


def adapter_of(base: Base, rank: int, seed: int = 0, **plan: Any) -> Adapter:
    """An adapter with random A and B, attached nowhere; strong enough to change what is said."""
    adapter = tiny.adapted(base, rank=rank, alpha=rank * 1.5, slot=900, seed=100 * rank + seed, **plan)
    detach(base, 900)
    return adapter


def engine_of(base: Base, adapters: dict[str, Adapter] | None = None, **limits: Any) -> Engine:
    """An engine whose adapters are in memory, by what stands for their digest."""
    known = adapters or {}
    given = {"running": 8, "step_tokens": 32, "cache_tokens": 1024, "adapter_slots": 8, **limits}
    return Engine(base, Limits(**given), load=lambda folder: known[folder.name])


def request(prompt: Iterable[int], max_tokens: int = 8, adapter: str = "", **given: Any) -> Request:
    id = given.pop("id", f"r{next(_numbers)}")
    return Request(id=id, prompt=tuple(prompt), max_tokens=max_tokens, adapter=adapter, **given)


def drain(engine: Engine, steps: int = 5000) -> list[Piece]:
    """Step until nothing is left."""
    pieces: list[Piece] = []
    for _ in range(steps):
        if not engine.busy:
            return pieces
        found = engine.step()
        if not found:
            time.sleep(0.001)
        pieces += found
    raise AssertionError("the engine does not come to an end")


def ask(
    engine: Engine, requests: Sequence[Request], join: Callable[[int], bool] = lambda i: True
) -> dict[str, list[int]]:
    """Answer requests; `join(i)` says before each step whether the next one arrives now. Returns tokens by id (of n = 1)."""
    waiting = list(requests)
    found: dict[str, list[int]] = {r.id: [] for r in requests}
    for i in itertools.count():
        if waiting and join(i):
            one = waiting.pop(0)
            engine.submit(one, Path(one.adapter) if one.adapter else None)
        if not waiting and not engine.busy:
            return found
        pieces = engine.step()
        if not pieces:
            time.sleep(0.001)  # an adapter is being read by another thread
        for piece in pieces:
            assert piece.finish in (None, "stop", "length"), piece
            found[piece.id] += piece.tokens
        assert i < 5000
    return found


def tokens(engine: Engine, one: Request) -> list[int]:
    """One request's answer."""
    return ask(engine, [one])[one.id]
