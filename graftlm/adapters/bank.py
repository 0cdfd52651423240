"""The LoRA formula, and a bank of adapters over one stored weight.

    y = x W^T + b + s (drop(x) A^T) B^T            LoRA (Hu et al. 2021), s = alpha / r, or alpha / sqrt(r) rank-stabilized
    y = m / |W + s B A| (x W^T + s (drop(x) A^T) B^T) + b                                        DoRA (Liu et al. 2024)

A bank holds one `Slot` (`slots.py`) for each adapter on this layer, of any rank; the segments of the micro-batch say which
tokens use which slot. Training one adapter is a bank of one; a sweep and a server have more. The matmul with W runs once for
all tokens, then each slot adds its low-rank term to its own range. One autograd function does both, so that backward needs
only x, the low-rank h = x A^T (T, r), and the stored form of W.

Letters: T tokens, `in`, `out` features, r rank, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm import kernels
from graftlm.adapters.slots import LowRank, ModulesToSave, Slot, TrainableTokens, combined_norm
from graftlm.base import context
from graftlm.base.embedding import StoredEmbedding
from graftlm.base.modules import Stored, stored_matmul
from graftlm.base.precision import Weight
from graftlm.kernels.counter_rng import keep_mask


@dataclass(frozen=True)
class _SlotUse:
    """One slot's range of a matmul: rows first..last of x use factor pair `index`, with these dropout keys."""

    first: int
    last: int
    index: int
    scale: float
    dropout: float
    key: int
    token_keys: Tensor | None

    @property
    def drops(self) -> bool:
        return self.dropout > 0 and self.token_keys is not None

    def dropped(self, x: Tensor) -> Tensor:
        """drop(x) for this use's rows of x (T, in) -> (t, in), each kept feature scaled by 1 / (1 - p)."""
        rows = x[self.first : self.last]
        keep = self.keep(x)
        return rows if keep is None else rows * keep

    def keep(self, x: Tensor) -> Tensor | None:
        if self.token_keys is None or not self.dropout:
            return None
        mask = keep_mask(self.token_keys, self.key, x.shape[1], self.dropout)  # (t, in)
        return mask.to(x.dtype) * (1.0 / (1.0 - self.dropout))


def _routing(uses: Sequence[_SlotUse], factors: Sequence[Tensor]) -> kernels.Routing:
    """The uses in the form of the routed kernels, one slot for each pair of factors."""
    scale = [0.0] * (len(factors) // 2)
    for use in uses:
        scale[use.index] = use.scale
    return kernels.Routing([(use.first, use.last, use.index) for use in uses], factors[0::2], factors[1::2], scale)


class _Banked(torch.autograd.Function):
    """x (T, in) -> x W^T + sum over uses of s (drop(x) A^T) B^T, (T, out); gradients to x, every A and every B."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, bf16_matmul: bool, uses: Sequence[_SlotUse], *factors: Tensor
    ) -> Tensor:
        hidden: list[Tensor | None]  # each (t, r)
        if any(u.drops for u in uses):
            y = kernels.matmul(x, weight, bf16_matmul)
            hidden = [
                kernels.low_rank(
                    y[u.first : u.last], u.dropped(x), factors[2 * u.index], factors[2 * u.index + 1], u.scale
                )
                for u in uses
            ]
        else:
            y, hidden = kernels.lora_linear(x, weight, _routing(uses, factors), bf16_matmul)
        ctx.save_for_backward(x, *factors, *hidden)
        ctx.weight, ctx.bf16_matmul, ctx.uses, ctx.count = weight, bf16_matmul, uses, len(factors)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        dy = grads[0].contiguous()  # (T, out)
        x, *rest = ctx.saved_tensors
        factors, hidden = rest[: ctx.count], rest[ctx.count :]
        weight, wanted = ctx.weight, ctx.needs_input_grad[0]
        totals: list[Tensor | None] = [None] * ctx.count
        if not any(u.drops for u in ctx.uses):
            routing = _routing(ctx.uses, factors)
            dx, totals[0::2], totals[1::2] = kernels.lora_linear_backward(
                dy, x, weight, hidden, routing, wanted, ctx.bf16_matmul
            )
            return (dx, None, None, None, *totals)
        dx = kernels.matmul_t(dy, weight, ctx.bf16_matmul) if wanted else None
        for use, h in zip(ctx.uses, hidden):
            rows = slice(use.first, use.last)
            keep = use.keep(x)  # (t, in), or None where this use drops nothing
            into = None if dx is None else (dx[rows] if keep is None else torch.zeros_like(x[rows]))
            dA, dB = kernels.low_rank_backward(
                dy[rows], use.dropped(x), h, factors[2 * use.index], factors[2 * use.index + 1], use.scale, into
            )
            if dx is not None and into is not None and keep is not None:
                dx[rows] += into * keep
            for index, gradient in ((2 * use.index, dA), (2 * use.index + 1, dB)):
                before = totals[index]
                totals[index] = gradient if before is None else before + gradient
        return (dx, None, None, None, *totals)


@dataclass(frozen=True)
class _Decoding:
    """The low-rank terms of a forward pass without gradients, and DoRA's scale of each range."""

    routes: kernels.DecodeRouting
    ratios: Sequence[tuple[int, int, Tensor]]  # (first, last, (out,))

    def matmul(self, x: Tensor, weight: Weight, bias: Tensor | None, bf16_matmul: bool) -> Tensor:
        """x (T, in) -> (T, out)."""
        y = stored_matmul(x, weight, None, bf16_matmul)
        if self.routes.ranges:
            kernels.add_routed(y, x, self.routes)
        for first, last, ratio in self.ratios:
            y[first:last] *= ratio
        return y if bias is None else y + bias.to(y.dtype)


class _Slots(dict[int, Slot]):
    """Slots by number, with a count of changes: a cached reading is valid while the count stays the same."""

    changes = 0

    def __setitem__(self, number: int, slot: Slot) -> None:
        self.changes += 1
        super().__setitem__(number, slot)

    def pop(self, number: int, default: Any = None) -> Any:
        self.changes += 1
        return super().pop(number, default)


class Bank:
    """The slots of one layer; the stored module calls it instead of its own matmul."""

    def __init__(self) -> None:
        self.slots: dict[int, Slot] = _Slots()
        self._routes: tuple[Any, int, _Decoding | None] | None = None

    def __call__(
        self, x: Tensor, module: Stored, weight: Weight, bias: Tensor | None, expert: int | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x (T, in) -> (T, out). For an expert, `rows` (T,) are the ascending indices of its tokens in the micro-batch."""
        ranges = _ranges(len(x), rows)
        if expert is None and not torch.is_grad_enabled():
            routes = self._routes_of(ranges, weight)
            if routes is not None:
                return routes.matmul(x, weight, bias, module.bf16_matmul)
        used = [(self.slots[slot], first, last) for slot, first, last in ranges if slot in self.slots]
        if all(isinstance(slot, LowRank) and slot.magnitude is None for slot, _, _ in used):
            y = self._low_rank(x, weight, used, expert, rows, module.bf16_matmul)
            return y if bias is None else y + bias.to(y.dtype)
        parts = [self._one(x[first:last], weight, bias, self.slots.get(slot), first, last, rows, len(x), module.bf16_matmul)
                 for slot, first, last in ranges]  # fmt: skip
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _routes_of(self, ranges: Sequence[tuple[int, int, int]], weight: Weight) -> _Decoding | None:
        """These ranges in the form of decoding's kernels, cached for the next step; None if a slot is not `for_decoding`."""
        slots, kept = self.slots, self._routes
        assert isinstance(slots, _Slots)
        changes = slots.changes  # before any slot is read: another thread may put one in meanwhile
        if kept is not None and kept[1] == changes and kept[0] == ranges:
            return kept[2]
        used = [(slots[slot], first, last) for slot, first, last in ranges if slot in slots]
        low = [(slot, first, last) for slot, first, last in used if isinstance(slot, LowRank) and slot.decode_ready]
        found = None
        if len(low) == len(used):
            routes = kernels.DecodeRouting([(a, b) for _, a, b in low], [slot.decode_factors for slot, _, _ in low])
            found = _Decoding(routes, [(a, b, slot.ratio(weight)) for slot, a, b in low if slot.magnitude is not None])
        self._routes = (ranges, changes, found)
        return found

    def _low_rank(
        self, x: Tensor, weight: Weight, used: Sequence[tuple[Any, int, int]], expert: int | None, rows: Tensor | None,
        bf16_matmul: bool,
    ) -> Tensor:  # fmt: skip
        if not used:
            return stored_matmul(x, weight, None, bf16_matmul)
        uses: list[_SlotUse] = []
        factors: list[Tensor] = []
        index: dict[int, int] = {}
        for slot, first, last in used:
            if id(slot) not in index:
                index[id(slot)] = len(index)
                factors.extend(slot.factors(expert))
            uses.append(_use(slot, first, last, index[id(slot)], rows, len(x)))
        y = _Banked.apply(x, weight, bf16_matmul, uses, *factors)
        assert isinstance(y, Tensor)
        return y

    def _one(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        slot: Slot | None,
        first: int,
        last: int,
        rows: Tensor | None,
        total: int,
        bf16_matmul: bool,
    ) -> Tensor:
        """One range of the layer's `total` rows through one slot of any kind; differentiable, x (t, in) -> (t, out)."""
        if isinstance(slot, ModulesToSave):
            return stored_matmul(x, slot.weight.to(x.dtype), bias, bf16_matmul)
        y = stored_matmul(x, weight, None, bf16_matmul)  # (t, out)
        if isinstance(slot, TrainableTokens):  # a head that shares the embedding's rows
            own = stored_matmul(x, slot.values.to(x.dtype), None, bf16_matmul)  # (t, rows)
            y = y.index_copy(1, torch.tensor(slot.tokens, device=y.device), own)
        elif isinstance(slot, LowRank):
            use = _use(slot, first, last, 0, rows, total)
            keep = use.keep(x)
            A, B = slot.factors(None)
            y = y + slot.scale * F.linear(F.linear(x if keep is None else x * keep, A.to(x.dtype)), B.to(x.dtype))
            if slot.magnitude is not None:
                y = y * (slot.magnitude / combined_norm(weight, A, B, slot.scale)).to(y.dtype)
        return y if bias is None else y + bias.to(y.dtype)


def _use(slot: LowRank, first: int, last: int, index: int, rows: Tensor | None, total: int) -> _SlotUse:
    """The use of one slot by rows [first, last) of a layer's `total` rows."""
    keys = None
    segments = context.current().segments
    if slot.dropout and torch.is_grad_enabled() and segments.streams:
        laid = segments if rows is not None else segments.of_rows(total)
        keys = laid.token_keys_on(slot.A.device)
        keys = keys[first:last] if rows is None else keys[rows[first:last]]
    return _SlotUse(first, last, index, slot.scale, slot.dropout, slot.key, keys)


def _ranges(tokens: int, rows: Tensor | None) -> Sequence[tuple[int, int, int]]:
    """(slot, first, last) over the rows of x: the ranges of the segments, or of the tokens that one expert gets."""
    segments = context.current().segments
    if rows is None:
        return segments.of_rows(tokens).slot_ranges
    ranges = segments.slot_ranges
    if len(ranges) == 1:
        return ((ranges[0][0], 0, tokens),)
    bounds = torch.tensor([stop for _, _, stop in ranges], device=rows.device)
    cuts = [0, *torch.searchsorted(rows, bounds).tolist()]
    return [(slot, a, b) for (slot, _, _), a, b in zip(ranges, cuts, cuts[1:]) if b > a]


class EmbeddingBank:
    """Slots on an embedding: some tokens get an adapter's rows, or all of them rows of an adapter's weight.

    The rows are scaled as the embedding's class does (`StoredEmbedding.scaled`).
    """

    def __init__(self) -> None:
        self.slots: dict[int, Slot] = {}

    def __call__(self, ids: Tensor, output: Tensor, embedding: StoredEmbedding) -> Tensor:
        """ids (...,) and the base's rows for them (..., width) -> the rows of each token's own slot (..., width)."""
        ids = ids.reshape(-1)  # (T,)
        flat = output.reshape(-1, output.shape[-1])  # (T, width)
        parts: list[Tensor] = []
        for number, first, last in context.current().segments.slot_ranges:
            slot, part = self.slots.get(number), ids[first:last]
            if isinstance(slot, ModulesToSave):
                parts.append(embedding.scaled(slot.weight, part).to(embedding.activation_dtype))
            elif isinstance(slot, TrainableTokens):
                row = slot.lookup[part]  # (t,)
                own = embedding.scaled(slot.values, row.clamp_min(0)).to(embedding.activation_dtype)
                parts.append(torch.where((row >= 0)[:, None], own, flat[first:last]))
            else:
                parts.append(flat[first:last])
        return torch.cat(parts).view(output.shape)
