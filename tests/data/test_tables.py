"""Tables and texts as other programs write them: other codings, other marks between columns, other names, no end of a line."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_check import encoder

from graftlm.data import lines
from graftlm.data.columns import Fault, RawRow, format_of
from graftlm.data.dataset import load
from graftlm.data.sources import Source, read
from graftlm.data.tables import delimiter_of
from graftlm.errors import DataError

ROWS = [{"prompt": 'é,;\t"a"\n', "completion": "ü😀"}, {"prompt": "", "completion": "x"}]


def rows_of(path: Path) -> list[dict[str, Any]]:
    found = list(read(Source(path=str(path))))
    assert all(isinstance(row, RawRow) for row in found), found
    return [row.columns for row in found if isinstance(row, RawRow)]


def fault_of(path: Path) -> str:
    return str(next(row for row in read(Source(path=str(path))) if isinstance(row, Fault)))


def write(path: Path, coding: str = "utf-8", **dialect: Any) -> Path:
    with path.open("w", encoding=coding, newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "completion"], **dialect)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


# ---- codings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_file_is_read_in_the_coding_that_its_byte_order_mark_names(coding: str, tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / "a.csv", coding)) == ROWS
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding=coding)
    assert rows_of(tmp_path / "a.jsonl") == ROWS
    (tmp_path / "a.json").write_text(json.dumps(ROWS), encoding=coding)
    assert rows_of(tmp_path / "a.json") == ROWS
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    assert rows_of(tmp_path / "b.csv.gz") == ROWS


@pytest.mark.parametrize("coding", ["utf-16-be", "utf-16-le"])
def test_utf_16_of_either_order_is_read_with_its_mark_and_named_without(coding: str, tmp_path: Path) -> None:
    plain = write(tmp_path / "a.csv", coding)
    with pytest.raises(DataError, match=f"iconv -f {coding.upper().replace('16-', '16')} -t UTF-8 .*a.csv > NEW_FILE"):
        rows_of(plain)
    marked = tmp_path / "b.csv"
    marked.write_bytes("\ufeff".encode(coding) + plain.read_bytes())
    assert rows_of(marked) == ROWS


def test_utf_16_that_breaks_off_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(json.dumps({"text": "a"}).encode("utf-16") + b"\x00")
    with pytest.raises(DataError, match="begins as utf-16"):
        rows_of(file)


@pytest.mark.parametrize(
    ("coding", "word", "kind"), [("latin-1", "café", "LATIN1"), ("cp1252", "“quoted” café – 5 €", "WINDOWS-1252")]
)
@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
def test_bytes_that_are_no_utf_8_are_named_with_their_line_and_the_command_that_mends_them(
    coding: str, word: str, kind: str, form: str, tmp_path: Path
) -> None:
    file = tmp_path / f"a.{form}"
    rows = [{"prompt": "plain", "completion": "x"}, {"prompt": word, "completion": "y"}]
    if form == "csv":
        file.write_text(
            "".join(f"{a},{b}\n" for a, b in [("prompt", "completion"), *(r.values() for r in rows)]), coding
        )
        line = 3
    else:
        text = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        file.write_text(text.replace(",\n", "\n") if form == "jsonl" else f"[{text}]", coding)
        line = 2
    try:
        said = fault_of(file)
    except DataError as error:
        said = str(error)
    assert said.startswith(f"{file}:{line}: ")
    assert "is no UTF-8" in said
    command = re.search(r"iconv -f (\S+) -t UTF-8 (\S+) > NEW_FILE", said)
    assert command
    assert (command[1], command[2]) == (kind, str(file))
    mended = tmp_path / f"new.{form}"  # what iconv does
    mended.write_text(file.read_bytes().decode({"LATIN1": "latin-1", "WINDOWS-1252": "cp1252"}[command[1]]), "utf-8")
    assert rows_of(mended) == rows


def test_a_header_that_is_no_utf_8_or_too_long_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes("question;réponse\na;b\n".encode("latin-1"))
    assert fault_of(file).startswith(f"{file}:1: line: byte 0xe9 at byte 11 of the line is no UTF-8")
    file.write_bytes(b"x" * (lines.MOST_ROW_BYTES + 1))
    assert fault_of(file).startswith(f"{file}:1: row: 8,388,609 bytes; expected at most 8,388,608 bytes a row")


# ---- between columns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16"])
def test_what_stands_between_columns_is_found(mark: str, coding: str, tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / "a.csv", coding, delimiter=mark)) == ROWS
    assert rows_of(write(tmp_path / "a.tsv", coding, delimiter=mark)) == ROWS


def test_a_first_line_for_excel_says_what_stands_between_columns(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("sep=;\nprompt;completion\na,b;c\n")
    (row,) = read(Source(path=str(file)))
    assert row == RawRow(f"{file}:3", {"prompt": "a,b", "completion": "c"})


@pytest.mark.parametrize(
    ("header", "mark"),
    [
        ("prompt,completion", ","), ("prompt;completion", ";"), ("text", ","),
        ("a;b;c", ";"), ('"id, or number";prompt;completion', ";"), ("a,b;c", ","), ("messages\ttools", "\t"),
    ],
)  # fmt: skip
def test_a_header_is_read_as_the_format_it_is_in_some_reading(header: str, mark: str) -> None:
    assert delimiter_of(header) == mark


def test_a_header_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("prompt,completion,prompt\na,b,c\n")
    with pytest.raises(DataError, match="names the column 'prompt' twice"):
        rows_of(file)


def test_lines_that_end_as_on_old_macs_are_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b'prompt,completion\ra,b\r"c\rd",e\r')
    assert rows_of(file) == [{"prompt": "a", "completion": "b"}, {"prompt": "c\rd", "completion": "e"}]


def test_a_row_of_more_columns_says_what_to_quote(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("prompt;completion\na;b;c\n")
    assert "3 columns; expected 2 (prompt, completion). Quote cells that hold semicolons." in fault_of(file)


# ---- names ---------------------------------------------------------------------------------------------------------------

NAMES = [
    ("question", "answer"), ("question", "response"), ("query", "response"), ("query", "answer"), ("input", "output"),
    ("prompt", "response"), ("prompt", "answer"), ("prompt", "output"), ("prompt", "chosen"), ("context", "response"),
    ("context", "answer"), ("context", "completion"), ("instruction", "response"), ("instruction", "answer"),
    ("instruction", "completion"), ("user", "assistant"), ("human", "assistant"), ("Question", "Answer"),
    ("input", "target"), ("source", "target"), ("problem", "solution"), ("article", "highlights"), ("example", "summary"),
    ("dialogue", "summary"), ("input", "response"), ("question", "output"),
]  # fmt: skip


@pytest.mark.parametrize("form", ["jsonl", "csv"])
@pytest.mark.parametrize("names", NAMES, ids="-".join)
def test_the_advice_for_other_names_of_a_question_and_its_answer_works(
    names: tuple[str, str], form: str, tmp_path: Path
) -> None:
    rows = [dict(zip(names, ("One?", "First.")))]
    said = fault_of_rows(rows)
    ways = re.split(r", or ", said.partition(". R")[2])
    assert ways
    for way in ways:
        pairs = re.findall(r"'([^']+)' to '([^']+)'", way)
        assert pairs, said
        renamed = [{dict(pairs).get(name, name): value for name, value in row.items()} for row in rows]
        file = tmp_path / f"a.{form}"
        if form == "jsonl":
            file.write_text("\n".join(map(json.dumps, renamed)))
        else:
            file.write_text(",".join(renamed[0]) + "\n" + ",".join(renamed[0].values()) + "\n")
        dataset = load([Source(path=str(file))], encoder())
        assert dataset.notes == ()
        text = encoder().tokenizer.decode(dataset.examples[0].ids.tolist())
        assert text.index("One?") < text.index("First.")


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"content": "a"}, "Rename 'content' to 'text'."),
        ({"body": "a", "title": "b"}, "Rename 'body' to 'text'."),
        ({"conversation": [{"role": "user", "content": "a"}]}, "Rename 'conversation' to 'messages'."),
        ({"dialog": [{"from": "human", "value": "a"}]}, "and in it 'from' to 'role' (human: user, gpt: assistant)"),
        (
            {"question": "a", "answer": "b", "id": 1},
            "Rename 'question' to 'instruction' and 'answer' to 'output' (a conver",
        ),
        ({"promt": "a", "completion": "b"}, "Rename 'promt' to 'prompt'."),
        ({"weird": "a"}, "Rename the columns to one of these."),
    ],
)
def test_other_columns_have_their_advice(row: dict[str, Any], advice: str) -> None:
    assert advice in fault_of_rows([row])


def fault_of_rows(rows: list[dict[str, Any]]) -> str:
    found = format_of(RawRow("a:1", rows[0]))
    assert isinstance(found, Fault), found
    return str(found)


# ---- sizes ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> int:
    """A limit of rows that a small file is over."""
    from graftlm.data import sources, tables

    for module in (lines, sources, tables):
        monkeypatch.setattr(module, "MOST_ROW_BYTES", 1000)
    monkeypatch.setattr(lines.lines, "__kwdefaults__", {"most": 1000})
    return 1000


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
def test_a_row_over_the_limit_is_named_and_the_others_are_read(form: str, narrow: int, tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "x" * (narrow + 50)}, {"text": "y" * (narrow - 50)}]
    file = tmp_path / f"a.{form}"
    if form == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    elif form == "json":
        file.write_text(",\n".join(map(json.dumps, rows)).join("[]"))
    elif form == "csv":
        file.write_text("\n".join(["text", *(row["text"] for row in rows)]))
    else:
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(file)
    found = list(read(Source(path=str(file))))
    (fault,) = [row for row in found if isinstance(row, Fault)]
    assert re.search(
        r"1,0\d\d bytes; expected at most 8,388,608 bytes a row. Split the text into several rows", str(fault)
    )
    assert fault.row == f"{file}:{3 if form == 'csv' else 2}"
    good = [row.columns for row in found if isinstance(row, RawRow)]
    assert good == ([rows[0]] if form == "csv" else [rows[0], rows[2]])


def test_a_quote_that_is_never_closed_ends_at_the_limit_of_a_row(narrow: int, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('prompt,completion\na,b\n"c,d\n' + "e,f\n" * 1000)
    said = fault_of(file)
    assert "or close the quote that was left open" in said
    assert said.startswith(f"{file}:")


def test_a_line_of_100_mb_is_passed_over_in_pieces(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    with file.open("w") as stream:
        stream.write('{"text": "')
        for _ in range(100):
            stream.write("x" * 1_000_000)
        stream.write('"}\n{"text": "a"}\n')
    heard: list[int] = []
    fault, row = read(Source(path=str(file)), heard.append)
    assert "100,000,013 bytes; expected at most 8,388,608 bytes a row" in str(fault)
    assert isinstance(row, RawRow)
    assert heard == sorted(heard)
    assert len(heard) > 100
    file.unlink()


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "jsonl.gz"])
def test_progress_counts_the_bytes_of_the_file(form: str, tmp_path: Path) -> None:
    import random

    file = tmp_path / f"a.{form}"
    rows = [{"text": random.Random(i).randbytes(4000).hex()} for i in range(400)]
    text = "\n".join(map(json.dumps, rows))
    if form == "json":
        text = text.replace("\n", ",\n").join("[]")
    elif form == "csv":
        text = "\n".join(["text", *(row["text"] for row in rows)])
    file.write_bytes(gzip.compress(text.encode()) if form.endswith("gz") else text.encode())
    heard: list[int] = []
    assert len(list(read(Source(path=str(file)), heard.append))) == 400
    assert heard == sorted(heard)
    assert len(heard) >= 5
    assert file.stat().st_size * 0.8 < heard[-1] <= file.stat().st_size
