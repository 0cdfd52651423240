"""Bodies within a limit of size and of time: refused by their header before a byte is read, or as soon as they break it."""

from __future__ import annotations

import asyncio
import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graftlm.serving.protocol import error


class BodyLimit:
    """ASGI middleware: 413 for a body of more than `limit` bytes, 408 for one that is not there after `seconds`."""

    def __init__(self, app: ASGIApp, limit: int, seconds: float) -> None:
        self._app, self._limit, self._seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if not said.isdigit() or len(said) > 18 or int(said) > self._limit:
            await self._too_large(send, said.decode("ascii", "replace")[:18] if said.isdigit() else None)
            return
        loop = asyncio.get_running_loop()
        end = loop.time() + self._seconds
        read = 0
        whole = late = answered = False

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
            # Whatever the application makes of a body that breaks off, the caller is told why.
            nonlocal answered
            if read <= self._limit and not late:
                await send(message)
            elif not answered:
                answered = True
                await (self._too_late(send) if late else self._too_large(send, None))

        await self._app(scope, counted, watched)

    async def _too_large(self, send: Send, size: str | None) -> None:
        found = f"the body has {size} bytes" if size is not None else "the body is larger than allowed"
        await _refuse(send, 413, f"{found}; this server reads at most {self._limit}", "body_too_large")

    async def _too_late(self, send: Send) -> None:
        await _refuse(send, 408, f"the body was not there within {self._seconds:g} seconds", "body_too_late")


async def _refuse(send: Send, status: int, message: str, code: str) -> None:
    body = json.dumps(error(message, "invalid_request_error", code)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
