"""The input embedding: rows in the activation dtype, an adapter's own rows, and one gradient with a tied head.

    StoredEmbedding(ids (...,)) -> (..., w)

It replaces the model's embedding and shares its tensors. What the class does after the lookup (Gemma's scale) is the class's
own code, run on a private view of the module with other rows: the shared module is never written to, so several threads may
run forward passes at once.

**A tied head.** The head's gradient dW (V, w) is known before the layers' backward pass (`training/loss.py`); the lookup's, a
few rows, at its end. Autograd would scatter these rows into a second matrix of zeros and add both. Here the head passes its
gradient on (`context.TiedGradient`) and the rows are added in place: the lookup's gradient is the sum. To save memory
(`ForwardContext.defer_tied_head_gradient`) the head passes on a function instead, which recomputes its logits and the gradient
after the layers' backward pass, when their activations are free.

Letters: V vocabulary, w width, T tokens.
"""

# nn.Module's attributes are untyped; the model's embedding may be of any class.
# pyright: reportAttributeAccessIssue=false, reportIncompatibleVariableOverride=false

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm import kernels
from graftlm.base import context
from graftlm.base.context import TiedGradient
from graftlm.kernels import GgufBlocks


class RowBank(Protocol):
    """The adapters on an embedding (`adapters.bank` implements it)."""

    def __call__(self, ids: Tensor, output: Tensor, embedding: StoredEmbedding) -> Tensor: ...


class StoredEmbedding(nn.Module):
    """The model's own embedding with rows cast to `activation_dtype`; `bank` inserts adapters' rows."""

    weight: nn.Parameter

    def __init__(self, original: nn.Module, activation_dtype: torch.dtype) -> None:
        super().__init__()
        # Shared parameters: moving or replacing a tensor here does so in the original too.
        self._parameters, self._buffers = original._parameters, original._buffers
        self._non_persistent_buffers_set = original._non_persistent_buffers_set
        self.__dict__["original"] = original  # not a child, or its tensors would be listed twice
        self.__dict__["head"] = None
        self.activation_dtype = activation_dtype
        self.bank: RowBank | None = None

    def tie(self, head: nn.Module | None) -> None:
        """Set the head; while it has the same weight as this embedding, the two share one gradient in training."""
        self.__dict__["head"] = head

    def forward(self, ids: Tensor) -> Tensor:
        rows, bank = self._own_rows(ids), self.bank
        return rows if bank is None else bank(ids, rows, self)

    def store_blocks(self, handle: Any) -> None:
        """Take rows in a GGUF file's blocks for the weight; `handle` is what code that reads `weight` gets."""
        self._parameters.pop("weight", None)
        self.__dict__["weight"] = handle

    @property
    def blocks(self) -> GgufBlocks | None:
        """The weight (V, w) where it is stored in blocks."""
        handle = self.__dict__.get("weight")
        return None if handle is None else handle.linear.compressed

    def _own_rows(self, ids: Tensor) -> Tensor:
        """The rows, upcast before the class scales them: Gemma rounds its scale to the dtype of the weight."""
        blocks = self.blocks
        if blocks is not None:
            rows = kernels.embedding_rows(blocks, ids.reshape(-1), self.activation_dtype)
            return self.scaled(rows, torch.arange(len(rows), device=ids.device).view(ids.shape))
        weight: Tensor = self.weight
        original: Any = self.__dict__["original"]
        if weight.dtype == self.activation_dtype:
            return original.forward(ids)
        padding = getattr(original, "padding_idx", None)
        if self._shares_gradient(weight):
            forward_context = context.current()
            forward_context.tied = TiedGradient()
            rows = look_up(weight, ids.reshape(-1), padding, self.activation_dtype, forward_context.tied)  # (T, w)
        else:
            rows = F.embedding(ids.reshape(-1), weight, padding).to(self.activation_dtype)
        return self.scaled(rows, torch.arange(len(rows), device=ids.device).view(ids.shape))

    def _shares_gradient(self, weight: Tensor) -> bool:
        head = self.__dict__["head"]
        return (
            weight.requires_grad and torch.is_grad_enabled() and weight.device.type == "cpu"
            and head is not None and head.weight is weight and context.active() is not None
        )  # fmt: skip

    def scaled(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Other `rows` (n, w), indexed by `ids`, with the class's own code after the lookup -> (*ids.shape, w).

        The padding index is not used: it only stops a gradient, and would be another row here.
        """
        original: Any = self.__dict__["original"]
        view: Any = object.__new__(type(original))
        view.__dict__.update(original.__dict__)
        view.__dict__["_parameters"] = {**original._parameters, "weight": rows}
        if "padding_idx" in view.__dict__:
            view.__dict__["padding_idx"] = None
        return type(original).forward(view, ids)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)


class _Lookup(torch.autograd.Function):
    """weight (V, w), ids (T,) -> rows (T, w) in `dtype`."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, padding: int | None, dtype: torch.dtype, tied: TiedGradient
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.type, ctx.padding, ctx.tied = weight.shape, weight.dtype, padding, tied
        return F.embedding(ids, weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None, None]:
        (ids,), (dy,) = ctx.saved_tensors, grads
        which, place = ids.unique(return_inverse=True)  # (u,), (T,)
        rows = torch.zeros(len(which), ctx.shape[1]).index_add_(0, place, dy.float())  # (u, w)
        if ctx.padding is not None:
            rows[which == ctx.padding] = 0  # as in PyTorch's own
        total = ctx.tied.take()
        if total is None:
            total = torch.zeros(ctx.shape, dtype=ctx.type)
        total[which] = (total[which].float() + rows).to(ctx.type)
        return total, None, None, None, None


def look_up(weight: Tensor, ids: Tensor, padding: int | None, dtype: torch.dtype, tied: TiedGradient) -> Tensor:
    """weight (V, w), ids (T,) -> rows (T, w) in `dtype`; on a CPU. The weight's gradient includes that of `tied`."""
    rows = _Lookup.apply(weight, ids, padding, dtype, tied)
    assert isinstance(rows, Tensor)
    return rows
