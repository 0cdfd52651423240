"""Tokens to text while they come: whole characters only, and nothing that a stop string might still swallow.

A token may hold half of a character, and some tokenizers write a space only between words, so a token's text is what it adds
to the text of the few tokens before it. Text is held back while its end could be the beginning of a stop string.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

_MOST_WAITING = 24  # tokens without a whole character: then they are no text, and are shown as they are


class Detokenizer:
    """The text of one answer, a token at a time."""

    def __init__(self, tokenizer: Any, hidden: Collection[int], stops: Collection[str] = ()) -> None:
        self._tokenizer, self._hidden = tokenizer, hidden
        self._stops = tuple(stop for stop in stops if stop)
        self._ids: list[int] = []  # those with a place in the text
        self._context = self._shown = 0  # decoding starts at `context`; ids before `shown` are in the text already
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now. Sets `stopped` when a stop string appeared; it and what follows are left out."""
        if token not in self._hidden:
            self._ids.append(token)
        return self._release(self._new(last=False), last=False)

    def flush(self) -> str:
        """What was held back, at the end of an answer."""
        return self._release(self._new(last=True), last=True)

    def _new(self, last: bool) -> str:
        waiting = len(self._ids) - self._shown
        if waiting == 0:
            return ""
        before = self._decode(self._ids[self._context : self._shown])
        now = self._decode(self._ids[self._context :])
        whole = not now.endswith("\ufffd") and len(now) > len(before)
        if not (whole or last or waiting > _MOST_WAITING):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False) if ids else ""

    def _release(self, text: str, last: bool) -> str:
        if not self._stops:
            return text
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = 0 if last else overlap(self._held, self._stops)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def overlap(text: str, words: Collection[str]) -> int:
    """Length of the longest end of a text that is a proper beginning of one of some words."""
    longest = max(map(len, words)) - 1
    for size in range(min(longest, len(text)), 0, -1):
        end = text[-size:]
        if any(word.startswith(end) for word in words):
            return size
    return 0
