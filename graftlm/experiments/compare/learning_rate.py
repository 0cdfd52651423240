"""A learning rate of its own for each method: a short search on training rows, by the loss on other training rows.

Rates lie on a grid, start * 10^(k / 2). The search goes from the start in the better direction until the loss rises, by
factors of ten where the start is a default, and then tries the rates beside the best. Where another method was searched
before, the start is near already (LoRA's rate is about ten times full's: Schulman et al. 2025), and three or four runs do.

Short runs favour higher rates than long ones do, so the lowest rate whose gain is within 1 % of the best is taken. A run
whose loss is not finite counts as infinitely bad.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

CLOSE = 0.01
"""A lower rate is taken if its gain is at most this share below the best."""
MOST_RUNS = 9
LORA_OVER_FULL = 10.0
"""Schulman et al. 2025, "LoRA Without Regret": about ten on all models they tried."""


@dataclass(frozen=True)
class TriedRate:
    """A rate and its loss."""

    rate: float
    loss: float
    """Infinite where it diverged."""
    before: float | None = None
    """Loss of the untrained base on the same rows."""


@dataclass(frozen=True)
class RateSearch:
    """The result of a search."""

    rate: float
    tried: tuple[TriedRate, ...] = ()
    """By rate; empty where the rate was given and nothing searched."""
    at_edge: bool = False
    """Whether the best rate tried was the highest or the lowest: another may be better."""


def search_learning_rate(
    start: float, losses_at: Callable[[Sequence[float]], Sequence[TriedRate]], *, blind: bool = True
) -> RateSearch | None:
    """Search around `start`; `losses_at` trains with rates, at once where it can. None where every rate diverged."""
    known: dict[int, TriedRate] = {}

    def learn(*rungs: int) -> None:
        """Try what is not known, as far as the number of runs allows. Only what is needed in any case is tried at once."""
        new = [rung for rung in rungs if rung not in known][: MOST_RUNS - len(known)]
        if new:
            known.update(zip(new, losses_at([rate_of(start, rung) for rung in new]), strict=True))

    def loss(rung: int) -> float:
        learn(rung)
        return known[rung].loss if rung in known else math.inf

    stride = 2 if blind else 1
    best = 0
    learn(0, stride)
    for direction in (1, -1):
        while loss(best + direction * stride) < loss(best):
            best += direction * stride
        if best != 0:
            break  # it got better this way, so the other way gets worse
    if stride == 2:
        learn(best - 1, best + 1)
        best = min((best - 1, best, best + 1), key=loss)
    finite = [tried for tried in known.values() if math.isfinite(tried.loss)]
    if not finite:
        return None
    lowest = min(tried.loss for tried in finite)
    worst = max(tried.loss if tried.before is None else tried.before for tried in finite)
    chosen = min(rung for rung, tried in known.items() if tried.loss <= lowest + CLOSE * max(0.0, worst - lowest))
    best = min(known, key=lambda rung: known[rung].loss)
    return RateSearch(
        rate_of(start, chosen), tuple(known[rung] for rung in sorted(known)), best in (min(known), max(known))
    )


def rate_of(start: float, rung: int) -> float:
    """The rate at grid point `rung`, to two digits."""
    return float(f"{start * 10 ** (rung / 2):.1e}")


def first_rate(adapter: bool, before: dict[bool, float], default: float) -> tuple[float, bool]:
    """Where a search starts: at the rate of the same kind of method, else of the other kind, else at the default (blind).

    `before` holds found rates by whether the method was an adapter.
    """
    if adapter in before:
        return before[adapter], False
    if (not adapter) in before:
        other = before[not adapter]
        return (other * LORA_OVER_FULL if adapter else other / LORA_OVER_FULL), False
    return default, True


def search_steps(wanted: int | None, steps: int) -> int:
    """Steps of one run of the search: `wanted`, else a quarter of the run's, from 20 to 100."""
    return min(steps, wanted or max(20, min(100, steps // 4)))
