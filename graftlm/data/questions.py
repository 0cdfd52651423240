"""Questions of eval rows: the prompts that a model can be asked, each with every answer that the rows have for it.

A row of prompt and completion asks its prompt; a conversation asks what stands before its last assistant message. Plain texts
ask nothing. Rows of one prompt are one question with several references.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from graftlm.base.chat import Encoder
from graftlm.data.columns import Fault, format_of
from graftlm.data.rows import ChatRow, CompletionRow, ParsedRow, parse
from graftlm.data.sources import Source, read


@dataclass(frozen=True)
class Question:
    """A prompt as the model reads it, and every answer that the data have for it."""

    row: str
    prompt: tuple[int, ...]
    references: tuple[str, ...]


def parsed_rows(sources: Sequence[Source]) -> Iterator[ParsedRow]:
    """Rows as typed examples; those with faults, which are refused when the same sources are loaded, are left out."""
    for source in sources:
        form: Any = None
        for raw in read(source):
            if isinstance(raw, Fault):
                continue
            form = form or format_of(raw)
            if isinstance(form, Fault):
                return
            found = parse(raw, form)
            if not isinstance(found, list):
                yield found


def reference_of(parsed: ParsedRow) -> str | None:
    """The answer of a row; None where it has no prompt, or an answer that is not trained or holds no text."""
    match parsed:
        case CompletionRow():
            answer = parsed.completion if parsed.prompt else ""
        case ChatRow():
            last = _last_answer(parsed)
            masked = last in parsed.masked
            answer = "" if masked or not last else str(parsed.messages[last].get("content") or "")
        case _:
            return None
    return answer.strip() or None


def questions_of(rows: Sequence[ParsedRow], encoder: Encoder) -> list[Question]:
    """The questions of rows, in the order in which a prompt comes first. Raises DataError for what a template refuses."""
    found: dict[tuple[int, ...], list[tuple[str, str]]] = {}
    for parsed in rows:
        answer = reference_of(parsed)
        if answer is None:
            continue
        if isinstance(parsed, ChatRow):
            prompt = encoder.prompt(parsed.messages[: _last_answer(parsed)], parsed.tools)
        else:
            assert isinstance(parsed, CompletionRow)
            prompt = encoder.prompt_text(parsed.prompt)
        if prompt:
            found.setdefault(tuple(prompt), []).append((parsed.row, answer))
    return [Question(known[0][0], prompt, tuple(a for _, a in known)) for prompt, known in found.items()]


def spread_out(questions: Sequence[Question], most: int) -> tuple[Question, ...]:
    """At most `most` of them, evenly over the file."""
    if len(questions) <= most:
        return tuple(questions)
    return tuple(questions[i * len(questions) // most] for i in range(most))


def _last_answer(parsed: ChatRow) -> int:
    """The place of the last assistant message."""
    return max(i for i, message in enumerate(parsed.messages) if message["role"] == "assistant")
