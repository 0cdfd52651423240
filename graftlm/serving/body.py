"""Bodies within a limit of size and of time: refused by their header before a byte is read, or as soon as they break it.
And as JSON: what cannot be read is told with its line and column.

Many clients send all of a body before they read a word. Were the connection closed on one that still sends, it would see a
reset instead of the answer; so what comes after a refusal is read and thrown away, up to DISCARDED bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graftlm.serving.http.protocol import error

DISCARDED = 64 << 20
"""Most bytes of a refused body that are read and thrown away."""


class BodyLimit:
    """ASGI middleware: 413 for a body of more than `limit` bytes, 408 for one that is not there after `seconds`."""

    def __init__(self, app: ASGIApp, limit: int, seconds: float) -> None:
        self._app, self._limit, self._seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        end = asyncio.get_running_loop().time() + self._seconds
        headers = dict(scope["headers"])
        said = headers.get(b"content-length", b"0")
        if not said.isdigit() or len(said) > 18 or int(said) > self._limit:
            # Who waits for leave to send is not to send it.
            rest = None if b"expect" in headers else receive
            await self._too_large(send, rest, end, said.decode("ascii", "replace")[:18] if said.isdigit() else None)
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
            # Whatever the application makes of a body that breaks off is not sent: the caller is told why.
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
        await _refuse(send, 408, f"the body was not there within {self._seconds:g} seconds", "body_too_late")


async def _refuse(
    send: Send, status: int, message: str, code: str, rest: Receive | None = None, end: float = 0.0
) -> None:
    """Answer, then read what still comes of the body until moment `end`, and only then close the connection."""
    body = json.dumps(error(message, "invalid_request_error", code)).encode()
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


class JsonRoute(APIRoute):
    """A route whose body is read by `read_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await answer(_JsonRequest(request.scope, request.receive))

        return handler


class _JsonRequest(Request):
    async def json(self) -> Any:
        packed = self.headers.get("content-encoding", "identity").lower()
        if packed != "identity":
            raise json.JSONDecodeError(f"the body is packed (Content-Encoding: {packed[:40]}); send it is", "", 0)
        return read_json(await self.body())


_REASONS = {
    "recursion limit exceeded": "it is nested more than 200 deep",
    "number out of range": "a number has more than 4300 digits",
    "invalid unicode code point": "it is not UTF-8",
    "lone leading surrogate in hex escape": "half of a surrogate pair is no character",
    "unexpected end of hex escape": "half of a surrogate pair is no character, or an escape ends early",
}


def read_json(body: bytes) -> Any:
    """The value of a JSON text. Raises JSONDecodeError, for whatever reason, with a message for whoever sent it."""
    try:
        return from_json(body.removeprefix(b"\xef\xbb\xbf"), allow_inf_nan=False)
    except ValueError as problem:
        reason, _, place = str(problem).partition(" at line ")
        reason = _REASONS.get(reason, reason)
        if reason in ("expected value", "invalid number") and (b"NaN" in body or b"Infinity" in body):
            reason = "a number or another value is expected (JSON has no NaN and no Infinity)"
        raise json.JSONDecodeError(f"the body is not JSON that can be read: {reason}, at line {place}", "", 0) from None
