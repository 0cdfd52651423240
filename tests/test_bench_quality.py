"""The comparison on real bases: its rows, its table and its page; nothing is trained here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))

import quality  # noqa: E402

from graftlm.config import CompareConfig  # noqa: E402


def _line(name: str, **other: Any) -> dict[str, Any]:
    line = dict.fromkeys(quality.KEPT, 0.5)
    interval = {"low": 0.9, "high": 1.1}
    return {
        **line,
        "name": name,
        "method": name.partition(":")[0],
        "base_precision": "nf4",
        "share_interval": interval,
        **other,
    }


def _compared(folder: Path, methods: tuple[str, ...], **other: Any) -> None:
    """Write what `graft compare` leaves behind."""
    folder.mkdir(parents=True)
    found = {
        "asked": {"seeds": 3, "methods": list(methods), "metric": None},
        "data": {"steps": 40, "rows": 640, "eval_rows": 120, "eval_tokens": 3000, "prompts_answered": 0},
        "lines": [_line(name, task_score=None, task_score_before=None, **other) for name in methods],
        "verdict": {"differences": [], "choice": "lora", "certain": True, "sentences": ["Take lora."]},
        "failed": {},
        "environment": {"versions": {}},
    }
    (folder / "compare.json").write_text(json.dumps(found), encoding="utf-8")


def test_the_options_of_every_regime_are_those_of_graft_compare(tmp_path: Path) -> None:
    for regime in quality.REGIMES.values():
        options = dict(zip(regime.options[::2], regime.options[1::2], strict=True))
        values = {name.removeprefix("--").replace("-", "_"): value for name, value in options.items()}
        config = CompareConfig.build(
            {
                **values,
                "model": "demo",
                "data": ["demo"],
                "methods": [*regime.methods, *regime.variants],
                "out": tmp_path,
            }
        )
        assert config.seeds == 3


def test_eight_regimes_hold_two_real_bases_on_four_data_sets() -> None:
    real = [(r.base, r.data) for r in quality.REGIMES.values() if r.base != "demo"]
    assert len(set(real)) == len(real) == 8
    assert {len({d for b, d in real if b == base}) for base in ("smollm2", "gemma3")} == {4}


@pytest.mark.parametrize("data", ["voices", "e2e", "gsm8k", "t0"])
def test_no_prompt_of_an_eval_row_is_that_of_a_training_row(data: str) -> None:
    if data != "voices" and not quality.SHARED.is_dir():
        pytest.skip(f"there is no {quality.SHARED}")
    train, valid = quality.cut(data, 640, 120)
    assert (len(train), len(valid)) == (640, 120)

    def prompts(rows: list[dict[str, Any]]) -> set[str]:
        return {row["prompt"] if "prompt" in row else row["messages"][0]["content"] for row in rows}

    assert not prompts(train) & prompts(valid)


def test_what_has_not_ended_is_missing_with_its_reason(tmp_path: Path) -> None:
    regime = quality.REGIMES["smollm2-gsm8k"]
    assert quality.read(regime, tmp_path)["missing"] == "not run"
    (tmp_path / regime.name).mkdir()
    (tmp_path / regime.name / "compare.json").write_text("{}", encoding="utf-8")
    assert quality.table(quality.read(regime, tmp_path)) == "Missing: begun, not ended."


def test_a_table_names_the_variants_that_have_not_been_run(tmp_path: Path) -> None:
    regime = quality.REGIMES["smollm2-gsm8k"]
    _compared(tmp_path / regime.name, regime.methods)
    text = quality.table(quality.read(regime, tmp_path))
    assert "| qlora | nf4 |" in text
    assert f"Not run yet: {quality.INT8}." in text


def test_variants_are_added_at_the_rate_of_the_method_they_vary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regime = quality.REGIMES["smollm2-voices"]
    _compared(tmp_path / regime.name, regime.methods, learning_rate=6.3e-4)
    commands: list[list[str]] = []

    def called(command: list[str], **_: Any) -> None:
        commands.append(command)

    monkeypatch.setattr(quality.subprocess, "run", called)
    monkeypatch.setattr(quality, "base_of", lambda regime, out: "demo")
    quality.run(regime, tmp_path, variants=True)
    options = dict(zip(commands[0][4::2], commands[0][5::2], strict=True))
    assert options["--methods"] == f"full,lora,qlora,{quality.INT8}"
    assert options["--learning-rate"] == f"{quality.INT8}=0.00063"


def test_methods_are_not_compared_again_where_their_variants_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regime = quality.REGIMES["smollm2-voices"]
    _compared(tmp_path / regime.name, (*regime.methods, quality.INT8))
    monkeypatch.setattr(quality.subprocess, "run", lambda command, **_: pytest.fail("compared again"))
    quality.run(regime, tmp_path, variants=False)


def test_the_page_holds_the_tables_of_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "quality.md"
    page.write_text(quality.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(quality, "PAGE", page)
    quality.write_page(json.loads(quality.RESULTS.read_text(encoding="utf-8")))
    assert page.read_text(encoding="utf-8") == (ROOT / "bench" / "results" / "quality.md").read_text(encoding="utf-8")
