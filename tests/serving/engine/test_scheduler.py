"""The queue is fair between tenants, and first come first served within one."""

from __future__ import annotations

import pytest
import tiny_engine

from graftlm.serving.engine.scheduler import MIN_CHUNK, FairQueue, StepCostModel, fair_order
from graftlm.serving.engine.sequence import Sequence


def waiting(tenant: str) -> Sequence:
    return Sequence(tiny_engine.request([1], 1, tenant=tenant), 0, None, None)


def test_the_tenant_who_was_served_least_is_next() -> None:
    queue = FairQueue()
    loud = [waiting("loud") for _ in range(5)]
    for one in loud:
        queue.add(one, set())
    queue.count_tokens("loud", 30)
    quiet = waiting("quiet")
    queue.add(quiet, set())
    assert list(queue) == [quiet, *loud]
    assert queue.tenants == ["quiet", "loud"]
    queue.count_tokens("quiet", 40)
    assert queue.tenants == ["loud", "quiet"]


def test_absence_saves_nothing_up() -> None:
    queue = FairQueue()
    queue.add(waiting("a"), set())
    queue.count_tokens("a", 1000)
    queue.add(waiting("b"), {"a"})
    queue.count_tokens("b", 10)
    assert queue.tenants == ["a", "b"], "b came in with a's count, not with nothing"


@pytest.mark.parametrize("first", [True, False])
def test_a_line_keeps_its_order_and_who_was_interrupted_stands_in_front(first: bool) -> None:
    queue = FairQueue()
    line = [waiting("a") for _ in range(4)]
    for one in line:
        queue.add(one, set())
    late = waiting("a")
    queue.add(late, set(), first=first)
    assert queue.waiting_of("a") == ([late, *line] if first else [*line, late])
    queue.remove(line[2])
    assert len(queue) == queue.num_waiting("a") == 4


def test_two_tenants_share_a_busy_engine_whatever_their_numbers() -> None:
    engine = tiny_engine.engine_of(tiny_engine.base_of(), max_num_seqs=2, queue=200)
    for i in range(60):
        engine.add_request(tiny_engine.request([5 + i % 7, 9, 11], 4, id=f"loud{i}", tenant="loud"))
    for _ in range(3):
        engine.step()
    for i in range(6):
        engine.add_request(tiny_engine.request([5 + i, 9, 11], 4, id=f"quiet{i}", tenant="quiet"))
    order = [p.id for p in tiny_engine.drain(engine) if p.finish_reason]
    last = max(order.index(f"quiet{i}") for i in range(6))
    assert last < 18, "about every second one is the quiet tenant's"


# ---- who takes part in a step ---------------------------------------------------------------------------------------


def paced(a: float, b: float) -> StepCostModel:
    """An engine whose steps of n tokens take a + b n seconds."""
    pace = StepCostModel()
    for n in (1, 2, 5, 12) * 20:
        pace.observe(n, a + b * n)
    return pace


def test_others_add_as_many_tokens_to_a_step_as_it_has_or_what_is_saved_up_for_them() -> None:
    steep, level = paced(0.010, 0.0019), paced(0.004, 0.0)
    # A step of one token takes 11.9 ms, a quarter of that is 3 ms, and a token of theirs takes 1.9.
    found: list[int] = []
    for _ in range(6):
        found.append(steep.budget_for_others(1))
        steep.charge(found[-1])
    assert found == [1, 2, 1, 2, 1, 2]
    assert steep.budget_for_others(24) >= 24
    assert level.budget_for_others(1) > 10**6, "where a token costs nothing all may join"
    assert StepCostModel().budget_for_others(5) == 5, "nothing is known"


def test_what_is_saved_up_pays_for_no_more_than_a_step_twice_as_long() -> None:
    pace = paced(0.010, 0.002)
    for _ in range(1000):
        pace.budget_for_others(1)
    assert pace.budget_for_others(1) == MIN_CHUNK, "16 ms, where a step of one token takes 12"
    assert paced(0.1, 0.001).budget_for_others(1) == 25, "a quarter of 101 ms"


def test_a_step_in_which_prompts_are_read_is_as_long_as_somebody_else_may_wait() -> None:
    assert paced(0.010, 0.0021).prefill_budget() == 42, "100 ms"
    assert paced(0.5, 0.11).prefill_budget() == 17, "four steps of one token: 2.4 s"
    assert paced(0.0, 1.0).prefill_budget() == MIN_CHUNK
    assert paced(0.004, 0.0).prefill_budget() > 10**6
    assert StepCostModel().prefill_budget() > 10**6, "nothing is known"


def test_a_thousand_steps_alike_make_nobody_forget_what_a_token_takes() -> None:
    pace = StepCostModel()
    for n in (1, 2) * 10:
        pace.observe(n, 0.002 + 0.002 * n)
    for i in range(1000):
        pace.observe(12, 0.026 * (1.5 if i % 2 else 0.5))  # the machine has other things to do as well
    assert pace.cost is not None
    assert pace.cost[1] == pytest.approx(0.002, rel=0.2)


def test_the_tenant_who_wants_least_goes_first_and_the_others_take_turns() -> None:
    def at_work(tenant: str, left: int, worked: int) -> Sequence:
        one = waiting(tenant)
        one.tokens = [1] * left
        one.last_step = worked
        return one

    big = [at_work("big", 1, worked) for worked in (4, 2, 3)]
    middle = [at_work("middle", 1, worked) for worked in (4, 1)]
    small = at_work("small", 1, 9)
    first, rest = fair_order([*big, *middle, small])
    assert first == [small]
    assert rest == [middle[1], big[1], big[2], middle[0], big[0]]


def test_beside_a_large_tenant_a_small_one_takes_part_in_every_step_and_neither_starves() -> None:
    engine = tiny_engine.engine_of(tiny_engine.base_of(), max_num_seqs=8, queue=200, shared=True)
    engine.scheduler.step_cost = paced(0.0, 0.01)  # pyright: ignore[reportPrivateUsage]
    engine.scheduler.step_cost.observe = lambda tokens, seconds: None  # type: ignore[method-assign]  # pyright: ignore[reportPrivateUsage]
    for i in range(30):
        engine.add_request(tiny_engine.request([5 + i % 7, 9, 11], 12, id=f"loud{i}", tenant="loud"))
    for _ in range(6):
        engine.step()
    engine.add_request(tiny_engine.request([5, 9, 11], 20, id="quiet", tenant="quiet"))
    told: list[list[str]] = []
    while engine.busy:
        told.append([output.id for output in engine.step()])
    steps = [ids for ids in told if "quiet" in ids]
    assert len(steps) == 20
    at = told.index(steps[0])
    assert told[at : at + 20] == steps, "one after the other"
    assert all(len(ids) == 2 for ids in steps[1:]), "and one of the large one's beside it, as many as it has itself"
    assert len({id for ids in steps for id in ids}) > 4, "in turn"
    assert sum(output == f"loud{i}" for ids in told for output in ids for i in range(30)) > 200
