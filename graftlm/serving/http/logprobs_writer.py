"""Log probabilities as OpenAI writes them: for chats a list of tokens, for texts a list of each of their parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graftlm.serving.engine.prompts import PromptEncoder
from graftlm.serving.engine.request import TokenLogprobs

_LEAST = -9999.0  # what is written for less, as OpenAI does


@dataclass
class Echo:
    """A prompt that the answers to it begin with."""

    text: str
    ids: Sequence[int]
    reports: list[TokenLogprobs] | None = None
    """Of its tokens from the second on; None where nobody wants them."""


class LogprobsWriter:
    """Writes the reports of one answer; of texts it counts where in them each token stands."""

    def __init__(self, prompts: PromptEncoder) -> None:
        self._prompts = prompts
        self._offsets: dict[int, int] = {}
        self._texts: dict[
            int, str
        ] = {}  # of the tokens of this answer: a long prompt has the same ones again and again

    def of_chat(self, reports: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        """The tokens of a chat's answer; None for none."""
        if not reports:
            return None
        content = [
            {**self._token(c.token, c.logprob), "top_logprobs": [self._token(*pair) for pair in c.top]} for c in reports
        ]
        return {"content": content, "refusal": None}

    def of_text(self, index: int, reports: Sequence[TokenLogprobs], echo: Echo | None = None) -> dict[str, Any] | None:
        """What is new of choice `index`, behind the tokens of its prompt where it has an echo; None for nothing.

        The first token of a prompt has no log probability, since nothing is before it.
        """
        told = list(reports)
        first: list[int] = []
        if echo is not None and echo.reports is not None:
            first, told = list(echo.ids[:1]), [*echo.reports, *told]
        if not told and not first:
            return None
        ids = [*first, *(c.token for c in told)]
        at = self._offsets.get(index, 0)
        offsets: list[int] = []
        for token in ids:
            offsets.append(at)
            at += 0 if token in self._prompts.hidden_ids else len(self._text(token))
        self._offsets[index] = at
        nothing: list[None] = [None] * len(first)
        return {
            "tokens": [self._text(token) for token in ids],
            "token_logprobs": [*nothing, *(max(c.logprob, _LEAST) for c in told)],
            "top_logprobs": [*nothing, *(self._top(c) for c in told)],
            "text_offset": offsets,
        }

    def _top(self, report: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens, and the one that is there."""
        top: dict[str, float] = {}
        for token, value in (*report.top, (report.token, report.logprob)):
            top.setdefault(self._text(token), max(value, _LEAST))
        return top

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": max(logprob, _LEAST), "bytes": list(text.encode("utf-8", "replace"))}

    def _text(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self._prompts.tokenizer.decode([token], skip_special_tokens=False)
        return text
