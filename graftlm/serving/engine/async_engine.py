"""The engine in a thread of its own, and the way to it from asynchronous code.

    async_engine = AsyncEngine(engine); async_engine.start()
    async for outputs in async_engine.generate(requests, folder): ...  # leaving the loop early aborts the requests
    state = await async_engine.call(lambda engine: ...)               # runs between two steps

The engine's thread waits while there is nothing to do. After each step it sends every listener its new outputs; those of a
tenant with queued requests are coalesced to one chunk every COALESCE_SECONDS. If the thread dies, all listeners get an
error, and `alive` is false from then on.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from graftlm.errors import GraftError
from graftlm.serving.engine.engine import Engine
from graftlm.serving.engine.request import Request, RequestOutput

T = TypeVar("T")
COALESCE_SECONDS = 0.05
"""Seconds between two chunks to a listener whose tenant has queued requests."""
_ENDED = "the engine of this server has ended"
_log = logging.getLogger("graft.serve")


class _Listener:
    """Receives the outputs of some requests of one tenant, in its event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, answers: int, tenant: str) -> None:
        self.loop, self.left, self.tenant = loop, answers, tenant
        self.news: asyncio.Queue[list[RequestOutput]] = asyncio.Queue()
        self.buffered: list[RequestOutput] = []
        """Outputs not sent yet; this and the next are the engine's thread's."""
        self.last_sent = -math.inf
        """Moment of `time.monotonic()`."""

    def buffer(self, outputs: Sequence[RequestOutput]) -> None:
        """Keep outputs to be sent, those of one answer merged."""
        for output in outputs:
            at = next((i for i, p in enumerate(self.buffered) if (p.id, p.index) == (output.id, output.index)), None)
            if at is None:
                self.buffered.append(output)
            else:
                self.buffered[at] = self.buffered[at].then(output)


class AsyncEngine:
    """Runs an engine until it is closed."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        engine.wake = self._wake_up
        engine.adapter_cache.on_loaded = self._wake_up
        self._listeners: dict[str, _Listener] = {}
        self._buffered: dict[_Listener, None] = {}  # those with buffered outputs, in order
        self._calls: list[tuple[Callable[[Engine], Any], Future[Any]]] = []
        self._wake = threading.Condition()
        self._awake = False
        self._closed = self._ended = False
        self._thread = threading.Thread(target=self._run, name="graft-engine", daemon=True)
        self.step_began: float | None = None
        """Moment of `time.monotonic()` at which the step that runs now began."""
        self.failures = 0

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._ended

    def close(self) -> None:
        """End the engine's thread and the loader's."""
        self._closed = True
        self._wake_up()
        if self._thread.is_alive():
            self._thread.join()
        self.engine.close()

    # ---- from asynchronous code -------------------------------------------------------------------------------------

    async def generate(self, requests: Sequence[Request], folder: Path | None) -> AsyncGenerator[list[RequestOutput]]:
        """Answer requests; yields new outputs until all are complete. Raises RequestError at once for what is refused, and
        GraftError when the engine has ended.

        All of them are refused when one is, and all are aborted when the caller leaves.
        """
        if self._ended:
            raise GraftError(_ENDED)
        listener = _Listener(asyncio.get_running_loop(), sum(r.n for r in requests), requests[0].tenant)
        added: list[str] = []
        try:
            for request in requests:
                self._listeners[request.id] = listener
                added.append(request.id)
                self.engine.add_request(request, folder)
            while listener.left:
                outputs = await listener.news.get()
                while not listener.news.empty():  # the loop is slower than the engine: all that has come is one chunk
                    outputs += listener.news.get_nowait()
                listener.left -= sum(p.finish_reason is not None for p in outputs)
                yield outputs
        finally:
            for id in added:
                if self._listeners.pop(id, None) is not None and listener.left:
                    self.engine.abort_request(id)

    async def call(self, do: Callable[[Engine], T]) -> T:
        """Run a function on the engine's thread, between two steps. Raises GraftError when the engine has ended."""
        future: Future[Any] = Future()
        with self._wake:
            if self._ended:
                raise GraftError(_ENDED)
            self._calls.append((do, future))
        self._wake_up()
        return await asyncio.wrap_future(future)

    # ---- the engine's thread ----------------------------------------------------------------------------------------

    def _wake_up(self) -> None:
        with self._wake:
            self._awake = True
            self._wake.notify()

    def _run(self) -> None:
        try:
            self._warm_up()
            self._work()
        except Exception:
            _log.exception("the engine's thread has died")
        finally:
            self._end()

    def _warm_up(self) -> None:
        try:
            self.engine.warm_up()
        except Exception:  # what it makes is only made earlier
            _log.exception("the engine could not warm up, and goes on")

    def _end(self) -> None:
        """Send an error to all listeners and callers."""
        with self._wake:
            self._ended = True
            calls, self._calls = self._calls, []
        for _, future in calls:
            future.set_exception(GraftError(_ENDED))
        self._dispatch([RequestOutput(id=id, finish_reason="error", error=_ENDED) for id in list(self._listeners)])

    def _work(self) -> None:
        while not self._closed:
            with self._wake:
                while not self._awake and not self._closed:
                    # A request that waits for an adapter may expire meanwhile.
                    if not self._wake.wait(0.1 if self.engine.busy else None):
                        break
                self._awake = False
                calls, self._calls = self._calls, []
            for do, future in calls:
                self._call(do, future)
            outputs: list[RequestOutput] = []
            if self.engine.busy or self.engine.adapter_cache.loading:
                outputs = self._step()
                if outputs or not self.engine.stalled:
                    self._awake = True  # there may be more to do at once
            if outputs or self._buffered:
                self._dispatch(outputs)

    def _call(self, do: Callable[[Engine], Any], future: Future[Any]) -> None:
        try:
            future.set_result(do(self.engine))
        except BaseException as error:
            future.set_exception(error)

    def _step(self) -> list[RequestOutput]:
        self.step_began = time.monotonic()
        try:
            return self.engine.step()
        except Exception as error:  # one bad step must not end the engine
            self.failures += 1
            _log.exception("a step of the engine failed; the requests that ran are ended")
            return self.engine.fail(f"the engine failed: {type(error).__name__}")
        finally:
            self.step_began = None

    def _dispatch(self, outputs: Sequence[RequestOutput]) -> None:
        """Send new outputs, and those that were buffered for long enough."""
        by_listener: defaultdict[_Listener, list[RequestOutput]] = defaultdict(list)
        for output in outputs:
            listener = self._listeners.get(output.id)
            if listener is not None:
                by_listener[listener].append(output)
        for listener, news in by_listener.items():
            listener.buffer(news)
            self._buffered[listener] = None
        now = time.monotonic()
        by_loop: defaultdict[asyncio.AbstractEventLoop, list[tuple[_Listener, list[RequestOutput]]]] = defaultdict(list)
        for listener in [one for one in self._buffered if self._flush_due(one, now)]:
            by_loop[listener.loop].append((listener, listener.buffered))
            listener.buffered, listener.last_sent = [], now
            del self._buffered[listener]
        for loop, chunks in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, chunks)
            except RuntimeError:  # that loop is closed
                for _, news in chunks:
                    for output in news:
                        self.engine.abort_request(output.id)

    def _flush_due(self, listener: _Listener, now: float) -> bool:
        """Whether a listener's outputs are sent now. The first and the last chunk are; between them a tenant with queued
        requests gets fewer chunks, since each costs time of the loop that all share and it gets no more tokens for it.
        """
        return (
            self._ended
            or now - listener.last_sent >= COALESCE_SECONDS
            or any(output.finish_reason is not None for output in listener.buffered)
            or not self.engine.scheduler.has_backlog(listener.tenant)
        )


def _deliver(chunks: Sequence[tuple[_Listener, list[RequestOutput]]]) -> None:
    for listener, news in chunks:
        listener.news.put_nowait(news)
