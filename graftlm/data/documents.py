"""From sources to documents: token ids, which of them are trained, and where the row stands.

Everything is read and tokenized before anything is trained, and all faults of all rows are reported at once. A
document's digest is taken over what the model sees of it (its tokens and which are trained), so equal rows have equal
digests wherever they stand; duplicates, overlaps and the validation split are found by it. The data set's digest names
all of it in its order, weights included.
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
from graftlm.data.columns import Fault, Format, Raw, format_of, refuse
from graftlm.data.lines import Moved
from graftlm.data.rows import Chat, Completion, Example, Kind, parse
from graftlm.data.sources import Source, read, size_of
from graftlm.data.unused import Unused
from graftlm.errors import ConfigError, DataError
from graftlm.progress import working

TooLong = Literal["error", "drop", "cut"]
_BATCH = 1024  # rows tokenized at a time: enough to keep the tokenizer's threads busy
_BATCH_CHARACTERS = 1_000_000  # and at most so many characters, or progress would stand still in long rows


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """One row as the model reads it."""

    ids: NDArray[np.int32]  # (tokens,)
    trained: NDArray[np.bool_]  # (tokens,): which tokens are targets of the loss
    row: str  # "train.jsonl:17"
    digest: str  # of ids and trained, 32 hexadecimal digits

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        return int(np.count_nonzero(self.trained))


@dataclass(frozen=True, eq=False)
class Part:
    """The documents of one source; an epoch sees each of them `weight` times."""

    name: str
    weight: float
    documents: tuple[Document, ...]


@dataclass(frozen=True, eq=False)
class Dataset:
    """The documents of all sources, with what was left out."""

    parts: tuple[Part, ...]
    kinds: Mapping[Kind, int]  # rows of each kind, as read
    dropped: int = 0  # rows left out because they were too long
    cut: int = 0  # rows shortened
    notes: tuple[str, ...] = ()  # what of the rows is not used

    @property
    def documents(self) -> tuple[Document, ...]:
        """All documents, source after source."""
        return tuple(document for part in self.parts for document in part.documents)

    @cached_property
    def rows(self) -> int:
        return sum(len(part.documents) for part in self.parts)

    @cached_property
    def tokens(self) -> int:
        return sum(document.tokens for part in self.parts for document in part.documents)

    @cached_property
    def trained_tokens(self) -> int:
        return sum(document.trained_tokens for part in self.parts for document in part.documents)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max((document.tokens for part in self.parts for document in part.documents), default=0)

    @cached_property
    def digest(self) -> str:
        """Names the data by content: every document in order, and every source's weight; not the sources' names."""
        total = hashlib.blake2b(digest_size=16)
        for part in self.parts:
            total.update(f"part {part.weight!r} {len(part.documents)}\n".encode())
            for document in part.documents:
                total.update(bytes.fromhex(document.digest))
        return total.hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """Everything that reading the sources gave, good and bad: what `load` trains on and `graft check` reports."""

    parts: tuple[Part, ...]
    kinds: Mapping[Kind, int]
    faults: tuple[Fault, ...]
    notes: tuple[str, ...] = ()
    """What of the rows is not used."""


def load(
    sources: Sequence[Source],
    encoder: Encoder,
    *,
    max_tokens: int | None = None,
    too_long: TooLong = "error",
) -> Dataset:
    """Read and tokenize every row of every source.

    `max_tokens`: most tokens of a document; what happens to a longer one is `too_long`. A document that has no trained
    token left after cutting is dropped. Raises DataError with up to 20 bad rows, or where no row is left.
    """
    if max_tokens is not None and max_tokens < 2:
        raise ConfigError(f"max_tokens is {max_tokens}; a document needs at least 2 tokens, one to predict the other")
    reading = read_all(sources, encoder)
    faults = list(reading.faults)
    parts: list[Part] = []
    dropped = cut = 0
    for part in reading.parts:
        kept: list[Document] = []
        for document in part.documents:
            if max_tokens is None or document.tokens <= max_tokens:
                kept.append(document)
            elif too_long == "error":
                faults.append(_too_long(document, max_tokens))
            elif too_long == "cut" and document.trained[:max_tokens].any():
                kept.append(make_document(document.row, document.ids[:max_tokens], document.trained[:max_tokens]))
                cut += 1
            else:
                dropped += 1
        parts.append(replace(part, documents=tuple(kept)))
    if faults:
        raise refuse(faults)
    dataset = Dataset(tuple(parts), reading.kinds, dropped, cut, reading.notes)
    if dataset.rows == 0:
        raise DataError(
            f"no row is left: all {dropped} have more than {max_tokens} tokens (or no trained token within them). "
            "Raise --max-tokens-per-document"
        )
    return dataset


def read_all(sources: Sequence[Source], encoder: Encoder) -> Reading:
    """Read and tokenize every row; bad rows are returned. Raises DataError for a source that cannot be read at all."""
    if not sources:
        raise DataError("no data was given. Give at least one file with --data")
    faults: list[Fault] = []
    unused = Unused()
    kinds: Counter[Kind] = Counter()
    sizes = [size_of(source) for source in sources]
    with working("reading data", sum(sizes) or None, "bytes" if any(sizes) else "") as task:
        examples: list[list[Example]] = []
        for i, source in enumerate(sources):
            moved = functools.partial(lambda before, done: task.to(before + done), sum(sizes[:i]))
            examples.append(list(_examples(source, faults, unused, moved)))
    parts: list[Part] = []
    with working("tokenizing", sum(map(len, examples)), "rows") as task:
        for source, rows in zip(sources, examples, strict=True):
            documents: list[Document] = []
            for batch in _batches(rows):
                kinds.update(example.kind for example in batch)
                documents += _encode(batch, encoder, faults, unused)
                task.to(task.done + len(batch))
            parts.append(Part(source.path, source.weight, tuple(documents)))
    order = {source.path: index for index, source in enumerate(sources)}
    faults.sort(key=lambda fault: _place(fault.row, order))
    return Reading(tuple(parts), dict(kinds), tuple(faults), unused.notes)


def split(dataset: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Part off about `fraction` of the documents for validation, by their digests.

    A document's side depends on its content alone: it stays when rows are added or moved, and equal rows stay together.
    Raises ConfigError for a fraction that is none, DataError where one side would be empty.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"the validation share is {fraction:g}; expected a number between 0 and 1, such as 0.05 (5%)")

    def held_out(document: Document) -> bool:
        # The digest read as a number in [0, 1). Rehashed, so that the sides of other uses of the digest do not align.
        rehashed = hashlib.blake2b(bytes.fromhex(document.digest), digest_size=8, person=b"validation").digest()
        return int.from_bytes(rehashed, "big") < fraction * 2**64

    sides = [[held_out(document) for document in part.documents] for part in dataset.parts]

    def side(wanted: bool) -> Dataset:
        parts = tuple(
            replace(part, documents=tuple(d for d, out in zip(part.documents, outs, strict=True) if out is wanted))
            for part, outs in zip(dataset.parts, sides, strict=True)
        )
        return replace(dataset, parts=parts, **({"dropped": 0, "cut": 0} if wanted else {}))

    train, valid = side(False), side(True)
    if not train.rows or not valid.rows:
        empty = "training" if not train.rows else "validation"
        raise DataError(
            f"a validation share of {fraction:.3g} leaves no row for {empty} ({dataset.rows} rows, sides chosen by "
            "content). Choose another share, or give validation rows as a file of their own with --eval-data"
        )
    return train, valid


def make_document(row: str, ids: NDArray[np.int32], trained: NDArray[np.bool_]) -> Document:
    """A document with its digest."""
    content = hashlib.blake2b(np.ascontiguousarray(ids, dtype="<i4").tobytes(), digest_size=16)
    content.update(np.packbits(trained).tobytes())
    return Document(ids, trained, row, content.hexdigest())


def _batches(rows: Sequence[Example]) -> Iterator[Sequence[Example]]:
    """Rows in order, as many as are tokenized at a time."""
    begin = characters = 0
    for place, row in enumerate(rows):
        length = _characters(row)
        if place - begin == _BATCH or (place > begin and characters + length > _BATCH_CHARACTERS):
            yield rows[begin:place]
            begin, characters = place, 0
        characters += length
    if begin < len(rows):
        yield rows[begin:]


def _characters(example: Example) -> int:
    match example:
        case Chat():
            return sum(len(str(message.get("content"))) for message in example.messages)
        case Completion():
            return len(example.prompt) + len(example.completion)
        case _:
            return len(example.text)


def _examples(source: Source, faults: list[Fault], unused: Unused, moved: Moved) -> Iterator[Example]:
    form: Format | None = None
    for raw in read(source, moved):
        if isinstance(raw, Fault):
            faults.append(raw)
            continue
        found = _example(raw, form)
        if isinstance(found, list):
            faults.extend(found)
            continue
        form, example = found
        unused.columns(source.path, raw, form)
        yield example


def _example(raw: Raw, form: Format | None) -> tuple[Format, Example] | list[Fault]:
    if form is None:
        own = format_of(raw)
        if isinstance(own, Fault):
            return [own]
        form = own
    example = parse(raw, form)
    return example if isinstance(example, list) else (form, example)


def _encode(batch: Sequence[Example], encoder: Encoder, faults: list[Fault], unused: Unused) -> list[Document]:
    marked: list[Marked] = []
    rows: list[Example] = []
    for example in batch:
        try:
            marked.append(_mark(example, encoder))
            rows.append(example)
            if isinstance(example, Chat):
                unused.keys(example, encoder)
        except DataError as error:
            faults.append(Fault(example.row, "messages", str(error), "", ""))
    documents: list[Document] = []
    for example, encoded in zip(rows, encoder.encode(marked), strict=True):
        if encoded.trained.any():
            documents.append(make_document(example.row, encoded.ids, encoded.trained))
        else:
            mend = "add an answer, or remove the row"
            faults.append(Fault(example.row, "row", "no trained token", "at least one", mend))
    return documents


def _mark(example: Example, encoder: Encoder) -> Marked:
    match example:
        case Chat():
            return encoder.mark_chat(example.messages, example.tools, masked=example.masked)
        case Completion():
            return encoder.mark_completion(example.prompt, example.completion)
        case _:
            return encoder.mark_text(example.text)


def _too_long(document: Document, max_tokens: int) -> Fault:
    mend = "raise --max-tokens-per-document, or choose --too-long drop or cut"
    return Fault(document.row, "length", f"{document.tokens} tokens", f"at most {max_tokens}", mend)


def _place(row: str, order: Mapping[str, int]) -> tuple[int, int]:
    name, _, number = row.rpartition(":")
    return order.get(name, len(order)), int(number) if number.isascii() and number.isdigit() else 0
