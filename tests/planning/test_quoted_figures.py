"""The well-known numbers: the page shows what the plan says, and each is held against settings that are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftlm.formatting import size
from graftlm.planning.activations import Workload
from graftlm.planning.fitting import PlanCase
from graftlm.planning.hardware import card
from graftlm.planning.models import find
from graftlm.planning.quoted_figures import QuotedFigure, quoted_figures

PAGE = Path(__file__).parents[2] / "docs" / "planning.md"
MODELS = ("llama-2-7b", "llama-2-13b", "llama-2-70b")


def of(name: str) -> list[QuotedFigure]:
    load = Workload(tokens=512, target_tokens=512, longest=512)
    return quoted_figures(
        name, PlanCase(shape=find(name).shape, targets=("mlp",), rank=4, load=load, card=card("h100"), fused=False)
    )


def test_the_page_shows_what_the_plan_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before = ""
    for answer in (a for name in MODELS for a in of(name)):
        quoted = "" if answer.claim.what == before else answer.claim.what
        before = answer.claim.what
        assert f"| {quoted} | {size(answer.ours * 1e9)} | {answer.verdict} | {answer.claim.under} |" in page


@pytest.mark.parametrize("name", MODELS)
def test_every_range_holds_somewhere_or_ours_is_lower(name: str) -> None:
    found: dict[str, set[str]] = {}
    for answer in of(name):
        found.setdefault(answer.claim.what, set()).add(answer.verdict)
    assert found
    assert all(verdicts & {"holds", "ours is lower"} for verdicts in found.values())


def test_a_model_that_nobody_quotes_has_no_such_table() -> None:
    assert of("qwen3-8b") == []
