"""The pretraining text: cleaned, in pieces that fit, and held out by passage rather than by row."""

import gzip
import json
from pathlib import Path

import pytest

from graftlm.errors import DataError
from tools.demo import corpus
from tools.demo.corpus import END_OF_TEXT, deal, hold_out, is_prose, pieces, read_t0, write_corpus


def sentence(number: int) -> str:
    return " ".join(f"{word}{'abcdefghij'[number // 10 % 10]}{'abcdefghij'[number % 10]}" for word in WORDS) + ". "


WORDS = (
    "river",
    "stone",
    "letter",
    "garden",
    "winter",
    "candle",
    "mirror",
    "bridge",
    "harbour",
    "window",
    "paper",
    "field",
)


def write_t0(path: Path, rows: list[tuple[str, str]]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for prompt, completion in rows:
            file.write(json.dumps({"prompt": prompt, "completion": completion + END_OF_TEXT}) + "\n")
    return path


def test_tasks_are_cleaned(tmp_path: Path) -> None:
    path = write_t0(
        tmp_path / "t0.jsonl.gz",
        [
            ("Who wrote it?\n\n\n\nA man of letters. \n", "Poe "),
            ("No answer follows\n", ""),
            ("何が書いてありますか\n", "日本語"),
            ("1 2 3 4 5 6 7 8 9\n", "10"),
            ("The -lrb- old -rrb- markup\n", "x"),
        ],
    )
    assert list(read_t0(path)) == ["Who wrote it?\n\nA man of letters.\nPoe"]


def test_pieces_fit_end_with_sentences_and_lose_no_word() -> None:
    text = "".join(sentence(number) for number in range(60)).strip()
    parts = list(pieces(text, 500))
    assert max(map(len, parts)) <= 500
    assert min(map(len, parts[:-1])) >= 250
    assert all(part.endswith(".") for part in parts)
    assert " ".join(parts) == text
    assert list(pieces("short")) == ["short"]
    assert list(pieces("x" * 25, 10)) == ["x" * 10, "x" * 10, "x" * 5]


def test_a_passage_is_dealt_once_and_its_short_tasks_each_time() -> None:
    passage = "".join(sentence(number) for number in range(60))
    dealt = list(deal([passage + "First question?\nYes", passage + "Second question?\nNo"]))
    assert dealt == list(deal([passage + "First question?\nYes"]))
    short = sentence(1) + "What?\n"
    assert list(deal([short + "Yes", short + "No"])) == [short + "Yes", short + "No"]


def test_no_task_that_shares_a_passage_with_an_eval_one_is_trained() -> None:
    texts = [f"Question {number}?\n{sentence(number % 50)}{sentence(number % 50 + 1)}" for number in range(600)]
    held, rest = hold_out(texts)
    assert held
    assert rest
    runs = {run for text in held for run in corpus._runs(text)}
    assert not any(len(corpus._runs(text) & runs) >= corpus.SHARED for text in rest)
    assert not set(held) & set(rest)


def test_prose_is_words_in_latin_script() -> None:
    assert is_prose("A café by the harbour, open till ten.")
    assert not is_prose("12 | 34 | 56 | 78")
    assert not is_prose("добрый вечер, как дела")


def test_the_corpus_files_hold_text_rows_that_end_as_completions_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "PLAIN_ROWS", 50)
    monkeypatch.setattr(corpus, "PLAIN_PAGES", 10)
    monkeypatch.setattr(corpus, "HELDOUT_PERMILLE", 200)
    t0 = write_t0(tmp_path / "t0.jsonl.gz", [(sentence(number) + "\n", "Yes") for number in range(40)])
    counts = write_corpus(t0, tmp_path / "corpus")
    assert counts["plain.jsonl"] == 60
    assert counts["t0.jsonl"] + counts["heldout-t0.jsonl"] == 40
    assert counts["heldout.jsonl"] == counts["heldout-t0.jsonl"] + counts["heldout-plain.jsonl"]
    for name, number in counts.items():
        lines = (tmp_path / "corpus" / name).read_text(encoding="utf-8").splitlines()
        assert len(lines) == number
        texts = [json.loads(line)["text"] for line in lines]
        assert all(json.loads(line).keys() == {"text"} for line in lines)
        assert all(text == text.strip() and END_OF_TEXT not in text and len(text) <= corpus.MAX_CHARS for text in texts)


def test_a_missing_t0_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no-such.*not found"):
        write_corpus(tmp_path / "no-such.jsonl.gz", tmp_path)
