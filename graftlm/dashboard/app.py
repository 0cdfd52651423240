"""The board over HTTP, for one person on this machine: reading only, and nothing but what the folders hold.

    GET /  /assets/NAME  /api/overview  /api/runs/ID  /api/runs/ID/curve  /api/sweeps/ID  /api/comparisons/ID  /api/adapters
        /reports/ID      /api/playground/models      POST /api/playground/chat (with --server)

Answers of the API have an ETag: a page that asks again gets 304 while nothing has changed. A request must name this machine in
its Host header: else a page on the web could read the board through a name of its own that it points here.
"""

from __future__ import annotations

import hashlib
import ipaddress
import socket
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graftlm.dashboard.contents import Contents
from graftlm.dashboard.page import REPORT_POLICY, SCRIPTS, STYLES, asset, encode, policy, served_page
from graftlm.dashboard.playground import Playground

_ASSETS = {
    **dict.fromkeys(STYLES, "text/css; charset=utf-8"), **dict.fromkeys(SCRIPTS, "text/javascript; charset=utf-8"),
    "uplot/LICENSE": "text/plain; charset=utf-8",
}  # fmt: skip
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def create_app(contents: Contents, host: str = "127.0.0.1") -> Starlette:
    """The application; `host` is what the server listens on."""

    def answer(find: Callable[[Request], Any]) -> Callable[[Request], Response]:
        def endpoint(request: Request) -> Response:
            found = find(request)
            if found is None:
                return JSONResponse({"error": "this is not there, or not any more"}, 404)
            return _tagged(request, encode(found).encode("ascii"), "application/json")

        return endpoint

    def by_id(find: Callable[[str], Any]) -> Callable[[Request], Any]:
        return lambda request: find(request.path_params["id"])

    def curve(request: Request) -> Any:
        known = [_whole(request.query_params.get(name)) for name in ("generation", "width", "known")]
        return contents.curve(request.path_params["id"], *known)

    routes = [
        Route("/", _page),
        Route("/assets/{name:path}", _asset),
        Route("/api/overview", answer(lambda request: contents.overview())),
        Route("/api/runs/{id}", answer(by_id(contents.run))),
        Route("/api/runs/{id}/curve", answer(curve)),
        Route("/api/sweeps/{id}", answer(by_id(contents.sweep))),
        Route("/api/comparisons/{id}", answer(by_id(contents.comparison))),
        Route("/api/adapters", answer(lambda request: contents.adapters())),
        Route("/reports/{id}", lambda request: _report(contents, request.path_params["id"])),
    ]
    if contents.server is not None:
        playground = Playground(contents.server)
        routes += [
            Route("/api/playground/models", playground.models),
            Route("/api/playground/chat", playground.chat, methods=["POST"]),
        ]
    app = Starlette(routes=routes, exception_handlers={Exception: _unexpected})
    app.add_middleware(Guard, host=host)
    return app


def _page(request: Request) -> Response:
    return _tagged(request, served_page().encode(), "text/html; charset=utf-8")


def _asset(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _ASSETS:
        return JSONResponse({"error": "the page has no such file"}, 404)
    return _tagged(request, asset(name).encode(), _ASSETS[name])


def _report(contents: Contents, id: str) -> Response:
    found = contents.report(id)
    if found is None:
        return JSONResponse({"error": "it has written no report yet"}, 404)
    return HTMLResponse(found, headers={"Content-Security-Policy": REPORT_POLICY})


def _tagged(request: Request, body: bytes, kind: str) -> Response:
    """A response that the browser asks for again, and gets only where it has changed."""
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type=kind, headers=headers)


def _whole(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 16 else -1


async def _unexpected(request: Request, error: Exception) -> Response:
    """A mistake of ours: the log has its traceback, and the board goes on."""
    return JSONResponse({"error": "the board failed to read this; its log says how"}, 500)


class Guard:
    """Refuses requests under another machine's name, and says in every response what the page may do."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app, self.host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        named = headers.get(b"host", b"").decode("latin-1")
        if not self._ours(named):
            said = f"the board does not answer to the name '{named[:80]}'; open it by its address, or give that name as --host"
            await JSONResponse({"error": said}, 403)(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = {name.lower() for name, _ in message["headers"]}
                extra = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
                         (b"content-security-policy", policy().encode())]  # fmt: skip
                message["headers"] = [*message["headers"], *(pair for pair in extra if pair[0] not in known)]
            await send(message)

        await self.app(scope, receive, guarded)

    def _ours(self, named: str) -> bool:
        name = named.rpartition(":")[0] if named.rpartition(":")[2].isdigit() else named
        name = name.strip("[]").lower()
        if name in _LOOPBACK or name == self.host.lower():
            return True
        if self.host in _LOOPBACK:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name == socket.gethostname().lower()
        return True
