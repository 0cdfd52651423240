"""From a request's body to the engine's requests, and to the outputs that answer them: what all routes of answers share."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from graftlm.errors import GraftError, RequestError
from graftlm.jsonfile import parse_json
from graftlm.serving.engine.answer_parser import AnswerParser, ReasoningParser
from graftlm.serving.engine.prompts import PromptEncoder
from graftlm.serving.engine.request import Grammar, RequestOutput
from graftlm.serving.engine.request import Request as EngineRequest
from graftlm.serving.http.answer_writer import new_id
from graftlm.serving.http.api_keys import Tenant
from graftlm.serving.http.dependencies import ApiError, ServerState, as_api_error, without_paths
from graftlm.serving.http.logprobs_writer import Echo
from graftlm.serving.http.middleware import PARSED
from graftlm.serving.http.model_registry import ServedModel
from graftlm.serving.http.protocol import ChatRequest, CompletionRequest
from graftlm.serving.http.tools import OfferedTools, offered_tools


def _no_parser() -> AnswerParser:
    return AnswerParser(None, None)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the engine is asked for one request of a client."""

    served: ServedModel
    encoder: PromptEncoder
    requests: list[EngineRequest]
    """One for each prompt."""
    n: int
    """Answers to each."""
    parser: Callable[[], AnswerParser] = _no_parser
    """Makes what reads one answer."""
    guided_by: str = "response_format"
    """The field that has the schema of an answer."""
    echoes: list[Echo] = field(default_factory=list[Echo])
    """Each prompt, where answers begin with it."""

    @property
    def places(self) -> dict[str, int]:
        """By the id of an engine's request, the number of its first answer."""
        return {one.id: i * self.n for i, one in enumerate(self.requests)}

    def echo(self, index: int) -> Echo | None:
        """The prompt that answer `index` begins with, if it does."""
        return self.echoes[index // self.n] if self.echoes else None


async def ask_chat(
    state: ServerState, tenant: Tenant, served: ServedModel, encoder: PromptEncoder, body: ChatRequest
) -> Asked:
    """What the engine is asked for a chat. Raises RequestError, ApiError, DataError for one that cannot be answered."""
    schema = body.wanted_schema
    offered = offered_tools(
        encoder, body.tools or (), body.tool_choice, parallel=body.parallel_tool_calls is not False, schema=schema
    )
    messages = [message.plain() for message in body.messages]
    length = sum(map(_length, messages)) + _PAGE * (offered is not None)
    ids = await _encoded(length, lambda: encoder.chat(messages, offered.prompt if offered is not None else None))
    opened = encoder.opens_reasoning(ids)

    def parser() -> AnswerParser:
        return AnswerParser(
            ReasoningParser(opened) if encoder.thinks else None, offered.parser() if offered is not None else None
        )

    thinks = encoder.thinks and body.reasoning_effort != "none"
    grammar = await _grammar(state, encoder, schema, offered, opened=opened, thinks=thinks)
    requests = _engine_requests(state, tenant, served, encoder, [ids], body, grammar)
    held = offered is not None and offered.constraint is not None
    return Asked(
        served=served, encoder=encoder, requests=requests, n=body.n or 1, parser=parser,
        guided_by="tools" if held else "response_format",
    )  # fmt: skip


async def ask_texts(
    state: ServerState, tenant: Tenant, served: ServedModel, encoder: PromptEncoder, body: CompletionRequest
) -> Asked:
    """What the engine is asked for texts to continue. Raises RequestError, ApiError for what cannot be answered."""
    ids = await prompts_of(encoder, body.prompts)
    grammar = await _grammar(state, encoder, body.wanted_schema, None, opened=False, thinks=False)
    requests = _engine_requests(state, tenant, served, encoder, ids, body, grammar)
    texts = [given if isinstance(given, str) else encoder.show(given) for given in body.prompts] if body.echo else []
    echoes = [Echo(text, one) for text, one in zip(texts, ids)]
    return Asked(served=served, encoder=encoder, requests=requests, n=body.n or 1, echoes=echoes)


async def _grammar(
    state: ServerState,
    encoder: PromptEncoder,
    schema: Any,
    offered: OfferedTools | None,
    *,
    opened: bool,
    thinks: bool,
) -> Grammar | None:
    """What an answer is held to, if anything."""
    constraint = offered.constraint if offered is not None else None
    if constraint is not None:
        return await run_in_threadpool(
            lambda: state.grammar_compiler(encoder).calls(constraint, opened=opened, thinks=thinks)
        )
    if schema is not None:
        return await run_in_threadpool(
            lambda: state.grammar_compiler(encoder).json(schema, opened=opened, thinks=thinks)
        )
    return None


def _engine_requests(
    state: ServerState, tenant: Tenant, served: ServedModel, encoder: PromptEncoder, ids: Sequence[Sequence[int]],
    body: ChatRequest | CompletionRequest, grammar: Grammar | None,
) -> list[EngineRequest]:  # fmt: skip
    engine = state.async_engine.engine
    engine.check_tokens("stop_token_ids", body.stop_token_ids or ())
    sampling = body.sampling()
    engine.check_tokens("logit_bias", sampling.bias)
    stop_ids = encoder.stop_ids.union(body.stop_token_ids or ())
    return [
        engine_request(
            state, tenant, served, encoder, one, _max_tokens(state, body.max_new_tokens, len(one)), n=body.n or 1,
            sampling=sampling, stop_ids=stop_ids, stop=body.stops, logprobs=body.alternatives, grammar=grammar,
            prompt_logprobs=body.logprobs if isinstance(body, CompletionRequest) and body.echo else None,
        )
        for one in ids
    ]  # fmt: skip


def open_model(state: ServerState, model: str, tenant: Tenant) -> ServedModel:
    """The model of this name, if this server still takes requests."""
    if state.draining:
        raise ApiError(503, "this server is shutting down; ask another one", headers={"Retry-After": "5"})
    if not state.async_engine.alive:
        raise ApiError(503, "the engine of this server has died; restart it")
    return state.model_registry.find(model, tenant)


async def prompt_encoder(state: ServerState, served: ServedModel) -> PromptEncoder:
    known = state.prompt_encoders.known(served.digest)
    if known is not None:
        return known
    try:
        return await run_in_threadpool(state.prompt_encoders.of, served.digest, served.folder, served.manifest)
    except GraftError as error:
        raise ApiError(
            500, f"adapter '{served.label}' cannot be used: {without_paths(str(error), served)}", "adapter_invalid"
        ) from None


async def prompts_of(encoder: PromptEncoder, given: list[str] | list[list[int]]) -> list[list[int]]:
    """Prompts as tokens, those that are text encoded."""
    length = sum(len(p) for p in given if isinstance(p, str))
    return await _encoded(length, lambda: [p if isinstance(p, list) else encoder.text(p) for p in given])


def _length(message: dict[str, Any]) -> int:
    """About how many characters a message has, with those that a template writes around it."""
    arguments = (call["function"]["arguments"] for call in message.get("tool_calls", ()))
    texts = (message.get("content", ""), message.get("reasoning_content", ""), *arguments)
    return sum(len(text) + _AROUND for text in texts if text)


async def _encoded(length: int, encode: Callable[[], Any]) -> Any:
    """Text to tokens: of a short one here, of more than a page in a thread, since it would block the event loop."""
    return _encode(encode) if length <= _PAGE else await run_in_threadpool(_encode, encode)


_AROUND = 20
_PAGE = 4000  # characters, about a millisecond: less than a thread may wait for its turn beside the engine


def _encode(encode: Callable[[], Any]) -> Any:
    """Text to tokens. Raises RequestError for what is no text (half of a surrogate pair)."""
    try:
        return encode()
    except (UnicodeError, TypeError) as error:
        raise RequestError(f"the prompt cannot be read as text: {str(error)[:200]}", field="prompt") from None


def engine_request(
    state: ServerState,
    tenant: Tenant,
    served: ServedModel,
    encoder: PromptEncoder,
    ids: Sequence[int],
    max_tokens: int,
    **given: Any,
) -> EngineRequest:
    limit = state.request_limits.prompt_tokens
    if limit is not None and len(ids) > limit:
        raise ApiError(
            400,
            f"the prompt has {len(ids)} tokens, this server takes at most {limit}",
            "context_length_exceeded",
            "prompt",
        )
    return EngineRequest(
        id=new_id("q"),
        prompt=tuple(ids),
        max_tokens=max_tokens,
        adapter=served.digest,
        tenant=tenant.name,
        hidden_ids=encoder.hidden_ids,
        tokenizer=encoder.tokenizer,
        deadline=time.monotonic() + state.request_limits.seconds,
        **given,
    )


def _max_tokens(state: ServerState, wanted: int | None, prompt: int) -> int:
    """max_tokens of an answer: the request's, within the server's limit; without it, what is left of the context."""
    allowed = state.request_limits.output_tokens
    if wanted is not None:
        if allowed is not None and wanted > allowed:
            raise ApiError(
                400, f"max_tokens is {wanted}, this server generates at most {allowed}", "invalid_value", "max_tokens"
            )
        return wanted
    left = max(state.async_engine.engine.runner.max_model_len - prompt, 1)
    return min(left, allowed) if allowed is not None else left


@contextlib.asynccontextmanager
async def aborted_on_disconnect(
    request: Request, state: ServerState, requests: Sequence[EngineRequest]
) -> AsyncIterator[None]:
    """Aborts the requests as soon as the client disconnects. A stream that has begun does that itself."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        for one in requests:
            state.async_engine.engine.abort_request(one.id)

    request.scope.get(PARSED, lambda: None)()  # the next step hands it to the engine
    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


async def outputs_of(
    state: ServerState, requests: Sequence[EngineRequest], served: ServedModel, guided_by: str = "response_format"
) -> AsyncIterator[list[RequestOutput]]:
    """The engine's outputs. Raises ApiError for what went wrong; aborts the requests when the caller leaves. `guided_by`: the
    field that has the schema of an answer."""
    began = time.monotonic()
    first = True
    async with contextlib.aclosing(state.async_engine.generate(requests, served.folder)) as news:
        async for outputs in news:
            if first:
                first = False
                state.metrics.first_token.observe(time.monotonic() - began)
            for output in outputs:
                if output.refused:
                    raise RequestError(output.error, field=guided_by)
                if output.finish_reason == "error":
                    raise ApiError(
                        500,
                        f"'{served.label}' cannot answer: {without_paths(output.error, served)}",
                        "adapter_invalid" if served.digest else None,
                    )
                if output.finish_reason == "timeout":
                    raise ApiError(
                        504, f"the answer was not complete within {state.request_limits.seconds:g} seconds", "timeout"
                    )
                if output.finish_reason == "cancelled":
                    raise ApiError(499, "the client disconnected", "cancelled")
            yield outputs
    state.metrics.duration.observe(time.monotonic() - began)


def error_event(error: ApiError | RequestError) -> Any:
    """An error as the object that a response with its status would have."""
    refused = as_api_error(error) if isinstance(error, RequestError) else error
    return parse_json(bytes(refused.response().body))


def sse(value: Any, name: str = "") -> bytes:
    """A server-sent event, with a name where the protocol has names."""
    named = f"event: {name}\n" if name else ""
    return f"{named}data: {json.dumps(value, ensure_ascii=False)}\n\n".encode("utf-8", "replace")
