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

STRETCH = 1.1
LEAST_CHUNK = 8
"""Tokens of a prompt that are always read, so that a long one comes to its end beside somebody's short answers."""
_REMEMBERED = 50  # steps of about as many tokens that an estimate is the mean of
_ENOUGH = 20  # steps before the estimates are used
_ANY = 1 << 30


class Pace:
    """Estimates a and b from the steps so far.

    Steps of about as many tokens are averaged first and the averages fitted, with equal relative errors: while one tenant is
    alone all steps are alike, and a fit of these would be a fit of noise.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float, float]] = {}  # by the power of two: steps, mean tokens, mean seconds
        self._steps = 0

    def learn(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens has taken so long."""
        steps, n, t = self._seen.get(tokens.bit_length(), (0.0, 0.0, 0.0))
        steps = min(steps + 1, _REMEMBERED)
        self._seen[tokens.bit_length()] = (steps, n + (tokens - n) / steps, t + (seconds - t) / steps)
        self._steps += 1

    def room(self, tokens: int) -> int:
        """How many tokens may join a step of `tokens` that is to take at most STRETCH times as long."""
        if self._steps < _ENOUGH or len(self._seen) < 2:
            return 0
        points = [(steps / (n * n), n, t) for steps, n, t in self._seen.values()]
        weight = sum(w for w, _, _ in points)
        mean_n, mean_t = sum(w * n for w, n, _ in points) / weight, sum(w * t for w, _, t in points) / weight
        spread = sum(w * (n - mean_n) ** 2 for w, n, _ in points)
        b = sum(w * (n - mean_n) * (t - mean_t) for w, n, t in points) / spread
        a = mean_t - b * mean_n
        if b <= 0:
            return _ANY
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
