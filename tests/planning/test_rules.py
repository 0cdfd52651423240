"""Every rule of the advice names what supports it, and the page has them all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from graftlm.planning import rules
from graftlm.planning.rules import ALL, Rule, plain, table

ROOT = Path(__file__).parents[2]
OTHER = ("arithmetic", "a choice", "Schulman et al. 2025")


@pytest.mark.parametrize("rule", ALL, ids=lambda rule: rule.name)
def test_a_rule_names_a_measurement_that_is_here_or_says_whose_it_is(rule: Rule) -> None:
    files = re.findall(r"\]\(\.\./(bench/results/[a-z-]+\.md)[^)]*\)", rule.measurement)
    assert files or any(word in rule.measurement for word in OTHER)
    for file in files:
        assert (ROOT / file).is_file()
    assert rule.says
    assert rule.threshold


def test_every_rule_of_the_module_is_in_the_list_once() -> None:
    own = [value for value in vars(rules).values() if isinstance(value, Rule)]
    assert list(ALL) == own
    assert len({rule.name for rule in ALL}) == len(ALL)


def test_the_page_has_the_table_of_the_rules() -> None:
    assert table(ALL) in (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")


def test_a_link_is_its_text_in_a_terminal() -> None:
    assert plain("see [quality.md](../bench/results/quality.md), twice") == "see quality.md, twice"
