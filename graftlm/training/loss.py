"""The loss from hidden states: logits exist only for trained tokens, a chunk at a time.

    L = sum over trained tokens t of weight[t] * -log softmax(head(hidden[t - 1]))[id[t]]

With weight = 1 / (trained tokens of the whole optimizer step) the gradient does not depend on how the step's documents
were split into passes. Each chunk's gradient is taken at once, in the forward pass, and its logits freed, so memory is
linear in tokens and not in tokens times vocabulary (the idea of Liger-Kernel's fused linear cross entropy; here over the
model's own head code, whatever it does to its logits).

Letters: n trained tokens, w width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.adapters.bank import Bank
from graftlm.base.linear import Stored
from graftlm.base.load import Base
from graftlm.segments import Segments, running

CHUNK_LOGITS = 1 << 23  # values of logits that exist at once: 32 MB in float32


def _chunks(slots: Sequence[tuple[int, int, int]], size: int) -> list[tuple[int, int, int]]:
    """(slot, first, last) pieces of at most `size` rows; a piece never crosses from one slot into the next."""
    return [(slot, a, min(a + size, last)) for slot, first, last in slots for a in range(first, last, size)]


def _piece(base: Base, hidden: Tensor, labels: Tensor, slot: int) -> Tensor:
    """hidden (c, w), labels (c,) -> each token's loss, (c,) float32."""
    with running(Segments(lengths=(len(hidden),), slots=(slot,))):
        logits = base.logits(hidden)  # (c, V)
    return F.cross_entropy(logits.float(), labels, reduction="none")


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, base: Base, labels: Tensor, weights: Tensor, slots: Any, *trained: Tensor
    ) -> tuple[Tensor, Tensor]:
        size = max(16, CHUNK_LOGITS // base.anatomy.vocabulary)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)  # (n,)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # (n, w)
        totals: list[Tensor | None] = [None] * len(trained)  # None: no token's loss depends on it
        for slot, first, last in _chunks(slots, size):
            with torch.enable_grad():
                part = hidden[first:last].detach().requires_grad_(gradient is not None)
                loss = _piece(base, part, labels[first:last], slot)
                weighted = (loss * weights[first:last]).sum()
                wanted = ([part] if gradient is not None else []) + list(trained)
                found: list[Tensor | None] = []
                if wanted:
                    found.extend(torch.autograd.grad(weighted, wanted, allow_unused=True))
            losses[first:last] = loss.detach()
            if gradient is not None:
                own = found.pop(0)
                assert own is not None
                gradient[first:last] = own
            for i, own in enumerate(found):
                if own is not None:
                    total = totals[i]
                    totals[i] = own.float() if total is None else total + own
        ctx.save_for_backward(*([gradient] if gradient is not None else []), *totals)
        ctx.with_hidden = gradient is not None
        ctx.kinds = [p.dtype for p in trained]
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        saved = list(ctx.saved_tensors)
        dh = saved.pop(0) * scale if ctx.with_hidden else None
        own = (None if t is None else (t * scale).to(kind) for t, kind in zip(saved, ctx.kinds))
        return (dh, None, None, None, None, *own)


def tail_parameters(base: Base) -> list[nn.Parameter]:
    """The trained tensors between the hidden states and the logits: the modules' own, and those of adapters on them."""
    found: dict[int, nn.Parameter] = {}
    for module in base.anatomy.tail_modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, Stored) and isinstance(module.bank, Bank):
            own += [p for slot in module.bank.slots.values() for p in slot.named().values()]
        found.update({id(p): p for p in own if p.requires_grad})
    return list(found.values())


def weighted_loss(
    base: Base, hidden: Tensor, labels: Tensor, weights: Tensor, slots: Sequence[tuple[int, int, int]]
) -> tuple[Tensor, Tensor]:
    """The weighted sum of token losses, with gradients, and each token's loss without.

    hidden (n, w) are the states in front of each trained token, labels (n,) the tokens, weights (n,) float32;
    `slots` gives (slot, first, last) over the n rows.
    """
    if torch.is_grad_enabled():
        total, losses = _HeadLoss.apply(hidden, base, labels, weights, slots, *tail_parameters(base))  # pyright: ignore
        return total, losses
    size = max(16, CHUNK_LOGITS // base.anatomy.vocabulary)
    parts = [_piece(base, hidden[a:b], labels[a:b], slot) for slot, a, b in _chunks(slots, size)]
    losses = torch.cat(parts) if parts else hidden.new_zeros(0)
    return (losses * weights).sum(), losses
