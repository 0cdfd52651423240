"""The adapters of a decoding step as tables on the device, at addresses that never change.

What a step launches then depends on how many rows it has, not on whose they are: each row's adapter is an entry of the tables,
which every layer has (`kernels.FactorTable`). An entry is made when its slot is first asked for, and anew after something was
attached to the slot or detached; the other entries stay, and only what is new is copied to the device.

    tables = FactorTables(base, entries=129)
    found = tables.entries_of({0, 3, 5})           # {0: 0, 3: 1, 5: 2}, and the largest rank
    tables.of(module)                              # the layer's table, None without adapters
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
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
        self._base = base
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
            layer: kernels.FactorTable(*(part[i] for part in self._there)) for i, layer in enumerate(self._layers)
        }
        self._changes = -1
        self._free = list(range(entries - 1, 0, -1))
        self._known: dict[int, _SlotEntry] = {}  # by slot
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
            self._forget_changed()
        wanted = {slot for slot in slots if slot}
        missing = [slot for slot in wanted if slot not in self._known]
        if len(missing) > len(self._free):
            for slot in [slot for slot in self._known if slot not in wanted]:
                self._forget(slot)
        new = [self._read(slot) for slot in missing]
        self._write([entry.number for entry in new if entry.number])
        found = {slot: self._known[slot] for slot in wanted}
        if not all(entry.number for entry in found.values()):
            return None
        largest = max((entry.rank for entry in found.values()), default=0)
        return {0: 0, **{slot: entry.number for slot, entry in found.items()}}, largest

    def _forget_changed(self) -> None:
        changes = self._base.adapter_changes  # before anything is read: another thread may attach meanwhile
        for slot, entry in list(self._known.items()):
            if self._base.slot_changes.get(slot, 0) != entry.changes:
                self._forget(slot)
        self.layers = tuple(i for i, layer in enumerate(self._layers) if layer.bank is not None)
        self._changes = changes

    def _forget(self, slot: int) -> None:
        entry = self._known.pop(slot)
        if entry.number:
            self._free.append(entry.number)

    def _write(self, numbers: Sequence[int]) -> None:
        """Copy entries from the host to where they always lie."""
        if not numbers:
            return
        where = kernels.to_device([torch.tensor(numbers)], self._base.device)[0]
        for there, here in zip(self._there, self._here):
            there.index_copy_(1, where, kernels.to_device([here[:, numbers]], there.device)[0])

    def _read(self, slot: int) -> _SlotEntry:
        """Write a slot's factors into an entry on the host."""
        entry = _SlotEntry(self._base.slot_changes.get(slot, 0))
        rows = self._rows(slot, entry)
        if rows is not None:
            entry.number, entry.rank = self._free.pop(), max((rank for _, _, rank, _ in rows), default=0)
            for here, values in zip(self._here, zip(*rows)):  # a field at once: layers are hundreds
                here[:, entry.number] = torch.tensor(values, dtype=here.dtype)
        self._known[slot] = entry
        return entry

    def _rows(self, slot: int, entry: _SlotEntry) -> list[tuple[int, int, int, float]] | None:
        """A slot's factors on each layer, as a table's fields, None where they are not of this kind; `entry` keeps them."""
        embedding = self._base.structure.embedding.bank
        if isinstance(embedding, EmbeddingBank) and slot in embedding.adapters:
            return None
        if any(isinstance(m.bank, LayerBank) and slot in m.bank.adapters for m in self._others):
            return None
        rows: list[tuple[int, int, int, float]] = []
        for layer in self._layers:
            bank = layer.bank
            part = bank.adapters.get(slot) if isinstance(bank, LayerBank) else None
            if part is None:
                rows.append((0, 0, 0, 0.0))
                continue
            if not isinstance(part, LowRank) or not _fits(part, self.dtype):
                return None
            A, B = part.A.detach(), part.B.detach()
            entry.kept += (A, B)
            rows.append((A.data_ptr(), B.data_ptr(), len(A), part.scale))
        return rows


@dataclass(eq=False)
class _SlotEntry:
    """What is known of a slot: its number in the tables, 0 where it has none, and its largest rank."""

    changes: int
    """Of the slot, before it was read."""
    number: int = 0
    rank: int = 0
    kept: list[Tensor] = field(default_factory=list[Tensor])
    """What the addresses point at."""


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
