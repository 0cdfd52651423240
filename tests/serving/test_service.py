"""The engine's thread: what it is asked between steps, and what is told when a step or the thread itself goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asking
import pytest

from graftlm.errors import AdapterError, GraftError
from graftlm.serving.request import Piece
from graftlm.serving.service import Service


@pytest.fixture
def service() -> Iterator[Service]:
    one = Service(asking.engine_of(asking.base_of()))
    one.start()
    yield one
    one.close()


async def answer(service: Service, **given: Any) -> list[Piece]:
    found: list[Piece] = []
    async for pieces in service.ask([asking.request([5, 9, 11], 6, **given)], None):
        found += pieces
    return found


def broken(*_: object) -> Any:
    raise RuntimeError("a mistake of ours")


def test_one_bad_step_ends_its_requests_and_not_the_service(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(service.engine.runner, "run", broken)
        last = asyncio.run(answer(service))[-1]
    assert (last.finish, last.error) == ("error", "the engine failed: RuntimeError")
    assert asyncio.run(answer(service))[-1].finish == "length"
    assert service.alive
    assert service.failures == 1


def test_whoever_waits_is_told_when_the_thread_has_died(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.engine, "step", broken)
    monkeypatch.setattr(service.engine, "fail", broken)
    last = asyncio.run(asyncio.wait_for(answer(service), 10))[-1]
    assert (last.finish, last.error) == ("error", "the engine of this server has ended")
    assert not service.alive

    async def late() -> None:
        with pytest.raises(GraftError, match="has ended"):
            await service.call(lambda engine: engine.running)
        with pytest.raises(GraftError, match="has ended"):
            await answer(service)

    asyncio.run(asyncio.wait_for(late(), 10))


def test_a_call_runs_between_two_steps_and_its_fault_is_the_callers(service: Service) -> None:
    async def calls() -> None:
        assert await service.call(lambda engine: engine.limits.running) == 8
        with pytest.raises(RuntimeError, match="a mistake of ours"):
            await service.call(broken)
        assert service.alive

    asyncio.run(calls())


def test_who_leaves_early_gives_his_request_up(service: Service) -> None:
    async def leave() -> None:
        async for _ in service.ask([asking.request([5, 9, 11], 40, id="left")], None):
            break

    asyncio.run(leave())
    last = asyncio.run(answer(service))[-1]
    assert last.finish == "length"
    assert service.engine.counts.finished == {"cancelled": 1, "length": 1}


def test_a_request_that_cannot_begin_fails_alone(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    hold = service.engine.residents.hold

    def gone(digest: str, folder: Path) -> None:
        if digest == "gone":
            raise AdapterError("the folder was removed meanwhile")
        hold(digest, folder)

    monkeypatch.setattr(service.engine.residents, "hold", gone)

    async def both() -> tuple[list[Piece], list[Piece]]:
        return await asyncio.gather(answer(service, adapter="gone", n=2), answer(service))

    lost, kept = asyncio.run(asyncio.wait_for(both(), 20))
    assert [(p.finish, p.error) for p in lost] == [("error", "the folder was removed meanwhile")] * 2
    assert kept[-1].finish == "length"
    assert service.engine.waiting == 0
    assert service.failures == 0


def test_a_tenant_with_answers_waiting_hears_in_parcels_and_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftlm.serving.service.PARCEL", 60.0)
    service = Service(asking.engine_of(asking.base_of(), shared=True))

    async def told(tenant: str) -> list[list[Piece]]:
        return [p async for p in service.ask([asking.request([5, 9, 11], 12, tenant=tenant, logprobs=0)], None)]

    async def both() -> tuple[list[list[Piece]], list[list[Piece]]]:
        asked = asyncio.gather(told("large"), told("small"))
        await asyncio.sleep(0)
        service.start()  # with both there from the first step on
        return await asyncio.wait_for(asked, 20)

    monkeypatch.setattr(service.engine, "crowds", lambda tenant: tenant == "large")
    parcels, single = asyncio.run(both())
    service.close()
    assert [sum(len(p.tokens) for p in news) for news in parcels] == [1, 11], (
        "the first word at once, the rest with the last"
    )
    (last,) = parcels[-1]
    assert (last.finish, last.completion_tokens, len(last.chosen)) == ("length", 12, 11)
    joined = [[p for news in all for p in news] for all in (parcels, single)]
    for part in ("tokens", "text", "chosen"):
        large, small = ([x for p in pieces for x in getattr(p, part)] for pieces in joined)
        assert large == small
