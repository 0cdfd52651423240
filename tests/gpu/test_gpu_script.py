"""The jobs of `bench/gpu.py` on the fake card: nothing in them is on the wrong device, and every figure is there."""

from __future__ import annotations

import pytest
from fixtures import Worker


@pytest.mark.parametrize("job", ["kernels", "7b-qlora", "decode"])
def test_a_job_runs_to_its_end_on_a_card(card: Worker, job: str) -> None:
    figures = card.ask("gpu_job", job=job)
    assert len(figures) >= 2
    assert not any("error" in one for one in figures.values()), figures
    for name, one in figures.items():
        if "plan" in one:
            assert one["allocated"] > 0, name
            assert "launches" in one["profile"]
