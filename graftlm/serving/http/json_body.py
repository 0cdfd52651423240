"""Request bodies as JSON: what cannot be read is refused with its line and column, a duplicate key with its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from graftlm.formatting import quote
from graftlm.jsonfile import duplicate_key


class JsonRoute(APIRoute):
    """A route whose body is read by `read_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handler


class _JsonRequest(Request):
    async def json(self) -> Any:
        encoding = self.headers.get("content-encoding", "identity").lower()
        if encoding != "identity":
            raise json.JSONDecodeError(
                f"the body is compressed (Content-Encoding: {encoding[:40]}); send it uncompressed", "", 0
            )
        return read_json(await self.body())


_REASONS = {
    "recursion limit exceeded": "it is nested more than 200 deep",
    "number out of range": "a number has more than 4300 digits",
    "invalid unicode code point": "it is not UTF-8",
    "lone leading surrogate in hex escape": "half of a surrogate pair is no character",
    "unexpected end of hex escape": "half of a surrogate pair is no character, or an escape ends early",
}


def read_json(body: bytes) -> Any:
    """The value of a JSON text without duplicate keys. Raises JSONDecodeError, with a message for the client.

    Most parsers silently keep the last of two values; which of them the client meant is not known.
    """
    body = body.removeprefix(b"\xef\xbb\xbf")
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as problem:
        reason, _, place = str(problem).partition(" at line ")
        reason = _REASONS.get(reason, reason)
        if reason in ("expected value", "invalid number") and (b"NaN" in body or b"Infinity" in body):
            reason = "a number or another value is expected (JSON has no NaN and no Infinity)"
        raise json.JSONDecodeError(f"the body is not JSON that can be read: {reason}, at line {place}", "", 0) from None
    twice = duplicate_key(body)
    if twice is not None:
        raise json.JSONDecodeError(f"the body has the key {quote(twice)} twice in one object; send it once", "", 0)
    return value
