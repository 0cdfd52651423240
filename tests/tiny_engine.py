"""For the tests of this folder: engines over tiny bases with adapters in memory, and asking them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tiny

from graftlm.adapters.attach import Adapter, detach
from graftlm.base.loading import Base, load_base
from graftlm.serving.engine.engine import Engine
from graftlm.serving.engine.request import Request, RequestOutput
from graftlm.serving.engine.scheduler import EngineLimits

RANKS = (1, 3, 8, 16, 33, 64)
_numbers = itertools.count()


def base_of(architecture: str = "llama", precision: Any = "float32") -> Base:
    return load_base(str(tiny.folder(architecture)), precision=precision, compute_dtype="float32")


def adapter_of(base: Base, rank: int, seed: int = 0, **plan: Any) -> Adapter:
    """An adapter with random A and B, attached nowhere; strong enough to change what is said."""
    adapter = tiny.adapted(base, rank=rank, alpha=rank * 1.5, slot=900, seed=100 * rank + seed, **plan)
    detach(base, 900)
    return adapter


def engine_of(base: Base, adapters: dict[str, Adapter] | None = None, **limits: Any) -> Engine:
    """An engine whose adapters are in memory, by what stands for their digest."""
    known = adapters or {}
    given = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "cache_tokens": 1024, "max_loras": 8, **limits}
    return Engine(base, EngineLimits(**given), load=lambda folder: known[folder.name])


def request(prompt: Iterable[int], max_tokens: int = 8, adapter: str = "", **given: Any) -> Request:
    id = given.pop("id", f"r{next(_numbers)}")
    return Request(id=id, prompt=tuple(prompt), max_tokens=max_tokens, adapter=adapter, **given)


def drain(engine: Engine, steps: int = 5000) -> list[RequestOutput]:
    """Step until nothing is left."""
    outputs: list[RequestOutput] = []
    for _ in range(steps):
        if not engine.busy:
            return outputs
        found = engine.step()
        if not found:
            time.sleep(0.001)
        outputs += found
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
            engine.add_request(one, Path(one.adapter) if one.adapter else None)
        if not waiting and not engine.busy:
            return found
        outputs = engine.step()
        if not outputs:
            time.sleep(0.001)  # an adapter is being read by another thread
        for output in outputs:
            assert output.finish_reason in (None, "stop", "length"), output
            found[output.id] += output.tokens
        assert i < 5000
    return found


def tokens(engine: Engine, one: Request) -> list[int]:
    """One request's answer."""
    return ask(engine, [one])[one.id]
