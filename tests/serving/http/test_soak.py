"""The server under everything at once, and two tenants of very different appetite: `bench/soak.py` in 20 seconds each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[3] / "bench"))

import report_soak
import soak


@pytest.mark.prove
def test_nothing_crashes_hangs_or_answers_wrongly_under_everything_at_once(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    found = soak.soak(soak.QUICK, tmp_path)
    for name in ("answers", "refusals", "deeds", "most_waiting"):
        record_property(name, found[name])
    assert found["faults"] == []
    assert found["answers"]["equal to its reference"] > 100
    assert found["answers"]["hung up"] > 20
    assert found["refusals"]["429 the queue is full"] > 20
    assert found["most_waiting"] <= soak.QUICK.queue
    kinds = {deed.partition(": ")[0] for deed in found["deeds"]}
    assert {
        "refused at publishing",
        "published behind its back",
        "replaced on disk",
        "alias",
        "load",
        "unload",
    } <= kinds


@pytest.mark.prove
def test_a_tenant_beside_one_that_asks_a_hundred_times_as_often_waits_at_most_twice_as_long(tmp_path: Path) -> None:
    found = soak.fairness(soak.Pair(seconds=8.0), tmp_path)
    assert found["beside"]["statuses"]["quiet 200"] == found["beside"]["seconds"]["count"]
    assert "quiet 429" not in found["beside"]["statuses"]
    assert found["seconds_p99_ratio"] <= 2, found


def test_the_slope_of_flat_memory_holds_zero_and_that_of_a_leak_does_not() -> None:
    def samples(a_minute: float) -> Iterator[tuple[float, int]]:
        for second in range(180):
            noise = (second * 7919 % 101 - 50) * 20_000  # ± 1 MB
            yield float(second), int(300e6 + noise + a_minute * second / 60)

    flat, leak = report_soak.slope([*samples(0)]), report_soak.slope([*samples(3e6)])
    assert abs(flat["mb_a_minute"]) <= flat["within"] < 0.5
    assert leak["mb_a_minute"] == pytest.approx(3, abs=0.5)
    assert leak["mb_a_minute"] > leak["within"]
    assert flat["points"] == 18


def test_the_99th_percentile_is_the_nearest_rank() -> None:
    assert report_soak.quantiles([float(i) for i in range(1, 201)])["p99"] == 198
    assert report_soak.quantiles([3.0])["p99"] == 3
