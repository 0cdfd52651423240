"""Find a row's format from its columns, or say which columns to rename.

A row of another format than the file's first row is a fault: a column that was only renamed in some rows would otherwise be
read as another kind of data. Columns of no format (an id, a source) are reported as not used (`unused.py`).
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from graftlm.errors import DataError, nearest

Format = Literal["messages", "completion", "instruction", "text"]

NEEDED: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
OPTIONAL: dict[Format, tuple[str, ...]] = {
    "messages": ("system", "tools", "functions"),
    "completion": ("system", "tools"),
    "instruction": ("input", "system", "history", "tools"),
    "text": (),
}
KNOWN = tuple(dict.fromkeys(name for names in (*NEEDED.values(), *OPTIONAL.values()) for name in names))
_EXPECTED = "messages, prompt + completion, instruction + output, or text"
SHOWN = 20
"""Most faults listed in one error."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row before it is parsed."""

    row: str  # "train.jsonl:17"
    columns: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one row, and how to fix it."""

    row: str
    field: str
    found: str
    expected: str
    mend: str

    def __str__(self) -> str:
        expected = f"; expected {self.expected}" if self.expected else ""
        mend = f". {self.mend[:1].upper()}{self.mend[1:]}" if self.mend else ""
        mend += "" if mend.endswith("?") else "."
        return f"{self.row}: {self.field}: {self.found}{expected}{mend}"


# Names of the question and answer columns in other programs and data sets, most common first.
_QUESTIONS = (
    "question", "query", "instruction", "prompt", "input", "user", "human", "problem", "source", "context", "article",
    "example", "dialogue",
)  # fmt: skip
_ANSWERS = (
    "answer", "response", "output", "completion", "assistant", "reply", "target", "chosen", "solution", "summary",
    "highlights", "gpt", "bot", "label",
)  # fmt: skip
_TEXTS = ("content", "body", "example", "article", "passage", "story", "code", "review")
_CONVERSATIONS = ("conversations", "conversation", "dialog", "dialogue", "chat", "turns", "chosen")


def _renaming(columns: dict[str, Any]) -> str | None:
    """How to rename the columns, from their meaning in other programs; None if no name is known."""
    plain = {name.strip().lower(): name for name in reversed(list(columns))}
    for name in _CONVERSATIONS:
        if isinstance(columns.get(plain.get(name, "")), list):
            first = next(iter(columns[plain[name]]), None)
            if isinstance(first, dict) and "from" in first:
                return (
                    f"rename '{plain[name]}' to 'messages', and in it 'from' to 'role' (human: user, gpt: assistant), "
                    "'value' to 'content'"
                )
            return f"rename '{plain[name]}' to 'messages'"
    answer = next((plain[name] for name in _ANSWERS if name in plain), None)
    question = next((plain[name] for name in _QUESTIONS if name in plain and plain[name] != answer), None)
    if answer is not None and question is not None:
        names = (("instruction", "output"), ("prompt", "completion"))
        if answer in ("completion", "chosen") or question == "prompt":
            names = names[::-1]
        if answer == "output" or question == "instruction":
            names = names[:1]
        return ", or ".join(
            _renamed(question, to, answer, end) + (" (a conversation)" if to == "instruction" else " (plain texts)")
            for to, end in names
        )
    text = next((plain[name] for name in _TEXTS if name in plain), None)
    return f"rename '{text}' to 'text'" if text is not None else None


def _renamed(question: str, to: str, answer: str, end: str) -> str:
    pairs = [f"'{name}' to '{new}'" for name, new in ((question, to), (answer, end)) if name != new]
    return "rename " + " and ".join(pairs)


def refuse(faults: Sequence[Fault]) -> DataError:
    """One error for all faults: up to 20 in full, and the number of others."""
    rows = len({fault.row for fault in faults})
    lines = [f"{rows} row{'s' if rows != 1 else ''} cannot be trained on; nothing was trained:"]
    lines += [f"  {fault}" for fault in faults[:SHOWN]]
    if len(faults) > SHOWN:
        lines.append(f"  and {len(faults) - SHOWN} more")
    return DataError("\n".join(lines))


def columns_of(form: Format) -> tuple[str, ...]:
    """A format's columns: the required ones, then the optional ones."""
    return (*NEEDED[form], *OPTIONAL[form])


def format_of(raw: RawRow) -> Format | Fault:
    """The format of a row's columns, or a fault that says how to rename them."""
    columns = raw.columns
    for form, needed in NEEDED.items():
        if all(name in columns for name in needed):
            return form
    others = [name for name in columns if name not in KNOWN]
    for needed in NEEDED.values():  # one of two columns is there, and the other is misspelt
        have = [name for name in needed if name in columns]
        lacking = next((name for name in needed if name not in columns), "")
        close = difflib.get_close_matches(lacking, others, n=1, cutoff=0.7) if have else []
        if close:
            mend = f"rename '{close[0]}' to '{lacking}'"
            return Fault(raw.row, "columns", _names(columns), f"'{lacking}' beside '{have[0]}'", mend)
    renaming = _renaming(columns)
    for needed in NEEDED.values():
        have = [name for name in needed if name in columns]
        if have:
            lacking = next(name for name in needed if name not in columns)
            mend = renaming or f"add the column '{lacking}'"
            return Fault(raw.row, "columns", _names(columns), f"'{lacking}' beside '{have[0]}'", mend)
    if renaming is None:
        near = next((hint for name in columns if (hint := nearest(name, KNOWN))), "")
        wrong = next((name for name in columns if nearest(name, KNOWN)), "")
        renaming = f"'{wrong}'{near}" if wrong else "rename the columns to one of these"
    return Fault(raw.row, "columns", _names(columns), _EXPECTED, renaming)


@functools.lru_cache
def misspelt(name: str, known: tuple[str, ...]) -> str | None:
    """The known name that `name` is a misspelling of, or None."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return close[0] if close else None


def _names(columns: dict[str, Any]) -> str:
    return "has " + (", ".join(f"'{name}'" for name in list(columns)[:8]) or "no columns")


def shown(value: Any, limit: int = 60) -> str:
    """A value as JSON, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."
