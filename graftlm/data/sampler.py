"""The order of examples: a fixed sequence of draws that depends on sizes, weights and a seed alone.

    draw      0  1  2  3 | 4  5  6  7 | 8 ...          step k takes draws k * batch_size onwards
    example  9  2  7  4 | 0  3  ...                   every epoch is a new shuffle of all examples

An epoch has each example of a source of weight w w times; the fractional part is another sample each epoch. A draw's number is
the key of its dropout, so a run can resume from any step without saved state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The draws of one trial; `sizes` and `weights` have one entry a source, examples are numbered across sources."""

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    batch_size: int
    steps: int
    draws: int
    """Draws in the whole run; the last step may have fewer than batch_size."""

    def step(self, step: int) -> list[tuple[int, int]]:
        """(draw, example) of each example in optimizer step `step`, counted from 0."""
        first = step * self.batch_size
        last = min(first + self.batch_size, self.draws)
        return [(draw, self.example(draw)) for draw in range(first, last)]

    def example(self, draw: int) -> int:
        """The example of a draw."""
        length = epoch_length(self.sizes, self.weights)
        epoch, place = divmod(draw, length)
        return int(_epoch(self.sizes, self.weights, self.seed, epoch)[place])

    def epoch(self, step: int) -> float:
        """Number of epochs in the first `step` steps."""
        length = epoch_length(self.sizes, self.weights)
        return min(step * self.batch_size, self.draws) / length if length else 0.0


def epoch_length(sizes: Sequence[int], weights: Sequence[float]) -> int:
    """Draws in one epoch: each source's examples times its weight, rounded, at least one if the source has any."""
    return sum(_share(size, weight) for size, weight in zip(sizes, weights))


def _share(size: int, weight: float) -> int:
    return max(1, round(size * weight)) if size else 0


def make_sampler(
    sizes: Sequence[int],
    weights: Sequence[float],
    *,
    seed: int,
    batch_size: int,
    epochs: float | None,
    steps: int | None,
) -> Sampler:
    """A sampler over `steps` full batches, or over `epochs` (1 if neither is given)."""
    length = epoch_length(sizes, weights)
    if steps is not None:
        draws = steps * batch_size
    else:
        draws = max(1, round(length * (1.0 if epochs is None else epochs)))
        steps = math.ceil(draws / batch_size)
    return Sampler(
        sizes=tuple(sizes), weights=tuple(weights), seed=seed, batch_size=batch_size, steps=steps, draws=draws
    )


@lru_cache(maxsize=8)
def _epoch(sizes: tuple[int, ...], weights: tuple[float, ...], seed: int, epoch: int) -> np.ndarray:
    """The examples of one epoch in their order, (draws,) int64."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))
    parts: list[np.ndarray] = []
    offset = 0
    for size, weight in zip(sizes, weights):
        # A source may have lost all its rows to --overlong drop or to the eval share.
        whole, rest = divmod(_share(size, weight), max(size, 1))
        examples = np.arange(offset, offset + size, dtype=np.int64)
        parts.extend([examples] * whole)
        if rest:
            parts.append(generator.permutation(examples)[:rest])
        offset += size
    return generator.permutation(np.concatenate(parts))
