"""Is one training better than another, or is it chance? A paired bootstrap over evaluation rows and seeds.

Each of V variants is trained with the same S seeds and evaluated on the same n rows; losses[s, i] is the loss of row i,
summed over its tokens, after training with seed s. The quantity of interest is the mean loss of a token of one variant minus
that of another, over all possible rows and seeds. The measured difference D has two sources of error:

    rows     other eval rows would have given another D. Rows are resampled with replacement, the same for every variant
             (paired), and with them their tokens: D* = sum of differences / sum of tokens. Rows of one prompt are resampled
             together, since they are not independent. (Efron & Tibshirani 1993; paired for language: Koehn 2004)
    seeds    another order of the data, another initial A would have given another D. Rows are the same in every seed, so
             D_1 ... D_S differ by this alone: the standard error is e = sd(D_s) / sqrt(S).

With S = 3, resampling seeds too gives far too short intervals: it underestimates the standard deviation of three values by a
third, and has the normal distribution's tails. In simulations of two equal methods such an interval misses zero in up to
27 of 100 comparisons instead of 5 (`bench/results/quality.md`). So each resample of rows is shifted by e times a draw from
Student's t with S - 1 degrees of freedom: two independent errors, one resampled, one of unknown size, added as by Behrens and
Fisher. What rows and seeds share is counted in both parts, so the interval is slightly too long. With one seed e is unknown
and no difference is significant.

Several pairs are judged together: p values are stepped down by Holm (1979).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MIN_GROUPS = 30
"""Fewest independent rows: with fewer, a single odd row decides."""
CONFIDENCE = 0.95
POWER = 0.8
"""Statistical power for which needed numbers of rows and seeds are given."""
MOST_ROWS, MOST_SEEDS = 1_000_000, 50
RESAMPLES = 5000
_SHIFTS = 8  # draws from Student's t for each resample of rows
_NODES = 96  # of the quadrature below: relative error under 1e-8


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Needed:
    """What would show a difference with 80 % power, if it is as large as measured."""

    rows: int | None
    """Evaluation rows with the same seeds; None where seeds are what is missing."""
    seeds: int | None
    """Seeds on the same rows; None where rows are what is missing."""
    both: tuple[int, int] | None = None
    """(rows, seeds) where neither alone is enough."""


@dataclass(frozen=True)
class Difference:
    """The mean loss of a token of `first` minus that of `second`, in nats; below zero `first` is better."""

    first: str
    second: str
    mean: float
    interval: Interval
    """Of rows and seeds; of rows alone where there is one seed."""
    p: float
    """Two-sided p value, corrected for all pairs (Holm)."""
    row_error: float
    """Standard error from the choice of rows."""
    seed_error: float | None
    """Standard error from the choice of seeds; None for one seed."""
    smallest: float
    """The smallest difference that these rows and seeds would show with 80 % power."""
    needed: Needed | None = None
    """None where the difference is significant already, or too small for a million rows or 50 seeds."""

    @property
    def distinguishable(self) -> bool:
        """Whether the difference is significant at 5 %; never with one seed."""
        return self.seed_error is not None and self.p < 1 - CONFIDENCE


class PairedBootstrap:
    """Losses of several variants on the same rows with the same seeds; resampled once, used for every statistic."""

    def __init__(
        self,
        losses: Mapping[str, Floats],
        base: Floats,
        tokens: NDArray[np.int64],
        groups: NDArray[np.int64],
        *,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> None:
        """`losses`: by variant (S, n), nats summed over a row's tokens; `base`: of the untrained base (n,); `tokens` (n,);
        `groups` (n,): rows of one number are drawn together."""
        self.seeds = len(next(iter(losses.values())))
        self.rows = len(tokens)
        self.groups = len(np.unique(groups))
        # A percentile interval of G values is too short by sqrt((G - 1) / G) and by the normal's quantile in the place of
        # Student's; resamples are widened by both (Hesterberg 2015, section 5.4).
        degrees = max(1, self.groups - 1)
        quantile = student_quantile(_ENDS[1], degrees) / _NORMAL.inv_cdf(_ENDS[1])
        self._wider = quantile * math.sqrt(self.groups / degrees)
        self._generator = np.random.Generator(np.random.Philox(seed))
        total = float(tokens.sum())
        self.by_seed = {name: found.sum(1) / total for name, found in losses.items()}  # (S,) mean loss of each seed
        self.base = float(base.sum()) / total
        means = [found.mean(0) for found in losses.values()]
        sums = np.stack([tokens.astype(np.float64), base, *means])  # (2 + V, n)
        drawn = self._resampled(sums, groups, resamples)  # (resamples, 2 + V)
        by_token = drawn[:, 1:] / drawn[:, :1]
        self._base = by_token[:, 0]
        self._means = dict(zip(losses, by_token[:, 1:].T))  # by variant (resamples,)

    def _resampled(self, sums: Floats, groups: NDArray[np.int64], resamples: int) -> Floats:
        """Sums over groups drawn with replacement, (resamples, k), of sums (k, n) by row."""
        _, place = np.unique(groups, return_inverse=True)
        count = int(place.max()) + 1
        grouped = np.stack([np.bincount(place, row, count) for row in sums], axis=1)  # (groups, k)
        chunk = max(1, 4_000_000 // count)
        parts: list[Floats] = []
        for first in range(0, resamples, chunk):
            size = min(chunk, resamples - first)
            drawn = self._generator.integers(0, count, (size, count)) + np.arange(size)[:, None] * count
            times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
            parts.append(times.astype(np.float64) @ grouped)
        return np.concatenate(parts)

    def loss(self, name: str) -> float:
        """Mean loss of a token over all seeds."""
        return float(self.by_seed[name].mean())

    def std(self, name: str) -> float | None:
        """Standard deviation of the loss between seeds; None for one."""
        return float(self.by_seed[name].std(ddof=1)) if self.seeds > 1 else None

    def gain(self, name: str) -> float:
        """How much lower the loss is than the base's."""
        return self.base - self.loss(name)

    def share(self, name: str, of: str) -> tuple[float, Interval] | None:
        """A variant's gain as a share of another's, with its interval; None where the other gained nothing."""
        whole = self.gain(of)
        if whole <= 0:
            return None
        behind = self._shifted(name, of)  # (shifts, resamples)
        wholes = np.maximum(self._base - self._means[of], 1e-9)
        low, high = np.quantile(1 - behind / wholes, _ENDS)
        return self.gain(name) / whole, Interval(float(low), float(high))

    def differences(self, names: Sequence[str]) -> list[Difference]:
        """Every pair of `names`, with p values corrected for all of them."""
        found = [self._difference(first, second) for first, second in combinations(names, 2)]
        stepped = holm([d.p for d in found])
        return [self._with_needed(replace(d, p=p)) for d, p in zip(found, stepped)]

    def _errors(self, first: str, second: str) -> tuple[float, float | None]:
        between = self.by_seed[first] - self.by_seed[second]  # (S,)
        row_error = self._wider * float((self._means[first] - self._means[second]).std(ddof=1))
        return row_error, float(between.std(ddof=1) / math.sqrt(self.seeds)) if self.seeds > 1 else None

    def _shifted(self, first: str, second: str) -> Floats:
        """Resampled differences (shifts, resamples), each shifted by the error of the seeds."""
        measured = self.loss(first) - self.loss(second)
        rows = measured + self._wider * (self._means[first] - self._means[second] - measured)
        _, seed_error = self._errors(first, second)
        if not seed_error:
            return rows[None]
        return rows + seed_error * self._generator.standard_t(self.seeds - 1, (_SHIFTS, len(rows)))

    def _difference(self, first: str, second: str) -> Difference:
        shifted = self._shifted(first, second)
        low, high = np.quantile(shifted, _ENDS)
        # One more on each side: no number of resamples can show that something never happens.
        below, above = (shifted <= 0).sum() + 1, (shifted >= 0).sum() + 1
        p = min(1.0, 2 * float(min(below, above)) / (shifted.size + 1))
        row_error, seed_error = self._errors(first, second)
        return Difference(
            first, second, self.loss(first) - self.loss(second), Interval(float(low), float(high)), p, row_error,
            seed_error, findable(row_error, seed_error or 0.0, self.seeds),
        )  # fmt: skip

    def _with_needed(self, found: Difference) -> Difference:
        if found.distinguishable or found.seed_error is None:
            return found
        return replace(found, needed=self.needed(found, abs(found.mean)))

    def needed(self, found: Difference, distance: float) -> Needed | None:
        """The rows and seeds that would show a difference of `distance` nats."""
        assert found.seed_error is not None
        return needed(distance, found.row_error, found.seed_error, rows=self.rows, seeds=self.seeds)


def holm(p: Sequence[float]) -> list[float]:
    """P values corrected for several tests: they bound the chance of any false claim (Holm 1979)."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    stepped = [0.0] * len(p)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        stepped[i] = highest
    return stepped


def findable(row_error: float, seed_error: float, seeds: int) -> float:
    """The smallest difference that is shown with 80 % power."""
    return half_width(row_error, seed_error, seeds) + _NORMAL.inv_cdf(POWER) * math.hypot(row_error, seed_error)


def half_width(row_error: float, seed_error: float, seeds: int) -> float:
    """Half the interval's length: the 97.5 % point of row_error Z + seed_error T, T Student's with seeds - 1 degrees."""
    if seeds < 2 or seed_error == 0:
        return _NORMAL.inv_cdf(_ENDS[1]) * row_error
    return sum_quantile(_ENDS[1], row_error, seed_error, seeds - 1)


def needed(distance: float, row_error: float, seed_error: float, *, rows: int, seeds: int) -> Needed | None:
    """The fewest rows with these seeds, and the fewest seeds with these rows, that would show `distance`; else both together.

    The error of rows falls with the square root of their number, that of seeds likewise: new rows and seeds are assumed to
    be like those at hand.
    """

    def found(n: int, s: int) -> bool:
        return distance >= findable(row_error * math.sqrt(rows / n), seed_error * math.sqrt(seeds / s), s)

    more_rows = _smallest(lambda n: found(n, seeds), rows, MOST_ROWS)
    more_seeds = next((s for s in range(seeds, MOST_SEEDS + 1) if found(rows, s)), None)
    if more_rows is not None or more_seeds is not None:
        return Needed(more_rows, more_seeds)
    for more in range(seeds + 1, MOST_SEEDS + 1):
        wider = rows * more // seeds
        if wider <= MOST_ROWS and found(wider, more):
            return Needed(None, None, (wider, more))
    return None


def _smallest(enough: Callable[[int], bool], low: int, high: int) -> int | None:
    """The smallest number from `low` to `high` that is enough, to within 2 %."""
    if not enough(high):
        return None
    while high - low > max(1, low // 50):
        middle = round(math.sqrt(low * high))
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


# ---- Student's t and the normal distribution, added -------------------------------------------------------------------


def student_quantile(p: float, degrees: int) -> float:
    """The p quantile of Student's t, p from 0.5 to 1."""
    return sum_quantile(p, 0.0, 1.0, degrees)


def sum_quantile(p: float, a: float, b: float, degrees: int) -> float:
    """The p quantile of a Z + b T, p from 0.5 to 1: Z standard normal, T Student's t, independent.

    By definition T = Z' / S with S^2 a chi-squared variable over its degrees of freedom (Student 1908), so given S the sum is
    normal with variance a^2 + b^2 / S^2, and

        P(a Z + b T <= x) = E[ Phi(x / sqrt(a^2 + b^2 / S^2)) ].

    The expectation is a Gauss-Legendre sum over S. The distribution is symmetric and has one mode, so it is concave above 0
    and Newton's steps from 0 approach the quantile from below.
    """
    nodes, weights = _scale_quadrature(degrees)
    deviations = np.sqrt(a * a + b * b / nodes**2)  # (nodes,)
    x = 0.0
    for _ in range(200):
        z = x / deviations
        cdf = float(weights @ np.array([_NORMAL.cdf(value) for value in z.tolist()]))
        density = float(weights @ (np.exp(-z * z / 2) / deviations)) / math.sqrt(2 * math.pi)
        step = (p - cdf) / density
        x += step
        if step <= 1e-12 * x:
            break
    return x


@cache
def _scale_quadrature(degrees: int) -> tuple[Floats, Floats]:
    """Nodes and weights of an expectation over S: its density is proportional to s^(n - 1) exp(-n s^2 / 2), n degrees."""
    low, high = max(0.0, 1 - 9 / math.sqrt(degrees)), 1 + 9 / math.sqrt(degrees)  # beyond lies less than 1e-16
    points, weights = np.polynomial.legendre.leggauss(_NODES)
    u = (points + 1) / 2
    nodes = low + (high - low) * u**3  # dense at the low end: with few degrees the tails come from S near 0
    logs = (degrees - 1) * np.log(nodes) - degrees * nodes**2 / 2
    density = weights * u**2 * np.exp(logs - logs.max())
    return nodes, density / density.sum()


_NORMAL = NormalDist()
_ENDS = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
