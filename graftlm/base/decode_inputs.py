"""The inputs of a decoding step in memory on the device that never moves: what is captured for them can be replayed.

    inputs = DecodeInputs(cache, table, rows=8, tiles=4)
    inputs.fill(ids, pasts, batch_slots, ranges)         new numbers, one copy from the host, nothing else changes
    hidden = base.hidden(inputs.ids, ForwardContext(Segments(..., kv_cache=inputs.attention())))

A step of n sequences fills the first n rows. The others are nobody's: token 0 at position 0, whose keys and values go to the
cache's spare block. Nothing that a layer does to one row depends on another.

Letters: n sequences, R rows, H heads, K key-value heads, D head width, V width of a value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graftlm import kernels
from graftlm.base.kv_cache import PagedKVCache


class DecodeInputs:
    """What is known of the rows of a step: their tokens and positions, where these are cached, and their adapters."""

    def __init__(self, cache: PagedKVCache, table: Tensor, *, rows: int, tiles: int) -> None:
        """`table` (R or more, blocks) int64 on the cache's device has the rows' blocks; several inputs may share it."""
        self.cache, self.rows = cache, rows
        self._table = table[:rows]
        stride = rows + rows % 2  # 16 bytes: Triton compiles anew for addresses that are not multiples of them
        self._numbers = torch.zeros(4 * stride + 3 * tiles, dtype=torch.int64, device=cache.device)
        *parts, of_tiles = self._numbers.split([stride] * 4 + [3 * tiles])
        self.ids, self.positions, self._places, self._visible = (part[:rows] for part in parts)  # (R,) each
        self.tiles = of_tiles.view(3, tiles)
        """Entry, first row and last row of each range of rows with one adapter, for `kernels.add_by_table`."""
        self._own = torch.arange(rows, device=cache.device)

    def fill(
        self, ids: Tensor, pasts: Sequence[int], batch_slots: Sequence[int], ranges: Sequence[tuple[int, int, int]]
    ) -> None:
        """Row i is token ids[i] (n,), at position pasts[i] of the sequence in batch slot batch_slots[i]; `ranges` are tiles."""
        cache, n, block = self.cache, len(pasts), self.cache.block
        most = max(pasts, default=0) // block + 1
        rows = self.rows + self.rows % 2  # as they lie on the device
        table = torch.full((rows, most), cache.blocks)
        table[:n] = cache.tables[list(batch_slots), :most]
        numbers = torch.zeros(4, rows, dtype=torch.int64)
        numbers[0, :n], numbers[1, :n] = ids, torch.tensor(pasts, dtype=torch.int64)
        positions = numbers[1]
        numbers[2] = table.gather(1, (positions // block)[:, None])[:, 0] * block + positions % block
        numbers[3] = positions + 1
        tiles = torch.zeros(self.tiles.shape, dtype=torch.int64)
        if ranges:
            tiles[:, : len(ranges)] = torch.tensor(ranges).T
        flat = torch.cat([numbers.flatten(), tiles.flatten()])
        given, blocks = kernels.to_device([flat, table[: self.rows]], cache.device)
        self._numbers.copy_(given)
        self._table[:, :most].copy_(blocks)

    def attention(self) -> DecodeStepAttention:
        """The attention of one forward pass."""
        rows = kernels.DecodeAttention(self._own, self._visible, self._table, self.cache.block)
        return DecodeStepAttention(self.cache, self._places, rows)


class DecodeStepAttention:
    """Keys and values of a row each, cached, and its attention over what it sees: `Segments.kv_cache` of a step."""

    def __init__(self, cache: PagedKVCache, places: Tensor, rows: kernels.DecodeAttention) -> None:
        self._cache, self._places, self._rows = cache, places, rows

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
        """Cache k (R, K, D) and v (R, K, V), and compute attention for q (R, H, D) -> (R, H, V)."""
        keys, values = self._cache.put(layer, self._places, k, v)
        out = keys.new_empty(*q.shape[:2], v.shape[2])
        factor = q.shape[2] ** -0.5 if scale is None else scale
        kernels.attend_rows(
            q.to(keys.dtype), keys, values, out, self._rows, scale=factor, window=window or 0, softcap=softcap or 0.0
        )
        return out.to(q.dtype)  # a model may rotate in float32
