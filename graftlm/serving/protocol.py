"""OpenAI's requests and answers as values: what is read, what is refused, how an answer is written.

Fields that would change an answer and are not supported are refused by name, never ignored; fields that change nothing
here (`user`, `metadata`, ...) are read and left aside. Beyond OpenAI's there are `top_k`, `min_p`, `repetition_penalty` and
`stop_token_ids`, as other servers have them.
"""

from __future__ import annotations

import base64
import secrets
import struct
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from graftlm.serving.prompts import Prompts
from graftlm.serving.request import Chosen, Piece, Sampling

MOST_STOPS, MOST_TOP, MOST_ANSWERS, MOST_PROMPTS = 16, 20, 128, 256
_MOST_SEED = (1 << 63) - 1

Text = Annotated[str, Field(max_length=10_000_000)]
StopText = Annotated[str, Field(max_length=1000)]
Name = Annotated[str, Field(max_length=10_000, description="the base, or an adapter: formal, formal@3, formal@prod")]


class _Read(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(_Read):
    type: Literal["text"]
    text: Text


class ChatMessage(_Read):
    """One turn. Other parts of OpenAI's messages (images, sound, tool calls) are refused."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Text | list[TextPart] | None = None
    name: Annotated[str, Field(max_length=64)] | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates read it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts or ())
        return {"role": self.role, "content": text, **({"name": self.name} if self.name else {})}


class StreamOptions(_Read):
    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(_Read):
    name: Annotated[str, Field(max_length=64)] = "answer"
    description: Text | None = None
    schema_: dict[str, Any] | bool = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Read):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is given with type 'json_schema', and only then")
        return self

    @property
    def wanted(self) -> Any:
        """The wanted schema; any object for `json_object`."""
        return {"type": "object"} if self.json_schema is None else self.json_schema.schema_


class _Asked(_Read):
    """What chats and completions share."""

    model: Name
    max_tokens: Annotated[int, Field(ge=1, le=1 << 30)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, le=1 << 30)] | None = 0
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    seed: Annotated[int, Field(ge=-_MOST_SEED, le=_MOST_SEED)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = 1
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(max_length=256)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: Annotated[str, Field(max_length=1000)] | None = Field(None, description="read and left aside")
    metadata: dict[str, Any] | None = Field(None, description="read and left aside")

    @model_validator(mode="after")
    def _bias(self) -> Self:
        for token in self.logit_bias or {}:
            if not (token.isascii() and token.isdigit() and len(token) < 12):
                raise ValueError(f"logit_bias: {token[:20]!r} is not the number of a token")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self) -> Sampling:
        """How tokens are chosen; without a seed by one that nobody knows."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            bias={int(token): value for token, value in (self.logit_bias or {}).items()},
            seed=secrets.randbits(62) if self.seed is None else self.seed,
        )


class ChatRequest(_Asked):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 30)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    store: bool | None = Field(None, description="read and left aside: nothing is stored")
    service_tier: Annotated[str, Field(max_length=64)] | None = Field(None, description="read and left aside")
    safety_identifier: Annotated[str, Field(max_length=1000)] | None = Field(None, description="read and left aside")
    prompt_cache_key: Annotated[str, Field(max_length=1000)] | None = Field(None, description="read and left aside")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is given without logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens mean the same; give one")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many other tokens to report; None for no report at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1, max_length=1 << 20)]


class CompletionRequest(_Asked):
    """`POST /v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | _Ids
        | Annotated[list[_Ids], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    echo: Literal[False] | None = False
    best_of: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(
                f"best_of is {self.best_of} and n is {self.n or 1}: only as many answers as are returned are written"
            )
        return self

    @property
    def most_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each text or ids."""
        return several(self.prompt)


class EmbeddingRequest(_Read):
    """`POST /v1/embeddings`: the mean of the states before the head, at length 1."""

    model: Name
    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | _Ids
        | Annotated[list[_Ids], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: None = None
    user: Annotated[str, Field(max_length=1000)] | None = Field(None, description="read and left aside")

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        return several(self.input)


class AdapterRequest(_Read):
    """Load or unload one version."""

    adapter: Name


class AliasRequest(_Read):
    """Point an alias at a version."""

    name: Annotated[str, Field(max_length=1000)]
    alias: Annotated[str, Field(max_length=1000)]
    version: Annotated[int, Field(ge=1, lt=1 << 31)]


class RollbackRequest(_Read):
    """Point an alias at what it pointed at before."""

    name: Annotated[str, Field(max_length=1000)]
    alias: Annotated[str, Field(max_length=1000)]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """Every error."""

    error: ErrorBody


def several(given: Any) -> Any:
    """One prompt or a list of them -> a list of them."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


def error(message: str, type: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI writes it; what cannot be written as UTF-8 is replaced."""
    said = message.encode("utf-8", "replace").decode()
    return {"error": {"message": said, "type": type, "param": param, "code": code}}


# ---- answers --------------------------------------------------------------------------------------------------------


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def usage(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Tokens of a whole answer, from the last pieces of each of its prompts and choices."""
    ends = [p for p in pieces if p.finish is not None]
    read = sum(p.prompt_tokens for p in ends if p.index == 0)
    written = sum(p.completion_tokens for p in ends)
    return {
        "prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(p.cached_tokens for p in ends if p.index == 0)},
    }  # fmt: skip


class Writer:
    """Writes one answer's objects: the same id, moment, model and fingerprint in all of them."""

    def __init__(self, kind: Literal["chat", "text"], model: str, fingerprint: str, prompts: Prompts) -> None:
        self.chat = kind == "chat"
        self.id = new_id("chatcmpl" if self.chat else "cmpl")
        self._prompts = prompts
        self._common = {"id": self.id, "created": int(time.time()), "model": model, "system_fingerprint": fingerprint}
        self._offsets: dict[int, int] = {}

    def whole(self, answers: Sequence[Sequence[Piece]], used: dict[str, Any]) -> dict[str, Any]:
        """A complete answer; `answers` has the pieces of each choice."""
        choices: list[dict[str, Any]] = []
        for index, pieces in enumerate(answers):
            text = "".join(p.text for p in pieces)
            said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            reports = [c for p in pieces for c in p.chosen]
            choices.append(
                {"index": index, **said, "logprobs": self._logprobs(index, reports), "finish_reason": pieces[-1].finish}
            )
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._common, "object": kind, "choices": choices, "usage": used}

    def chunk(self, index: int, piece: Piece | None, with_usage: bool) -> dict[str, Any]:
        """One event of a stream; no piece for the one that begins choice `index`."""
        text = piece.text if piece is not None else ""
        finish = piece.finish if piece is not None else None
        if self.chat:
            said: dict[str, Any] = {
                "delta": {"role": "assistant", "content": ""} if piece is None else ({"content": text} if text else {})
            }
        else:
            said = {"text": text}
        logprobs = self._logprobs(index, piece.chosen) if piece is not None else None
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}
        return {**self._chunk(), "choices": [choice], **({"usage": None} if with_usage else {})}

    def last(self, used: dict[str, Any]) -> dict[str, Any]:
        """The event after the last choice that says what the answer cost."""
        return {**self._chunk(), "choices": [], "usage": used}

    def _chunk(self) -> dict[str, Any]:
        return {**self._common, "object": "chat.completion.chunk" if self.chat else "text_completion"}

    def _logprobs(self, index: int, reports: Sequence[Chosen]) -> dict[str, Any] | None:
        if not reports:
            return None
        if self.chat:
            return {
                "content": [
                    {**self._token(c.token, c.logprob), "top_logprobs": [self._token(*pair) for pair in c.top]}
                    for c in reports
                ],
                "refusal": None,
            }
        tokens = [self._text(c.token) for c in reports]
        at = self._offsets.get(index, 0)
        offsets: list[int] = []
        for token in tokens:
            offsets.append(at)
            at += len(token)
        self._offsets[index] = at
        top = [{self._text(token): value for token, value in c.top} for c in reports]
        return {
            "tokens": tokens,
            "token_logprobs": [c.logprob for c in reports],
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode("utf-8", "replace"))}

    def _text(self, token: int) -> str:
        return self._prompts.tokenizer.decode([token], skip_special_tokens=False)


def embedding(values: Sequence[float], encoding: str) -> list[float] | str:
    """A vector as numbers, or as little-endian float32 in base 64, which OpenAI's client asks for."""
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode() if encoding == "base64" else list(values)
