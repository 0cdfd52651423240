"""What `bench/serve.py` says of its figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import report_serve
import serve


def turn(seconds: float, **given: Any) -> dict[str, Any]:
    return {"seconds": seconds, "tokens_per_second": 256 / seconds, "answers": 24, **given}


def figures() -> dict[str, Any]:
    """Figures in which a goal is reached, a least is, and one is missed."""
    ours = {"mixed": 2.0, "base": 1.8, "one": 0.5}
    turns = {f"graft {kind} {name}": turn(s, milliseconds_a_step=10 * s) for kind in ("float32", "bfloat16", "nf4")
             for name, s in ours.items()}  # fmt: skip
    turns["graft float32 mixed"]["same_as_peer"] = 23
    turns |= {"peer float32 mixed": turn(13.0), "peer nf4 mixed": turn(15.0), "peer nf4 bare one": turn(2.5)}
    return {
        "machine": {"processor": "A", "threads": 2, "kernels": "C", "date": "2026-01-02T03", "versions": {"torch": "2"}},
        "size": serve.Size().__dict__, "seconds": 400.0, "turns": turns,
    }  # fmt: skip


def test_every_bar_is_a_row_with_its_verdict() -> None:
    rows = [line for line in report_serve.table(figures()).splitlines() if line.startswith("| ")]
    assert [row.split("|")[-2].strip() for row in rows[1:]] == [
        "goal", "must", "missed", "must", "must", "must", "must", "must",
    ]  # fmt: skip
    assert "6.50x (128.0 vs 19.7 tokens/s)" in rows[1]
    assert "90%" in rows[6]


def test_answers_that_agree_with_the_peers_are_counted() -> None:
    assert "- graft float32 mixed: 23 of 24" in report_serve.table(figures())


def test_parts_that_were_not_reached_are_no_rows() -> None:
    found = figures()
    found["memory"] = {"ratio": 1.02, "own_bytes": 19.5e6}
    assert "1.02 of its own 19.5 MB" in report_serve.table(found)
    assert "Zipf" not in report_serve.table(found)
