"""Which tokens of a micro-batch use which adapter's factors on one layer, for the routed kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FactorRange = tuple[int, int, int]
"""(factor index, first token, one past the last token). The index is into A, B and scale; it is not the adapter slot."""
FactorList = Sequence[Tensor | None]
"""The A or B of each factor pair; None if a pair does not adapt this layer (the base alone)."""


@dataclass(frozen=True, eq=False)
class Routing:
    """Disjoint ranges of tokens, and by factor index A (r, in), B (out, r), of any rank, and the scale of B A."""

    ranges: Sequence[FactorRange]
    A: FactorList
    B: FactorList
    scale: Sequence[float]
    gradient_dtype: torch.dtype | None = None
    """Of the gradients to A and B: on a GPU these may be copies in another dtype. None: that of A and B."""

    def only(self, tokens: int) -> tuple[Tensor, Tensor, float] | None:
        """The one A, B and scale that all of `tokens` use, if there is one."""
        if len(self.ranges) != 1 or self.ranges[0][1:] != (0, tokens):
            return None
        factor_index = self.ranges[0][0]
        a, b = self.A[factor_index], self.B[factor_index]
        return None if a is None or b is None else (a, b, self.scale[factor_index])
