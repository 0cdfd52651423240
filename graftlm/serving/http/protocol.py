"""OpenAI's requests and responses as values.

Fields that would change an answer and are not supported are refused by name, never ignored; fields that change nothing
here (`user`, `metadata`, ...) are accepted and ignored. Beyond OpenAI's there are `top_k`, `min_p`, `repetition_penalty` and
`stop_token_ids`, as other servers have them.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from graftlm.config.fields import MOST_TEMPERATURE
from graftlm.serving.engine.request import SamplingParams
from graftlm.serving.http.fields import Bias, LeftAside, Name, Only, Prompt, Read, Stop, Text, fault
from graftlm.serving.http.messages import OLD_FUNCTIONS, TEXT_ONLY, Messages, check_answered
from graftlm.serving.http.tools import ToolChoice, Tools, check_tools

MOST_TOP, MOST_ANSWERS = 20, 128
_MOST_SEED = (1 << 63) - 1


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

    @property
    def wanted_schema(self) -> Any:
        """The schema that an answer is held to; None for none."""
        form = self.response_format
        return None if form is None or form.type == "text" else form.wanted

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

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 30)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    store: bool | None = Field(None, description="read and left aside: nothing is stored")
    service_tier: LeftAside | None = None
    safety_identifier: LeftAside | None = None
    prompt_cache_key: LeftAside | None = None
    prompt_cache_retention: LeftAside | None = None
    prompt_cache_options: dict[str, Any] | None = Field(None, description="read and left aside")
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = True
    functions: Annotated[Any, Only(None, [], why=OLD_FUNCTIONS)] = None
    function_call: Annotated[Any, Only(None, "none", "auto", why=OLD_FUNCTIONS)] = None
    modalities: Annotated[Any, Only(None, ["text"], why=TEXT_ONLY)] = None
    audio: Annotated[Any, Only(None, why=TEXT_ONLY)] = None
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
        check_tools(self.tools or (), self.tool_choice)
        check_answered(self.messages)
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
    max_tokens: Annotated[int, Field(ge=0, le=1 << 30)] | None = None
    echo: bool | None = Field(
        None, description="begin the answer with the prompt; with logprobs, also with its tokens'"
    )
    best_of: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    suffix: Annotated[Any, Only(None, "", why="this server writes nothing in front of a text")] = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise fault(
                f"is {self.best_of}, and n is {self.n or 1}: as many answers are written as are returned; leave it out",
                "best_of",
            )
        if self.max_tokens == 0 and not self.echo:
            raise fault(
                "is 0, and at least 1 is expected; with echo, 0 asks for the prompt alone", "max_tokens",
                code="integer_below_min_value",
            )  # fmt: skip
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
