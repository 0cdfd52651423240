"""Bodies no larger than a limit: refused by their header before a byte is read, or as soon as they have grown past it."""

from __future__ import annotations

import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graftlm.serving.protocol import error


class BodyLimit:
    """ASGI middleware that answers 413 for a body of more than `limit` bytes."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if not said.isdigit() or int(said) > self._limit:
            await self._refuse(send, int(said) if said.isdigit() else None)
            return
        read = 0
        answered = False

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            return message if read <= self._limit else {"type": "http.disconnect"}

        async def watched(message: Message) -> None:
            # Whatever the application makes of a body that breaks off, the caller is told why.
            nonlocal answered
            if read <= self._limit:
                await send(message)
            elif not answered:
                answered = True
                await self._refuse(send, None)

        await self._app(scope, counted, watched)

    async def _refuse(self, send: Send, size: int | None) -> None:
        found = f"the body has {size} bytes" if size is not None else "the body is larger than allowed"
        body = json.dumps(
            error(f"{found}; this server reads at most {self._limit}", "invalid_request_error", "body_too_large")
        )
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body.encode()})
