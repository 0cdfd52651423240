"""What every route works with: the server's state, the tenant of a request, and errors as responses."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from graftlm.errors import AdapterError, DataError, GraftError, RequestError, StoreError
from graftlm.serving.engine.async_engine import AsyncEngine
from graftlm.serving.engine.prompts import PromptEncoder, PromptEncoderCache
from graftlm.serving.engine.structured_output import GrammarCompiler
from graftlm.serving.http import protocol
from graftlm.serving.http.api_keys import ApiKeys, Tenant
from graftlm.serving.http.metrics import Metrics
from graftlm.serving.http.model_registry import ModelRegistry, ServedModel, UnknownModel

_MAX_GRAMMAR_COMPILERS = 32


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What one request may take."""

    body_bytes: int = 4 << 20
    body_seconds: float = 60.0
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    seconds: float = 300.0


@dataclass(kw_only=True)
class ServerState:
    """Everything the routes work with."""

    async_engine: AsyncEngine
    model_registry: ModelRegistry
    api_keys: ApiKeys
    prompt_encoders: PromptEncoderCache
    metrics: Metrics
    request_limits: RequestLimits = RequestLimits()
    fingerprint: str = ""
    draining: bool = False
    preloading: bool = False
    in_flight: Counter[str] = field(default_factory=Counter[str])
    """Requests of each tenant that have arrived and are not parsed yet."""
    grammar_compilers: OrderedDict[int, GrammarCompiler] = field(default_factory=OrderedDict[int, GrammarCompiler])

    def grammar_compiler(self, prompts: PromptEncoder) -> GrammarCompiler:
        """The grammar compiler of a tokenizer; those of the last few are kept, since making one takes a second."""
        key = id(prompts.tokenizer)  # unique while the grammar compiler lives, which keeps its tokenizer
        found = self.grammar_compilers.get(key)
        if found is None:
            vocabulary = self.async_engine.engine.base.structure.vocabulary
            found = self.grammar_compilers[key] = GrammarCompiler(prompts.tokenizer, vocabulary, prompts.stop_ids)
            if len(self.grammar_compilers) > _MAX_GRAMMAR_COMPILERS:
                self.grammar_compilers.popitem(last=False)
        return found


class ApiError(Exception):
    """Becomes an error response."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers

    def response(self) -> JSONResponse:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return JSONResponse(protocol.error(str(self), kind, self.code, self.param), self.status, headers=self.headers)


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": protocol.ErrorAnswer, "description": text}
    for status, text in {
        400: "The request cannot be answered as asked", 401: "No valid API key", 404: "No such model, or not for this key",
        408: "The body took too long to arrive", 413: "The body is too large", 429: "The queue is full",
        500: "The adapter or the engine failed", 503: "Shutting down", 504: "Out of time",
    }.items()
}  # fmt: skip
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "The answer"},
    **ERRORS,
}
ADMIN_ERRORS = {**ERRORS, 403: {"model": protocol.ErrorAnswer, "description": "Not an admin's key"}}
READ_ERRORS: dict[int | str, dict[str, Any]] = {401: ERRORS[401], 400: ERRORS[400]}
_bearer = HTTPBearer(auto_error=False, description="an API key of the server's file of keys")


def state_of(request: Request) -> ServerState:
    """The state of the server that a request came to."""
    return request.app.state.graft


StateDep = Annotated[ServerState, Depends(state_of)]


async def perhaps_tenant(
    state: StateDep, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Tenant | None:
    """The tenant of a request's key, if it has a known one."""
    return state.api_keys.tenant(credentials.credentials if credentials is not None else None)


OptionalTenantDep = Annotated[Tenant | None, Depends(perhaps_tenant)]


async def tenant_of(tenant: OptionalTenantDep) -> Tenant:
    """The tenant of a request's key. Raises ApiError."""
    if tenant is None:
        raise ApiError(
            401, "this server wants an API key: send the header 'Authorization: Bearer KEY'", "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip
    return tenant


TenantDep = Annotated[Tenant, Depends(tenant_of)]


async def admin_of(state: StateDep, tenant: TenantDep) -> Tenant:
    """The same, where it must be an admin. Raises ApiError."""
    if not tenant.admin:
        way = (
            "use an admin's key"
            if state.api_keys.required
            else "start it with --api-keys FILE in which a key has admin: true"
        )
        raise ApiError(403, f"only an admin may change what this server serves; {way}", "not_admin")
    return tenant


AdminDep = Annotated[Tenant, Depends(admin_of)]


def as_api_error(error: GraftError) -> ApiError:
    if isinstance(error, UnknownModel):
        return ApiError(404, str(error), "model_not_found", "model")
    if isinstance(error, RequestError) and error.full:
        return ApiError(429, str(error), "queue_full", headers={"Retry-After": "1"})
    if isinstance(error, (RequestError, DataError, StoreError)):
        return ApiError(400, str(error), "invalid_value", error.field if isinstance(error, RequestError) else None)
    return ApiError(500, str(error), "adapter_invalid" if isinstance(error, AdapterError) else None)


def without_paths(message: str, served: ServedModel) -> str:
    """An adapter's error for a client, who may know names and no folders."""
    return message.replace(str(served.folder), served.label) if served.folder is not None else message


def version_headers(served: ServedModel) -> dict[str, str]:
    """Response headers that name the version."""
    label = served.label.encode("ascii", "replace").decode()
    return {"x-graft-adapter": served.digest or "base", "x-graft-version": label}
