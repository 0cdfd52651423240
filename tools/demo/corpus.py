"""What the bundled base is trained on: tasks and answers in natural language, and plain product descriptions.

    t0.jsonl               general English: the T0 subset distributed with Self-Instruct
    plain.jsonl            generated products in the plain voice, most after their prompt, some as a page of prose
    heldout-t0.jsonl       tasks chosen by content; every other task that uses the same passage is in neither file
    heldout-plain.jsonl    products with names that the second file never has
    heldout.jsonl          both

A model with random weights has the language of the prompt to learn too, so each row is `{"text": prompt + completion}`,
every token of it trained. The prompt is followed by the completion directly, as in a row with both fields, and ends in
a way that the tokenizer never joins to what comes after: a single newline (T0) or a colon (products).

Rows have at most `MAX_CHARS` characters, which is under 512 tokens of the bundled tokenizer. A longer task is not cut
but dealt out in pieces, at the end of a sentence where there is one, so that all its prose is read.

T0 asks many questions about one passage, which has two consequences. Pieces of a passage dealt out before are left
out. And held out at random, most tasks would have their passage in the training data, so that the eval loss would
flatter: tasks that share runs of words with a held-out one are left out of training.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from graftlm.errors import DataError
from tools.demo.voices import describe, example, facts

PLAIN_ROWS = 30_000
PLAIN_PAGES = 3_000
HELDOUT_PLAIN_ROWS = 400
HELDOUT_PERMILLE = 10
MAX_CHARS = 1180
MAX_BYTES_PER_CHAR = 1.04  # more is another script, which a vocabulary of 4096 spells out byte by byte
MAX_SIGN_SHARE = 0.14  # digits and signs; more is a table or a markup that lost its words
RUN = 8  # words that follow each other
COMMON = 60  # a run in more tasks than this is the wording of a question, not a passage
SHARED = 3  # runs in common that make two tasks one passage,
SHARED_ANY = 60  # or so many of any kind, where a passage itself is in many tasks
END_OF_TEXT = "<|endoftext|>"


def write_corpus(t0_gz: Path, out: Path) -> dict[str, int]:
    """Write the five files into `out` and return the number of rows of each.

    Raises DataError when `t0_gz` is missing.
    """
    if not t0_gz.is_file():
        raise DataError(f"T0 file '{t0_gz}' not found. Give the path of t0.jsonl.gz (rows with prompt and completion).")
    held_tasks, train_tasks = hold_out(list(read_t0(t0_gz)))
    train, held = list(deal(train_tasks)), list(deal(held_tasks))
    plain_held = [joined(example(product, "plain")) for product in facts(2, HELDOUT_PLAIN_ROWS, "heldout")]
    files = {
        "t0.jsonl": train,
        "plain.jsonl": list(plain_texts()),
        "heldout-t0.jsonl": held,
        "heldout-plain.jsonl": plain_held,
        "heldout.jsonl": held + plain_held,
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, texts in files.items():
        write_rows(out / name, ({"text": text} for text in texts))
    return {name: len(texts) for name, texts in files.items()}


def read_t0(t0_gz: Path) -> Iterator[str]:
    """Yield each T0 task with its answer as one text, without the end marker; other scripts and tables are left out."""
    with gzip.open(t0_gz, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            prompt, completion = str(row["prompt"]), str(row["completion"])
            text = joined({"prompt": prompt.strip() + "\n", "completion": completion.removesuffix(END_OF_TEXT).strip()})
            text = re.sub(r"\n\s*\n", "\n\n", text)
            damaged = END_OF_TEXT in text or "-lrb-" in text  # brackets spelled out by some parser
            if completion.removesuffix(END_OF_TEXT).strip() and is_prose(text) and not damaged:
                yield text


def is_prose(text: str) -> bool:
    """Tell whether `text` is mostly words in Latin script."""
    signs = sum(not (char.isalpha() or char.isspace()) for char in text)
    return signs <= MAX_SIGN_SHARE * len(text) and len(text.encode()) <= MAX_BYTES_PER_CHAR * len(text)


def deal(tasks: Iterable[str]) -> Iterator[str]:
    """Yield the tasks, long ones in pieces; of their pieces only what is prose and was not yielded before."""
    seen: set[int] = set()
    for text in tasks:
        for piece in pieces(text):
            marks = {mark for mark in (zlib.crc32(run.encode()) for run in _runs(piece)) if mark % 8 == 0}
            if len(text) <= MAX_CHARS or (is_prose(piece) and len(marks & seen) <= len(marks) // 2):
                yield piece
            seen |= marks


def hold_out(texts: list[str]) -> tuple[list[str], list[str]]:
    """Return the held-out texts and those of the rest that share no passage with them."""
    chosen = [zlib.crc32(text.encode()) % 1000 < HELDOUT_PERMILLE for text in texts]
    held_runs = {run for text, held in zip(texts, chosen, strict=True) if held for run in _runs(text)}
    shared = [_runs(text) & held_runs for text in texts]
    frequency = Counter(run for runs in shared for run in runs)
    held = [text for text, is_held in zip(texts, chosen, strict=True) if is_held]
    rest = [
        text
        for text, is_held, runs in zip(texts, chosen, shared, strict=True)
        if not is_held and len(runs) < SHARED_ANY and sum(frequency[run] <= COMMON for run in runs) < SHARED
    ]
    return held, rest


def _runs(text: str) -> set[str]:
    """Return every run of `RUN` words of `text`, or all of a shorter text."""
    found = re.findall(r"\w+", text.lower())
    return {" ".join(found[at : at + RUN]) for at in range(max(1, len(found) - RUN + 1))}


def plain_texts() -> Iterator[str]:
    """Yield the plain descriptions, each after its prompt, then the pages: several products without prompts."""
    for product in facts(0, PLAIN_ROWS):
        yield joined(example(product, "plain"))
    products = facts(1, PLAIN_PAGES * 6)
    for page in range(PLAIN_PAGES):
        number = 2 + page % 5
        chosen = products[page * 6 : page * 6 + number]
        yield ("\n" if page % 2 else "\n\n").join(describe(product, "plain").strip() for product in chosen)


def joined(row: dict[str, str]) -> str:
    """Return the text that a row's tokens spell: the prompt, followed directly by the completion."""
    return row["prompt"] + row["completion"]


def pieces(text: str, max_chars: int = MAX_CHARS) -> Iterator[str]:
    """Yield `text` in pieces of at most `max_chars`, each ending with a paragraph, a sentence or at least a word."""
    while len(text) > max_chars:
        least = max_chars // 2
        ends = (text.rfind(mark, least, max_chars) for mark in ("\n", ". ", " "))
        end = next((end + 1 for end in ends if end >= 0), max_chars)
        yield text[:end].strip()
        text = text[end:].strip()
    if text:
        yield text


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write `rows` as JSON lines, in UTF-8 and with the same bytes on every system."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
