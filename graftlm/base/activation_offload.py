"""Activations in the host's memory: the input of each checkpointed layer goes there and comes back for the backward pass.

    offload = ActivationOffload()
    with offload.saving():
        ...                          what autograd saves in here, if it is large, waits in pinned memory

Copies run on a stream of their own. In the forward pass a layer's input leaves while the layer runs; in the backward pass
the input of the layer before comes back while this one is recomputed. So a GPU holds two of them at once instead of all, and
each value crosses the bus twice a step. On a CPU the copy is an ordinary one: for tests, since nothing is gained.

The copies hold the same bits, so gradients do not change.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LEAST_BYTES = 1 << 16  # a smaller tensor stays: its copy would take longer than it takes room


@dataclass(eq=False)
class _OnHost:
    """A saved tensor in the host's memory, and again on its device once it was asked for."""

    host: Tensor
    device: torch.device
    before: weakref.ref[_OnHost] | None
    """The one that was saved before it, which the backward pass wants after it."""
    fetched: Tensor | None = None
    ready: Any = None
    """The event after which `fetched` may be read."""


class ActivationOffload:
    """Saved tensors of checkpointed layers, in the order of the forward pass; one for a model."""

    def __init__(self, least_bytes: int = LEAST_BYTES) -> None:
        self.least_bytes = least_bytes
        self.saved_bytes = 0
        """All bytes that were brought to the host so far."""
        self._last: weakref.ref[_OnHost] | None = None
        self._streams: dict[torch.device, Any] = {}

    @contextmanager
    def saving(self) -> Iterator[None]:
        """While open, what autograd saves is brought to the host."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def _pack(self, tensor: Tensor) -> Tensor | _OnHost:
        if tensor.nbytes < self.least_bytes or isinstance(tensor, nn.Parameter):
            return tensor
        self.saved_bytes += tensor.nbytes
        value = tensor.detach()
        if tensor.device.type == "cuda":
            side = self._stream(tensor.device)
            side.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(side):
                host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
                host.copy_(value, non_blocking=True)
            value.record_stream(side)  # its memory is not used again before it has left
        else:
            host = value.to("cpu", copy=True)
        saved = _OnHost(host, tensor.device, self._last)
        self._last = weakref.ref(saved)
        return saved

    def _unpack(self, saved: Tensor | _OnHost) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self._fetch(saved)
        value = saved.fetched
        assert value is not None
        if saved.ready is not None:
            torch.cuda.current_stream(saved.device).wait_event(saved.ready)
        saved.fetched = saved.ready = None
        before = None if saved.before is None else saved.before()
        if before is not None:  # its turn comes next
            self._fetch(before)
        return value

    def _fetch(self, saved: _OnHost) -> None:
        """Begin to bring a tensor back, if that has not begun."""
        if saved.fetched is not None:
            return
        if saved.device.type != "cuda":
            saved.fetched = saved.host.to(saved.device, copy=True)
            return
        side = self._stream(saved.device)
        value = torch.empty(saved.host.shape, dtype=saved.host.dtype, device=saved.device)
        side.wait_stream(torch.cuda.current_stream(saved.device))  # who had this memory before may still be at work
        with torch.cuda.stream(side):
            value.copy_(saved.host, non_blocking=True)
            saved.ready = side.record_event()
        value.record_stream(side)
        saved.fetched = value
