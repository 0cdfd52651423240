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


@dataclass(frozen=True, eq=False)
class Dropout:
    """The masks of layers with the same input x (T, in): what of it is dropped, with probability `dropout`, for each layer."""

    token_keys: Tensor
    """(T,) int32, as `counter_rng.keep_mask` has them."""
    module_keys: tuple[int, ...]
    """Of each layer."""
    dropout: float


@dataclass(frozen=True, eq=False)
class FactorTable:
    """The factors of several adapters on one layer, told on its device; they may change there between two steps of decoding.

    Entry 0 has none (rank 0), nor have unused ones. A and B lie end to end in the dtype of the layer's input.
    """

    A: Tensor
    """(entries,) int64: addresses of A (r, in)."""
    B: Tensor
    """(entries,) int64: addresses of B transposed, (r, out)."""
    ranks: Tensor
    """(entries,) int32."""
    scale: Tensor
    """(entries,) float32: of B A."""


TABLE_TOKENS = 16
"""Tokens of a tile that reads a `FactorTable`, at most."""


def tiles_of(ranges: Sequence[FactorRange], tokens: int) -> list[FactorRange]:
    """(factor index, first token, last token) of pieces of `tokens` tokens at most."""
    return [
        (factor_index, begin, min(begin + tokens, last))
        for factor_index, first, last in ranges
        for begin in range(first, last, tokens)
    ]
