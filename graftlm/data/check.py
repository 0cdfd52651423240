"""`graft check`: the examples that training would read.

Every row is read and tokenized as in training. The result is a `DataReport`: the numbers of rows, tokens and target tokens, the
lengths of examples, the rows that are bad or too long, duplicates, rows in both training and eval data, and two rows with their
target tokens in colour. It renders as JSON or in a terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from graftlm import terminal
from graftlm.base.chat import Encoder
from graftlm.data.columns import SHOWN, Fault
from graftlm.data.dataset import Example, Overlong, read_examples
from graftlm.data.sources import Source

_PREVIEW_TOKENS = 400  # most tokens shown of an example


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthBin:
    """Examples of `low` up to `high` tokens, both included."""

    low: int
    high: int
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPiece:
    """A piece of an example's text, in the loss or not."""

    text: str
    in_loss: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamplePreview:
    """An example as pieces of text; `tokens` counts all of it, even if the text is cut."""

    row: str
    tokens: int
    target_tokens: int
    pieces: tuple[TextPiece, ...]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class DataReport:
    """The result of `graft check`."""

    rows: int
    tokens: int
    target_tokens: int
    kinds: dict[str, int]
    shortest: int
    median: int
    longest: int
    histogram: tuple[LengthBin, ...]
    max_tokens: int | None
    overlong: int
    when_overlong: Overlong
    overlong_rows: tuple[str, ...]  # the first 20
    duplicates: int  # rows beyond the first of their kind
    duplicate_rows: tuple[tuple[str, ...], ...]  # the first 20 groups, at most 4 rows of each
    eval_rows: int
    overlap: int  # eval rows that are also training rows
    overlap_rows: tuple[tuple[str, str], ...]  # (eval row, training row), the first 20
    faults: int
    fault_rows: tuple[str, ...]  # the first 20
    previews: tuple[ExamplePreview, ...]
    template: str  # "of the model" or "plain"
    template_digest: str
    date: str
    notes: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Whether training would start: no bad row, and no row too long unless such rows are dropped or truncated."""
        return self.faults == 0 and (self.overlong == 0 or self.when_overlong != "error")

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {**_plain(asdict(self)), "good": self.good}

    def __repr__(self) -> str:
        return terminal.as_text(self.render)

    def _repr_html_(self) -> str:
        return terminal.as_html(self.render)

    def render(self, console: Console) -> None:
        """Write the report to a terminal."""
        facts: list[tuple[str, str]] = []
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.items())
        share = f" ({self.target_tokens / self.tokens:.0%})" if self.tokens else ""
        facts.append(("rows", f"{self.rows:,} ({kinds})" if kinds else f"{self.rows:,}"))
        facts.append(("tokens", f"{self.tokens:,}"))
        facts.append(("target tokens", f"{self.target_tokens:,}{share}"))
        facts.append(("length", f"{self.shortest:,} to {self.longest:,} tokens, median {self.median:,}"))
        facts.append(("template", f"{self.template}, date {self.date}" if "chat" in self.kinds else "not used"))
        if self.max_tokens is not None:
            facts.append(("too long", f"{self.overlong:,} of more than {self.max_tokens:,} tokens"))
        facts.append(("duplicates", f"{self.duplicates:,}"))
        if self.eval_rows:
            facts.append(("validation", f"{self.eval_rows:,} rows, {self.overlap:,} of them also in the training data"))
        facts.append(("bad rows", f"{self.faults:,}"))
        terminal.facts(console, facts)
        self._render_histogram(console)
        for note in self.notes:
            console.print(f"note: {note}", style="yellow", markup=False)
        self._render_list(console, "too long", self.overlong, self.overlong_rows)
        self._render_list(console, "duplicates", len(self.duplicate_rows), [" = ".join(g) for g in self.duplicate_rows])
        self._render_list(console, "overlap", self.overlap, [" = ".join(pair) for pair in self.overlap_rows])
        self._render_list(console, "bad rows", self.faults, self.fault_rows)
        for shown in self.previews:
            how, before, after = ("in green", "", "") if console.color_system else ("between {+ and +}", "{+", "+}")
            title = f"{shown.row}: {shown.tokens:,} tokens, {shown.target_tokens:,} target tokens ({how})"
            console.print(Text(f"\n{title}", style="bold"), soft_wrap=True)
            text = Text()
            for piece in shown.pieces:
                marked = f"{before}{piece.text}{after}" if piece.in_loss else piece.text
                text.append(marked, style="green" if piece.in_loss else "dim")
            console.print(text)

    def _render_histogram(self, console: Console) -> None:
        if not self.histogram:
            return
        most = max(step.rows for step in self.histogram)
        columns = [terminal.Column("tokens", right=True), terminal.Column("rows", right=True), terminal.Column()]
        console.print()
        terminal.table(
            console, columns,
            [(f"{s.low:,}-{s.high:,}", f"{s.rows:,}", "█" * round(40 * s.rows / most)) for s in self.histogram],
        )  # fmt: skip

    def _render_list(self, console: Console, title: str, count: int, rows: Sequence[str]) -> None:
        if not rows:
            return
        console.print(f"\n[bold]{title}[/bold]")
        for row in rows:
            console.print(f"  {row}", markup=False, highlight=False, soft_wrap=True)
        if count > len(rows):
            console.print(f"  and {count - len(rows)} more")


def check(
    sources: Sequence[Source],
    encoder: Encoder,
    *,
    eval_sources: Sequence[Source] = (),
    max_tokens: int | None = None,
    overlong: Overlong = "error",
) -> DataReport:
    """Read every row as training would, and report. Raises DataError for a source that cannot be read at all."""
    reading = read_examples(sources, encoder)
    faults: list[Fault] = list(reading.faults)
    examples = [example for part in reading.parts for example in part.examples]
    eval_examples: list[Example] = []
    notes = reading.notes
    if eval_sources:
        other = read_examples(eval_sources, encoder)
        faults += other.faults
        notes += other.notes
        eval_examples = [example for part in other.parts for example in part.examples]
    lengths = np.array([example.tokens for example in examples], np.int64)  # (rows,)
    longer = [d for d in (*examples, *eval_examples) if max_tokens is not None and d.tokens > max_tokens]
    groups: dict[str, list[str]] = {}
    for example in examples:
        groups.setdefault(example.digest, []).append(example.row)
    repeated = [rows for rows in groups.values() if len(rows) > 1]
    overlap = [(d.row, groups[d.digest][0]) for d in eval_examples if d.digest in groups]
    return DataReport(
        rows=len(examples),
        tokens=int(lengths.sum()),
        target_tokens=sum(example.target_tokens for example in examples),
        kinds={str(kind): count for kind, count in reading.kinds.items()},
        shortest=int(lengths.min()) if len(lengths) else 0,
        median=int(np.median(lengths)) if len(lengths) else 0,
        longest=int(lengths.max()) if len(lengths) else 0,
        histogram=histogram(lengths),
        max_tokens=max_tokens,
        overlong=len(longer),
        when_overlong=overlong,
        overlong_rows=tuple(f"{d.row} ({d.tokens:,} tokens)" for d in longer[:SHOWN]),
        duplicates=sum(len(rows) - 1 for rows in repeated),
        duplicate_rows=tuple(tuple(rows[:4]) for rows in repeated[:SHOWN]),
        eval_rows=len(eval_examples),
        overlap=len(overlap),
        overlap_rows=tuple(overlap[:SHOWN]),
        faults=len(faults),
        fault_rows=tuple(str(fault) for fault in faults[:SHOWN]),
        previews=tuple(_shown(example, encoder) for example in _two(examples)),
        template="of the model" if encoder.has_own_template else "plain (the model has none)",
        template_digest=encoder.template_digest,
        date=encoder.date,
        notes=tuple(dict.fromkeys((*encoder.notes, *notes))),
    )


def histogram(lengths: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[LengthBin, ...]:
    """Examples by length, in steps that double (1-16, 17-32, 33-64, ...), from the shortest to the longest."""
    if not len(lengths):
        return ()
    bins: list[LengthBin] = []
    low, high = 1, 16
    while low <= lengths.max():
        rows = int(np.count_nonzero((lengths >= low) & (lengths <= high)))
        if rows or bins:
            bins.append(LengthBin(low=low, high=high, rows=rows))
        low, high = high + 1, high * 2
    return tuple(bins)


def _two(examples: Sequence[Example]) -> Sequence[Example]:
    """The first row, and the one of middle length."""
    if len(examples) < 2:
        return examples
    middle = sorted(examples[1:], key=lambda example: example.tokens)[(len(examples) - 1) // 2]
    return (examples[0], middle)


def _shown(example: Example, encoder: Encoder) -> ExamplePreview:
    """Runs of target and other tokens, each decoded together so that characters of several tokens are complete."""
    loss_mask = example.loss_mask[:_PREVIEW_TOKENS]  # (shown,)
    borders = [0, *(int(at) + 1 for at in np.flatnonzero(loss_mask[1:] != loss_mask[:-1])), len(loss_mask)]
    pieces: list[TextPiece] = []
    for start, end in pairwise(borders):
        ids: list[int] = example.ids[start:end].tolist()
        text = str(encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        pieces.append(TextPiece(text=text, in_loss=bool(loss_mask[start])))
    if example.tokens > _PREVIEW_TOKENS:
        pieces.append(TextPiece(text=f" ... ({example.tokens - _PREVIEW_TOKENS:,} more tokens)", in_loss=False))
    return ExamplePreview(
        row=example.row,
        tokens=example.tokens,
        target_tokens=example.target_tokens,
        pieces=tuple(pieces),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
