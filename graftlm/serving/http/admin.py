"""The routes that tell what is served, and with an admin's key change it."""

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
from graftlm.serving.body import JsonRoute
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
    """One of them."""
    asked = str(request.scope["path"]).removeprefix("/v1/models/")  # the route's pattern drops a newline at the end
    found = state.model_registry.find(asked, tenant)
    return _model(state, model, found)


@router.get("/v1/adapters", responses=READ_ERRORS)
async def adapters(state: StateDep, tenant: TenantDep) -> dict[str, Any]:
    """Every adapter that this key may use, with its lineage and where it is; and the load of the server."""
    states = await state.async_engine.call(adapter_states)
    return await run_in_threadpool(_adapters, state, tenant, {s.digest: s for s in states})


@router.post("/v1/adapters/load", responses=ADMIN_ERRORS)
async def load(asked: protocol.AdapterRequest, state: StateDep, tenant: AdminDep) -> dict[str, Any]:
    """Read a version into memory, and serve it again if it was unloaded."""
    who = state.model_registry.offer(asked.adapter, tenant)
    if not who.digest:
        raise ApiError(400, f"'{asked.adapter}' is the base, which is always loaded", param="adapter")
    await preload(state, who)
    return {"adapter": who.label, "digest": who.digest, "loaded": True}


@router.post("/v1/adapters/unload", responses=ADMIN_ERRORS)
async def unload(asked: protocol.AdapterRequest, state: StateDep, tenant: AdminDep) -> dict[str, Any]:
    """Serve a version no more; who has it now is answered to the end. Its memory is freed when nobody holds it."""
    who = state.model_registry.find(asked.adapter, tenant)
    if not who.digest:
        raise ApiError(400, f"'{asked.adapter}' is the base, which cannot be unloaded", param="adapter")
    state.model_registry.withdraw(who.digest)
    freed = await state.async_engine.call(lambda engine: engine.adapter_cache.drop(who.digest))
    return {"adapter": who.label, "digest": who.digest, "freed": freed}


@router.post("/v1/adapters/alias", responses=ADMIN_ERRORS)
def alias(asked: protocol.AliasRequest, state: StateDep, tenant: AdminDep) -> dict[str, Any]:
    """Point an alias at a version; requests that come after the answer get that one."""
    before, now = _changed(state, lambda: state.model_registry.alias(asked.name, asked.alias, asked.version))
    return {"name": asked.name, "alias": asked.alias, "before": before, "version": now}


@router.post("/v1/adapters/rollback", responses=ADMIN_ERRORS)
def rollback(asked: protocol.RollbackRequest, state: StateDep, tenant: AdminDep) -> dict[str, Any]:
    """Point an alias at what it pointed at before."""
    before, now = _changed(state, lambda: state.model_registry.rollback(asked.name, asked.alias))
    return {"name": asked.name, "alias": asked.alias, "before": before, "version": now}


def _changed(state: ServerState, change: Callable[[], T]) -> T:
    """What a change of the store gives. Raises ApiError with what the store says, but for its folder."""
    try:
        return change()
    except StoreError as error:
        store = state.model_registry.store
        message = str(error) if store is None else str(error).replace(str(store.root), "the store")
        raise ApiError(400, message, "invalid_value") from None


async def preload(state: ServerState, who: ServedModel) -> None:
    """Have a version in memory. Raises ApiError for one that cannot be loaded, or finds no memory in time."""
    folder = who.folder
    assert folder is not None
    end = time.monotonic() + state.request_limits.seconds
    await state.async_engine.call(lambda engine: engine.adapter_cache.hold(who.digest, folder))
    try:
        while True:
            ready, error = await state.async_engine.call(lambda engine: engine.adapter_cache.state(who.digest))
            if error:
                raise ApiError(
                    400, f"adapter '{who.label}' cannot be loaded: {without_paths(error, who)}", "adapter_invalid"
                )
            if ready:
                return
            if time.monotonic() > end:
                raise ApiError(
                    504,
                    f"adapter '{who.label}' was not in memory within {state.request_limits.seconds:g} seconds: requests hold "
                    "what is there; give more memory with --adapter-memory-gb",
                    "timeout",
                )
            await asyncio.sleep(0.01)
    finally:
        await state.async_engine.call(lambda engine: engine.adapter_cache.leave(who.digest))


def _model(state: ServerState, id: str, who: ServedModel) -> dict[str, Any]:
    said = {"id": id, "object": "model", "created": _moment(who), "owned_by": "graft"}
    if not who.digest:
        return {**said, "root": state.model_registry.base_name, "parent": None}
    return {**said, "root": who.label, "parent": state.model_registry.base_name, "digest": who.digest}


def _moment(who: ServedModel) -> int:
    """When a version was published, in seconds since 1970; 0 for the base, of which nobody knows."""
    try:
        return int(datetime.fromisoformat(str(who.version.event["at"])).timestamp()) if who.version else 0
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
        "running": engine.running, "running_limit": engine.limits.max_num_seqs, "waiting": engine.waiting,
        "waiting_limit": engine.limits.queue, "cache_occupied": engine.runner.occupied,
        "generated_tokens": engine.counts.generated_tokens, "prompt_tokens": engine.counts.prompt_tokens,
    }  # fmt: skip
    base = {"name": state.model_registry.base_name, "allowed": tenant.may_use(""), "fingerprint": state.fingerprint}
    return {"base": base, "adapters": found, "load": load, "keys_wanted": state.keys.wanted}
