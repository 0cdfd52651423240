"""The queue is fair between tenants, and first come first served within one."""

from __future__ import annotations

import asking
import pytest

from graftlm.serving.queue import FairQueue
from graftlm.serving.sequence import Sequence


def waiting(tenant: str) -> Sequence:
    return Sequence(asking.request([1], 1, tenant=tenant), 0, None, None)


def test_the_tenant_who_was_served_least_is_next() -> None:
    queue = FairQueue()
    loud = [waiting("loud") for _ in range(5)]
    for one in loud:
        queue.add(one, set())
    queue.serve("loud", 30)
    quiet = waiting("quiet")
    queue.add(quiet, set())
    assert list(queue) == [quiet, *loud]
    assert queue.tenants == ["quiet", "loud"]
    queue.serve("quiet", 40)
    assert queue.tenants == ["loud", "quiet"]


def test_absence_saves_nothing_up() -> None:
    queue = FairQueue()
    queue.add(waiting("a"), set())
    queue.serve("a", 1000)
    queue.add(waiting("b"), {"a"})
    queue.serve("b", 10)
    assert queue.tenants == ["a", "b"], "b came in with a's count, not with nothing"


@pytest.mark.parametrize("first", [True, False])
def test_a_line_keeps_its_order_and_who_was_interrupted_stands_in_front(first: bool) -> None:
    queue = FairQueue()
    line = [waiting("a") for _ in range(4)]
    for one in line:
        queue.add(one, set())
    late = waiting("a")
    queue.add(late, set(), first=first)
    assert queue.line("a") == ([late, *line] if first else [*line, late])
    queue.remove(line[2])
    assert len(queue) == queue.waiting("a") == 4


def test_two_tenants_share_a_busy_engine_whatever_their_numbers() -> None:
    engine = asking.engine_of(asking.base_of(), running=2, queue=200)
    for i in range(60):
        engine.submit(asking.request([5 + i % 7, 9, 11], 4, id=f"loud{i}", tenant="loud"))
    for _ in range(3):
        engine.step()
    for i in range(6):
        engine.submit(asking.request([5 + i, 9, 11], 4, id=f"quiet{i}", tenant="quiet"))
    order = [p.id for p in asking.drain(engine) if p.finish]
    last = max(order.index(f"quiet{i}") for i in range(6))
    assert last < 18, "about every second one is the quiet tenant's"
