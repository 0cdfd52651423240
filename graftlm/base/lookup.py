"""Rows of an embedding whose matrix is the head's too: one gradient instead of two as large as the matrix.

A head tied to the embedding has its gradient dW (V, w) before the backward pass begins (`training/loss.py`); the lookup has
a handful of rows at its end. Left to autograd, the rows are made into a second matrix of zeros to be added to the first. Here
the head hands its own over and the rows are added in place: the lookup's gradient is that of both.

Where memory counts more than time (`StoredLinear.late`) the head hands over how to make it instead, and it is made when the
layers have run back and their activations are gone: its logits are computed once more.

    Share          between one lookup and the head that follows it in the same pass
    look_up(...)   rows in another type than the matrix has, with that gradient

Letters: V vocabulary, w width, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Share:
    """What a head leaves for the lookup of its matrix: nothing yet, its gradient, or how to make that."""

    def __init__(self) -> None:
        self.gradient: Tensor | None = None
        self.make: Callable[[], Tensor] | None = None

    def take(self) -> Tensor | None:
        """The head's gradient, or None where it has left none; nothing is kept."""
        gradient, make = self.gradient, self.make
        self.gradient = self.make = None
        return gradient if make is None else make()


class _Lookup(torch.autograd.Function):
    """weight (V, w), ids (T,) -> rows (T, w) in `wide`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int | None, wide: torch.dtype, share: Share) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.type, ctx.padding, ctx.share = weight.shape, weight.dtype, padding, share
        return F.embedding(ids, weight).to(wide)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None, None]:
        (ids,), (dy,) = ctx.saved_tensors, grads
        which, place = ids.unique(return_inverse=True)  # (u,), (T,)
        rows = torch.zeros(len(which), ctx.shape[1]).index_add_(0, place, dy.float())  # (u, w)
        if ctx.padding is not None:
            rows[which == ctx.padding] = 0  # as PyTorch's own has it
        total = ctx.share.take()
        if total is None:
            total = torch.zeros(ctx.shape, dtype=ctx.type)
        total[which] = (total[which].float() + rows).to(ctx.type)
        return total, None, None, None, None


def look_up(weight: Tensor, ids: Tensor, padding: int | None, wide: torch.dtype, share: Share) -> Tensor:
    """weight (V, w), ids (T,) -> rows (T, w) in `wide`; on a CPU. Whatever `share` then holds is in the weight's gradient."""
    rows = _Lookup.apply(weight, ids, padding, wide, share)
    assert isinstance(rows, Tensor)
    return rows
