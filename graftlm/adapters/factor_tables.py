"""The adapters of a decoding step as tables on the device, at addresses that never change.

What a step launches then depends on how many rows it has, not on whose they are: each row's adapter is an entry of the tables,
which every layer has (`kernels.FactorTable`). Entries are made when a slot is first asked for and forgotten when anything was
attached or detached since.

    tables = FactorTables(base, entries=129)
    found = tables.entries_of({0, 3, 5})           # {0: 0, 3: 1, 5: 2}, and the largest rank
    tables.of(module)                              # the layer's table, None without adapters
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from graftlm import kernels
from graftlm.adapters.bank import EmbeddingBank, LayerBank
from graftlm.adapters.layer_adapter import LowRank
from graftlm.base.loading import Base
from graftlm.base.modules import StoredLinear


class FactorTables:
    """The factors of the adapters in use on every linear layer but the head, which is outside of a captured step."""

    def __init__(self, base: Base, *, entries: int) -> None:
        self._base, self._most = base, entries
        head = base.structure.head
        self._layers = [m for m in base.stored().values() if isinstance(m, StoredLinear) and m is not head]
        self._others = [m for m in base.stored().values() if not isinstance(m, StoredLinear)]
        padded = -(-entries // 4) * 4  # each layer's begin at 16 bytes: Triton compiles anew for other addresses
        shape, device = (len(self._layers), padded), base.device
        self.dtype = base.activation_dtype
        """Of the factors: what is multiplied by them is cast to it."""
        self._there = [torch.zeros(shape, dtype=dtype, device=device) for dtype in _FIELDS]
        self._here = [torch.zeros(shape, dtype=dtype) for dtype in _FIELDS]
        self._table_of: dict[Any, kernels.FactorTable] = {
            layer: kernels.FactorTable(*(field[i] for field in self._there)) for i, layer in enumerate(self._layers)
        }
        self._changes = -1
        self._entries: dict[int, tuple[int, int] | None] = {}  # of a slot: entry and rank, None: not by tables
        self._kept: list[Tensor] = []  # what the addresses point at
        self.layers: tuple[int, ...] = ()
        """Which layers have any adapter now."""

    def of(self, layer: Any) -> kernels.FactorTable | None:
        """The table of one layer; None for one that has none."""
        return self._table_of.get(layer)

    def entries_of(self, slots: Collection[int]) -> tuple[dict[int, int], int] | None:
        """The entry of each slot, and the largest rank of them, 0 for the base alone.

        None where an adapter among them is more than low-rank products in the dtype of the layers' input.
        """
        if self._changes != self._base.adapter_changes:
            self._forget()
        wanted = {slot for slot in slots if slot}
        missing = [slot for slot in wanted if slot not in self._entries]
        if len(self._entries) + len(missing) >= self._most:
            self._forget()
            missing = list(wanted)
        if missing:
            for slot in missing:
                self._entries[slot] = self._read(slot, len(self._entries) + 1)
            for there, here in zip(self._there, self._here):
                there.copy_(kernels.to_device([here], there.device)[0])
        found = {slot: self._entries[slot] for slot in wanted}
        known = {slot: of for slot, of in found.items() if of is not None}
        if len(known) < len(found):
            return None
        ranks = [rank for _, rank in known.values()]
        return {0: 0, **{slot: entry for slot, (entry, _) in known.items()}}, max(ranks, default=0)

    def _forget(self) -> None:
        self._changes = self._base.adapter_changes  # before anything is read: another thread may attach meanwhile
        self._entries, self._kept = {}, []
        self._here[2].zero_()  # the ranks
        self.layers = tuple(i for i, layer in enumerate(self._layers) if layer.bank is not None)

    def _read(self, slot: int, entry: int) -> tuple[int, int] | None:
        """Write a slot's factors into an entry; the entry and its largest rank, None where they are not of this kind."""
        embedding = self._base.structure.embedding.bank
        if isinstance(embedding, EmbeddingBank) and slot in embedding.adapters:
            return None
        if any(isinstance(m.bank, LayerBank) and slot in m.bank.adapters for m in self._others):
            return None
        rows: list[tuple[int, int, int, float]] = []  # of each layer
        for layer in self._layers:
            bank = layer.bank
            part = bank.adapters.get(slot) if isinstance(bank, LayerBank) else None
            if part is None:
                rows.append((0, 0, 0, 0.0))
                continue
            if not isinstance(part, LowRank) or not _fits(part, self.dtype):
                return None
            A, B = part.A.detach(), part.B.detach()
            self._kept += (A, B)
            rows.append((A.data_ptr(), B.data_ptr(), len(A), part.scale))
        for field, values in zip(self._here, zip(*rows)):  # a field at once: layers are hundreds
            field[:, entry] = torch.tensor(values, dtype=field.dtype)
        return entry, max((rank for _, _, rank, _ in rows), default=0)


_FIELDS = (torch.int64, torch.int64, torch.int32, torch.float32)  # of a FactorTable


def _fits(part: LowRank, dtype: torch.dtype) -> bool:
    """Whether a table takes these factors: no DoRA, one dtype, both laid out as `LowRank.for_decoding` does."""
    return (
        part.magnitude is None
        and not part.A.requires_grad
        and part.A.dtype == part.B.dtype == dtype
        and part.A.is_contiguous()
        and part.B.T.is_contiguous()
        and len(part.A) <= kernels.MOST_TABLE_RANK
    )
