"""`make compat`: its releases are those of the package, and its table says what pytest found."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.version import Version

from graftlm.base.transformers_versions import RANGE
from tools import compat
from tools.compat import CONTRACT, ROOT, VERSIONS, Result, constraints, read_report, table

CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_the_releases_are_the_oldest_that_the_package_takes_and_the_one_that_set_up_installs() -> None:
    pinned = re.search(r"^transformers==(.+)$", CONSTRAINTS, flags=re.MULTILINE)
    assert pinned is not None
    assert pinned[1] == VERSIONS[-1]
    assert sorted(VERSIONS, key=Version) == list(VERSIONS)
    assert f'"transformers{RANGE}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert RANGE.startswith(f">={'.'.join(VERSIONS[0].split('.')[:2])},")


def test_the_contract_tests_are_there() -> None:
    assert all((ROOT / place).exists() for place in CONTRACT)


def test_an_environment_has_the_pins_of_set_up_except_what_the_release_decides() -> None:
    found = constraints(CONSTRAINTS, "5.17.0").splitlines()
    assert "transformers==5.17.0" in found
    assert set(CONSTRAINTS.splitlines()) - set(found) == {
        line for line in CONSTRAINTS.splitlines() if line.startswith(("transformers==", "huggingface_hub=="))
    }


REPORT = """<testsuites><testsuite time="7.25">
<testcase classname="tests.base.test_a" name="test_good"/>
<testcase classname="tests.base.test_a" name="test_left"><skipped message="no GPU"/></testcase>
<testcase classname="tests.base.test_b" name="test_bad[7]"><failure message="no">E</failure></testcase>
<testcase classname="tests.base.test_b" name="test_worse"><error message="no">E</error></testcase>
</testsuite></testsuites>"""


def test_failed_tests_and_errors_are_counted_and_named() -> None:
    found = read_report("5.20.2", REPORT)
    assert found == Result("5.20.2", 1, 1, ("tests.base.test_b::test_bad[7]", "tests.base.test_b::test_worse"), 7.25)
    lines = table([found, Result("5.24.0", 850, 0, (), 61.0)]).splitlines()
    assert lines[1].split() == ["5.20.2", "1", "2", "1", "7"]
    assert lines[2].split() == ["5.24.0", "850", "0", "0", "61"]
    assert lines[3] == "5.20.2: tests.base.test_b::test_bad[7]"


def test_an_environment_is_made_once_and_again_when_its_pins_change(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    root, ran = tmp_path / "root", []
    root.mkdir()
    for name in ("constraints.txt", "pyproject.toml", "setup.py"):
        (root / name).write_text("numpy==2.4.6\n")
    monkeypatch.setattr(compat, "ROOT", root)
    monkeypatch.setattr(compat, "PLACE", root / "build" / "compat")
    monkeypatch.setattr(compat.venv, "create", lambda place, **options: place.mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr(compat.subprocess, "run", lambda command, **options: ran.append(command))
    python = compat.environment("5.22.2")
    assert python.parent.parent == root / "build" / "compat" / "5.22.2"
    assert len(ran) == 1
    assert (
        "numpy==2.4.6\ntransformers==5.22.2\n" in (root / "build" / "compat" / "5.22.2" / "constraints.txt").read_text()
    )
    compat.environment("5.22.2")
    assert len(ran) == 1
    (root / "constraints.txt").write_text("numpy==2.4.7\n")
    compat.environment("5.22.2")
    assert len(ran) == 2
