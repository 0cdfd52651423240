"""OpenAI's requests and responses as values.

Fields that would change an answer and are not supported are refused by name, never ignored; fields that change nothing
here (`user`, `metadata`, ...) are accepted and ignored. Beyond OpenAI's there are `top_k`, `min_p`, `repetition_penalty` and
`stop_token_ids`, as other servers have them.
"""

from __future__ import annotations

import base64
import secrets
import struct
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, Tag, model_validator

from graftlm.config.fields import MOST_TEMPERATURE
from graftlm.formatting import quote
from graftlm.serving.engine.prompts import PromptEncoder
from graftlm.serving.engine.request import RequestOutput, SamplingParams, TokenLogprobs
from graftlm.serving.http.fields import Bias, LeftAside, Name, Only, Prompt, Read, Stop, Text, TextOrParts, fault

MOST_TOP, MOST_ANSWERS = 20, 128
_MOST_SEED = (1 << 63) - 1
_NO_TOOLS = "this server calls no tools"
_TEXT_ONLY = "this server reads and writes text only"


class TextPart(Read):
    type: Literal["text"]
    text: Text
    prompt_cache_breakpoint: dict[str, Any] | None = Field(None, description="read and left aside")

    @model_validator(mode="before")
    @classmethod
    def _kind(cls, given: Any) -> Any:  # told before the fields that another kind of part has
        if isinstance(given, dict) and isinstance(given.get("type"), str) and given["type"] != "text":
            raise fault(f'is {quote(given["type"])}, and {_TEXT_ONLY}; give parts of type "text"', "type")
        return given


_Parts = Annotated[list[TextPart], Field(max_length=10_000, fail_fast=True)]
Content = Annotated[Annotated[Text, Tag("one")] | Annotated[_Parts, Tag("many")], TextOrParts]


class ChatMessage(Read):
    """One turn. Other parts of OpenAI's messages (images, sound, tool calls) are refused.

    The message of an answer may be sent back as it came.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    refusal: Annotated[Any, Only(None, "", why="a refusal is no text for this model")] = None
    annotations: Annotated[Any, Only(None, [], why=_TEXT_ONLY)] = None
    audio: Annotated[Any, Only(None, why=_TEXT_ONLY)] = None
    tool_calls: Annotated[Any, Only(None, [], why=_NO_TOOLS)] = None
    tool_call_id: Annotated[Any, Only(None, why=_NO_TOOLS)] = None
    function_call: Annotated[Any, Only(None, why=_NO_TOOLS)] = None

    @model_validator(mode="after")
    def _said(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise fault("is null or missing, and text, or a list of parts, is expected", "content", code="invalid_type")
        return self

    def plain(self) -> dict[str, Any]:
        """As chat templates read it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts or ())
        return {"role": self.role, "content": text, **({"name": self.name} if self.name else {})}


class StreamOptions(Read):
    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(Read):
    name: Annotated[str, Field(max_length=64)] = "answer"
    description: Text | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Read):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise fault('is missing, and type "json_schema" needs it', "json_schema", code="missing_required_parameter")
        if self.type != "json_schema" and self.json_schema is not None:
            raise fault(f'is given, and type is "{self.type}"; give type "json_schema", or leave it out', "json_schema")
        return self

    @property
    def wanted(self) -> Any:
        """The wanted schema; any object for `json_object`."""
        return {"type": "object"} if self.json_schema is None else self.json_schema.schema_


class _GenerationRequest(Read):
    """What chats and completions share."""

    model: Name
    max_tokens: Annotated[int, Field(ge=1, le=1 << 30)] | None = None
    temperature: Annotated[float, Field(ge=0, le=MOST_TEMPERATURE)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, le=1 << 30)] | None = 0
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    logit_bias: Bias | None = None
    seed: Annotated[int, Field(ge=-_MOST_SEED, le=_MOST_SEED)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = 1
    stop: Stop | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=256, fail_fast=True)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: LeftAside | None = None
    metadata: dict[str, Any] | None = Field(None, description="read and left aside")

    @model_validator(mode="after")
    def _streamed(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise fault("is given, and stream is not true; leave it out, or ask for a stream", "stream_options")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self) -> SamplingParams:
        """How tokens are sampled; without a seed by a random one."""
        return SamplingParams(
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


class ChatRequest(_GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 30)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    store: bool | None = Field(None, description="read and left aside: nothing is stored")
    service_tier: LeftAside | None = None
    safety_identifier: LeftAside | None = None
    prompt_cache_key: LeftAside | None = None
    prompt_cache_retention: LeftAside | None = None
    prompt_cache_options: dict[str, Any] | None = Field(None, description="read and left aside")
    tools: Annotated[Any, Only(None, [], why=_NO_TOOLS)] = None
    tool_choice: Annotated[Any, Only(None, "none", "auto", why=_NO_TOOLS)] = None
    parallel_tool_calls: bool | None = Field(None, description="read and left aside: there are no tools")
    functions: Annotated[Any, Only(None, [], why=_NO_TOOLS)] = None
    function_call: Annotated[Any, Only(None, "none", "auto", why=_NO_TOOLS)] = None
    modalities: Annotated[Any, Only(None, ["text"], why=_TEXT_ONLY)] = None
    audio: Annotated[Any, Only(None, why=_TEXT_ONLY)] = None
    prediction: Annotated[Any, Only(None, why="this server does not read predictions")] = None
    reasoning_effort: Annotated[Any, Only(None, "none", why="how much is reasoned is up to the model")] = None
    verbosity: Annotated[Any, Only(None, why="how much is written is up to the model and max_tokens")] = None
    moderation: Annotated[Any, Only(None, why="this server moderates nothing")] = None
    web_search_options: Annotated[Any, Only(None, why="this server searches nothing")] = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise fault(f"is {self.top_logprobs}, and logprobs is not true; give both, or leave it out", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise fault(
                f"is {self.max_completion_tokens}, and max_tokens, which means the same, is {self.max_tokens}; give one",
                "max_completion_tokens",
            )
        return self

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many other tokens to report; None for no report at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_GenerationRequest):
    """`POST /v1/completions`."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    echo: Annotated[Any, Only(None, False, why="this server does not write the prompt again")] = None
    best_of: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    suffix: Annotated[Any, Only(None, "", why="this server writes nothing in front of a text")] = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise fault(
                f"is {self.best_of}, and n is {self.n or 1}: as many answers are written as are returned; leave it out",
                "best_of",
            )
        return self

    @property
    def max_new_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each text or ids."""
        return several(self.prompt)


class EmbeddingRequest(Read):
    """`POST /v1/embeddings`: the mean of the states before the head, at length 1."""

    model: Name
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[Any, Only(None, why="vectors are as long as the model is wide")] = None
    user: LeftAside | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        return several(self.input)


class AdapterRequest(Read):
    """Load or unload one version."""

    adapter: Name


class AliasRequest(Read):
    """Point an alias at a version."""

    name: Annotated[str, Field(max_length=1000)]
    alias: Annotated[str, Field(max_length=1000)]
    version: Annotated[int, Field(ge=1, lt=1 << 31)]


class RollbackRequest(Read):
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


def usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Tokens of a whole answer, from the last outputs of each of its prompts and choices."""
    ends = [p for p in outputs if p.finish_reason is not None]
    read = sum(p.prompt_tokens for p in ends if p.index == 0)
    written = sum(p.completion_tokens for p in ends)
    return {
        "prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(p.cached_tokens for p in ends if p.index == 0)},
    }  # fmt: skip


class ResponseWriter:
    """Writes one answer's objects: the same id, moment, model and fingerprint in all of them."""

    def __init__(self, kind: Literal["chat", "text"], model: str, fingerprint: str, prompts: PromptEncoder) -> None:
        self.chat = kind == "chat"
        self.id = new_id("chatcmpl" if self.chat else "cmpl")
        self._prompts = prompts
        self._common = {"id": self.id, "created": int(time.time()), "model": model, "system_fingerprint": fingerprint}
        self._offsets: dict[int, int] = {}

    def whole(self, answers: Sequence[Sequence[RequestOutput]], used: dict[str, Any]) -> dict[str, Any]:
        """A complete answer; `answers` has the outputs of each choice."""
        choices: list[dict[str, Any]] = []
        for index, outputs in enumerate(answers):
            text = "".join(p.text for p in outputs)
            said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            reports = [c for p in outputs for c in p.logprobs]
            choices.append(
                {
                    "index": index,
                    **said,
                    "logprobs": self._logprobs(index, reports),
                    "finish_reason": outputs[-1].finish_reason,
                }
            )
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._common, "object": kind, "choices": choices, "usage": used}

    def chunk(self, index: int, output: RequestOutput | None, with_usage: bool) -> dict[str, Any]:
        """One event of a stream; no output for the one that begins choice `index`."""
        text = output.text if output is not None else ""
        finish_reason = output.finish_reason if output is not None else None
        if self.chat:
            said: dict[str, Any] = {
                "delta": {"role": "assistant", "content": ""} if output is None else ({"content": text} if text else {})
            }
        else:
            said = {"text": text}
        logprobs = self._logprobs(index, output.logprobs) if output is not None else None
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._chunk(), "choices": [choice], **({"usage": None} if with_usage else {})}

    def last(self, used: dict[str, Any]) -> dict[str, Any]:
        """The event after the last choice that says what the answer cost."""
        return {**self._chunk(), "choices": [], "usage": used}

    def _chunk(self) -> dict[str, Any]:
        return {**self._common, "object": "chat.completion.chunk" if self.chat else "text_completion"}

    def _logprobs(self, index: int, reports: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
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
