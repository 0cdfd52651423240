"""At the door: whom the queue has no room for is told before a body is read, and tenants take turns at being read.

Turning somebody away must cost next to nothing, and so must standing behind somebody who asks a hundred times as often. If
all that has arrived were read, checked and looked up first come, first served, others would wait behind that work, however
fair the queue behind it is. So of one tenant one request at a time is read, and of one that has answers waiting, who is
served no sooner for it, the next only after a pause several times as long. Who stands here counts as waiting.
"""

from __future__ import annotations

import asyncio
import functools
from collections import defaultdict

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graftlm.errors import RequestError
from graftlm.serving.http.dependencies import ServerState, as_api_error

ASKING = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings"})
READ = "graft.read"
"""Where a request's scope has what to call once it is read."""
_TENANT = "graft.tenant"
PAUSE, LONGEST_PAUSE = 4.0, 0.1
"""How many times as long as a request was read nobody else of its tenant is, while that has answers waiting; and at most
how many seconds, since some reading is waiting for another thread."""


class AdmissionControl:
    """ASGI middleware that answers 429 to whom the queue has no room for."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in ASKING and scope["method"] == "POST":
            tenant = self._state.keys.tenant(_key(scope))
            if tenant is not None:
                scope[_TENANT] = tenant.name
                if await _turned_away(self._state, scope, send, self._state.in_flight[tenant.name]):
                    return
        await self._app(scope, receive, send)


async def _turned_away(state: ServerState, scope: Scope, send: Send, in_flight: int = 0) -> bool:
    """Whether the queue has no room for a request's tenant beside those who stand in front; then the tenant has been told."""
    try:
        state.async_engine.engine.check_room(scope[_TENANT], in_flight=in_flight)
    except RequestError as error:
        status, headers, body = _told(str(error))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        return True
    return False


@functools.lru_cache(maxsize=1024)
def _told(message: str) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body of a refusal. The same few are told over and over again, each with other numbers."""
    response = as_api_error(RequestError(message, full=True)).response()
    return response.status_code, response.raw_headers, bytes(response.body)


class ReadThrottle:
    """ASGI middleware, behind the limit of bodies: waits for the whole body, then for the tenant's turn.

    The turn ends when the request says that it was read, or is over. With one tenant there is nobody to take turns with.
    """

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app, self._state = app, state
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # there are as many tenants as keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _TENANT not in scope or not self._state.async_engine.engine.limits.shared:
            await self._app(scope, receive, send)
            return
        begun = [await receive()]
        while begun[-1]["type"] == "http.request" and begun[-1].get("more_body", False):
            begun.append(await receive())

        async def again() -> Message:
            return begun.pop(0) if begun else await receive()

        tenant: str = scope[_TENANT]
        turn, in_flight, loop = self._turns[tenant], self._state.in_flight, asyncio.get_running_loop()
        in_flight[tenant] += 1
        try:
            await turn.acquire()
        finally:
            in_flight[tenant] -= 1
        mine, begun_at = True, loop.time()

        def read() -> None:
            nonlocal mine
            if mine:
                mine = False
                pause = min(PAUSE * (loop.time() - begun_at), LONGEST_PAUSE)
                loop.call_later(pause if self._state.async_engine.engine.crowds(tenant) else 0.0, turn.release)

        scope[READ] = read
        try:
            if not await _turned_away(self._state, scope, send):  # the queue may have filled while it stood here
                await self._app(scope, again, send)
        finally:
            read()


def _key(scope: Scope) -> str | None:
    """The bearer token of a request; None where there is none that reads."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            kind, _, key = value.decode("latin-1").partition(" ")
            return key.strip() if kind.lower() == "bearer" else None
    return None
