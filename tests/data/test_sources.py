"""Files, folders and hub datasets to rows, each with its place."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from graftlm.data import sources
from graftlm.data.columns import Fault, RawRow, format_of
from graftlm.data.rows import parse
from graftlm.data.sources import Source, read
from graftlm.errors import ConfigError, DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": 'a,\n"b"', "completion": "c\u2028d"},
    {"prompt": "é", "completion": "ü😀"},
    {"prompt": "", "completion": "x"},
]


def rows_of(path: Path | str) -> list[RawRow | Fault]:
    return list(read(Source(path=str(path))))


def columns(found: list[RawRow | Fault]) -> list[dict[str, Any]]:
    assert all(isinstance(row, RawRow) for row in found), found
    return [row.columns for row in found if isinstance(row, RawRow)]


def write(path: Path, kind: str) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    if kind == "jsonl":
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    assert columns(rows_of(write(tmp_path / f"train.{kind}", kind))) == ROWS


def test_a_row_carries_its_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a"}\n\n  \n{"text": "b"}\n')
    assert [row.row for row in rows_of(path)] == [f"{path}:1", f"{path}:4"]
    path = write(tmp_path / "train.json", "json")
    assert [row.row for row in rows_of(path)] == [f"{path}:{line}" for line in (2, 6, 10)]
    path = write(tmp_path / "train.csv", "csv")  # the first row takes two lines
    assert [row.row for row in rows_of(path)] == [f"{path}:{line}" for line in (2, 4, 5)]


def test_broken_json_names_line_column_and_what_stands_there(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"\n[1]\n{"text": "c"}\n')
    good, broken, other, last = rows_of(path)
    assert isinstance(good, RawRow)
    assert isinstance(last, RawRow)
    assert isinstance(broken, Fault)
    assert isinstance(other, Fault)
    assert str(broken).startswith(f"{path}:2: line: broken JSON at column 13 (Expecting ',' delimiter): ")
    assert "expected one JSON object a line. Repair or remove the line." in str(broken)
    assert str(other).startswith(f"{path}:3: line: list '[1]'; expected a JSON object")


def test_bytes_that_are_no_utf8_name_their_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    fault = rows_of(path)[1]
    assert isinstance(fault, Fault)
    assert fault.row.endswith(":2")
    assert "UTF-8" in str(fault)


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert columns(rows_of(path)) == [{"text": "a"}]


def test_broken_json_in_a_list_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text('[\n {"text": "a"},\n {"text": b}\n]')
    found = rows_of(path)
    assert isinstance(found[1], Fault)
    assert f"{path}:3" in str(found[1])
    assert "line 3, column 11" in str(found[1])
    path.write_text('[{"text": "a"}\n{"text": "b"}]')
    assert "expected ',' or ']'" in str(rows_of(path)[1])
    path.write_text('[{"text": "a"},')
    assert isinstance(rows_of(path)[1], Fault)
    path.write_text('{"text": "a"}')
    with pytest.raises(DataError, match=r"expected a list of rows.*name it \.jsonl"):
        rows_of(path)


def test_a_csv_row_of_another_width_is_a_fault_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("prompt,completion\na,b\nc,d,e\n")
    fault = rows_of(path)[1]
    assert isinstance(fault, Fault)
    assert str(fault) == f"{path}:3: line: 3 columns; expected 2 (prompt, completion). Quote cells that hold commas."


def test_a_csv_cell_may_hold_messages_as_json(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    messages = [{"role": "user", "content": "Hi"}]
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([["messages"], [json.dumps(messages)]])
    assert columns(rows_of(path)) == [{"messages": messages}]


def test_a_missing_file_names_the_nearest_one_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"no file .*trian\.jsonl, did you mean 'train\.jsonl'\?"):
        rows_of(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="has no file of a similar name"):
        rows_of(tmp_path / "zzzzzzzz.parquet")
    with pytest.raises(DataError, match="nowhere does not exist"):
        rows_of(tmp_path / "nowhere" / "train.jsonl")


def test_a_name_in_a_folder_that_is_here_is_no_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"no file data/train, did you mean 'train\.jsonl'"):
        rows_of("data/train")


def test_empty_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("")
    with pytest.raises(DataError, match="is empty"):
        rows_of(path)
    path.write_text("\n\n")
    with pytest.raises(DataError, match="holds no row"):
        rows_of(path)
    path = tmp_path / "train.csv"
    path.write_text("prompt,completion\n")
    with pytest.raises(DataError, match="holds no row"):
        rows_of(path)
    path = tmp_path / "train.json"
    path.write_text("[]")
    with pytest.raises(DataError, match="holds no row"):
        rows_of(path)


def test_an_unknown_ending_names_the_nearest_known_one(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonlines"
    path.write_text("{}")
    with pytest.raises(DataError, match=r"ends in '\.jsonlines', did you mean '\.jsonl'\?"):
        rows_of(path)
    path = tmp_path / "train"
    path.write_text("{}")
    with pytest.raises(DataError, match="has no ending"):
        rows_of(path)


def test_files_that_are_not_what_their_name_says_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    path.write_text("no parquet")
    with pytest.raises(DataError, match="no Parquet file"):
        rows_of(path)
    path = tmp_path / "train.jsonl.gz"
    path.write_text("no gzip")
    with pytest.raises(DataError, match="cannot be read as gzip"):
        rows_of(path)


def test_a_folder_without_data_is_refused_and_one_with_data_is_a_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "mine"
    folder.mkdir()
    with pytest.raises(DataError, match="folder without data files"):
        rows_of(folder)
    write(folder / "train.jsonl", "jsonl")
    found = rows_of(folder)
    assert columns(found) == ROWS
    assert found[1].row == f"{folder}:2"


def test_a_name_that_is_neither_here_nor_on_the_hub_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    def unreachable(path: str, **_: Any) -> None:
        raise ConnectionError(f"cannot reach {path}\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"'owner/name@test' is no file here.*cannot reach owner/name\)"):
        rows_of("owner/name@test")


def test_a_hub_id_is_loaded_with_its_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[str, str]] = []

    def load(path: str, split: str) -> datasets.Dataset:
        asked.append((path, split))
        return datasets.Dataset.from_list([{"text": "a", "extra": None}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert columns(rows_of("owner/name@test")) == [{"text": "a"}]
    assert columns(rows_of("owner/name")) == [{"text": "a"}]
    assert asked == [("owner/name", "test"), ("owner/name", "train")]


def test_a_weight_follows_a_colon() -> None:
    assert Source.parse("a.jsonl") == Source(path="a.jsonl", weight=1.0)
    assert Source.parse("a.jsonl:2") == Source(path="a.jsonl", weight=2.0)
    assert Source.parse("owner/name@test:0.5") == Source(path="owner/name@test", weight=0.5)
    assert Source.parse("C:/a.jsonl") == Source(path="C:/a.jsonl")
    for wrong in ("0", "-1", "nan", "inf"):
        with pytest.raises(DataError, match=f"weight of 'a.jsonl' is {wrong}"):
            Source.parse(f"a.jsonl:{wrong}")


def test_a_file_whose_name_ends_like_a_weight_is_that_file(tmp_path: Path) -> None:
    path = tmp_path / "a:2"
    path.write_text("{}")
    assert Source.parse(str(path)) == Source(path=str(path))


def test_a_hub_id_may_hold_a_dot_and_a_slip_in_a_file_name_is_none(tmp_path: Path) -> None:
    assert sources.is_hub_id("teknium/OpenHermes-2.5")
    assert sources.is_hub_id("owner/name@train")
    assert not sources.is_hub_id("train.jsn")
    assert not sources.is_hub_id("data/train.jsonl")


def test_an_answer_in_brackets_in_csv_stays_a_text(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('prompt,completion\nsort 3 1 2,"[1, 2, 3]"\n')
    assert [row.columns["completion"] for row in read(Source(path=str(file)))] == ["[1, 2, 3]"]  # type: ignore[union-attr]


def test_a_csv_cell_may_be_long(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text\n" + "a" * 200_000 + "\n")
    assert len(next(iter(read(Source(path=str(file))))).columns["text"]) == 200_000  # type: ignore[union-attr]


def test_half_a_character_is_a_fault_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "ab\\ud83d"}\n')
    raw = next(iter(read(Source(path=str(file)))))
    form = format_of(raw)  # type: ignore[arg-type]
    faults = parse(raw, form)  # type: ignore[arg-type]
    assert isinstance(faults, list)
    assert "position 2" in str(faults[0])


def test_a_limit_above_the_models_positions_is_refused() -> None:
    assert sources.token_limit(None, 64) == 64
    with pytest.raises(ConfigError, match="is 65, and this model's longest position is 64"):
        sources.token_limit(65, 64)
