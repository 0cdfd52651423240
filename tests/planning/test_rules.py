"""Every rule of the advice names what supports it, and the page has them all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from graftlm.planning import rules
from graftlm.planning.rules import ALL, LEAST_SHARE, NF4_DAMAGE, Rule, plain, table

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


def comparisons() -> dict[str, dict[str, Any]]:
    """The lines of each finished comparison of bench/quality.py by method; real ones and those of the bundled base."""
    found = json.loads((ROOT / "bench" / "results" / "quality.json").read_text(encoding="utf-8"))
    lines = {name: {line["name"]: line for line in one["lines"]} for name, one in found.items() if "lines" in one}
    return {name: own for name, own in lines.items() if {"full", "lora", "qlora"} <= own.keys()}


def test_lora_reached_the_stated_share_of_fulls_gain_in_every_comparison() -> None:
    assert len(comparisons()) >= 2
    shares = {name: 100 * lines["lora"]["share"] for name, lines in comparisons().items()}
    assert min(shares.values()) >= LEAST_SHARE - 0.05, shares
    assert f"{LEAST_SHARE}" in rules.LORA.measurement


def test_where_nf4_damages_a_base_less_than_the_threshold_qlora_lost_no_fiftieth_of_the_gain() -> None:
    for name, lines in comparisons().items():
        damage = lines["qlora"]["loss_before"] - lines["lora"]["loss_before"]
        assert damage > NF4_DAMAGE or lines["lora"]["share"] - lines["qlora"]["share"] < 0.02, name


def test_a_link_is_its_text_in_a_terminal() -> None:
    assert plain("see [quality.md](../bench/results/quality.md), twice") == "see quality.md, twice"
