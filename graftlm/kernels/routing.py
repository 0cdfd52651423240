"""Which tokens of a micro-batch use which adapter on one layer, for the routed kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Range = tuple[int, int, int]
"""(first token, one past the last token, slot)."""
Slots = Sequence[Tensor | None]
"""Each slot's A or B; None if a slot does not adapt this layer (slot 0, the base alone)."""


@dataclass(frozen=True, eq=False)
class Routing:
    """Disjoint ranges of tokens, and by slot A (r, in), B (out, r), of any rank, and the scale of B A."""

    ranges: Sequence[Range]
    A: Slots
    B: Slots
    scale: Sequence[float]

    def only(self, tokens: int) -> tuple[Tensor, Tensor, float] | None:
        """The one A, B and scale that all of `tokens` use, if there is one."""
        if len(self.ranges) != 1 or self.ranges[0][:2] != (0, tokens):
            return None
        slot = self.ranges[0][2]
        a, b = self.A[slot], self.B[slot]
        return None if a is None or b is None else (a, b, self.scale[slot])
