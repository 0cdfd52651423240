"""The ASGI middleware of the server, from the outside in.

    RequestCounter     counts requests by path and status
    AdmissionControl   429 when the queue is full, before anything is read
    BodyLimit          413 and 408 for bodies that are too large or too slow
    ReadThrottle       one request of a tenant is parsed at a time

Rejecting a request must cost next to nothing, and so must waiting behind a tenant that sends a hundred times as many. If
all requests were parsed, checked and looked up first come, first served, others would wait behind that work, however fair the
queue behind it is. So each tenant has one request parsed at a time, and while it has queued requests, its next one is parsed
after a pause several times as long. Requests that wait here count as waiting.

Many clients send all of a body before they read the response. Were the connection closed on one that still sends, it would see
a reset instead of the response; so what comes after a refusal is read and thrown away, up to DISCARDED bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections import defaultdict
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graftlm.errors import RequestError
from graftlm.serving.http import protocol
from graftlm.serving.http.dependencies import ServerState, as_api_error
from graftlm.serving.http.metrics import Metrics

COMPLETION_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"})
PARSED = "graft.parsed"
"""Key of a request's scope: the function to call once the request is parsed."""
_TENANT = "graft.tenant"
PAUSE_FACTOR, MAX_PAUSE_SECONDS = 4.0, 0.1
"""While a tenant has queued requests, the pause before its next one is parsed: this many times as long as the last one took,
and at most so many seconds, since some of that time is waiting for another thread."""
DISCARDED = 64 << 20
"""Most bytes of a refused body that are read and thrown away."""


class RequestCounter:
    """Counts requests by path and status, once they are answered.

    `paths` are counted by their name even where no route has seen the request.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            known = scope["path"] if scope["path"] in self._paths else "unknown"
            path = getattr(scope.get("route"), "path", known)
            self._metrics.requests.labels(path, str(status)).inc()


class AdmissionControl:
    """Rejects requests to COMPLETION_PATHS with 429 where the queue has no room for them."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in COMPLETION_PATHS and scope["method"] == "POST":
            tenant = self._state.api_keys.tenant(_key(scope))
            if tenant is not None:
                scope[_TENANT] = tenant.name
                if await _reject_if_full(self._state, scope, send, self._state.in_flight[tenant.name]):
                    return
        await self._app(scope, receive, send)


async def _reject_if_full(state: ServerState, scope: Scope, send: Send, in_flight: int = 0) -> bool:
    """Whether the queue has no room for another request of its tenant beside the `in_flight` ones; then 429 was sent."""
    try:
        state.async_engine.engine.scheduler.check_queue_capacity(scope[_TENANT], in_flight=in_flight)
    except RequestError as error:
        status, headers, body = _rejection(str(error))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        return True
    return False


@functools.lru_cache(maxsize=1024)
def _rejection(message: str) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body of a rejection; cached, since the same few are sent over and over again."""
    response = as_api_error(RequestError(message, full=True)).response()
    return response.status_code, response.raw_headers, bytes(response.body)


class BodyLimit:
    """413 for a body of more than `limit` bytes, 408 for one that is not complete after `seconds`."""

    def __init__(self, app: ASGIApp, limit: int, seconds: float) -> None:
        self._app, self._limit, self._seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        end = asyncio.get_running_loop().time() + self._seconds
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > self._limit:
            # A client that waits for 100 Continue does not send the body.
            rest = None if b"expect" in headers else receive
            size = length.decode("ascii", "replace")[:18] if length.isdigit() else None
            await self._too_large(send, rest, end, size)
            return
        read = 0
        whole = late = begun = False

        async def counted() -> Message:
            nonlocal read, whole, late
            if late:
                return {"type": "http.disconnect"}
            if whole:  # what comes now is the end of the connection, whenever that is
                return await receive()
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                late = True
                return {"type": "http.disconnect"}
            read += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            return message if read <= self._limit else {"type": "http.disconnect"}

        async def watched(message: Message) -> None:
            # Whatever the application answers to a body that breaks off is not sent; the client gets the reason.
            nonlocal begun
            if begun or (read <= self._limit and not late):
                begun = True
                await send(message)

        await self._app(scope, counted, watched)
        if begun:
            return
        if late:
            await self._too_late(send)
        elif read > self._limit:
            await self._too_large(send, None if whole else receive, end, None)

    async def _too_large(self, send: Send, rest: Receive | None, end: float, size: str | None) -> None:
        found = f"the body has {size} bytes" if size is not None else f"the body has more than {self._limit} bytes"
        message = (
            f"{found}, and this server reads at most {self._limit}; send less, or start it with a larger --max-body-mb"
        )
        await _refuse(send, 413, message, "body_too_large", rest, end)

    async def _too_late(self, send: Send) -> None:
        await _refuse(send, 408, f"the body was not complete within {self._seconds:g} seconds", "body_too_late")


async def _refuse(
    send: Send, status: int, message: str, code: str, rest: Receive | None = None, end: float = 0.0
) -> None:
    """Respond, then read what still comes of the body until moment `end`, and only then close the connection."""
    body = json.dumps(protocol.error(message, "invalid_request_error", code)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    if rest is not None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(end):
                await _discard(rest)
    await send({"type": "http.response.body"})


async def _discard(receive: Receive) -> None:
    left = DISCARDED
    while left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return


class ReadThrottle:
    """Waits for the whole body, then for the tenant's turn.

    The turn ends when the route says that the request is parsed (PARSED), or when it is over. With one tenant there are no
    turns.
    """

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app, self._state = app, state
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # there are as many tenants as keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _TENANT not in scope or not self._state.async_engine.engine.limits.multi_tenant:
            await self._app(scope, receive, send)
            return
        body = [await receive()]
        while body[-1]["type"] == "http.request" and body[-1].get("more_body", False):
            body.append(await receive())

        async def replay() -> Message:
            return body.pop(0) if body else await receive()

        tenant: str = scope[_TENANT]
        turn, in_flight, loop = self._turns[tenant], self._state.in_flight, asyncio.get_running_loop()
        in_flight[tenant] += 1
        try:
            await turn.acquire()
        finally:
            in_flight[tenant] -= 1
        parsing, began = True, loop.time()

        def parsed() -> None:
            nonlocal parsing
            if parsing:
                parsing = False
                pause = min(PAUSE_FACTOR * (loop.time() - began), MAX_PAUSE_SECONDS)
                loop.call_later(
                    pause if self._state.async_engine.engine.scheduler.has_backlog(tenant) else 0.0, turn.release
                )

        scope[PARSED] = parsed
        try:
            if not await _reject_if_full(self._state, scope, send):  # the queue may have filled meanwhile
                await self._app(scope, replay, send)
        finally:
            parsed()


def _key(scope: Scope) -> str | None:
    """The bearer token of a request; None where there is none."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            kind, _, key = value.decode("latin-1").partition(" ")
            return key.strip() if kind.lower() == "bearer" else None
    return None
