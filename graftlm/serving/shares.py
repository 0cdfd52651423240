"""Who takes part in a step when several tenants want it: a small one is not to wait for a large one's batch.

A step of n tokens takes about a + b n seconds. Where b is next to nothing, as on a GPU, everybody takes part in every step.
On a CPU twelve tokens take several times as long as one, so a tenant with one answer beside another's twelve would write at
a fraction of its speed for as long as they are there. So the tenant that wants the fewest tokens goes first, and of the
others as many join as it wants itself, or as many as make the step no longer than STRETCH times its own: max-min
fairness a step at a time. Those that are left out are first the next time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from graftlm.serving.sequence import Sequence

STRETCH = 1.3
LEAST_CHUNK = 8
"""Tokens of a prompt that are always read, so that a long one comes to its end beside somebody's short answers."""
_FORGET = 0.99
_ENOUGH = 20  # steps before the estimate is used
_ANY = 1 << 30


class Pace:
    """Estimates a and b from the steps so far, the last hundred or so; least squares with exponential forgetting."""

    def __init__(self) -> None:
        self._weight = self._n = self._t = self._nn = self._nt = 0.0
        self._steps = 0

    def learn(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens has taken so long."""
        self._weight, self._n, self._t, self._nn, self._nt = (
            _FORGET * old + new
            for old, new in zip(
                (self._weight, self._n, self._t, self._nn, self._nt),
                (1.0, tokens, seconds, tokens * tokens, tokens * seconds),
            )
        )
        self._steps += 1

    def room(self, tokens: int) -> int:
        """How many tokens may join a step of `tokens` that is to take at most STRETCH times as long."""
        if self._steps < _ENOUGH:
            return 0
        mean_n, mean_t = self._n / self._weight, self._t / self._weight
        spread = self._nn / self._weight - mean_n * mean_n
        b = (self._nt / self._weight - mean_n * mean_t) / spread if spread > 1e-9 else 0.0
        a = mean_t - b * mean_n
        if b <= 0:
            return _ANY if spread > 1e-9 else 0
        return min(int((STRETCH - 1) * (max(a, 0.0) + b * tokens) / b), _ANY)


def first_and_rest(running: Iterable[Sequence]) -> tuple[list[Sequence], list[Sequence]]:
    """Those of the tenant that wants the fewest tokens; and the others', one of each tenant in turn, the idlest first."""
    by_tenant: defaultdict[str, list[Sequence]] = defaultdict(list)
    for sequence in running:
        by_tenant[sequence.request.tenant].append(sequence)
    least = min(by_tenant, key=lambda tenant: (sum(s.left for s in by_tenant[tenant]), tenant))
    first = by_tenant.pop(least)
    turns = [
        (turn, sequence.worked, sequence)
        for line in by_tenant.values()
        for turn, sequence in enumerate(sorted(line, key=lambda s: s.worked))
    ]
    return first, [sequence for _, _, sequence in sorted(turns, key=lambda entry: entry[:2])]
