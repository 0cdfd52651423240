"""A sequence of launches captured once and launched again as one: CUDA graphs.

What is captured is fixed: the kernels, their order, shapes, numbers and addresses. So a region reads what changes from memory
on the GPU, waits for nothing, copies nothing from or to the host, and its shapes depend on nothing but what it was captured
for. It has run before, so that every kernel is loaded and every check made. What it allocates stays its own, in a pool
that graphs share which never run at the same time.

Traced; no graph has been captured on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_one_capture = threading.Lock()  # a process captures one region at a time, whichever thread and GPU


class Graphs:
    """Graphs on one GPU which share their memory: none runs before the result of the one before it was used."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None  # PyTorch's own is on the GPU of a process's first capture
        self._pool: Any = None
        self._first: Any = None  # a pool ends with its last graph, so one graph is kept

    def capture(self, region: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What launches all that `region` launches, and the tensor that it writes then.

        Other threads may use the GPU meanwhile. Raises RuntimeError for a region that cannot be captured, and what the region
        raises.
        """
        with _one_capture, torch.cuda.device(self._device):
            if self._stream is None:
                self._stream = torch.cuda.Stream(self._device)
            if self._first is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            before = torch.cuda.current_stream(self._device)
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    out = region()
            finally:
                torch.cuda.set_stream(before)  # a capture that fails at its end leaves its own
        if self._first is None:
            self._first = graph
        return graph.replay, out
