"""What is shipped: the demo's files are what the generator makes, in separate pools, short, and found by name."""

import json
from pathlib import Path

import pytest

from graftlm import demo
from graftlm.errors import DataError, ModelError
from tools.demo.corpus import PLAIN_PAGES, PLAIN_ROWS
from tools.demo.finetuning_data import HOUSE_VOICES, ROWS, write_house
from tools.demo.voices import facts, pool_of


def rows(path: Path | str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def names(path: Path) -> set[str]:
    return {line[6:] for row in rows(path) for line in row["prompt"].splitlines() if line.startswith("name: ")}


def test_bundled_files_are_what_the_generator_makes(tmp_path: Path) -> None:
    made = write_house(tmp_path)
    assert sorted(path.name for path in made) == sorted(path.name for path in demo.DATA.iterdir())
    for path in made:
        assert path.read_bytes() == (demo.DATA / path.name).read_bytes(), path.name


def test_training_validation_and_the_bases_own_training_share_no_name() -> None:
    base = {product.name for product in facts(0, PLAIN_ROWS)} | {p.name for p in facts(1, PLAIN_PAGES * 6)}
    train, valid = names(demo.DATA / "formal-train.jsonl"), names(demo.DATA / "formal-valid.jsonl")
    assert {pool_of(name) for name in train} == {"train"}
    assert not train & valid
    assert not (train | valid) & base


def test_the_voices_answer_the_same_prompts() -> None:
    for split in ROWS:
        prompts = [[row["prompt"] for row in rows(demo.DATA / f"{voice}-{split}.jsonl")] for voice in HOUSE_VOICES]
        assert prompts[0] == prompts[1] == prompts[2]
        assert len(set(prompts[0])) == ROWS[split]


def test_completions_are_short_and_the_data_small() -> None:
    for path in demo.DATA.iterdir():
        assert max(len(row["completion"]) for row in rows(path)) <= 360
        assert {key for row in rows(path) for key in row} == {"prompt", "completion"}
    assert sum(path.stat().st_size for path in demo.DATA.iterdir()) < 2_000_000


def test_data_names_resolve_to_files_of_their_split() -> None:
    for name, voice in {
        "demo": "playful",
        "demo-formal": "formal",
        "demo-playful": "playful",
        "demo-terse": "terse",
    }.items():
        assert len(rows(demo.resolve_data(name, "train"))) == 1200
        assert Path(demo.resolve_data(name, "valid")).name == f"{voice}-valid.jsonl"
        assert len(rows(demo.resolve_data(name, "valid"))) == 150


def test_other_names_are_returned_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo-own").mkdir()
    for name in ("train.jsonl", "owner/name", "data/demo", "demo-own", "demo-x.jsonl", "5%"):
        assert demo.resolve_data(name, "valid") == name
    assert demo.resolve_model("owner/demo") == "owner/demo"


def test_a_demo_name_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(DataError, match=r"no bundled data is called 'demo-fromal'.*demo-formal"):
        demo.resolve_data("demo-fromal", "train")


def test_a_missing_base_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "BASE", tmp_path / "base")
    with pytest.raises(ModelError, match=r"bundled base is missing.*tools\.demo\.recipe"):
        demo.resolve_model("demo")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="bundled base is missing"):
        demo.resolve_model("demo")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"")
    assert demo.resolve_model("demo") == str(tmp_path / "base")
