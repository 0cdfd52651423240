"""At the door: who stands there counts as waiting, and a tenant that has answers waiting is read with pauses between."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from graftlm.errors import RequestError
from graftlm.serving.http import middleware

READS = 0.01  # seconds that an answer's request is read


class Engine:
    """What the door asks of one: room for three, and whether a tenant has answers waiting."""

    limits = SimpleNamespace(shared=True)

    @property
    def scheduler(self) -> Engine:
        return self

    def __init__(self, *crowding: str) -> None:
        self.crowding = crowding

    def check_room(self, tenant: str, answers: int = 1, *, in_flight: int = 0) -> None:
        if in_flight + answers > 3:
            raise RequestError(f"the queue is full: {in_flight} answers wait, the limit is 3", full=True)

    def crowds(self, tenant: str) -> bool:
        return tenant in self.crowding


class Door:
    """AdmissionControl and turns in front of an application that reads for READS and then answers for as long as
    `answering` says."""

    def __init__(self, *crowding: str, answering: Callable[[], Awaitable[Any]] = lambda: asyncio.sleep(0)) -> None:
        self.state: Any = SimpleNamespace(
            api_keys=SimpleNamespace(tenant=lambda key: SimpleNamespace(name=key)), in_flight=Counter[str](),
            async_engine=SimpleNamespace(engine=Engine(*crowding)),
        )  # fmt: skip
        self.answering = answering
        self.read: list[tuple[str, float, float]] = []
        """Whose requests were read, in order, each with its beginning and end."""
        self.statuses: list[int] = []
        self.enter = middleware.AdmissionControl(middleware.ReadThrottle(self.app, self.state), self.state)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.sleep(READS)
        self.read.append((scope["headers"][0][1].decode().removeprefix("Bearer "), began, loop.time()))
        scope[middleware.PARSED]()
        await self.answering()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def ask(self, key: str) -> None:
        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions",
            "headers": [(b"authorization", f"Bearer {key}".encode())],
        }  # fmt: skip

        async def receive() -> Any:
            return {"type": "http.request", "body": b"{}", "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.statuses.append(message["status"])

        await self.enter(scope, receive, send)


async def _all(*asking: Awaitable[None]) -> None:
    async with asyncio.timeout(20):
        await asyncio.gather(*asking)


def test_who_stands_at_the_door_counts_as_waiting() -> None:
    async def twelve_at_once() -> Door:
        door = Door()
        await _all(*(door.ask("loud") for _ in range(12)))
        return door

    door = asyncio.run(twelve_at_once())
    # One is read and three stand behind it: the queue has room for no more.
    assert Counter(door.statuses) == {200: 4, 429: 8}
    assert [whose for whose, *_ in door.read] == ["loud"] * 4
    assert not +door.state.in_flight


def test_another_tenant_is_read_while_many_of_one_stand() -> None:
    async def loud_and_quiet() -> Door:
        door = Door()
        await _all(*(door.ask("loud") for _ in range(3)), door.ask("quiet"))
        return door

    door = asyncio.run(loud_and_quiet())
    assert [whose for whose, *_ in door.read].index("quiet") < 2
    assert door.statuses == [200] * 4


def test_of_a_tenant_with_answers_waiting_the_next_is_read_after_a_pause_as_long_as_four_readings() -> None:
    async def two_of(tenant: str) -> list[tuple[str, float, float]]:
        door = Door("crowding")
        await _all(door.ask(tenant), door.ask(tenant))
        return door.read

    (_, began, ended), (_, again, _) = asyncio.run(two_of("crowding"))
    assert again - ended >= 0.95 * min(middleware.PAUSE_FACTOR * (ended - began), middleware.MAX_PAUSE_SECONDS)


def test_a_tenant_without_answers_waiting_is_read_without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "PAUSE_FACTOR", 1e6)
    monkeypatch.setattr(middleware, "MAX_PAUSE_SECONDS", 1e6)  # a pause would outlast the test

    async def many() -> Door:
        door = Door("somebody else")
        await _all(*(door.ask("calm") for _ in range(3)))
        return door

    assert asyncio.run(many()).statuses == [200] * 3


def test_the_turn_ends_with_reading_and_not_with_the_answer() -> None:
    async def two() -> Door:
        open_ = asyncio.Event()
        door = Door(answering=open_.wait)
        asking = asyncio.ensure_future(_all(door.ask("one"), door.ask("one")))
        async with asyncio.timeout(20):
            while len(door.read) < 2:  # both are read before either is answered
                await asyncio.sleep(0.001)
        assert not door.statuses
        open_.set()
        await asking
        return door

    assert asyncio.run(two()).statuses == [200] * 2
