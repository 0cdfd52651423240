"""The playground's way to a running server: requests of the page go to the one that `--server` names, answers stream back.

The page itself may talk to nobody but the board, so no setting of the other server is needed, and no request of a page can go
anywhere else. A key that the page sends is handed on and not kept.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from anyio import to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from graftlm.dashboard.page import encode
from graftlm.jsonfile import parse_json

MOST_BODY_BYTES = 1 << 20
SECONDS = 300.0
"""Longest wait for the next piece of an answer."""
_FIELDS = ("model", "messages", "max_tokens", "temperature")


@dataclass
class Playground:
    """Hands requests on to an OpenAI-compatible server."""

    url: str
    """Its address, as `BoardConfig` has checked it: without `/v1`, and without a password."""

    async def models(self, request: Request) -> Response:
        """The names that the server answers to."""
        try:
            status, _, response = await self._send(request, "GET", "/models", None)
            body = await self._thread(partial(response.read, 8 << 20))
        except (OSError, http.client.HTTPException) as error:
            return self._unreachable(error)
        if status != 200:
            return Response(body, status, media_type="application/json")
        try:
            names = [str(model["id"]) for model in parse_json(body)["data"]]
        except (ValueError, KeyError, TypeError):
            return _error(502, f"{self.url} does not list its models as OpenAI's interface does")
        return Response(encode({"models": names}), media_type="application/json")

    async def chat(self, request: Request) -> Response:
        """An answer as it is written, in OpenAI's server-sent events."""
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return _error(415, "send JSON, and say so: Content-Type: application/json")
        body = b""
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > MOST_BODY_BYTES:
                    return _error(413, f"the request has more than {MOST_BODY_BYTES:,} bytes; shorten the prompt")
        except ClientDisconnect:
            return Response(status_code=499)
        try:
            asked = parse_json(body)
            wanted = {name: asked[name] for name in _FIELDS if asked.get(name) is not None}
        except (ValueError, TypeError, AttributeError):
            return _error(400, "the request is no JSON object")
        wanted |= {"stream": True, "stream_options": {"include_usage": True}}
        try:
            status, connection, response = await self._send(request, "POST", "/chat/completions", encode(wanted))
        except (OSError, http.client.HTTPException) as error:
            return self._unreachable(error)
        kind = response.getheader("content-type") or "text/event-stream"
        return StreamingResponse(
            self._pieces(connection, response), status, media_type=kind, headers={"Cache-Control": "no-store"}
        )

    async def _pieces(
        self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse
    ) -> AsyncIterator[bytes]:
        """An answer piece by piece; the connection is closed with the page's, so that the server stops writing."""
        try:
            while piece := await self._thread(partial(response.read1, 1 << 16)):
                yield piece
        except (OSError, http.client.HTTPException):
            yield b'data: {"error":{"message":"the server broke the answer off"}}\n\n'
        finally:
            _close(connection)

    async def _send(
        self, request: Request, method: str, path: str, body: str | None
    ) -> tuple[int, http.client.HTTPConnection, http.client.HTTPResponse]:
        place = urlsplit(self.url)
        kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
        connection = kind(place.hostname or "", place.port, timeout=SECONDS)
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
        if key := request.headers.get("authorization"):
            headers["Authorization"] = key

        def exchange() -> http.client.HTTPResponse:
            connection.request(method, f"{place.path}/v1{path}", body, headers)
            return connection.getresponse()

        try:
            response = await self._thread(exchange)
        except BaseException:
            _close(connection)
            raise
        return response.status, connection, response

    @staticmethod
    async def _thread(call: Any) -> Any:
        """In a thread that is left behind where the page goes away; closing the connection ends it."""
        return await to_thread.run_sync(call, abandon_on_cancel=True)

    def _unreachable(self, error: Exception) -> Response:
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return _error(502, f"{self.url} does not answer ({said}); is `graft serve` running there?")


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message}}, status)


def _close(connection: http.client.HTTPConnection) -> None:
    if connection.sock is not None:
        with contextlib.suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)  # a thread may be waiting for it
    connection.close()
