"""The engine's thread: what it is asked between steps, and what is told when a step or the thread itself goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_engine

from graftlm.errors import AdapterError, GraftError
from graftlm.serving.engine.async_engine import AsyncEngine
from graftlm.serving.engine.request import RequestOutput


@pytest.fixture
def async_engine() -> Iterator[AsyncEngine]:
    one = AsyncEngine(tiny_engine.engine_of(tiny_engine.base_of()))
    one.start()
    yield one
    one.close()


async def answer(async_engine: AsyncEngine, **given: Any) -> list[RequestOutput]:
    found: list[RequestOutput] = []
    async for outputs in async_engine.generate([tiny_engine.request([5, 9, 11], 6, **given)], None):
        found += outputs
    return found


def broken(*_: object) -> Any:
    raise RuntimeError("a mistake of ours")


def test_one_bad_step_ends_its_requests_and_not_the_service(
    async_engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(async_engine.engine.runner, "execute_model", broken)
        last = asyncio.run(answer(async_engine))[-1]
    assert (last.finish_reason, last.error) == ("error", "the engine failed: RuntimeError")
    assert asyncio.run(answer(async_engine))[-1].finish_reason == "length"
    assert async_engine.alive
    assert async_engine.failures == 1


def test_an_engine_that_could_not_warm_up_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    async_engine = AsyncEngine(tiny_engine.engine_of(tiny_engine.base_of()))
    monkeypatch.setattr(async_engine.engine, "warm_up", broken)
    async_engine.start()
    try:
        assert asyncio.run(asyncio.wait_for(answer(async_engine), 10))[-1].finish_reason == "length"
    finally:
        async_engine.close()


def test_whoever_waits_is_told_when_the_thread_has_died(
    async_engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_engine.engine, "step", broken)
    monkeypatch.setattr(async_engine.engine, "fail", broken)
    last = asyncio.run(asyncio.wait_for(answer(async_engine), 10))[-1]
    assert (last.finish_reason, last.error) == ("error", "the engine of this server has ended")
    assert not async_engine.alive

    async def late() -> None:
        with pytest.raises(GraftError, match="has ended"):
            await async_engine.call(lambda engine: engine.num_running)
        with pytest.raises(GraftError, match="has ended"):
            await answer(async_engine)

    asyncio.run(asyncio.wait_for(late(), 10))


def test_a_call_runs_between_two_steps_and_its_fault_is_the_callers(async_engine: AsyncEngine) -> None:
    async def calls() -> None:
        assert await async_engine.call(lambda engine: engine.limits.max_num_seqs) == 8
        with pytest.raises(RuntimeError, match="a mistake of ours"):
            await async_engine.call(broken)
        assert async_engine.alive

    asyncio.run(calls())


def test_who_leaves_early_gives_his_request_up(async_engine: AsyncEngine) -> None:
    async def leave() -> None:
        async for _ in async_engine.generate([tiny_engine.request([5, 9, 11], 40, id="left")], None):
            break

    asyncio.run(leave())
    last = asyncio.run(answer(async_engine))[-1]
    assert last.finish_reason == "length"
    assert async_engine.engine.counts.finished == {"cancelled": 1, "length": 1}


def test_a_request_that_cannot_begin_fails_alone(async_engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    hold = async_engine.engine.adapter_cache.acquire

    def gone(digest: str, folder: Path) -> None:
        if digest == "gone":
            raise AdapterError("the folder was removed meanwhile")
        hold(digest, folder)

    monkeypatch.setattr(async_engine.engine.adapter_cache, "acquire", gone)

    async def both() -> tuple[list[RequestOutput], list[RequestOutput]]:
        return await asyncio.gather(answer(async_engine, adapter="gone", n=2), answer(async_engine))

    lost, kept = asyncio.run(asyncio.wait_for(both(), 20))
    assert [(p.finish_reason, p.error) for p in lost] == [("error", "the folder was removed meanwhile")] * 2
    assert kept[-1].finish_reason == "length"
    assert async_engine.engine.num_waiting == 0
    assert async_engine.failures == 0


def test_a_tenant_with_answers_waiting_hears_in_parcels_and_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftlm.serving.engine.async_engine.COALESCE_SECONDS", 60.0)
    async_engine = AsyncEngine(tiny_engine.engine_of(tiny_engine.base_of(), multi_tenant=True))

    async def told(tenant: str) -> list[list[RequestOutput]]:
        return [
            p
            async for p in async_engine.generate([tiny_engine.request([5, 9, 11], 12, tenant=tenant, logprobs=0)], None)
        ]

    async def both() -> tuple[list[list[RequestOutput]], list[list[RequestOutput]]]:
        asked = asyncio.gather(told("large"), told("small"))
        await asyncio.sleep(0)
        async_engine.start()  # with both there from the first step on
        return await asyncio.wait_for(asked, 20)

    monkeypatch.setattr(async_engine.engine.scheduler, "has_backlog", lambda tenant: tenant == "large")
    chunks, single = asyncio.run(both())
    async_engine.close()
    assert [sum(len(p.tokens) for p in news) for news in chunks] == [1, 11], (
        "the first word at once, the rest with the last"
    )
    (last,) = chunks[-1]
    assert (last.finish_reason, last.completion_tokens, len(last.logprobs)) == ("length", 12, 11)
    joined = [[p for news in all for p in news] for all in (chunks, single)]
    for part in ("tokens", "text", "logprobs"):
        large, small = ([x for p in outputs for x in getattr(p, part)] for outputs in joined)
        assert large == small
