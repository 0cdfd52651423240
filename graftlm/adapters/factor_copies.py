"""An adapter's A and B in the dtype of its matmuls, on a GPU: copied together, once a forward pass.

A and B are trained in float32 and used in bfloat16, several times a layer and step; a cast for each use would be a launch each.
The copies of layers with the same input (q, k and v) lie below each other, so that one matmul with them is that of all:

    copies = FactorCopies([[q, k, v], [o], ...])
    A, B = copies.of(o, torch.bfloat16)              # (r, in), (out, r)
    A = copies.joined([q, k, v], torch.bfloat16)     # (3 r, in)

A forward context begins with new copies, since somebody else's optimizer may have written A and B unseen by PyTorch. Within
one, or outside of any, those are copied again whose version has changed, which PyTorch's operations raise, and our kernels too.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from graftlm import kernels
from graftlm.base import context


class Pair(Protocol):
    """What has an A (r, in) and a B (out, r)."""

    @property
    def A(self) -> Tensor: ...
    @property
    def B(self) -> Tensor: ...


class FactorCopies:
    """The copies of some layers' pairs; layers of one group have the same input."""

    def __init__(self, groups: Sequence[Sequence[Pair]]) -> None:
        self._groups = groups
        self._pairs = [pair for group in groups for pair in group]
        self._place = {id(pair): i for i, pair in enumerate(self._pairs)}
        self._dtype: torch.dtype | None = None
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._joined: dict[tuple[int, ...], Tensor] = {}
        self._versions: list[tuple[int, int]] = []
        self._pass: weakref.ref[context.ForwardContext] | None = None
        self._lock = threading.Lock()

    def of(self, pair: Pair, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of one layer in `dtype`, as they are now."""
        place = self._place[id(pair)]
        self._update(dtype, [place])
        return self._copies[place]

    def joined(self, pairs: Sequence[Pair], dtype: torch.dtype) -> Tensor | None:
        """The A of a group's layers below each other, (sum of r, in); None if they are no group, in this order."""
        places = tuple(self._place.get(id(pair), -1) for pair in pairs)
        if -1 in places:
            return None
        self._update(dtype, places)
        return self._joined.get(places)

    def _update(self, dtype: torch.dtype, places: Sequence[int]) -> None:
        active = context.active()
        begins = active is not None and (self._pass is None or self._pass() is not active)
        same = dtype == self._dtype and not begins
        if same and all(self._versions[i] == _version(self._pairs[i]) for i in places):
            return
        with self._lock:
            if dtype != self._dtype:
                self._allocate(dtype)
            self._pass = self._pass if active is None else weakref.ref(active)
            stale = [i for i, pair in enumerate(self._pairs) if begins or self._versions[i] != _version(pair)]
            for i in stale:
                self._versions[i] = _version(self._pairs[i])
            targets = [copy for i in stale for copy in self._copies[i]]
            sources = [tensor.detach() for i in stale for tensor in (self._pairs[i].A, self._pairs[i].B)]
            kernels.copy_together(targets, sources)

    def _allocate(self, dtype: torch.dtype) -> None:
        self._copies, self._joined = [], {}
        for group in self._groups:
            first = group[0].A
            whole = torch.empty(sum(len(p.A) for p in group), first.shape[1], dtype=dtype, device=first.device)
            self._joined[tuple(self._place[id(p)] for p in group)] = whole
            for pair, A in zip(group, whole.split([len(p.A) for p in group])):
                self._copies.append((A, torch.empty_like(pair.B, dtype=dtype, memory_format=torch.contiguous_format)))
        self._versions = [(-1, -1)] * len(self._pairs)
        self._dtype = dtype


def _version(pair: Pair) -> tuple[int, int]:
    return pair.A._version, pair.B._version
