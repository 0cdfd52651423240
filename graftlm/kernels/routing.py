"""Which tokens of a pass use which adapter on one layer: what the routed low-rank products take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Range = tuple[int, int, int]
"""(first token, one past the last token, slot)."""
Slots = Sequence[Tensor | None]
"""Each slot's A or B; None where a slot leaves this layer as it is (slot 0, the bare base)."""


@dataclass(frozen=True, eq=False)
class Routing:
    """Disjoint ranges of tokens, and by slot A (r, in), B (out, r), of any rank, and the scale of their product."""

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
