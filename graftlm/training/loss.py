"""The loss from hidden states: logits exist only for target tokens, a chunk at a time.

    L = sum over target tokens t of weight[t] * -log softmax(head(hidden[t - 1]))[id[t]]

With weight = 1 / (target tokens of the whole optimizer step) the gradient does not depend on how the step's examples
were split into micro-batches. Each chunk's gradient is taken at once, in the forward pass, and its logits freed, so memory is
linear in tokens and not in tokens times vocabulary (the idea of Liger-Kernel's fused linear cross entropy).

Where the logits are the head's matmul and nothing else, and the head carries no adapter, the logits of a chunk become
their own gradient in place. Elsewhere autograd runs through the model's own code, whatever that does to its logits.

Letters: n target tokens, w width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm import kernels
from graftlm.adapters.bank import LayerBank
from graftlm.base.context import ForwardContext
from graftlm.base.loading import Base
from graftlm.base.modules import Stored, StoredLinear
from graftlm.segments import Segments

CHUNK_LOGITS = 1 << 23  # values of logits that exist at once on a CPU: 32 MB in float32
CHUNK_LOGITS_GPU = 1 << 27  # on a GPU, which small matmuls leave idle: 256 MB in bfloat16
CHUNK_LOGITS_CAPPED = 1 << 25  # there, where autograd keeps them with their upcast copy and probabilities
CHUNK_ROWS = 96  # but at least so many rows: for each chunk the head is read, decoded and packed anew


def chunk_logits(device: str, plain_head: bool) -> int:
    """Values of logits that may exist at once on a kind of device; `plain_head`: they become their gradient in place."""
    return CHUNK_LOGITS if device != "cuda" else CHUNK_LOGITS_GPU if plain_head else CHUNK_LOGITS_CAPPED


def head_pieces(first: int, last: int, vocabulary: int, most_logits: int) -> list[tuple[int, int]]:
    """(first, last) pieces of rows whose logits may exist at once, all of about one size: a short one would cost its own
    matmul with the head."""
    count = last - first
    pieces = -(-count // max(CHUNK_ROWS, most_logits // vocabulary))
    return [(first + count * i // pieces, first + count * (i + 1) // pieces) for i in range(pieces)]


def _chunks(
    target_ranges: Sequence[tuple[int, int, int]], vocabulary: int, device: torch.device
) -> list[tuple[int, int, int]]:
    """(slot, first, last) pieces of all ranges; a piece never crosses from one slot into the next."""
    most = chunk_logits(device.type, plain_head=False)
    return [(slot, a, b) for slot, first, last in target_ranges for a, b in head_pieces(first, last, vocabulary, most)]


def _plain_pieces(hidden: Tensor, vocabulary: int) -> list[tuple[int, int]]:
    """The pieces of hidden states (n, w) in front of a plain head."""
    return head_pieces(0, len(hidden), vocabulary, chunk_logits(hidden.device.type, plain_head=True))


def _piece(base: Base, hidden: Tensor, labels: Tensor, slot: int, context: ForwardContext) -> Tensor:
    """hidden (c, w), labels (c,) -> each token's loss, (c,) float32."""
    logits = base.logits(hidden, context.over(Segments(lengths=(len(hidden),), slots=(slot,))))  # (c, V)
    return F.cross_entropy(logits.float(), labels, reduction="none")


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        base: Base,
        labels: Tensor,
        weights: Tensor,
        target_ranges: Any,
        context: ForwardContext,
        *trained: Tensor,
    ) -> tuple[Tensor, Tensor]:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)  # (n,)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # (n, w)
        totals: list[Tensor | None] = [None] * len(trained)  # None: no token's loss depends on it
        for slot, first, last in _chunks(target_ranges, base.structure.vocabulary, hidden.device):
            with torch.enable_grad():
                part = hidden[first:last].detach().requires_grad_(gradient is not None)
                loss = _piece(base, part, labels[first:last], slot, context)
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
        # In their parameters' types: they are kept until the backward pass is over.
        own_types = (None if t is None else t.to(p.dtype) for t, p in zip(totals, trained))
        ctx.save_for_backward(*([gradient] if gradient is not None else []), *own_types)
        ctx.with_hidden = gradient is not None
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        saved = list(ctx.saved_tensors)
        dh = saved.pop(0) * scale if ctx.with_hidden else None
        return (dh, None, None, None, None, None, *(None if t is None else t.mul_(scale) for t in saved))


class _PlainHeadLoss(torch.autograd.Function):
    """The same where logits are hidden W^T: a chunk's logits become their gradient, and meet W once more."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: StoredLinear,
        W: Tensor | None,
        labels: Tensor,
        weights: Tensor,
        context: ForwardContext,
    ) -> Any:
        wants_hidden, _, wants_head = ctx.needs_input_grad[:3]
        left = context.take_tied()
        tied = left if wants_hidden and wants_head else None
        late = tied is not None and context.defer_tied_head_gradient
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)  # (n,)
        dh = torch.empty_like(hidden) if wants_hidden else None  # (n, w)
        dW: Tensor | None = None  # (V, w)
        for first, last in _plain_pieces(hidden, head.out_features):
            asked = weights[first:last] if wants_hidden or wants_head else None
            logits, found = _own_gradient(hidden[first:last], head, labels[first:last], asked)
            whole = last - first == len(hidden)  # nothing to copy together
            if whole:
                losses = found
            else:
                losses[first:last] = found
            if dh is not None:
                own = kernels.matmul_t(logits, head.value, head.bf16_matmul)
                if whole:
                    dh = own
                else:
                    dh[first:last] = own
            if wants_head and not late:
                dW = _added(dW, logits, hidden, first, head)
            del logits  # before the next chunk's are made: else there would be two at once
        ctx.save_for_backward(
            dh, None if dW is None or W is None else dW.to(W.dtype)
        )  # kept until the backward pass is over
        ctx.tied, ctx.later = tied, (hidden.detach(), head, labels, weights, context) if late else None
        ctx.mark_non_differentiable(losses)
        return torch.dot(losses, weights) if losses.is_cuda else (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        dh, dW = ctx.saved_tensors
        scale = grads[0]
        dW = None if dW is None else dW.mul_(scale)
        if ctx.later is not None:
            hidden, head, labels, weights, context = ctx.later
            ctx.tied.make = partial(_head_gradient, hidden, head, labels, weights * scale, context)
        elif ctx.tied is not None:  # the lookup at the other end adds its own to it
            ctx.tied.gradient, dW = dW, None
        return None if dh is None else dh * scale, None, dW, None, None, None


def _own_gradient(hidden: Tensor, head: StoredLinear, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """hidden (c, w) -> the gradient of the weighted losses to their logits (c, V), made in place of these, and the losses."""
    logits = head(hidden)
    if logits.requires_grad:
        logits = logits.detach()
    return logits, kernels.cross_entropy_in_place(logits, labels, weights)


def _added(dW: Tensor | None, dlogits: Tensor, hidden: Tensor, first: int, head: StoredLinear) -> Tensor:
    """What the chunk from row `first` on adds to the gradient dW (V, w): of several the sum is float32."""
    assert head.weight is not None
    part = hidden[first : first + len(dlogits)]
    if len(part) == len(hidden):
        return kernels.weight_gradient(dlogits, part, head.bf16_matmul, head.weight.dtype)
    own = kernels.weight_gradient(dlogits, part, head.bf16_matmul)
    return own.float() if dW is None else dW.add_(own)


@torch.no_grad()
def _head_gradient(
    hidden: Tensor, head: StoredLinear, labels: Tensor, weights: Tensor, context: ForwardContext
) -> Tensor:
    """The gradient of the weighted losses to the head's weight (V, w), from the hidden states (n, w) alone."""
    assert head.weight is not None
    dW: Tensor | None = None
    with context:
        for first, last in _plain_pieces(hidden, len(head.weight)):
            logits, _ = _own_gradient(hidden[first:last], head, labels[first:last], weights[first:last])
            dW = _added(dW, logits, hidden, first, head)
            del logits
    return torch.zeros_like(head.weight) if dW is None else dW.to(head.weight.dtype)


def _plain_head(base: Base, trained: Sequence[nn.Parameter]) -> StoredLinear | None:
    """The head, where it alone stands between hidden states and logits, without an adapter and with nothing else trained."""
    head = base.structure.head
    if (
        not base.structure.head_is_plain_matmul
        or not isinstance(head, StoredLinear)
        or head.weight is None
        or head.bank is not None
    ):
        return None
    return head if all(p is head.weight for p in trained) else None


def tail_parameters(base: Base) -> list[nn.Parameter]:
    """The trained tensors between the hidden states and the logits: the modules' own, and those of adapters on them."""
    found: dict[int, nn.Parameter] = {}
    for module in base.structure.tail_modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, Stored) and isinstance(module.bank, LayerBank):
            own += [p for adapter in module.bank.adapters.values() for p in adapter.named().values()]
        found.update({id(p): p for p in own if p.requires_grad})
    return list(found.values())


def weighted_loss(
    base: Base,
    hidden: Tensor,
    labels: Tensor,
    weights: Tensor,
    target_ranges: Sequence[tuple[int, int, int]],
    context: ForwardContext,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of token losses, with gradients, and each token's loss without; `context` is the micro-batch's.

    hidden (n, w) are the states in front of each target token, labels (n,) the tokens, weights (n,) float32;
    `target_ranges` gives (slot, first, last) over the n rows.
    """
    trained = tail_parameters(base) if torch.is_grad_enabled() else []
    head = _plain_head(base, trained)
    if head is not None:
        with context:
            total, losses = _PlainHeadLoss.apply(hidden, head, head.dense, labels, weights, context)  # pyright: ignore
        return total, losses
    if torch.is_grad_enabled():
        total, losses = _HeadLoss.apply(hidden, base, labels, weights, target_ranges, context, *trained)  # pyright: ignore
        return total, losses
    chunks = _chunks(target_ranges, base.structure.vocabulary, hidden.device)
    parts = [_piece(base, hidden[a:b], labels[a:b], slot, context) for slot, a, b in chunks]
    losses = torch.cat(parts) if parts else hidden.new_zeros(0)
    return (losses * weights).sum(), losses
