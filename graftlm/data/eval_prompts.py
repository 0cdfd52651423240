"""Eval prompts: the prompts of eval rows, each with every answer that the rows have for it.

The prompt of a conversation is everything before its last assistant message. Plain texts have no prompt. Rows with the same
prompt are one eval prompt with several references.
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
class EvalPrompt:
    """A prompt as the model reads it, and every answer that the data have for it."""

    row: str
    prompt: tuple[int, ...]
    references: tuple[str, ...]


def parsed_rows(sources: Sequence[Source]) -> Iterator[ParsedRow]:
    """Rows as typed examples, without those that have faults: loading the same sources refuses them."""
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
    """The answer of a row; None if the row has no prompt, or its answer is masked or holds no text."""
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


def collect_eval_prompts(rows: Sequence[ParsedRow], encoder: Encoder) -> list[EvalPrompt]:
    """The eval prompts of rows, in the order of their first row. Raises DataError for what a template refuses."""
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
    return [EvalPrompt(known[0][0], prompt, tuple(a for _, a in known)) for prompt, known in found.items()]


def evenly(prompts: Sequence[EvalPrompt], most: int) -> tuple[EvalPrompt, ...]:
    """At most `most` of them, evenly over the file."""
    if len(prompts) <= most:
        return tuple(prompts)
    return tuple(prompts[i * len(prompts) // most] for i in range(most))


def _last_answer(parsed: ChatRow) -> int:
    """The index of the last assistant message."""
    return max(i for i, message in enumerate(parsed.messages) if message["role"] == "assistant")
