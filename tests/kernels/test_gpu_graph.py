"""What surrounds a capture: its stream, its pool and its turn. PyTorch's part is a stand-in; nothing is captured here."""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import Any

import pytest
import torch

from graftlm.kernels import gpu_graph

DEVICE = torch.device("cuda", 1)


class Torch:
    """`torch.cuda` as far as `Graphs` uses it. A failed capture leaves the thread on its stream, as PyTorch's does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current: Any = "the stream before"
        self.streams: list[torch.device] = []
        self.pools = self.inside = self.most_inside = 0
        self.captured: list[tuple[Any, Any]] = []
        self.graphs: list[weakref.ref[Any]] = []
        for name in ("Stream", "graph_pool_handle", "set_stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"_{name}"))
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: type("Graph", (), {"replay": lambda self: None})())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)

    def _Stream(self, device: torch.device) -> str:
        self.streams.append(device)
        return f"stream {len(self.streams)}"

    def _graph_pool_handle(self) -> int:
        self.pools += 1
        return self.pools

    def _set_stream(self, stream: Any) -> None:
        self.current = stream

    @contextlib.contextmanager
    def _graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Any:
        before, self.current = self.current, stream
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.captured.append((pool, stream))
        self.graphs.append(weakref.ref(graph))
        try:
            yield
            self.current = before
        finally:
            self.inside -= 1


def test_a_capture_that_fails_leaves_the_thread_on_the_stream_that_it_was_on(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Torch(monkeypatch)

    def region() -> torch.Tensor:
        assert cuda.current == "stream 1"
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        gpu_graph.Graphs(DEVICE).capture(region)
    assert cuda.current == "the stream before"


def test_graphs_have_a_stream_on_their_own_gpu_and_a_pool_that_lives_as_long_as_they(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = Torch(monkeypatch)
    graphs = gpu_graph.Graphs(DEVICE)
    for _ in range(3):  # what each gives is dropped at once
        graphs.capture(lambda: torch.zeros(1))
    gpu_graph.Graphs(DEVICE).capture(lambda: torch.zeros(1))
    assert cuda.streams == [DEVICE, DEVICE]
    assert cuda.captured == [(1, "stream 1")] * 3 + [(2, "stream 2")]
    assert [graph() is not None for graph in cuda.graphs[:3]] == [True, False, False]  # a pool ends with its last graph
    del graphs
    assert cuda.graphs[0]() is None


def test_two_threads_never_capture_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Torch(monkeypatch)
    met = threading.Event()

    def region() -> torch.Tensor:
        met.wait(0.05)  # nobody sets it: the other thread has the time to come in
        return torch.zeros(1)

    threads = [threading.Thread(target=gpu_graph.Graphs(DEVICE).capture, args=(region,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cuda.captured) == 2
    assert cuda.most_inside == 1
