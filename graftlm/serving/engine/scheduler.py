"""Who is next: a queue that is fair between tenants.

Each tenant has a line of its own and a count of the tokens it was served. The tenant with the lowest count goes first (the
virtual token counter of Sheng et al. 2024, "Fairness in Serving Large Language Models"), so one that asks a hundred times
as often waits behind its own requests, not the others behind it. One that was away comes back with the lowest count of
those who are here, so absence saves nothing up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from graftlm.serving.engine.sequence import Sequence


class FairQueue:
    """Waiting sequences, by tenant."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[Sequence]] = {}
        self._served: dict[str, float] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Sequence]:
        for tenant in self.tenants:
            yield from self._lines[tenant]

    def waiting(self, tenant: str) -> int:
        """How many sequences of a tenant wait."""
        return len(self._lines.get(tenant, ()))

    @property
    def tenants(self) -> list[str]:
        """Tenants who wait, who is next first."""
        return self.by_service(self._lines)

    def by_service(self, tenants: Iterable[str]) -> list[str]:
        """Tenants, the least served first; of two served alike the one with fewer waiting."""
        return sorted(set(tenants), key=lambda name: (self._served.get(name, 0.0), self.waiting(name), name))

    def line(self, tenant: str) -> list[Sequence]:
        """A tenant's waiting sequences, oldest first."""
        return list(self._lines.get(tenant, ()))

    def add(self, sequence: Sequence, running: set[str], *, first: bool = False) -> None:
        """Put a sequence at the end of its tenant's line, or `first` in it; `running` are tenants with sequences at work."""
        tenant = sequence.request.tenant
        if tenant not in self._lines:
            here = [count for name, count in self._served.items() if name in self._lines or name in running]
            if tenant not in running:
                self._served[tenant] = max(self._served.get(tenant, 0.0), min(here, default=0.0))
            self._served.setdefault(tenant, 0.0)
            self._lines[tenant] = deque()
        if first:
            self._lines[tenant].appendleft(sequence)
        else:
            self._lines[tenant].append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands."""
        line = self._lines[sequence.request.tenant]
        line.remove(sequence)
        if not line:
            del self._lines[sequence.request.tenant]

    def serve(self, tenant: str, tokens: float) -> None:
        """Count tokens that a tenant was served."""
        self._served[tenant] = self._served.get(tenant, 0.0) + tokens
        if len(self._served) > 10_000:  # tenants who left long ago
            here = self._lines.keys() | {tenant}
            self._served = {name: count for name, count in self._served.items() if name in here}
