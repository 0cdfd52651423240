"""OpenAI's HTTP interface over the engine: the application that joins the routes, and nothing of models.

    POST /v1/chat/completions   /v1/completions   /v1/responses   /v1/embeddings    GET /v1/models   /v1/models/NAME
    GET  /v1/adapters           POST /v1/adapters/load  unload  alias  rollback (an admin's key)
    GET  /  (a page)   /healthz   /readyz   /metrics   /openapi.json

Every bound has its status and says its numbers: 400 a request that cannot be answered as asked, 401 no key, 403 not an
admin's, 404 no such model or not for this key, 408 a body that does not come, 413 one that is too large, 429 a full queue,
503 shutting down, 504 out of time.
"""

from __future__ import annotations

import time
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from graftlm import __version__
from graftlm.errors import GraftError
from graftlm.serving.http import admin as administration
from graftlm.serving.http import openai as answers
from graftlm.serving.http import responses
from graftlm.serving.http.dependencies import ApiError, OptionalTenantDep, ServerState, StateDep, as_api_error
from graftlm.serving.http.invalid import explain
from graftlm.serving.http.metrics import CONTENT_TYPE
from graftlm.serving.http.middleware import (
    COMPLETION_PATHS,
    AdmissionControl,
    BodyLimit,
    ReadThrottle,
    RequestCounter,
)

router = APIRouter()
_NAMES = {
    "/v1/chat/completions": {"prompt": "messages"}, "/v1/embeddings": {"prompt": "input"},
    "/v1/responses": {"prompt": "input", "max_tokens": "max_output_tokens", "response_format": "text"},
    "/v1/adapters/load": {"model": "adapter"}, "/v1/adapters/unload": {"model": "adapter"},
}  # fmt: skip
"""What the fields of a path are called, where not as everywhere."""


def create_app(state: ServerState) -> FastAPI:
    """The application; `state` holds what its routes work with."""
    app = _App(state)
    app.add_middleware(ReadThrottle, state=state)
    app.add_middleware(BodyLimit, limit=state.request_limits.body_bytes, seconds=state.request_limits.body_seconds)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(GraftError, _graft_error)
    app.add_exception_handler(Exception, _unexpected)
    for part in (answers.router, responses.router, administration.router, router):
        app.include_router(part)
    return app


class _App(FastAPI):
    """With admission control in front of all that FastAPI does for a request: rejecting one must cost next to nothing.

    Its OpenAPI description has no 422: an invalid request is a 400 here, as with OpenAI.
    """

    def __init__(self, state: ServerState) -> None:
        super().__init__(
            title="graft serve", version=__version__, docs_url=None, redoc_url=None,
            description="One base model, many adapters, one server.",
        )  # fmt: skip
        self.state.graft = state
        self._outermost = RequestCounter(AdmissionControl(super().__call__, state), state.metrics, COMPLETION_PATHS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._outermost(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        found = super().openapi()
        for path in found["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return found


def _response(request: Request, error: ApiError) -> JSONResponse:
    if error.param is not None:
        error.param = _NAMES.get(request.url.path, {}).get(error.param, error.param)
    return error.response()


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return _response(request, error)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, first["ctx"]["error"], "invalid_json").response()
    if isinstance(error.body, bytes):
        found = request.headers.get("content-type")
        message = f"Content-Type is {found[:80]}" if found else "the header Content-Type is missing"
        message += ", and the body is read as JSON only when it is said to be: send 'Content-Type: application/json'"
        return ApiError(400, message, "invalid_content_type").response()
    if error.body is None and first["type"] == "missing":
        return ApiError(400, "the body is empty or null, and an object of JSON is expected", "invalid_type").response()
    message, param, code = explain(first, error.body)
    return ApiError(400, message, code, param).response()


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    said = {404: f"there is nothing at {request.url.path[:200]}", 405: f"{request.method} is not what this path takes"}
    message = said.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()


async def _graft_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, GraftError)
    return _response(request, as_api_error(error))


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    """A mistake of ours: the log has its traceback, the caller gets a status and no insides."""
    return ApiError(500, "the server failed; its log says how").response()


@router.get("/healthz", responses={503: {"description": "The engine has died"}})
def healthz(state: StateDep) -> Response:
    """Whether the engine lives."""
    began = state.async_engine.step_began
    stuck = began is not None and time.monotonic() - began > 300
    good = state.async_engine.alive and not stuck
    return JSONResponse({"status": "ok" if good else "dead"}, 200 if good else 503)


@router.get("/readyz", responses={503: {"description": "Still loading, or shutting down"}})
def readyz(state: StateDep) -> Response:
    """Whether requests are taken."""
    good = state.async_engine.alive and not state.draining and not state.preloading
    said = "ready" if good else "draining" if state.draining else "loading"
    return JSONResponse({"status": said}, 200 if good else 503)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(state: StateDep, tenant: OptionalTenantDep) -> Response:
    """For Prometheus; what it says of single versions takes an admin's key where there are keys."""
    versions = not state.api_keys.required or (tenant is not None and tenant.admin)
    return Response(state.metrics.page(versions=versions), media_type=CONTENT_TYPE)


@router.get("/", response_class=HTMLResponse)
def page() -> HTMLResponse:
    """Two adapters, one prompt, both answers."""
    return HTMLResponse(files("graftlm.serving.http").joinpath("page.html").read_text(encoding="utf-8"), headers=_PAGE)


_PAGE = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
