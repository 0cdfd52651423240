"""Who takes part in a step when several tenants want it: a small one is not to wait for a large one's batch.

A step of n tokens takes about a + b n seconds. Where b is next to nothing, as on a GPU, everybody takes part in every step.
On a CPU twelve tokens take several times as long as one, so a tenant with one answer beside another's twelve would write at
a fraction of its speed for as long as they are there. So the tenant that wants the fewest tokens goes first, and of the
others, one of each tenant in turn and the idlest first, as many join as it has itself: max-min fairness a step at a time. More
join where they add little to the step: a SHARE of the time that its own steps take is saved up for them. When it has nothing
to do they have all of the engine, in steps no longer than LONGEST, since whoever comes waits for the end of one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from graftlm.serving.engine.sequence import Sequence

SHARE = 0.25
"""Seconds that others may add for each second of the smallest tenant's own steps."""
LONGEST = 0.1
"""Seconds of a step in which prompts are read; where single tokens take long, those of four of them."""
LEAST_CHUNK = 8
"""Tokens of a prompt that may be read in any step."""
_REMEMBERED = 50  # steps of about as many tokens that an estimate is the mean of
_ENOUGH = 20  # steps before the estimates are used
_ANY = 1 << 30


class StepCostModel:
    """Estimates a and b from the steps so far, and keeps what the others have saved up.

    Steps of about as many tokens are averaged first and the averages fitted, with equal relative errors: while one tenant is
    alone all steps are alike, and a fit of these would be a fit of noise.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float, float]] = {}  # by the power of two: steps, mean tokens, mean seconds
        self._steps = 0
        self._saved = 0.0  # seconds
        self.cost: tuple[float, float] | None = None
        """a and b, in seconds; None as long as too little is known."""

    def learn(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens has taken so long."""
        steps, n, t = self._seen.get(tokens.bit_length(), (0.0, 0.0, 0.0))
        steps = min(steps + 1, _REMEMBERED)
        self._seen[tokens.bit_length()] = (steps, n + (tokens - n) / steps, t + (seconds - t) / steps)
        self._steps += 1
        if self._steps >= _ENOUGH and len(self._seen) > 1:
            self.cost = self._fitted()

    def _fitted(self) -> tuple[float, float]:
        points = [(steps / (n * n), n, t) for steps, n, t in self._seen.values()]
        weight = sum(w for w, _, _ in points)
        mean_n, mean_t = sum(w * n for w, n, _ in points) / weight, sum(w * t for w, _, t in points) / weight
        spread = sum(w * (n - mean_n) ** 2 for w, n, _ in points)
        b = max(sum(w * (n - mean_n) * (t - mean_t) for w, n, t in points) / spread, 0.0)
        return max(mean_t - b * mean_n, 0.0), b

    def reading(self) -> int:
        """How many tokens a step may have in which prompts are read."""
        if self.cost is None:
            return _ANY
        a, b = self.cost
        left = max(LONGEST, 4 * (a + b)) - a
        return max(int(min(left / b, _ANY)), LEAST_CHUNK) if b > 0 else _ANY

    def room(self, own: int) -> int:
        """How many tokens others may add now to a step of `own` tokens: as many again, or what is saved up for them."""
        if self.cost is None:
            return own
        a, b = self.cost
        alone = a + b * own
        self._saved = min(self._saved + SHARE * alone, max(alone, LEAST_CHUNK * b))
        return max(own, min(int(self._saved / b), _ANY)) if b > 0 else _ANY

    def spend(self, tokens: int) -> None:
        """Others have added so many."""
        if self.cost is not None:
            self._saved = max(self._saved - tokens * self.cost[1], 0.0)


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
