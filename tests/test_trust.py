"""`docs/trust.md` says what `bench/trust.py` measured, and in that table Graft is never silent and never wrong."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest

from graftlm.adapters import canary
from graftlm.config import Precision

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_trust", ROOT / "bench" / "trust.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_table_of_the_results(bench: Any) -> None:
    page = bench.PAGE.read_text()
    shown = page.partition(bench.BEGIN)[2].partition(bench.END)[0].strip()
    assert shown == bench.table(json.loads(bench.RESULTS.read_text()))


def test_graft_refuses_or_is_right(bench: Any) -> None:
    rows = json.loads(bench.RESULTS.read_text())["rows"]
    assert {row["graft"]["word"] for row in rows} == {"refused", "right"}
    assert [row["graft"]["word"] for row in rows if row["fault"] == "nothing is wrong"] == ["right", "right"]
    assert [row["peers"]["word"] for row in rows if row["fault"] == "nothing is wrong"] == ["right", "right"]
    expected = {*bench.ADAPTER_FAULTS, *(fault.name for fault in bench.RUN_FAULTS)}
    assert expected <= {row["fault"] for row in rows}


def test_the_page_says_what_the_canary_allows() -> None:
    page = (ROOT / "docs" / "trust.md").read_text()
    tolerance = canary._TOLERANCE  # pyright: ignore[reportPrivateUsage]
    same = {canary._tolerance(kind, kind) for kind in get_args(Precision)}  # pyright: ignore[reportPrivateUsage]
    assert same == {0.001}
    for kinds, value in (({"float32", "bfloat16"}, 0.1), ({"float32", "int8"}, 0.15), ({"bfloat16", "int8"}, 0.15)):
        assert tolerance[frozenset(kinds)] == value
    for line in ("the same precision | 0.001", "float32 and bfloat16 | 0.1", "int8 and one of these | 0.15"):
        assert f"| {line} |" in page
    assert f"| nf4 and any other | {canary._FOUR_BITS} |" in page  # pyright: ignore[reportPrivateUsage]
    by_dtype = canary._DTYPE_TOLERANCE  # pyright: ignore[reportPrivateUsage]
    assert f"`f` is {by_dtype['float32']} with float32 matmuls and {by_dtype['bfloat16']} with bfloat16" in page
