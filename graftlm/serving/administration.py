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
from graftlm.serving import protocol
from graftlm.serving.access import ADMIN_ERRORS, ERRORS, READ_ERRORS, Admin, Here, Refused, State, Whose, without_paths
from graftlm.serving.body import JsonRoute
from graftlm.serving.catalogue import Answerer, lineage
from graftlm.serving.keys import Tenant
from graftlm.serving.metrics import adapter_states

router = APIRouter(route_class=JsonRoute)
T = TypeVar("T")


@router.get("/v1/models", responses=READ_ERRORS)
def models(state: Here, tenant: Whose) -> dict[str, Any]:
    """The base, every adapter that this key may use, each with its versions and aliases."""
    return {"object": "list", "data": _models(state, tenant)}


@router.get("/v1/models/{model:path}", responses={**READ_ERRORS, 404: ERRORS[404]})
def model(model: str, request: Request, state: Here, tenant: Whose) -> dict[str, Any]:
    """One of them."""
    asked = str(request.scope["path"]).removeprefix("/v1/models/")  # the route's pattern drops a newline at the end
    found = state.catalogue.find(asked, tenant)
    return _model(state, model, found)


@router.get("/v1/adapters", responses=READ_ERRORS)
async def adapters(state: Here, tenant: Whose) -> dict[str, Any]:
    """Every adapter that this key may use, with its lineage and where it is; and the load of the server."""
    states = await state.service.call(adapter_states)
    return await run_in_threadpool(_adapters, state, tenant, {s.digest: s for s in states})


@router.post("/v1/adapters/load", responses=ADMIN_ERRORS)
async def load(asked: protocol.AdapterRequest, state: Here, tenant: Admin) -> dict[str, Any]:
    """Read a version into memory, and serve it again if it was unloaded."""
    who = state.catalogue.offer(asked.adapter, tenant)
    if not who.digest:
        raise Refused(400, f"'{asked.adapter}' is the base, which is always loaded", param="adapter")
    await preload(state, who)
    return {"adapter": who.label, "digest": who.digest, "loaded": True}


@router.post("/v1/adapters/unload", responses=ADMIN_ERRORS)
async def unload(asked: protocol.AdapterRequest, state: Here, tenant: Admin) -> dict[str, Any]:
    """Serve a version no more; who has it now is answered to the end. Its memory is freed when nobody holds it."""
    who = state.catalogue.find(asked.adapter, tenant)
    if not who.digest:
        raise Refused(400, f"'{asked.adapter}' is the base, which cannot be unloaded", param="adapter")
    state.catalogue.withdraw(who.digest)
    freed = await state.service.call(lambda engine: engine.residents.drop(who.digest))
    return {"adapter": who.label, "digest": who.digest, "freed": freed}


@router.post("/v1/adapters/alias", responses=ADMIN_ERRORS)
def alias(asked: protocol.AliasRequest, state: Here, tenant: Admin) -> dict[str, Any]:
    """Point an alias at a version; requests that come after the answer get that one."""
    before, now = _changed(state, lambda: state.catalogue.alias(asked.name, asked.alias, asked.version))
    return {"name": asked.name, "alias": asked.alias, "before": before, "version": now}


@router.post("/v1/adapters/rollback", responses=ADMIN_ERRORS)
def rollback(asked: protocol.RollbackRequest, state: Here, tenant: Admin) -> dict[str, Any]:
    """Point an alias at what it pointed at before."""
    before, now = _changed(state, lambda: state.catalogue.rollback(asked.name, asked.alias))
    return {"name": asked.name, "alias": asked.alias, "before": before, "version": now}


def _changed(state: State, change: Callable[[], T]) -> T:
    """What a change of the store gives. Raises Refused with what the store says, but for its folder."""
    try:
        return change()
    except StoreError as error:
        store = state.catalogue.store
        message = str(error) if store is None else str(error).replace(str(store.root), "the store")
        raise Refused(400, message, "invalid_value") from None


async def preload(state: State, who: Answerer) -> None:
    """Have a version in memory. Raises Refused for one that cannot be loaded, or finds no memory in time."""
    folder = who.folder
    assert folder is not None
    end = time.monotonic() + state.bounds.seconds
    await state.service.call(lambda engine: engine.residents.hold(who.digest, folder))
    try:
        while True:
            ready, error = await state.service.call(lambda engine: engine.residents.state(who.digest))
            if error:
                raise Refused(
                    400, f"adapter '{who.label}' cannot be loaded: {without_paths(error, who)}", "adapter_invalid"
                )
            if ready:
                return
            if time.monotonic() > end:
                raise Refused(
                    504, f"adapter '{who.label}' was not in memory within {state.bounds.seconds:g} seconds: requests hold "
                    "what is there; give more memory with --adapter-gb", "timeout",
                )  # fmt: skip
            await asyncio.sleep(0.01)
    finally:
        await state.service.call(lambda engine: engine.residents.leave(who.digest))


def _model(state: State, id: str, who: Answerer) -> dict[str, Any]:
    said = {"id": id, "object": "model", "created": _moment(who), "owned_by": "graft"}
    if not who.digest:
        return {**said, "root": state.catalogue.base_name, "parent": None}
    return {**said, "root": who.label, "parent": state.catalogue.base_name, "digest": who.digest}


def _moment(who: Answerer) -> int:
    """When a version was published, in seconds since 1970; 0 for the base, of which nobody knows."""
    try:
        return int(datetime.fromisoformat(str(who.version.event["at"])).timestamp()) if who.version else 0
    except (KeyError, ValueError, OverflowError):
        return 0


def _models(state: State, tenant: Tenant) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if tenant.may_use(""):
        found.append(_model(state, state.catalogue.base_name, state.catalogue.base))
    for name, versions in state.catalogue.listed(tenant):
        served = [v for v in versions if not state.catalogue.withdrawn(v.digest)]
        if served and served[0] is versions[0]:
            found.append(_model(state, name.name, served[0]))
        for version in served:
            found.append(_model(state, version.label, version))
            assert version.version is not None
            found += [_model(state, f"{name.name}@{alias}", version) for alias in version.version.aliases]
    return found


def _adapters(state: State, tenant: Tenant, states: dict[str, Any]) -> dict[str, Any]:
    engine = state.service.engine
    found: list[dict[str, Any]] = []
    for name, versions in state.catalogue.listed(tenant):
        rows: list[dict[str, Any]] = []
        for one in versions:
            assert one.version is not None
            now = states.get(one.digest)
            where = "disk" if now is None else "slot" if now.resident else "memory" if now.in_memory else "loading"
            where = "unloaded" if state.catalogue.withdrawn(one.digest) else where
            rows.append({
                "version": one.label, "number": one.version.number, "digest": one.digest, "aliases": list(one.version.aliases),
                "where": where, "running": now.running if now else 0, "hits": now.hits if now else 0,
                "evictions": now.evictions if now else 0, "lineage": lineage(one.version),
            })  # fmt: skip
        found.append({"name": name.name, "versions": rows})
    load = {
        "running": engine.running, "running_limit": engine.limits.running, "waiting": engine.waiting,
        "waiting_limit": engine.limits.queue, "cache_occupied": engine.runner.occupied,
        "generated_tokens": engine.counts.written_tokens, "prompt_tokens": engine.counts.prompt_tokens,
    }  # fmt: skip
    base = {"name": state.catalogue.base_name, "allowed": tenant.may_use(""), "fingerprint": state.fingerprint}
    return {"base": base, "adapters": found, "load": load, "keys_wanted": state.keys.wanted}
