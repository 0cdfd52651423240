"""From messages to token ids and their loss mask. Training, generation and serving all encode here.

A row becomes a text with the character ranges of its target tokens: what the model is to generate (`template.py` finds it for
chats; of a prompt with its completion it is the completion, of plain text everything), or the whole text. The whole text is
tokenized, and the ranges are mapped to tokens by the fast tokenizer's offsets, not by searching for token ids: an end token
that is also the padding token is still a target.

In generation the model gets the prompt alone, so the prompt must have the same tokens in training. If a token spans the border
between prompt and answer, the two sides are tokenized separately.

`loss_mask[t]` says that token t is a target of the loss. Token 0 never is, since no token before it predicts it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from graftlm.base.jinja import PLAIN_TEMPLATE
from graftlm.base.template import Marked, Span, Template
from graftlm.base.template_render import Message, Tools
from graftlm.config.fields import TrainOn
from graftlm.errors import ConfigError, DataError, ModelError

__all__ = ["DATE", "PLAIN_TEMPLATE", "Encoded", "Encoder", "Marked", "Message", "TrainOn"]

DATE = "2026-01-01"
"""The default date for chat templates."""


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One example: token ids and loss mask."""

    ids: NDArray[np.int32]  # (tokens,)
    loss_mask: NDArray[np.bool_]  # (tokens,)


class Encoder:
    """Encodes chats, prompts with completions, and texts for one tokenizer.

    `train_on`: train on every assistant message and completion, only the last assistant message, or everything, prompts
    too. The ids of a row do not depend on it. `date`: the ISO date for chat templates.
    Raises ModelError for a tokenizer without offsets or without an end token, ConfigError for an invalid date.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, train_on: TrainOn = "all-assistant", date: str | None = None
    ) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer {type(tokenizer).__name__} gives no character offsets (it is a slow tokenizer), so the "
                "tokens of an answer cannot be found. Use a model with a tokenizer.json, or convert it: "
                "AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...)"
            )
        known = get_args(TrainOn)
        if train_on not in known:
            raise ConfigError(f"train_on is '{train_on}'; expected {', '.join(known[:-1])} or {known[-1]}")
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer names no end token (eos_token), so a model could not learn to stop. "
                "Set eos_token in the model's tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.train_on: TrainOn = train_on
        self.date = date or DATE
        try:
            np.datetime64(self.date, "D")
        except ValueError:
            raise ConfigError(f"date is '{self.date}'; expected year-month-day, such as {DATE}") from None
        self._backend: Any = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        self._eos_id = int(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]
        self._lead = self._leading_ids()
        self.has_own_template = bool(tokenizer.chat_template)
        self._template = self._make(self._source(tools=False))
        self._tool_template = self._template
        if isinstance(tokenizer.chat_template, dict) and "tool_use" in tokenizer.chat_template:
            self._tool_template = self._make(self._source(tools=True))

    @property
    def template(self) -> str:
        """The chat template in use: the tokenizer's, or the plain one if it has none."""
        return self._template.source

    @property
    def template_digest(self) -> str:
        """Identifies the template by content; with the date, it determines how messages become text."""
        both = [self._template.source, self._tool_template.source]
        return hashlib.blake2b("\0".join(dict.fromkeys(both)).encode(), digest_size=16).hexdigest()

    @property
    def tokenizer_digest(self) -> str:
        """Identifies the tokenizer by content, 32 hexadecimal digits."""
        self._tokenize([])  # without the truncation and padding that a tokenizer.json may carry
        return hashlib.blake2b(self._backend.to_str().encode(), digest_size=16).hexdigest()

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about the template, so far."""
        return tuple(dict.fromkeys((*self._template.notes, *self._tool_template.notes)))

    @property
    def stop_ids(self) -> frozenset[int]:
        """The stop tokens: the end token, and the tokens with which the template ends a last turn."""
        stops = {self._eos_id}
        for template in (self._template, self._tool_template):
            for text in template.stop_strings():
                stops.update(self._backend.encode(text, add_special_tokens=False).ids[:1])
        return frozenset(stops)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The stop tokens as the text that they have in a rendered conversation."""
        return tuple(self.tokenizer.convert_ids_to_tokens(sorted(self.stop_ids)))

    def attempt(self, messages: Sequence[Message], tools: Tools | None = None, *, prompt: bool = False) -> str | None:
        """The text of a conversation, with the generation prompt or without; None where the template refuses it."""
        return self._template_for(tools).renderer.attempt(messages, tools, prompt=prompt)

    # ------------------------------------------------------------------------------------------------ one row

    def chat(self, messages: Sequence[Message], tools: Tools | None = None) -> Encoded:
        """Encode a conversation; targets are what `train_on` says, with end tokens. Raises DataError."""
        return self.encode([self.mark_chat(messages, tools)])[0]

    def completion(self, prompt: str, completion: str) -> Encoded:
        """Encode a prompt and its completion; targets are the completion and the end token, or everything."""
        return self.encode([self.mark_completion(prompt, completion)])[0]

    def text(self, text: str) -> Encoded:
        """Encode a text; every token is a target, the end token included."""
        return self.encode([self.mark_text(text)])[0]

    def prompt(self, messages: Sequence[Message], tools: Tools | None = None) -> list[int]:
        """The tokens of a conversation with the generation prompt. Raises DataError."""
        text = self._template_for(tools).render(messages, tools, prompt=True)
        return list(self._tokenize([text])[0].ids)

    def prompt_text(self, prompt: str) -> list[int]:
        """The tokens of a plain prompt, the same as in `completion`."""
        ids = list(self._tokenize([prompt])[0].ids)
        return [*self._missing_lead(ids), *ids]

    # ------------------------------------------------------------------------------------------------ many rows

    def same_text(self, messages: Sequence[Message], others: Sequence[Message], tools: Tools | None = None) -> bool:
        """Whether two conversations render to the same text. Raises DataError."""
        template = self._template_for(tools)
        return template.render(messages, tools) == template.render(others, tools)

    def mark_chat(
        self, messages: Sequence[Message], tools: Tools | None = None, *, masked: Collection[int] = (), prompt: int = 0
    ) -> Marked:
        """The text of a conversation and its target ranges, without messages whose index is in `masked`.

        The first `prompt` messages are targets only where everything is. Raises DataError.
        """
        if not messages:
            raise DataError("a conversation needs at least one message")
        if self.train_on != "everything":
            masked = {*masked, *range(prompt)}
        return self._template_for(tools).mark(messages, tools, masked=masked, train_on=self.train_on)

    def mark_completion(self, prompt: str, completion: str) -> Marked:
        """A prompt and its completion as one text; the target range is the completion, or the prompt too for `everything`."""
        text = prompt + completion
        spans: list[Span] = [(len(prompt), len(text))]
        if self.train_on == "everything" and prompt:  # a range of its own, so that no token reaches over the border
            spans.insert(0, (0, len(prompt)))
        return Marked(text, tuple(spans), bos=True, eos=True)

    def mark_text(self, text: str) -> Marked:
        """A text; the target range is all of it."""
        return Marked(text, ((0, len(text)),), bos=True, eos=True)

    def encode(self, rows: Sequence[Marked]) -> list[Encoded]:
        """Tokenize texts with their ranges, a batch at a time (the tokenizer uses its own threads)."""
        return [self._encode(row, encoding) for row, encoding in zip(rows, self._tokenize([r.text for r in rows]))]

    # ------------------------------------------------------------------------------------------------ tokens

    def _encode(self, row: Marked, whole: Encoding) -> Encoded:
        borders = [start for start, _ in row.spans if 0 < start < len(row.text) and _reaches_over(whole, start)]
        pieces = [whole] if not borders else self._apart(row.text, borders)
        offsets = [0, *borders]  # where each piece begins in the text
        ids: list[int] = [token for piece in pieces for token in piece.ids]
        loss_mask = np.zeros(len(ids), np.bool_)  # (tokens,)
        for start, end in row.spans:
            loss_mask[_token_at(pieces, offsets, start) : _token_after(pieces, offsets, end)] = True
        if row.eos and (not ids or ids[-1] != self._eos_id):
            ids.append(self._eos_id)
            loss_mask = np.append(loss_mask, True)
        lead = self._missing_lead(ids) if row.bos else []
        if lead:
            ids = [*lead, *ids]
            loss_mask = np.concatenate((np.zeros(len(lead), np.bool_), loss_mask))
        loss_mask[:1] = False
        return Encoded(np.array(ids, np.int32), loss_mask)

    def _apart(self, text: str, borders: Sequence[int]) -> list[Encoding]:
        cuts = [0, *borders, len(text)]
        return self._tokenize([text[start:end] for start, end in pairwise(cuts)])

    def _tokenize(self, texts: Sequence[str]) -> list[Encoding]:
        # A tokenizer.json may turn on truncation or padding; examples need neither.
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if self._backend.padding is not None:
            self._backend.no_padding()
        return self._backend.encode_batch(list(texts), add_special_tokens=False)

    def _leading_ids(self) -> list[int]:
        """The tokens that the tokenizer adds before any text."""
        plain = self._backend.encode("a", add_special_tokens=False).ids
        full = self._backend.encode("a", add_special_tokens=True).ids
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return list(full[:start])
        return []

    def _missing_lead(self, ids: Sequence[int]) -> list[int]:
        return [] if list(ids[: len(self._lead)]) == self._lead else self._lead

    # ------------------------------------------------------------------------------------------------ templates

    def _source(self, *, tools: bool) -> str:
        if not self.has_own_template:
            return ("{{- bos_token }}" if self._lead == [self.tokenizer.bos_token_id] else "") + PLAIN_TEMPLATE
        try:
            return self.tokenizer.get_chat_template(tools=[] if tools else None)
        except ValueError as error:
            raise ModelError(f"the tokenizer's chat templates: {error}") from error

    def _make(self, source: str) -> Template:
        tokens = {key: str(value) for key, value in self.tokenizer.special_tokens_map.items()}
        backend = self._backend.get_added_tokens_decoder().values()
        specials = [*(str(token.content) for token in backend), *self.tokenizer.all_special_tokens]
        return Template(source, tokens, specials, self.date)

    def _template_for(self, tools: Tools | None) -> Template:
        return self._tool_template if tools else self._template


# The next four use the tokenizer's offsets. Leading white space of a token may be missing from its offsets (`trim_offsets`),
# so a token is taken to begin where the one before it ends.


def _first_at(encoding: Encoding, position: int, length: int) -> int | None:
    """The first token that contains the character at `position`, or else the next character that any token contains."""
    for at in range(position, length):
        token = encoding.char_to_token(at)
        if token is not None:
            return token
    return None


def _reach(encoding: Encoding) -> int:
    """The end of the last token's characters."""
    count = len(encoding)
    span: Span | None = encoding.token_to_chars(count - 1) if count else None
    return span[1] if span else 0


def _reaches_over(encoding: Encoding, border: int) -> bool:
    """Whether a token has characters on both sides of `border`."""
    token = _first_at(encoding, border, _reach(encoding))
    if token is None:
        return False
    start, _ = encoding.token_to_chars(token) or (0, 0)
    while token > 0:
        before = encoding.token_to_chars(token - 1)
        if before is None:
            break
        if before[0] == start:  # several tokens of one character
            token -= 1
            continue
        start = min(start, before[1])
        break
    else:
        start = 0
    return start < border


def _locate(offsets: Sequence[int], position: int) -> int:
    """The piece that contains `position`."""
    piece = len(offsets) - 1
    while offsets[piece] > position:
        piece -= 1
    return piece


def _token_at(pieces: Sequence[Encoding], offsets: Sequence[int], start: int) -> int:
    """The first token of a range that begins at `start`."""
    piece = _locate(offsets, start)
    before = sum(len(p) for p in pieces[:piece])
    encoding = pieces[piece]
    token = _first_at(encoding, start - offsets[piece], _reach(encoding)) if start > offsets[piece] else 0
    return before + (len(encoding) if token is None else token)


def _token_after(pieces: Sequence[Encoding], offsets: Sequence[int], end: int) -> int:
    """The token after a range that ends at `end`; a token that spans the end belongs to the range."""
    piece = _locate(offsets, end)
    before = sum(len(p) for p in pieces[:piece])
    encoding = pieces[piece]
    if end == offsets[piece]:
        return before
    token = _first_at(encoding, end - offsets[piece], _reach(encoding))
    if token is None:
        return before + len(encoding)
    start, _ = encoding.token_to_chars(token) or (0, 0)
    return before + token + (1 if start < end - offsets[piece] else 0)
