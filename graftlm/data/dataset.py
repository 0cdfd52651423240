"""From sources to examples: token ids, loss mask, and the row's position in its file.

Everything is read and tokenized before training starts, and all faults of all rows are reported at once. An example's digest
covers its token ids and loss mask, so equal rows have equal digests in any file; duplicates, overlaps and the eval split are
found by it. The data set's digest covers all examples in order, and the weights.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from graftlm.base.chat import Encoder, Marked
from graftlm.data.columns import Fault, Format, RawRow, format_of, refuse
from graftlm.data.lines import Moved
from graftlm.data.rows import ChatRow, CompletionRow, Kind, ParsedRow, parse
from graftlm.data.sources import Source, read, size_of
from graftlm.data.unused import Unused
from graftlm.errors import ConfigError, DataError
from graftlm.progress import working

Overlong = Literal["error", "drop", "truncate"]
_BATCH = 1024  # rows tokenized at a time, enough for the tokenizer's threads
_BATCH_CHARACTERS = 1_000_000  # and at most so many characters, so that progress moves in long rows


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One row after template and tokenizer."""

    ids: NDArray[np.int32]  # (tokens,)
    loss_mask: NDArray[np.bool_]  # (tokens,): whether each token is a target
    row: str  # "train.jsonl:17"
    digest: str  # of ids and loss mask, 32 hexadecimal digits

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def target_tokens(self) -> int:
        return int(np.count_nonzero(self.loss_mask))


@dataclass(frozen=True, eq=False)
class DatasetPart:
    """The examples of one source; an epoch has each of them `weight` times."""

    name: str
    weight: float
    examples: tuple[Example, ...]


@dataclass(frozen=True, eq=False)
class Dataset:
    """The examples of all sources, and what was left out."""

    parts: tuple[DatasetPart, ...]
    kinds: Mapping[Kind, int]  # rows of each kind, as read
    dropped: int = 0  # rows left out because they were too long
    truncated: int = 0  # rows shortened
    notes: tuple[str, ...] = ()  # parts of rows that are not used

    @property
    def examples(self) -> tuple[Example, ...]:
        """All examples, source after source."""
        return tuple(example for part in self.parts for example in part.examples)

    @cached_property
    def rows(self) -> int:
        return sum(len(part.examples) for part in self.parts)

    @cached_property
    def tokens(self) -> int:
        return sum(example.tokens for part in self.parts for example in part.examples)

    @cached_property
    def target_tokens(self) -> int:
        return sum(example.target_tokens for part in self.parts for example in part.examples)

    @cached_property
    def longest(self) -> int:
        """Tokens in the longest example."""
        return max((example.tokens for part in self.parts for example in part.examples), default=0)

    @cached_property
    def digest(self) -> str:
        """Identifies the data by content: every example in order, and every source's weight; not the sources' names."""
        total = hashlib.blake2b(digest_size=16)
        for part in self.parts:
            total.update(f"part {part.weight!r} {len(part.examples)}\n".encode())
            for example in part.examples:
                total.update(bytes.fromhex(example.digest))
        return total.hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class ReadResult:
    """The examples and faults of all sources, for `load` and `graft check`."""

    parts: tuple[DatasetPart, ...]
    kinds: Mapping[Kind, int]
    faults: tuple[Fault, ...]
    notes: tuple[str, ...] = ()
    """Parts of rows that are not used."""


def load(
    sources: Sequence[Source],
    encoder: Encoder,
    *,
    max_tokens: int | None = None,
    overlong: Overlong = "error",
) -> Dataset:
    """Read and tokenize every row of every source.

    `max_tokens`: most tokens in an example; `overlong` says what happens to longer ones. An example without a target token
    after truncation is dropped. Raises DataError with up to 20 bad rows, or if no row is left.
    """
    if max_tokens is not None and max_tokens < 2:
        raise ConfigError(f"max_tokens is {max_tokens}; an example needs at least 2 tokens, one to predict the other")
    reading = read_examples(sources, encoder)
    faults = list(reading.faults)
    parts: list[DatasetPart] = []
    dropped = truncated = 0
    for part in reading.parts:
        kept: list[Example] = []
        for example in part.examples:
            if max_tokens is None or example.tokens <= max_tokens:
                kept.append(example)
            elif overlong == "error":
                faults.append(_overlong(example, max_tokens))
            elif overlong == "truncate" and example.loss_mask[:max_tokens].any():
                kept.append(make_example(example.row, example.ids[:max_tokens], example.loss_mask[:max_tokens]))
                truncated += 1
            else:
                dropped += 1
        parts.append(replace(part, examples=tuple(kept)))
    if faults:
        raise refuse(faults)
    dataset = Dataset(tuple(parts), reading.kinds, dropped, truncated, reading.notes)
    if dataset.rows == 0:
        raise DataError(
            f"no row is left: all {dropped} have more than {max_tokens} tokens (or no target token within them). "
            "Raise --max-length"
        )
    return dataset


def read_examples(sources: Sequence[Source], encoder: Encoder) -> ReadResult:
    """Read and tokenize every row; bad rows are returned. Raises DataError for a source that cannot be read at all."""
    if not sources:
        raise DataError("no data was given. Give at least one file with --data")
    faults: list[Fault] = []
    unused = Unused()
    kinds: Counter[Kind] = Counter()
    sizes = [size_of(source) for source in sources]
    with working("reading data", sum(sizes) or None, "bytes" if any(sizes) else "") as task:
        parsed_rows: list[list[ParsedRow]] = []
        for i, source in enumerate(sources):
            moved = functools.partial(lambda before, done: task.to(before + done), sum(sizes[:i]))
            parsed_rows.append(list(_parsed_rows(source, faults, unused, moved)))
    parts: list[DatasetPart] = []
    with working("tokenizing", sum(map(len, parsed_rows)), "rows") as task:
        for source, rows in zip(sources, parsed_rows, strict=True):
            examples: list[Example] = []
            for batch in _batches(rows):
                kinds.update(parsed.kind for parsed in batch)
                examples += _encode(batch, encoder, faults, unused)
                task.to(task.done + len(batch))
            parts.append(DatasetPart(source.path, source.weight, tuple(examples)))
    order = {source.path: index for index, source in enumerate(sources)}
    faults.sort(key=lambda fault: _place(fault.row, order))
    return ReadResult(tuple(parts), dict(kinds), tuple(faults), unused.notes)


def split(dataset: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Split off about `fraction` of the examples as the eval set, by their digests.

    An example's side depends on its content alone: it does not change when rows are added or moved, and equal rows are on the
    same side. Raises ConfigError for an invalid fraction, DataError if one side would be empty.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"the eval share is {fraction:g}; expected a number between 0 and 1, such as 0.05 (5%)")

    def in_eval(example: Example) -> bool:
        # The digest as a number in [0, 1), hashed again so that this split is independent of other uses of the digest.
        rehashed = hashlib.blake2b(bytes.fromhex(example.digest), digest_size=8, person=b"validation").digest()
        return int.from_bytes(rehashed, "big") < fraction * 2**64

    sides = [[in_eval(example) for example in part.examples] for part in dataset.parts]

    def side(wanted: bool) -> Dataset:
        parts = tuple(
            replace(part, examples=tuple(d for d, out in zip(part.examples, outs, strict=True) if out is wanted))
            for part, outs in zip(dataset.parts, sides, strict=True)
        )
        return replace(dataset, parts=parts, **({"dropped": 0, "truncated": 0} if wanted else {}))

    train, valid = side(False), side(True)
    if not train.rows or not valid.rows:
        empty = "training" if not train.rows else "validation"
        raise DataError(
            f"an eval share of {fraction:.3g} leaves no row for {empty} ({dataset.rows} rows, sides chosen by "
            "content). Choose another share, or give eval rows as a file with --eval-data"
        )
    return train, valid


def make_example(row: str, ids: NDArray[np.int32], loss_mask: NDArray[np.bool_]) -> Example:
    """An example with its digest."""
    content = hashlib.blake2b(np.ascontiguousarray(ids, dtype="<i4").tobytes(), digest_size=16)
    content.update(np.packbits(loss_mask).tobytes())
    return Example(ids, loss_mask, row, content.hexdigest())


def _batches(rows: Sequence[ParsedRow]) -> Iterator[Sequence[ParsedRow]]:
    """Rows in order, in batches for the tokenizer."""
    begin = characters = 0
    for place, row in enumerate(rows):
        length = _characters(row)
        if place - begin == _BATCH or (place > begin and characters + length > _BATCH_CHARACTERS):
            yield rows[begin:place]
            begin, characters = place, 0
        characters += length
    if begin < len(rows):
        yield rows[begin:]


def _characters(parsed: ParsedRow) -> int:
    match parsed:
        case ChatRow():
            return sum(len(str(message.get("content"))) for message in parsed.messages)
        case CompletionRow():
            return len(parsed.prompt) + len(parsed.completion)
        case _:
            return len(parsed.text)


def _parsed_rows(source: Source, faults: list[Fault], unused: Unused, moved: Moved) -> Iterator[ParsedRow]:
    form: Format | None = None
    for raw in read(source, moved):
        if isinstance(raw, Fault):
            faults.append(raw)
            continue
        found = _parse_row(raw, form)
        if isinstance(found, list):
            faults.extend(found)
            continue
        form, parsed = found
        unused.columns(source.path, raw, form)
        yield parsed


def _parse_row(raw: RawRow, form: Format | None) -> tuple[Format, ParsedRow] | list[Fault]:
    if form is None:
        own = format_of(raw)
        if isinstance(own, Fault):
            return [own]
        form = own
    parsed = parse(raw, form)
    return parsed if isinstance(parsed, list) else (form, parsed)


def _encode(batch: Sequence[ParsedRow], encoder: Encoder, faults: list[Fault], unused: Unused) -> list[Example]:
    marked: list[Marked] = []
    rows: list[ParsedRow] = []
    for parsed in batch:
        try:
            marked.append(_mark(parsed, encoder))
            rows.append(parsed)
            if isinstance(parsed, ChatRow):
                unused.keys(parsed, encoder)
        except DataError as error:
            faults.append(Fault(parsed.row, "messages", str(error), "", ""))
    examples: list[Example] = []
    for parsed, encoded in zip(rows, encoder.encode(marked), strict=True):
        if encoded.loss_mask.any():
            examples.append(make_example(parsed.row, encoded.ids, encoded.loss_mask))
        else:
            mend = "add an answer, or remove the row"
            faults.append(Fault(parsed.row, "row", "no target token", "at least one", mend))
    return examples


def _mark(parsed: ParsedRow, encoder: Encoder) -> Marked:
    match parsed:
        case ChatRow():
            return encoder.mark_chat(parsed.messages, parsed.tools, masked=parsed.masked, prompt=parsed.prompt)
        case CompletionRow():
            return encoder.mark_completion(parsed.prompt, parsed.completion)
        case _:
            return encoder.mark_text(parsed.text)


def _overlong(example: Example, max_tokens: int) -> Fault:
    mend = "raise --max-length, or choose --overlong drop or truncate"
    return Fault(example.row, "length", f"{example.tokens} tokens", f"at most {max_tokens}", mend)


def _place(row: str, order: Mapping[str, int]) -> tuple[int, int]:
    name, _, number = row.removesuffix("]").rpartition("[" if row.endswith("]") else ":")
    return order.get(name, len(order)), int(number) if number.isascii() and number.isdigit() else 0
