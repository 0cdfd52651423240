"""The paged KV cache, with which sequences of any lengths share one forward pass.

    cache.keys[layer]      (positions, K, D)    positions = blocks of `block` positions each
    a sequence             3 -> 0 -> 7          the blocks of its tokens, in order: its row of `tables`

All memory is allocated at the start. A sequence that grows takes a free block, one that ends frees its blocks, and sequences
with the same first tokens may share full blocks (vLLM's paged attention, Kwon et al. 2023, with blocks as plain rows). The
engine assigns the blocks (`serving/engine/kv_cache.py`). This file has the forward pass: write the new tokens' keys and
values, then compute each segment's attention over its cached tokens and its own. A kernel computes all single-token segments
at once from the blocks; for longer segments the cached keys and values are gathered.

`layer_kv_specs` finds each layer's shapes by recording one forward pass, and `check_kv_cache` checks on the actual weights
that a model gives the same logits with the cache as without.

Letters: T tokens of a micro-batch, n segments, L new tokens and M tokens of a segment, H heads, K key-value heads, D head
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import torch
from torch import Tensor

from graftlm import kernels
from graftlm.base.attention import UnsupportedAttention, causal, distance, short_windows, tolerance
from graftlm.base.context import ForwardContext
from graftlm.base.loading import Base
from graftlm.segments import Segments


@dataclass(frozen=True)
class LayerKVSpec:
    """The heads and widths of one layer's keys and values."""

    key_heads: int
    width: int
    value_width: int

    @property
    def values(self) -> int:
        """Values for each token."""
        return self.key_heads * (self.width + self.value_width)


class PagedKVCache:
    """Every layer's keys and values, and the block table of each of `batch_slots` sequences."""

    def __init__(
        self, layers: dict[int, LayerKVSpec], *, blocks: int, block: int, batch_slots: int, max_blocks: int, dtype: torch.dtype,
        device: torch.device, spare: bool = False,
    ) -> None:  # fmt: skip
        """`spare`: memory for one block more, number `blocks`, which is no sequence's: rows that are nobody's write there."""
        self.layers, self.blocks, self.block = layers, blocks, block

        def memory(heads: int, width: int) -> Tensor:
            return torch.zeros((blocks + spare) * block, heads, width, dtype=dtype, device=device)

        self.keys = {i: memory(kept.key_heads, kept.width) for i, kept in layers.items()}
        self.values = {i: memory(kept.key_heads, kept.value_width) for i, kept in layers.items()}
        self.tables = torch.zeros(
            batch_slots, max_blocks, dtype=torch.long
        )  # on the CPU: the engine writes it, forward passes copy it
        self.device = device

    def put(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k (T, K, D) and v (T, K, V) at `places` (T,) of a layer; returns all of its keys and values."""
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(0, places, k.to(keys.dtype))
        values.index_copy_(0, places, v.to(values.dtype))
        return keys, values

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys.values(), *self.values.values()))


def bytes_per_token(layers: dict[int, LayerKVSpec], dtype: torch.dtype) -> int:
    """Bytes of one token in the KV cache, all layers."""
    return sum(kept.values for kept in layers.values()) * dtype.itemsize


class PagedAttention:
    """One forward pass with a cache: segment i belongs to the sequence in batch slot `batch_slots[i]`, which has
    `segments.cached[i]` cached tokens.

    Created before the segments, which have it as their `kv_cache`; `start` gets the segments.
    """

    def __init__(
        self, store: PagedKVCache, lengths: Sequence[int], pasts: Sequence[int], batch_slots: Sequence[int]
    ) -> None:
        self.store, device = store, store.device
        block = store.block
        most = (max(p + n for p, n in zip(pasts, lengths)) + block - 1) // block
        tables = store.tables[torch.tensor(batch_slots), :most]  # (n, most)
        if max(lengths) == 1:
            positions = torch.tensor(pasts)  # (T,)
            self.rows = tables.gather(1, (positions // block)[:, None])[:, 0] * block + positions % block
        else:
            positions = torch.cat([torch.arange(p, p + n) for p, n in zip(pasts, lengths)])
            of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))  # (T,)
            self.rows = tables[of, positions // block] * block + positions % block
        starts: list[int] = []
        at = 0
        for length in lengths:
            starts.append(at)
            at += length
        single = [i for i, n in enumerate(lengths) if n == 1]
        if device.type != "cpu":  # in groups of like length
            single.sort(key=lambda i: -pasts[i])
        self.singles: kernels.DecodeAttention | None = None
        if not single:
            (self.rows,) = kernels.to_device([self.rows], device)
        else:
            first = torch.tensor([starts[i] for i in single])
            visible = [pasts[i] + 1 for i in single]
            mine = tables if single == list(range(len(lengths))) else tables[torch.tensor(single)]
            of_host = [self.rows, first, torch.tensor(visible), mine]
            self.rows, first, visible_there, mine = kernels.to_device(of_host, device)
            self.singles = kernels.DecodeAttention(first, visible_there, mine, block, visible)
        self.only_singles = len(single) == len(lengths)
        self.fresh: list[tuple[int, int, int]] = []  # (first token, segments, length) of runs without cached tokens
        self.longer: list[tuple[int, int, Tensor]] = []  # (first token, length, rows of all its tokens)
        several = [i for i, n in enumerate(lengths) if n > 1]
        afresh = [i for i in several if pasts[i] == 0]
        for _, group in groupby(afresh, key=lambda i: (lengths[i], starts[i] - lengths[i] * i)):
            run = list(group)
            neighbours = all(starts[b] == starts[a] + lengths[a] for a, b in pairwise(run))
            for part in [run] if neighbours else [[i] for i in run]:
                self.fresh.append((starts[part[0]], len(part), lengths[part[0]]))
        for i in several:
            if pasts[i]:
                at_all = torch.arange(pasts[i] + lengths[i])
                rows = tables[i][at_all // block] * block + at_all % block  # (M,)
                self.longer.append((starts[i], lengths[i], kernels.to_device([rows], device)[0]))

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Cache k (T, K, D) and v (T, K, V), and compute attention for q (T, H, D) -> (T, H, V)."""
        keys, values = self.store.put(layer, self.rows, k, v)
        out = q.new_empty(*q.shape[:2], v.shape[2])  # (T, H, V)
        if self.singles is not None:
            factor = q.shape[2] ** -0.5 if scale is None else scale
            kernels.attend_rows(
                q, keys, values, out, self.singles, scale=factor, window=window or 0, softcap=softcap or 0.0
            )
            if self.only_singles:
                return out
        groups = q.shape[1] // k.shape[1]
        for first, count, length in self.fresh:
            part = slice(first, first + count * length)
            run = [t[part].unflatten(0, (count, length)).transpose(1, 2) for t in (q, k, v)]  # (n, heads, L, D)
            out[part] = causal(run[0], run[1], run[2], groups, scale, window, softcap).transpose(1, 2).flatten(0, 1)
        for first, length, rows in self.longer:
            part = slice(first, first + length)
            queries, past_keys, past_values = (t[None].transpose(1, 2) for t in (q[part], keys[rows], values[rows]))
            y = causal(
                queries, past_keys.to(q.dtype), past_values.to(q.dtype), groups, scale, window, softcap
            )  # (1, H, L, V)
            out[part] = y[0].transpose(0, 1)
        return out


@dataclass(frozen=True)
class AttentionSpec:
    """The parameters of one layer's attention."""

    scale: float
    window: int
    """Window: number of keys for each query; 0 for all before it."""
    softcap: float
    """0 for none."""


@dataclass
class _Recorder:
    """A KV cache that stores nothing and records what it gets; attention runs without cached tokens."""

    seen: dict[int, LayerKVSpec] = field(default_factory=dict[int, LayerKVSpec])
    attention_specs: dict[int, AttentionSpec] = field(default_factory=dict[int, AttentionSpec])
    twice: bool = False

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        self.twice = self.twice or layer in self.seen
        self.seen[layer] = LayerKVSpec(k.shape[1], k.shape[2], v.shape[2])
        self.attention_specs[layer] = AttentionSpec(
            q.shape[2] ** -0.5 if scale is None else scale, window or 0, softcap or 0.0
        )
        run = [t[None].transpose(1, 2) for t in (q, k, v)]
        return causal(run[0], run[1], run[2], q.shape[1] // k.shape[1], scale, window, softcap)[0].transpose(0, 1)


def layer_kv_specs(base: Base) -> dict[int, LayerKVSpec]:
    """The shapes of each layer's keys and values, recorded in one short forward pass.

    Raises UnsupportedAttention if the layers cannot be distinguished.
    """
    return _watch(base).seen


def attention_specs(base: Base) -> dict[int, AttentionSpec]:
    """The parameters of each layer's attention, recorded in one short forward pass. Raises as `layer_kv_specs` does."""
    return _watch(base).attention_specs


@torch.no_grad()
def _watch(base: Base) -> _Recorder:
    watch = _Recorder()
    segments = Segments(lengths=(3,), slots=(0,), kv_cache=watch)
    base.hidden(torch.arange(3, device=base.device) % base.structure.vocabulary, ForwardContext(segments))
    if watch.twice or not watch.seen:
        raise UnsupportedAttention("a different number (layer_idx) for each layer with a KV cache")
    return watch


@torch.no_grad()
def check_kv_cache(base: Base) -> tuple[dict[int, LayerKVSpec], str]:
    """Each layer's shapes, if the paged KV cache gives the same logits as no cache; else {} and the reason.

    Two texts grow together in steps of several tokens and of one, over blocks out of order.
    """
    if not base.packs:
        return {}, base.no_packing_reason
    try:
        with short_windows(base.model, 5):
            layers = layer_kv_specs(base)
            store = PagedKVCache(
                layers, blocks=9, block=4, batch_slots=2, max_blocks=4, dtype=base.activation_dtype, device=base.device
            )
            store.tables[0], store.tables[1] = torch.tensor([7, 2, 5, 0]), torch.tensor([1, 8, 3, 6])
            generator = torch.Generator().manual_seed(0)
            texts = [
                torch.randint(base.structure.vocabulary, (n,), generator=generator).to(base.device) for n in (13, 11)
            ]
            whole = [_logits(base, text, Segments(lengths=(len(text),), slots=(0,))) for text in texts]
            done = [0, 0]
            for step in ((6, 3), (1, 1), (3, 1), (1, 5), (2, 1)):
                kv_cache = PagedAttention(store, step, done, (0, 1))
                segments = Segments(lengths=step, slots=(0, 0), cached=tuple(done), kv_cache=kv_cache)
                ids = torch.cat([text[a : a + n] for text, a, n in zip(texts, done, step)])
                found = _logits(base, ids, segments).split(list(step))
                for i in range(2):
                    expected = whole[i][done[i] : done[i] + step[i]]
                    apart = distance(found[i], expected)
                    if apart >= tolerance(exact=base.compute_dtype == "float32"):
                        return {}, f"a paged KV cache changes its logits (by {apart:.2g})"
                done = [a + n for a, n in zip(done, step)]
    except UnsupportedAttention as error:
        return {}, f"it needs {error}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the model's own code may raise anything
        return {}, f"a paged KV cache fails in it ({type(error).__name__}: {str(error).strip()[:120]})"
    return layers, ""


def _logits(base: Base, ids: Tensor, segments: Segments) -> Tensor:
    context = ForwardContext(segments)
    return base.logits(base.hidden(ids, context), context)


__all__ = [
    "AttentionSpec",
    "LayerKVSpec",
    "PagedAttention",
    "PagedKVCache",
    "attention_specs",
    "bytes_per_token",
    "check_kv_cache",
    "layer_kv_specs",
]
