"""The routes that list what is served, and with an admin's key change it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from graftlm.errors import StoreError
from graftlm.serving.http import protocol
from graftlm.serving.http.api_keys import Tenant
from graftlm.serving.http.dependencies import (
    ADMIN_ERRORS,
    ERRORS,
    READ_ERRORS,
    AdminDep,
    ApiError,
    ServerState,
    StateDep,
    TenantDep,
    without_paths,
)
from graftlm.serving.http.json_body import JsonRoute
from graftlm.serving.http.metrics import adapter_states
from graftlm.serving.http.model_registry import ServedModel, lineage

router = APIRouter(route_class=JsonRoute)
T = TypeVar("T")


@router.get("/v1/models", responses=READ_ERRORS)
def models(state: StateDep, tenant: TenantDep) -> dict[str, Any]:
    """The base, every adapter that this key may use, each with its versions and aliases."""
    return {"object": "list", "data": _models(state, tenant)}


@router.get("/v1/models/{model:path}", responses={**READ_ERRORS, 404: ERRORS[404]})
def model(model: str, request: Request, state: StateDep, tenant: TenantDep) -> dict[str, Any]:
    """One entry of the list."""
    name = str(request.scope["path"]).removeprefix("/v1/models/")  # the route's pattern drops a newline at the end
    found = state.model_registry.find(name, tenant)
    return _model(state, model, found)


@router.get("/v1/adapters", responses=READ_ERRORS)
async def adapters(state: StateDep, tenant: TenantDep) -> dict[str, Any]:
    """Every adapter that this key may use, with its lineage and where it is; and the load of the server."""
    states = await state.async_engine.call(adapter_states)
    return await run_in_threadpool(_adapters, state, tenant, {s.digest: s for s in states})


@router.post("/v1/adapters/load", responses=ADMIN_ERRORS)
async def load(body: protocol.AdapterRequest, state: StateDep, tenant: AdminDep) -> dict[str, Any]:
    """Read a version into memory, and serve it again if it was unloaded."""
    served = state.model_registry.offer(body.adapter, tenant)
    if not served.digest:
        raise ApiError(400, f"'{body.adapter}' is the base, which is always loaded", param="adapter")
    await preload(state, served)
    return {"adapter": served.label, "digest": served.digest, "loaded": True}


@router.post("/v1/adapters/unload", responses=ADMIN_ERRORS)
async def unload(body: protocol.AdapterRequest, state: StateDep, tenant: AdminDep) -> dict[str, Any]:
    """Stop serving a version. Requests that have it are finished; its memory is freed when no request holds it."""
    served = state.model_registry.find(body.adapter, tenant)
    if not served.digest:
        raise ApiError(400, f"'{body.adapter}' is the base, which cannot be unloaded", param="adapter")
    state.model_registry.withdraw(served.digest)
    freed = await state.async_engine.call(lambda engine: engine.adapter_cache.evict_if_idle(served.digest))
    return {"adapter": served.label, "digest": served.digest, "freed": freed}


@router.post("/v1/adapters/alias", responses=ADMIN_ERRORS)
def alias(body: protocol.AliasRequest, state: StateDep, tenant: AdminDep) -> dict[str, Any]:
    """Point an alias at a version; requests that come after the answer get that one."""
    before, now = _changed(state, lambda: state.model_registry.alias(body.name, body.alias, body.version))
    return {"name": body.name, "alias": body.alias, "before": before, "version": now}


@router.post("/v1/adapters/rollback", responses=ADMIN_ERRORS)
def rollback(body: protocol.RollbackRequest, state: StateDep, tenant: AdminDep) -> dict[str, Any]:
    """Point an alias at what it pointed at before."""
    before, now = _changed(state, lambda: state.model_registry.rollback(body.name, body.alias))
    return {"name": body.name, "alias": body.alias, "before": before, "version": now}


def _changed(state: ServerState, change: Callable[[], T]) -> T:
    """The result of a change of the store. Raises ApiError with the store's message, without its folder."""
    try:
        return change()
    except StoreError as error:
        store = state.model_registry.store
        message = str(error) if store is None else str(error).replace(str(store.root), "the store")
        raise ApiError(400, message, "invalid_value") from None


async def preload(state: ServerState, served: ServedModel) -> None:
    """Have a version in memory. Raises ApiError for one that cannot be loaded, or finds no memory in time."""
    folder = served.folder
    assert folder is not None
    end = time.monotonic() + state.request_limits.seconds
    await state.async_engine.call(lambda engine: engine.adapter_cache.acquire(served.digest, folder))
    try:
        while True:
            ready, error = await state.async_engine.call(lambda engine: engine.adapter_cache.load_state(served.digest))
            if error:
                raise ApiError(
                    400, f"adapter '{served.label}' cannot be loaded: {without_paths(error, served)}", "adapter_invalid"
                )
            if ready:
                return
            if time.monotonic() > end:
                raise ApiError(
                    504,
                    f"adapter '{served.label}' was not in memory within {state.request_limits.seconds:g} seconds: requests "
                    "hold the others; give more memory with --adapter-memory-gb",
                    "timeout",
                )
            await asyncio.sleep(0.01)
    finally:
        await state.async_engine.call(lambda engine: engine.adapter_cache.release(served.digest))


def _model(state: ServerState, id: str, served: ServedModel) -> dict[str, Any]:
    said = {"id": id, "object": "model", "created": _moment(served), "owned_by": "graft"}
    if not served.digest:
        return {**said, "root": state.model_registry.base_name, "parent": None}
    return {**said, "root": served.label, "parent": state.model_registry.base_name, "digest": served.digest}


def _moment(served: ServedModel) -> int:
    """When a version was published, in seconds since 1970; 0 for the base."""
    try:
        return int(datetime.fromisoformat(str(served.version.event["at"])).timestamp()) if served.version else 0
    except (KeyError, ValueError, OverflowError):
        return 0


def _models(state: ServerState, tenant: Tenant) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if tenant.may_use(""):
        found.append(_model(state, state.model_registry.base_name, state.model_registry.base))
    for name, versions in state.model_registry.listed(tenant):
        served = [v for v in versions if not state.model_registry.withdrawn(v.digest)]
        if served and served[0] is versions[0]:
            found.append(_model(state, name.name, served[0]))
        for version in served:
            found.append(_model(state, version.label, version))
            assert version.version is not None
            found += [_model(state, f"{name.name}@{alias}", version) for alias in version.version.aliases]
    return found


def _adapters(state: ServerState, tenant: Tenant, states: dict[str, Any]) -> dict[str, Any]:
    engine = state.async_engine.engine
    found: list[dict[str, Any]] = []
    for name, versions in state.model_registry.listed(tenant):
        rows: list[dict[str, Any]] = []
        for one in versions:
            assert one.version is not None
            now = states.get(one.digest)
            where = "disk" if now is None else "slot" if now.resident else "memory" if now.in_memory else "loading"
            where = "unloaded" if state.model_registry.withdrawn(one.digest) else where
            rows.append({
                "version": one.label, "number": one.version.number, "digest": one.digest, "aliases": list(one.version.aliases),
                "where": where, "running": now.running if now else 0, "hits": now.hits if now else 0,
                "evictions": now.evictions if now else 0, "lineage": lineage(one.version),
            })  # fmt: skip
        found.append({"name": name.name, "versions": rows})
    load = {
        "running": engine.num_running, "running_limit": engine.limits.max_num_seqs, "waiting": engine.num_waiting,
        "waiting_limit": engine.limits.queue, "cache_occupied": engine.runner.kv_cache_usage,
        "generated_tokens": engine.counts.generated_tokens, "prompt_tokens": engine.counts.prompt_tokens,
    }  # fmt: skip
    base = {"name": state.model_registry.base_name, "allowed": tenant.may_use(""), "fingerprint": state.fingerprint}
    return {"base": base, "adapters": found, "load": load, "keys_wanted": state.api_keys.required}
