"""Numbers and names are ASCII: the digits of other scripts, which Python's `int` and `\\d` take too, count as no number."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "adapters"))

import stores

from graftlm.adapters.store import Store, parse
from graftlm.adapters.store.remote import Remote
from graftlm.commands.push_pull import is_hub_id
from graftlm.config import CheckConfig, CompareConfig, MergeConfig, SweepConfig, TrainConfig
from graftlm.data.sources import Source, share
from graftlm.errors import ConfigError, GraftError, StoreError
from graftlm.planning.hardware import memory_bytes
from graftlm.training import checkpoint

ONES = ("١", "１", "²", "१", "𝟏", "①")
"""One in Arabic, wide, raised, Devanagari, bold and circled digits: `str.isdigit` is true of each."""


@pytest.mark.parametrize("one", ONES)
def test_a_version_in_other_digits_is_no_version(one: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.publish(stores.adapter(tmp_path / "a"), "good")
    assert one.isdigit()
    with pytest.raises(StoreError, match="is not allowed"):
        store.find(f"good@{one}")
    with pytest.raises(StoreError, match="is not allowed"):
        parse(f"good{one}@1")
    with pytest.raises(StoreError, match="is not allowed"):
        store.alias("good", one, 1)
    with pytest.raises(StoreError, match="is not allowed"):
        store.publish(tmp_path / "a", f"good{one}")
    assert store.find("good@1").number == 1


@pytest.mark.parametrize("number", [*ONES, "01", "0", "-1", "1_0", " 1"])
def test_a_remote_record_in_other_digits_is_none(number: str, tmp_path: Path) -> None:
    names = tmp_path / "there" / stores.BASE / "names" / "good"
    names.mkdir(parents=True)
    (names / f"{number}.json").write_text(json.dumps({"name": "good", "version": 1, "digest": "d" * 64}))
    assert Remote(str(tmp_path / "there")).records() == []


@pytest.mark.parametrize("one", ONES)
def test_options_are_numbers_in_ascii_digits_alone(one: str, tmp_path: Path) -> None:
    needed = {"model": "m", "data": "d.jsonl", "out": "o"}
    for config, values in (
        (TrainConfig, {**needed, "steps": one}),
        (TrainConfig, {**needed, "template_date": f"202{one}-01-01"}),
        (TrainConfig, {**needed, "rank_pattern": f"q_proj={one}"}),
        (CheckConfig, {"model": "m", "data": "d.jsonl", "template_date": f"202{one}-01-01"}),
        (CompareConfig, {**needed, "methods": f"lora:learning-rate={one}"}),
        (CompareConfig, {**needed, "learning_rate": f"lora={one}"}),
        (SweepConfig, {**needed, "search": f"rank=4..64:{one}"}),
        (SweepConfig, {**needed, "search": f"learning-rate=1e-5..{one}"}),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            config.build(values)
    with pytest.raises(ConfigError):
        memory_bytes(f"{one}0GB")
    with pytest.raises(ConfigError):
        share(f"{one}%")
    assert Source.parse(f"rows.jsonl:{one}") == Source(path=f"rows.jsonl:{one}"), "a name, not a weight"
    merge = MergeConfig.build({"model": "m", "adapter": f"A:{one}", "out": "o"})
    assert merge.weighted() == ((f"A:{one}", 1.0),), "a name, not a weight"


@pytest.mark.parametrize("one", ONES)
def test_a_checkpoint_folder_in_other_digits_is_none(one: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / one).mkdir(parents=True)
    assert checkpoint.newest(tmp_path) == (None, [])


def test_a_hub_id_is_ascii() -> None:
    assert is_hub_id("owner/name-1.5")
    assert not is_hub_id("оwner/name")  # its first letter is a Cyrillic one
    assert not is_hub_id("owner/name١")


def test_an_error_names_the_characters_that_are_allowed() -> None:
    with pytest.raises(GraftError, match="A to Z, a to z, 0 to 9"):
        parse("good@١")
