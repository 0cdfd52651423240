"""The low-rank formula, and a bank of adapters over one stored weight.

    y = x W^T + b + s (drop(x) A^T) B^T            LoRA (Hu et al. 2021), s = alpha / r, or alpha / sqrt(r) rank-stabilized
    y = m / |W + s B A| (x W^T + s (drop(x) A^T) B^T) + b                                        DoRA (Liu et al. 2024)

A bank holds one `Slot` for each adapter that adapts this layer, of any rank; the segments of the pass say which tokens use
which. Training one adapter is a bank of one; a sweep and a server fill more. W is multiplied once for all tokens, then each
slot adds to its own range. One autograd function does both, so that its backward pass needs only x, the narrow h = x A^T,
and the stored form of W.

Letters: T tokens, `in`, `out` features, r rank, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm import kernels
from graftlm.base import context
from graftlm.base.embedding import StoredEmbedding
from graftlm.base.modules import Stored, StoredStack, product
from graftlm.base.precision import Weight, dequantize
from graftlm.kernels.counter_rng import hash_words, keep_mask, uniform


def scale_of(alpha: float, rank: int, rank_stabilized: bool) -> float:
    """s = alpha / r (Hu et al. 2021, section 4.1), or alpha / sqrt(r) (Kalajdzievski 2023)."""
    return alpha / math.sqrt(rank) if rank_stabilized else alpha / rank


@dataclass(eq=False)
class LowRank:
    """One adapter's A and B on one layer. For stacked experts both hold all experts, in PEFT's layout."""

    A: nn.Parameter  # (r, in), or (E r, in)
    B: nn.Parameter  # (out, r), or (out, r E) with the expert running fastest
    scale: float
    alpha: float
    rank: int
    dropout: float = 0.0
    key: int = 0
    """Names this layer to the random numbers of dropout."""
    experts: int = 0
    magnitude: nn.Parameter | None = None  # (out,), DoRA's m
    _ratio: Tensor | None = None

    def factors(self, expert: int | None) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of the layer, or of one of its experts."""
        if expert is None:
            return self.A, self.B
        A = self.A.view(self.experts, self.rank, -1)[expert]
        B = self.B.view(-1, self.rank, self.experts)[:, :, expert]
        return A, B

    def for_decoding(self) -> LowRank:
        """The same numbers as decoding reads them fastest: B transposed in memory, and in 16 bits where that loses nothing."""

        def in_bfloat16(tensor: Tensor) -> Tensor:
            half = tensor.to(torch.bfloat16)
            return half if torch.equal(half.float(), tensor) else tensor

        if self.experts:
            return self
        A, B = in_bfloat16(self.A.detach()).contiguous(), in_bfloat16(self.B.detach()).T.contiguous().T
        return replace(self, A=nn.Parameter(A, requires_grad=False), B=nn.Parameter(B, requires_grad=False))

    @property
    def decode_ready(self) -> bool:
        """Whether decoding's kernels take these factors as they lie (see `for_decoding`)."""
        return not (self.experts or self.A.requires_grad) and self.decode_factors.ready

    @cached_property
    def decode_factors(self) -> kernels.Factors:
        """A, B and the scale as decoding's kernels take them."""
        return kernels.Factors(self.A.detach(), self.B.detach(), self.scale)

    def ratio(self, weight: Weight) -> Tensor:
        """m / |W + s B A| (out,), for passes that record no gradients; kept, since A and B of a server stay as they are."""
        assert self.magnitude is not None
        if self._ratio is None:
            self._ratio = self.magnitude.detach() / combined_norm(weight, self.A.float(), self.B.float(), self.scale)
        return self._ratio

    def named(self) -> dict[str, nn.Parameter]:
        """The trained tensors, under the names that PEFT gives them."""
        found = {"lora_A.weight": self.A, "lora_B.weight": self.B}
        if self.magnitude is not None:
            found["lora_magnitude_vector"] = self.magnitude
        return found


@dataclass(eq=False)
class ModulesToSave:
    """A module trained whole for one adapter (PEFT's `modules_to_save`): its own copy of the weight, in float32."""

    weight: nn.Parameter  # (out, in)

    def named(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight}


@dataclass(eq=False)
class TrainableTokens:
    """Some rows of an embedding (and of a head tied to it) trained for one adapter (PEFT's `trainable_token_indices`)."""

    tokens: tuple[int, ...]
    values: nn.Parameter  # (rows, width), the rows themselves
    lookup: Tensor = field(init=False)  # (vocabulary,) row of a token id, -1 for others

    vocabulary: int = 0

    def __post_init__(self) -> None:
        self.lookup = torch.full((self.vocabulary,), -1, dtype=torch.long)
        self.lookup[list(self.tokens)] = torch.arange(len(self.tokens))
        self.lookup = self.lookup.to(self.values.device)

    def named(self) -> dict[str, nn.Parameter]:
        return {"token_adapter.trainable_tokens_delta": self.values}


Slot = LowRank | ModulesToSave | TrainableTokens


def new_low_rank(
    module: Stored,
    name: str,
    *,
    rank: int,
    alpha: float,
    rank_stabilized: bool = False,
    dropout: float = 0.0,
    dora: bool = False,
    seed: int = 0,
) -> LowRank:
    """An untrained slot: A uniform within 1 / sqrt(in), as `nn.Linear` starts, B zero, so that it changes nothing yet.

    A's numbers depend on (seed, layer name) only, so they are the same beside whatever other layers or trials.
    """
    device = module.value.device
    experts = module.experts if isinstance(module, StoredStack) else 0
    out_features, in_features = module.shape[-2:]
    bound = 1.0 / math.sqrt(in_features)
    rows = rank * max(experts, 1)
    A = (uniform((rows, in_features), seed, "A", name) * 2 - 1) * bound
    B = torch.zeros(out_features, rows)
    magnitude = None
    if dora:
        magnitude = nn.Parameter(torch.linalg.vector_norm(dequantize(module.value, torch.float32), dim=1))
    return LowRank(
        A=nn.Parameter(A.to(device)),
        B=nn.Parameter(B.to(device)),
        scale=scale_of(alpha, rank, rank_stabilized),
        alpha=alpha,
        rank=rank,
        dropout=dropout,
        key=hash_words("dropout", name),
        experts=experts,
        magnitude=magnitude,
    )


@dataclass(frozen=True)
class _SlotUse:
    """One slot's share of a product: rows first..last of x use factor pair `index`, with these random numbers."""

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
    """Uses as the routed kernels take them, a slot for each pair of factors."""
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
            for place, gradient in ((2 * use.index, dA), (2 * use.index + 1, dB)):
                known = totals[place]
                totals[place] = gradient if known is None else known + gradient
        return (dx, None, None, None, *totals)


@dataclass(frozen=True)
class _Decoding:
    """The low-rank products of a pass that records no gradients, and what DoRA scales each range with."""

    routes: kernels.DecodeRouting
    ratios: Sequence[tuple[int, int, Tensor]]  # (first, last, (out,))

    def product(self, x: Tensor, weight: Weight, bias: Tensor | None, bf16_matmul: bool) -> Tensor:
        """x (T, in) -> (T, out)."""
        y = product(x, weight, None, bf16_matmul)
        if self.routes.ranges:
            kernels.add_routed(y, x, self.routes)
        for first, last, ratio in self.ratios:
            y[first:last] *= ratio
        return y if bias is None else y + bias.to(y.dtype)


class _Slots(dict[int, Slot]):
    """Slots by number, counting their changes: what was read of them holds until then."""

    changes = 0

    def __setitem__(self, number: int, slot: Slot) -> None:
        self.changes += 1
        super().__setitem__(number, slot)

    def pop(self, number: int, default: Any = None) -> Any:
        self.changes += 1
        return super().pop(number, default)


class Bank:
    """The slots of one layer, called by the stored module in place of its own product."""

    def __init__(self) -> None:
        self.slots: dict[int, Slot] = _Slots()
        self._routes: tuple[Any, int, _Decoding | None] | None = None

    def __call__(
        self, x: Tensor, module: Stored, weight: Weight, bias: Tensor | None, expert: int | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x (T, in) -> (T, out). For an expert, `rows` (T,) are the ascending indices of its tokens in the pass."""
        ranges = _ranges(len(x), rows)
        if expert is None and not torch.is_grad_enabled():
            routes = self._routes_of(ranges, weight)
            if routes is not None:
                return routes.product(x, weight, bias, module.bf16_matmul)
        used = [(self.slots[slot], first, last) for slot, first, last in ranges if slot in self.slots]
        if all(isinstance(slot, LowRank) and slot.magnitude is None for slot, _, _ in used):
            y = self._low_rank(x, weight, used, expert, rows, module.bf16_matmul)
            return y if bias is None else y + bias.to(y.dtype)
        parts = [self._one(x[first:last], weight, bias, self.slots.get(slot), first, last, rows, len(x), module.bf16_matmul)
                 for slot, first, last in ranges]  # fmt: skip
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _routes_of(self, ranges: Sequence[tuple[int, int, int]], weight: Weight) -> _Decoding | None:
        """How decoding's kernels take these ranges, kept for the next pass; None where a slot is not `for_decoding`."""
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
            return product(x, weight, None, bf16_matmul)
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
            return product(x, slot.weight.to(x.dtype), bias, bf16_matmul)
        y = product(x, weight, None, bf16_matmul)  # (t, out)
        if isinstance(slot, TrainableTokens):  # a head that shares the embedding's rows
            own = product(x, slot.values.to(x.dtype), None, bf16_matmul)  # (t, rows)
            y = y.index_copy(1, torch.tensor(slot.tokens, device=y.device), own)
        elif isinstance(slot, LowRank):
            use = _use(slot, first, last, 0, rows, total)
            keep = use.keep(x)
            A, B = slot.factors(None)
            y = y + slot.scale * F.linear(F.linear(x if keep is None else x * keep, A.to(x.dtype)), B.to(x.dtype))
            if slot.magnitude is not None:
                y = y * (slot.magnitude / combined_norm(weight, A, B, slot.scale)).to(y.dtype)
        return y if bias is None else y + bias.to(y.dtype)


@torch.no_grad()
def combined_norm(weight: Weight, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """|W + s B A| of each row, (out,), a constant to the gradient as DoRA's section 4.3 has it.

    |w + s b A|^2 = |w|^2 + 2 s (w A^T) b + s^2 b (A A^T) b for each row w of W and b of B: no (out, in) sum is made.
    """
    W = dequantize(weight, torch.float32)  # (out, in)
    square = W.square().sum(1) + 2 * scale * ((W @ A.T) * B).sum(1) + scale**2 * ((B @ (A @ A.T)) * B).sum(1)
    return square.clamp_min(0).sqrt()


def _use(slot: LowRank, first: int, last: int, index: int, rows: Tensor | None, total: int) -> _SlotUse:
    """The part [first, last) of a layer's `total` rows that one slot gets."""
    keys = None
    segments = context.current().segments
    if slot.dropout and torch.is_grad_enabled() and segments.streams:
        laid = segments if rows is not None else segments.of_rows(total)
        keys = laid.token_keys_on(slot.A.device)
        keys = keys[first:last] if rows is None else keys[rows[first:last]]
    return _SlotUse(first, last, index, slot.scale, slot.dropout, slot.key, keys)


def _ranges(tokens: int, rows: Tensor | None) -> Sequence[tuple[int, int, int]]:
    """(slot, first, last) over the rows of x: those of the pass's segments, or of an expert's share of them."""
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

    The scale that the embedding's class applies comes along (`StoredEmbedding.scaled`).
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
                place = slot.lookup[part]  # (t,)
                own = embedding.scaled(slot.values, place.clamp_min(0)).to(embedding.activation_dtype)
                parts.append(torch.where((place >= 0)[:, None], own, flat[first:last]))
            else:
                parts.append(flat[first:last])
        return torch.cat(parts).view(output.shape)


__all__ = [
    "Bank",
    "EmbeddingBank",
    "LowRank",
    "ModulesToSave",
    "Slot",
    "TrainableTokens",
    "combined_norm",
    "new_low_rank",
    "scale_of",
]  # fmt: skip
