"""The engine in a thread of its own, and the way to it from asynchronous code.

    async_engine = AsyncEngine(engine); async_engine.start()
    async for outputs in async_engine.ask(request, folder): ...        # leaving the loop early gives the request up
    state = await async_engine.call(lambda engine: ...)               # runs between two steps

The engine's thread waits while there is nothing to do. After each step it hands every listener's loop all of its news at once,
but a listener of a tenant whose further answers wait only as often as COALESCE_SECONDS says.
Should it die, whoever waits is told so, and `alive` is false from then on.
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
"""Seconds between two chunks of news to somebody whose tenant has answers waiting."""
_ENDED = "the engine of this server has ended"
_log = logging.getLogger("graft.serve")


class _Listener:
    """Who hears of some requests of a tenant, in which loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, answers: int, tenant: str) -> None:
        self.loop, self.left, self.tenant = loop, answers, tenant
        self.news: asyncio.Queue[list[RequestOutput]] = asyncio.Queue()
        self.held: list[RequestOutput] = []
        """What is not told yet; this and the next are the engine's thread's."""
        self.told = -math.inf
        """Moment of `time.monotonic()` at which it was told last."""

    def hold(self, outputs: Sequence[RequestOutput]) -> None:
        """Keep outputs to be told, those of one answer as one."""
        for output in outputs:
            at = next((i for i, p in enumerate(self.held) if (p.id, p.index) == (output.id, output.index)), None)
            if at is None:
                self.held.append(output)
            else:
                self.held[at] = self.held[at].then(output)


class AsyncEngine:
    """Runs an engine until it is closed."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        engine.wake = self._wake_up
        engine.adapter_cache.on_arrival(self._wake_up)
        self._listeners: dict[str, _Listener] = {}
        self._late: dict[_Listener, None] = {}  # those who have something held, in order
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

    async def ask(self, requests: Sequence[Request], folder: Path | None) -> AsyncGenerator[list[RequestOutput]]:
        """Answer requests; yields what is new until all are complete. Raises RequestError at once for what is refused, and
        GraftError when the engine has ended.

        All of them are refused when one is, and all are given up when the caller leaves.
        """
        if self._ended:
            raise GraftError(_ENDED)
        listener = _Listener(asyncio.get_running_loop(), sum(r.n for r in requests), requests[0].tenant)
        asked: list[str] = []
        try:
            for request in requests:
                self._listeners[request.id] = listener
                asked.append(request.id)
                self.engine.submit(request, folder)
            while listener.left:
                outputs = await listener.news.get()
                while not listener.news.empty():  # the loop is slower than the engine: all that has come is one chunk
                    outputs += listener.news.get_nowait()
                listener.left -= sum(p.finish_reason is not None for p in outputs)
                yield outputs
        finally:
            for id in asked:
                if self._listeners.pop(id, None) is not None and listener.left:
                    self.engine.cancel(id)

    async def call(self, do: Callable[[Engine], T]) -> T:
        """Run something on the engine's thread, between two steps. Raises GraftError when that has ended."""
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
            self._work()
        except Exception:
            _log.exception("the engine's thread has died")
        finally:
            self._end()

    def _end(self) -> None:
        """Tell all who wait that nothing comes any more."""
        with self._wake:
            self._ended = True
            calls, self._calls = self._calls, []
        for _, future in calls:
            future.set_exception(GraftError(_ENDED))
        self._tell([RequestOutput(id=id, finish_reason="error", error=_ENDED) for id in list(self._listeners)])

    def _work(self) -> None:
        while not self._closed:
            with self._wake:
                while not self._awake and not self._closed:
                    # What waits for an adapter may run out of time meanwhile.
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
            if outputs or self._late:
                self._tell(outputs)

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

    def _tell(self, outputs: Sequence[RequestOutput]) -> None:
        """Hand out what is new, and what was held for long enough."""
        by_listener: defaultdict[_Listener, list[RequestOutput]] = defaultdict(list)
        for output in outputs:
            listener = self._listeners.get(output.id)
            if listener is not None:
                by_listener[listener].append(output)
        for listener, news in by_listener.items():
            listener.hold(news)
            self._late[listener] = None
        now = time.monotonic()
        by_loop: defaultdict[asyncio.AbstractEventLoop, list[tuple[_Listener, list[RequestOutput]]]] = defaultdict(list)
        for listener in [one for one in self._late if self._due(one, now)]:
            by_loop[listener.loop].append((listener, listener.held))
            listener.held, listener.told = [], now
            del self._late[listener]
        for loop, chunks in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, chunks)
            except RuntimeError:  # that loop is closed: nobody listens any more
                for _, news in chunks:
                    for output in news:
                        self.engine.cancel(output.id)

    def _due(self, listener: _Listener, now: float) -> bool:
        """Whether a listener is told now. The first word and the last are; between them one whose tenant has answers
        waiting, and so gets no more of the server whatever it is told, hears in chunks: each costs the loop that all share.
        """
        return (
            self._ended
            or now - listener.told >= COALESCE_SECONDS
            or any(output.finish_reason is not None for output in listener.held)
            or not self.engine.crowds(listener.tenant)
        )


def _deliver(chunks: Sequence[tuple[_Listener, list[RequestOutput]]]) -> None:
    for listener, news in chunks:
        listener.news.put_nowait(news)
