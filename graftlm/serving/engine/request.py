"""What goes into the engine and what comes out: plain values, no tensors, no text encoding, no network.

    Request            the prompt as token ids, the adapter (by digest), when to stop, how to sample
    RequestOutput      what one step added to one answer; the last one has the finish reason and the usage

One request may want several answers (`n`); each is a sequence of its own, told apart by `index`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from graftlm.config.fields import LEAST_TEMPERATURE

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]


class Grammar(Protocol):
    """A compiled constraint on what may be generated (`serving/engine/structured_output.py` implements it); `start`
    begins one answer."""

    def start(self) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is sampled. Temperature 0 takes the likeliest; everything else draws by a counter, not by state.

    A temperature below LEAST_TEMPERATURE is 0: logits divided by it leave the range of float32 or come close to it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """Only the `top_k` likeliest tokens; 0 for all."""
    min_p: float = 0.0
    """Only tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Logits of tokens that the text already holds are divided by it where positive, multiplied where negative."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """Taken off a token's logit once, and for each time, that the answer already holds it (OpenAI's two)."""
    bias: Mapping[int, float] = field(default_factory=dict[int, float])
    """Added to the logits of single tokens."""
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < LEAST_TEMPERATURE

    @property
    def changes_logits(self) -> bool:
        """Whether logits are changed before a token is sampled."""
        return (
            self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0 or bool(self.bias)
        )


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request to the engine."""

    id: str
    prompt: tuple[int, ...]
    max_tokens: int = 16
    """Most new tokens; 0 with `embed`, or where only the prompt is asked about."""
    adapter: str = ""
    """Digest of an adapter version; empty for the bare base."""
    tenant: str = ""
    """The owner of the API key: the queue is fair between tenants."""
    sampling: SamplingParams = SamplingParams()
    n: int = 1
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    hidden_ids: frozenset[int] = frozenset()
    """Tokens that are no part of the text: those that begin, end and pad."""
    logprobs: int | None = None
    """How many alternatives to report beside each token's own log probability; None for no report."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, from the second on; they are computed anew, whatever the prefix cache has."""
    grammar: Grammar | None = None
    embed: bool = False
    """Answer with the mean of the states before the head instead of tokens."""
    tokenizer: Any = None
    """Decodes this answer; None for the base's own."""
    deadline: float | None = None
    """Moment of `time.monotonic()` after which the answer is ended."""


@dataclass(frozen=True)
class TokenLogprobs:
    """One token with its log probability under the model, and the likeliest others."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(kw_only=True)
class RequestOutput:
    """What one step added to answer `index` of request `id`; `finish_reason` is set on the last one."""

    id: str
    index: int = 0
    text: str = ""
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Of the prompt's tokens from the second on, in the first output of the first answer to it, where they were wanted."""
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt that were found in the prefix cache."""
    completion_tokens: int = 0
    """New tokens so far, an end token included."""
    embedding: list[float] | None = None
    error: str = ""
    refused: bool = False
    """Whether the error is the request's own, and not the adapter's or the engine's."""

    def then(self, later: RequestOutput) -> RequestOutput:
        """This and a later output of the same answer as one."""
        return replace(
            later,
            text=self.text + later.text,
            tokens=self.tokens + later.tokens,
            logprobs=self.logprobs + later.logprobs,
            prompt_logprobs=later.prompt_logprobs if self.prompt_logprobs is None else self.prompt_logprobs,
        )
