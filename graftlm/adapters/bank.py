"""The LoRA formula, and a bank of adapters over one stored weight.

    y = x W^T + b + s (drop(x) A^T) B^T            LoRA (Hu et al. 2021), s = alpha / r, or alpha / sqrt(r) rank-stabilized
    y = m / |W + s B A| (x W^T + s (drop(x) A^T) B^T) + b                                        DoRA (Liu et al. 2024)

Each adapted layer has one bank. It holds a `LayerAdapter` (`layer_adapter.py`) in the slot of each adapter on this layer, of
any rank; the segments of the micro-batch say which tokens use which slot. Training one adapter is a bank of one; a sweep and a
server have more. The matmul with W runs once for all tokens, then each adapter adds its low-rank term to its own range. One
autograd function does both, so that backward needs only x, the low-rank h = x A^T (T, r), and the stored form of W.

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
from graftlm.adapters.dora import rescaled, row_norms
from graftlm.adapters.layer_adapter import LayerAdapter, LowRank, ModulesToSave, TrainableTokens
from graftlm.base import context
from graftlm.base.embedding import StoredEmbedding
from graftlm.base.modules import Stored, grouped_matmul, stored_matmul
from graftlm.base.precision import Weight


@dataclass(frozen=True)
class _SlotUse:
    """One adapter's range of a matmul: tokens first..last of x use factor pair `factor_index`, with these dropout keys."""

    factor_index: int
    first: int
    last: int
    scale: float
    dropout: float
    dropout_key: int
    token_keys: Tensor | None

    @property
    def drops(self) -> bool:
        return self.dropout > 0 and self.token_keys is not None

    def dropped(self, x: Tensor) -> Tensor:
        """drop(x) for this use's tokens x (t, in), each kept feature scaled by 1 / (1 - p); also its own gradient."""
        if self.token_keys is None or not self.dropout:
            return x
        return kernels.dropped(x, self.token_keys, self.dropout_key, self.dropout)


class _Dropout(torch.autograd.Function):
    """drop(x) of one use's tokens, (t, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, use: _SlotUse) -> Tensor:
        ctx.use = use
        return use.dropped(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return ctx.use.dropped(grads[0]), None


def _routing(
    uses: Sequence[_SlotUse], factors: Sequence[Tensor], gradient_dtype: torch.dtype | None = None
) -> kernels.Routing:
    """The uses in the form of the routed kernels."""
    scale = [0.0] * (len(factors) // 2)
    for use in uses:
        scale[use.factor_index] = use.scale
    return kernels.Routing(
        [(use.factor_index, use.first, use.last) for use in uses], factors[0::2], factors[1::2], scale, gradient_dtype
    )


class _LoRALinear(torch.autograd.Function):
    """x (T, in) -> x W^T + sum over uses of s (drop(x) A^T) B^T, (T, out); gradients to x, every A and every B.

    `copies` are read in the factors' place where they are given.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        bf16_matmul: bool,
        uses: Sequence[_SlotUse],
        copies: Sequence[Tensor],
        *factors: Tensor,
    ) -> Tensor:
        ctx.gradient_dtype = factors[0].dtype
        factors = tuple(copies) or factors
        low_rank_states: list[Tensor | None]  # each (t, r)
        if any(u.drops for u in uses):
            y = kernels.matmul(x, weight, bf16_matmul)
            low_rank_states = [
                kernels.low_rank(
                    y[u.first : u.last],
                    u.dropped(x[u.first : u.last]),
                    factors[2 * u.factor_index],
                    factors[2 * u.factor_index + 1],
                    u.scale,
                )
                for u in uses
            ]
        else:
            y, low_rank_states = kernels.lora_linear(x, weight, _routing(uses, factors), bf16_matmul)
        ctx.save_for_backward(x, *factors, *low_rank_states)
        ctx.weight, ctx.bf16_matmul, ctx.uses, ctx.count = weight, bf16_matmul, uses, len(factors)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        dy = grads[0].contiguous()  # (T, out)
        x, *rest = ctx.saved_tensors
        factors, low_rank_states = rest[: ctx.count], rest[ctx.count :]
        weight, needs_dx = ctx.weight, ctx.needs_input_grad[0]
        totals: list[Tensor | None] = [None] * ctx.count
        if not any(u.drops for u in ctx.uses):
            routing = _routing(ctx.uses, factors, ctx.gradient_dtype)
            dx, totals[0::2], totals[1::2] = kernels.lora_linear_backward(
                dy, x, weight, low_rank_states, routing, needs_dx, ctx.bf16_matmul
            )
            return (dx, None, None, None, None, *totals)
        dx = kernels.matmul_t(dy, weight, ctx.bf16_matmul) if needs_dx else None
        for use, h in zip(ctx.uses, low_rank_states):
            tokens = slice(use.first, use.last)
            dx_range = None if dx is None else (torch.empty_like(x[tokens]) if use.drops else dx[tokens])
            dA, dB = kernels.low_rank_backward(
                dy[tokens],
                use.dropped(x[tokens]),
                h,
                factors[2 * use.factor_index],
                factors[2 * use.factor_index + 1],
                use.scale,
                dx_range,
                ctx.gradient_dtype,
                overwrite=use.drops,
            )
            if dx is not None and dx_range is not None and use.drops:
                dx[tokens].add_(use.dropped(dx_range))
            for index, gradient in ((2 * use.factor_index, dA), (2 * use.factor_index + 1, dB)):
                before = totals[index]
                totals[index] = gradient if before is None else before + gradient
        return (dx, None, None, None, None, *totals)


class _LoRAGroup(torch.autograd.Function):
    """x (T, in) -> x W^T + s (drop(x) A^T) B^T of n layers, (T, out) each; gradients to x, every A and every B.

    `A` (sum of r, in) and `B` are copies of the factors, which are the A of all layers and then the B of all.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Sequence[Weight], A: Tensor, B: Sequence[Tensor], scale: float,
        drops: kernels.Dropout | None, *factors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ys, h = kernels.lora_group(x, weights, A, B, scale, drops)
        ctx.save_for_backward(x, h, A, *B)
        ctx.weights, ctx.scale, ctx.drops, ctx.gradient_dtype = weights, scale, drops, factors[0].dtype
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, h, A, *B = ctx.saved_tensors
        dys = [None if dy is None else dy.contiguous() for dy in grads]
        dx, dA, dB = kernels.lora_group_backward(
            dys, x, ctx.weights, h, A, B, ctx.scale, ctx.needs_input_grad[0], ctx.gradient_dtype, ctx.drops
        )
        return dx, None, None, None, None, None, *dA.split([b.shape[1] for b in B]), *dB


@dataclass(frozen=True)
class _InferenceRouting:
    """The low-rank terms of any forward pass without gradients, and DoRA's scale of each range."""

    routes: kernels.DecodeRouting
    dora_scales: Sequence[tuple[int, int, Tensor]]  # (first, last, (out,))

    def matmul(self, x: Tensor, weight: Weight, bias: Tensor | None, bf16_matmul: bool) -> Tensor:
        """x (T, in) -> (T, out)."""
        y = stored_matmul(x, weight, None, bf16_matmul)
        if self.routes.ranges:
            kernels.add_routed(y, x, self.routes)
        for first, last, dora_scale in self.dora_scales:
            y[first:last] *= dora_scale
        return y if bias is None else y + bias.to(y.dtype)


class _AdaptersBySlot(dict[int, LayerAdapter]):
    """Adapters by slot, with a count of changes: a cached reading is valid while the count stays the same."""

    changes = 0

    def __setitem__(self, slot: int, adapter: LayerAdapter) -> None:
        self.changes += 1
        super().__setitem__(slot, adapter)

    def pop(self, slot: int, default: Any = None) -> Any:
        self.changes += 1
        return super().pop(slot, default)


class LayerBank:
    """The adapters of one layer, by slot; the stored module calls it instead of its own matmul."""

    def __init__(self) -> None:
        self.adapters: dict[int, LayerAdapter] = _AdaptersBySlot()
        self._routing: tuple[Any, int, _InferenceRouting | None] | None = None
        self._squares: Tensor | None = None

    def __call__(
        self, x: Tensor, module: Stored, weight: Weight, bias: Tensor | None, expert: int | None = None,
        token_indices: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x (T, in) -> (T, out). For an expert, `token_indices` (T,) are its tokens' ascending indices in the micro-batch."""
        on_device = context.current().segments.on_device
        if on_device is not None:
            y = stored_matmul(x, weight, None, module.bf16_matmul)
            on_device.add_adapters(module, y, x)
            return y if bias is None else y + bias.to(y.dtype)
        ranges = _ranges(len(x), token_indices)
        if expert is None and not torch.is_grad_enabled():
            routing = self._cached_routing(ranges, weight)
            if routing is not None:
                return routing.matmul(x, weight, bias, module.bf16_matmul)
        used = [(self.adapters[slot], first, last) for slot, first, last in ranges if slot in self.adapters]
        if all(isinstance(part, LowRank) for part, _, _ in used):
            dropping = any(isinstance(part, LowRank) and part.dropout for part, _, _ in used)
            if expert is None and dropping and kernels.groups_lora(x.device):
                alone = self.together(x, [module])
                if alone is not None:
                    return alone[0] if bias is None else alone[0] + bias.to(alone[0].dtype)
            y = self._forward_lora(x, weight, used, expert, token_indices, module.bf16_matmul)
            y = self._with_dora(y, weight, used)
            return y if bias is None else y + bias.to(y.dtype)
        parts = [
            self._forward_range(
                x[first:last], weight, bias, self.adapters.get(slot), first, last, token_indices, len(x),
                module.bf16_matmul,
            )
            for slot, first, last in ranges
        ]  # fmt: skip
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def together(self, x: Tensor, modules: Sequence[Stored]) -> list[Tensor] | None:
        """x (T, in) -> the output of each of `modules`, which get the same x, (T, out) without biases.

        None unless one LoRA adapter is on all of them, for all tokens, with the same dropout if any.
        """
        ranges = _ranges(len(x), None)
        if len(ranges) != 1 or not len(x):
            return None
        found = [m.bank.adapters.get(ranges[0][0]) if isinstance(m.bank, LayerBank) else None for m in modules]
        parts = [p for p in found if isinstance(p, LowRank) and not p.experts]
        copies = parts[0].copies if parts else None
        if copies is None or len(parts) != len(modules) or len({(p.scale, p.A.dtype, p.dropout) for p in parts}) != 1:
            return None
        A = copies.joined(parts, x.dtype)
        if A is None:
            return None
        keys = _slot_use(parts[0], 0, 0, len(x), None, len(x)).token_keys
        drops = None
        if keys is not None:
            if not kernels.drops_in_products(x, A, [p.rank for p in parts]):
                return None
            drops = kernels.Dropout(keys, tuple(p.dropout_key for p in parts), parts[0].dropout)
        B = [copies.of(part, x.dtype)[1] for part in parts]
        factors = (*(part.A for part in parts), *(part.B for part in parts))
        ys: Any = _LoRAGroup.apply(x, [m.value for m in modules], A, B, parts[0].scale, drops, *factors)
        banks: list[Any] = [m.bank for m in modules]
        return [b._with_dora(y, m.value, [(p, 0, len(x))]) for y, b, m, p in zip(ys, banks, modules, parts)]

    def _with_dora(self, y: Tensor, weight: Weight, used: Sequence[tuple[Any, int, int]]) -> Tensor:
        """y (T, out) with each DoRA adapter's range (adapter, first, last) times m / |W + s B A|; differentiable."""
        scaled = [(part, first, last) for part, first, last in used if part.magnitude is not None]
        if not scaled:
            return y
        parts = list({id(part): part for part, _, _ in scaled}.values())
        norms = [part.norm(weight, self._squares_of(weight), y.dtype) for part in parts]
        ranges = [(parts.index(part), first, last) for part, first, last in scaled]
        return rescaled(y, ranges, norms, [part.magnitude for part in parts])

    def _squares_of(self, weight: Weight) -> Tensor:
        """|w|^2 of each row (out,): kept for as long as adapters are here, under which the base stays as it is."""
        if isinstance(weight, Tensor) and weight.requires_grad:
            return row_norms(weight).square()
        if self._squares is None:
            with torch.inference_mode(False):  # a step may save them for its backward pass
                self._squares = row_norms(weight).square()
        return self._squares

    def groups(self, x: Tensor) -> bool:
        """Whether `of_all` knows the current adapter: none, or one LoRA for all tokens, of a rank that can be grouped."""
        slots = {slot for slot, _, _ in context.current().segments.slot_ranges}
        found = self.adapters.get(next(iter(slots)))
        if len(slots) != 1 or found is None:
            return len(slots) == 1
        if not isinstance(found, LowRank) or found.magnitude is not None or found.dropout:
            return False
        return kernels.has_grouped_matmul(x, found.rank)

    def of_all(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """x (S, in), rows sorted by expert, W (E, out, in) -> (S, out) with the adapter; see `StoredStack.of_all`."""
        y = grouped_matmul(x, weight, ends)
        adapter = self.adapters.get(context.current().segments.slot_ranges[0][0])
        if adapter is None:
            return y
        assert isinstance(adapter, LowRank)
        A, B = adapter.stacked(x.dtype)  # (E, r, in), (E, out, r)
        return y.add_(grouped_matmul(grouped_matmul(x, A, ends), B, ends), alpha=adapter.scale)

    def _cached_routing(self, ranges: Sequence[tuple[int, int, int]], weight: Weight) -> _InferenceRouting | None:
        """These ranges for the decoding kernels, cached for the next call; None if an adapter is not `decode_ready`."""
        adapters, kept = self.adapters, self._routing
        assert isinstance(adapters, _AdaptersBySlot)
        changes = adapters.changes  # before any of them is read: another thread may put one in meanwhile
        if kept is not None and kept[1] == changes and kept[0] == ranges:
            return kept[2]
        used = [(adapters[slot], first, last) for slot, first, last in ranges if slot in adapters]
        low = [(part, first, last) for part, first, last in used if isinstance(part, LowRank) and part.decode_ready]
        found = None
        if len(low) == len(used):
            routes = kernels.DecodeRouting([(a, b) for _, a, b in low], [part.decode_factors for part, _, _ in low])
            found = _InferenceRouting(
                routes,
                [
                    (a, b, part.dora_scale(weight, self._squares_of(weight)))
                    for part, a, b in low if part.magnitude is not None
                ],
            )  # fmt: skip
        self._routing = (ranges, changes, found)
        return found

    def _forward_lora(
        self, x: Tensor, weight: Weight, used: Sequence[tuple[Any, int, int]], expert: int | None, token_indices: Tensor | None,
        bf16_matmul: bool,
    ) -> Tensor:  # fmt: skip
        if not used:
            return stored_matmul(x, weight, None, bf16_matmul)
        uses: list[_SlotUse] = []
        factors: list[Tensor] = []
        copies: list[Tensor] = []
        factor_index: dict[int, int] = {}
        for part, first, last in used:
            if id(part) not in factor_index:
                factor_index[id(part)] = len(factor_index)
                factors.extend(part.factors(expert))
                copies.extend(part.factors_in(x.dtype, expert))
            uses.append(_slot_use(part, factor_index[id(part)], first, last, token_indices, len(x)))
        if len(copies) < len(factors):  # some have none
            copies = []
        y = _LoRALinear.apply(x, weight, bf16_matmul, uses, copies, *factors)
        assert isinstance(y, Tensor)
        return y

    def _forward_range(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        adapter: LayerAdapter | None,
        first: int,
        last: int,
        token_indices: Tensor | None,
        total: int,
        bf16_matmul: bool,
    ) -> Tensor:
        """One range of the layer's `total` tokens through one adapter of any kind; differentiable, x (t, in) -> (t, out)."""
        if isinstance(adapter, ModulesToSave):
            return stored_matmul(x, adapter.weight.to(x.dtype), bias, bf16_matmul)
        y = stored_matmul(x, weight, None, bf16_matmul)  # (t, out)
        if isinstance(adapter, TrainableTokens):  # a head that shares the embedding's rows
            own = stored_matmul(x, adapter.values.to(x.dtype), None, bf16_matmul)  # (t, rows)
            y = y.index_copy(1, torch.tensor(adapter.tokens, device=y.device), own)
        elif isinstance(adapter, LowRank):
            use = _slot_use(adapter, 0, first, last, token_indices, total)
            low_rank_input: Any = _Dropout.apply(x, use) if use.drops else x
            A, B = adapter.factors(None)
            y = y + adapter.scale * F.linear(F.linear(low_rank_input, A.to(x.dtype)), B.to(x.dtype))
            y = self._with_dora(y, weight, [(adapter, 0, len(y))])
        return y if bias is None else y + bias.to(y.dtype)


def _slot_use(
    adapter: LowRank, factor_index: int, first: int, last: int, token_indices: Tensor | None, total: int
) -> _SlotUse:
    """The use of one adapter by tokens [first, last) of a layer's `total`."""
    keys = None
    segments = context.current().segments
    if adapter.dropout and torch.is_grad_enabled() and segments.rng_keys:
        laid = segments if token_indices is not None else segments.of_rows(total)
        keys = laid.token_keys_on(adapter.A.device)
        keys = keys[first:last] if token_indices is None else keys[token_indices[first:last]]
    return _SlotUse(factor_index, first, last, adapter.scale, adapter.dropout, adapter.dropout_key, keys)


def _ranges(tokens: int, token_indices: Tensor | None) -> Sequence[tuple[int, int, int]]:
    """(slot, first, last) over the tokens of x: the ranges of the segments, or of the tokens that one expert gets."""
    segments = context.current().segments
    if token_indices is None:
        return segments.of_rows(tokens).slot_ranges
    ranges = segments.slot_ranges
    if len(ranges) == 1:
        return ((ranges[0][0], 0, tokens),)
    bounds = torch.tensor([stop for _, _, stop in ranges], device=token_indices.device)
    cuts = [0, *torch.searchsorted(token_indices, bounds).tolist()]
    return [(slot, a, b) for (slot, _, _), a, b in zip(ranges, cuts, cuts[1:]) if b > a]


class EmbeddingBank:
    """Adapters on an embedding, by slot: some tokens get an adapter's rows, or all of them rows of an adapter's weight.

    The rows are scaled as the embedding's class does (`StoredEmbedding.scaled`).
    """

    def __init__(self) -> None:
        self.adapters: dict[int, LayerAdapter] = {}

    def __call__(self, ids: Tensor, output: Tensor, embedding: StoredEmbedding) -> Tensor:
        """ids (...,) and the base's rows for them (..., width) -> the rows of each token's own adapter (..., width)."""
        ids = ids.reshape(-1)  # (T,)
        flat = output.reshape(-1, output.shape[-1])  # (T, width)
        parts: list[Tensor] = []
        for slot, first, last in context.current().segments.slot_ranges:
            adapter, part = self.adapters.get(slot), ids[first:last]
            if isinstance(adapter, ModulesToSave):
                parts.append(embedding.scaled(adapter.weight, part).to(embedding.activation_dtype))
            elif isinstance(adapter, TrainableTokens):
                index = adapter.lookup[part]  # (t,)
                own = embedding.scaled(adapter.values, index.clamp_min(0)).to(embedding.activation_dtype)
                parts.append(torch.where((index >= 0)[:, None], own, flat[first:last]))
            else:
                parts.append(flat[first:last])
        return torch.cat(parts).view(output.shape)
