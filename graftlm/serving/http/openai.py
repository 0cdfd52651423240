"""The routes that answer: chats, completions, embeddings, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from graftlm.errors import GraftError, RequestError
from graftlm.jsonfile import parse_json
from graftlm.serving.body import JsonRoute
from graftlm.serving.engine.prompts import PromptEncoder
from graftlm.serving.engine.request import Request as EngineRequest
from graftlm.serving.engine.request import RequestOutput
from graftlm.serving.http import protocol
from graftlm.serving.http.api_keys import Tenant
from graftlm.serving.http.dependencies import (
    ANSWERS,
    ERRORS,
    ApiError,
    ServerState,
    StateDep,
    TenantDep,
    as_api_error,
    version_headers,
    without_paths,
)
from graftlm.serving.http.middleware import READ
from graftlm.serving.http.model_registry import ServedModel
from graftlm.serving.http.protocol import ChatRequest, CompletionRequest, EmbeddingRequest, ResponseWriter

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions", responses=ANSWERS, response_model=None)
async def chat(asked: ChatRequest, request: Request, state: StateDep, tenant: TenantDep) -> Response:
    """Answer a conversation; with `stream` as server-sent events."""
    who = _open(state, asked.model, tenant)
    prompts = await _prompts(state, who)
    messages = [message.plain() for message in asked.messages]
    ids = await _encoded(sum(len(m["content"]) for m in messages), lambda: prompts.chat(messages))
    return await _answer(state, "chat", asked, request, tenant, who, prompts, [ids])


@router.post("/v1/completions", responses=ANSWERS, response_model=None)
async def completions(asked: CompletionRequest, request: Request, state: StateDep, tenant: TenantDep) -> Response:
    """Continue one prompt or several; with `stream` as server-sent events."""
    who = _open(state, asked.model, tenant)
    prompts = await _prompts(state, who)
    ids = await _texts(prompts, asked.prompts)
    return await _answer(state, "text", asked, request, tenant, who, prompts, ids)


@router.post("/v1/embeddings", responses=ERRORS, response_model=None)
async def embeddings(asked: EmbeddingRequest, request: Request, state: StateDep, tenant: TenantDep) -> Response:
    """The mean of the last layer's states over each input, scaled to length 1."""
    who = _open(state, asked.model, tenant)
    prompts = await _prompts(state, who)
    ids = await _texts(prompts, asked.prompts)
    questions = [_question(state, tenant, who, prompts, one, 0, embed=True) for one in ids]
    by_id = {question.id: i for i, question in enumerate(questions)}
    ends: dict[int, RequestOutput] = {}
    async with _given_up_with(request, state, questions):
        async for outputs in _pieces(state, questions, who):
            ends.update({by_id[p.id]: p for p in outputs if p.finish_reason is not None})
    data: list[dict[str, Any]] = []
    for i in range(len(questions)):
        vector = ends[i].embedding or []
        length = sum(v * v for v in vector) ** 0.5 or 1.0
        scaled = protocol.embedding([v / length for v in vector], asked.encoding_format or "float")
        data.append({"object": "embedding", "index": i, "embedding": scaled})
    used = protocol.usage(list(ends.values()))
    body = {
        "object": "list",
        "data": data,
        "model": asked.model,
        "usage": {k: used[k] for k in ("prompt_tokens", "total_tokens")},
    }
    return JSONResponse(body, headers=version_headers(who))


def _open(state: ServerState, model: str, tenant: Tenant) -> ServedModel:
    """Who answers, if this server still takes requests."""
    if state.draining:
        raise ApiError(503, "this server is shutting down; ask another one", headers={"Retry-After": "5"})
    if not state.async_engine.alive:
        raise ApiError(503, "the engine of this server has died; it must be started anew")
    return state.model_registry.find(model, tenant)


async def _prompts(state: ServerState, who: ServedModel) -> PromptEncoder:
    known = state.book.known(who.digest)
    if known is not None:
        return known
    try:
        return await run_in_threadpool(state.book.of, who.digest, who.folder, who.manifest)
    except GraftError as error:
        raise ApiError(
            500, f"adapter '{who.label}' cannot be used: {without_paths(str(error), who)}", "adapter_invalid"
        ) from None


async def _texts(prompts: PromptEncoder, given: list[str] | list[list[int]]) -> list[list[int]]:
    """Prompts as tokens, those that are text encoded."""
    length = sum(len(p) for p in given if isinstance(p, str))
    return await _encoded(length, lambda: [p if isinstance(p, list) else prompts.text(p) for p in given])


async def _encoded(length: int, encode: Callable[[], Any]) -> Any:
    """Text to tokens: a short one here, one of more than a page where it holds nobody up."""
    return _encode(encode) if length <= _PAGE else await run_in_threadpool(_encode, encode)


_PAGE = 4000  # characters, about a millisecond: less than a thread may wait for its turn beside the engine


def _encode(encode: Callable[[], Any]) -> Any:
    """Text to tokens; text that is no text (half of a surrogate pair) is the caller's fault."""
    try:
        return encode()
    except (UnicodeError, TypeError) as error:
        raise RequestError(f"the prompt cannot be read as text: {str(error)[:200]}", field="prompt") from None


def _question(
    state: ServerState,
    tenant: Tenant,
    who: ServedModel,
    prompts: PromptEncoder,
    ids: Sequence[int],
    most: int,
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
        id=protocol.new_id("q"),
        prompt=tuple(ids),
        max_tokens=most,
        adapter=who.digest,
        tenant=tenant.name,
        hidden_ids=prompts.hidden_ids,
        tokenizer=prompts.tokenizer,
        deadline=time.monotonic() + state.request_limits.seconds,
        **given,
    )


def _most_tokens(state: ServerState, asked: int | None, prompt: int) -> int:
    """How long an answer may be: what is asked, within what the server allows; without asking, what is left."""
    allowed = state.request_limits.output_tokens
    if asked is not None:
        if allowed is not None and asked > allowed:
            raise ApiError(
                400, f"max_tokens is {asked}, this server writes at most {allowed}", "invalid_value", "max_tokens"
            )
        return asked
    left = max(state.async_engine.engine.runner.most_tokens - prompt, 1)
    return min(left, allowed) if allowed is not None else left


async def _answer(
    state: ServerState, kind: Literal["chat", "text"], asked: ChatRequest | CompletionRequest, request: Request, tenant: Tenant,
    who: ServedModel, prompts: PromptEncoder, ids: Sequence[Sequence[int]],
) -> Response:  # fmt: skip
    grammar = None
    if asked.response_format is not None and asked.response_format.type != "text":
        schema = asked.response_format.wanted
        grammar = await run_in_threadpool(lambda: state.grammar_compiler(prompts).json(schema))
    state.async_engine.engine.check_tokens("stop_token_ids", asked.stop_token_ids or ())
    n = asked.n or 1
    sampling = asked.sampling()
    state.async_engine.engine.check_tokens("logit_bias", sampling.bias)
    stop_ids = prompts.stop_ids.union(asked.stop_token_ids or ())
    questions = [
        _question(
            state, tenant, who, prompts, one, _most_tokens(state, asked.most_tokens, len(one)), n=n, sampling=sampling,
            stop_ids=stop_ids, stop=asked.stops, logprobs=asked.alternatives, grammar=grammar,
        )
        for one in ids
    ]  # fmt: skip
    news = _pieces(state, questions, who)
    place = {question.id: i * n for i, question in enumerate(questions)}
    writer = ResponseWriter(kind, asked.model, state.fingerprint[:16], prompts)
    async with _given_up_with(request, state, questions):
        if asked.stream:
            # Nothing is sent before the first token, so that what goes wrong until then has its status.
            first = await anext(news)
            with_usage = asked.stream_options is not None and asked.stream_options.include_usage
            events = _events(writer, place, first, news, with_usage)
            return StreamingResponse(
                events, media_type="text/event-stream", headers={**version_headers(who), "Cache-Control": "no-cache"}
            )
        answers: list[list[RequestOutput]] = [[] for _ in range(n * len(questions))]
        async for outputs in news:
            for output in outputs:
                answers[place[output.id] + output.index].append(output)
    used = protocol.usage([p for outputs in answers for p in outputs])
    return JSONResponse(writer.whole(answers, used), headers=version_headers(who))


@contextlib.asynccontextmanager
async def _given_up_with(
    request: Request, state: ServerState, questions: Sequence[EngineRequest]
) -> AsyncIterator[None]:
    """Meanwhile the questions are given up as soon as the caller hangs up. A stream that has begun sees to that itself."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        for question in questions:
            state.async_engine.engine.cancel(question.id)

    request.scope.get(READ, lambda: None)()  # all that was to be read is; the next step hands it to the engine
    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


async def _pieces(
    state: ServerState, questions: Sequence[EngineRequest], who: ServedModel
) -> AsyncIterator[list[RequestOutput]]:
    """What the engine answers; raises ApiError for what went wrong, and gives the questions up when the caller is gone."""
    begun = time.monotonic()
    seen = False
    async with contextlib.aclosing(state.async_engine.ask(questions, who.folder)) as news:
        async for outputs in news:
            if not seen:
                seen = True
                state.metrics.first_token.observe(time.monotonic() - begun)
            for output in outputs:
                if output.refused:
                    raise RequestError(output.error, field="response_format")
                if output.finish_reason == "error":
                    raise ApiError(
                        500,
                        f"'{who.label}' cannot answer: {without_paths(output.error, who)}",
                        "adapter_invalid" if who.digest else None,
                    )
                if output.finish_reason == "timeout":
                    raise ApiError(
                        504, f"the answer was not complete within {state.request_limits.seconds:g} seconds", "timeout"
                    )
                if output.finish_reason == "cancelled":
                    raise ApiError(499, "the caller hung up", "cancelled")
            yield outputs
    state.metrics.duration.observe(time.monotonic() - begun)


async def _events(
    writer: ResponseWriter,
    place: dict[str, int],
    first: list[RequestOutput],
    news: AsyncIterator[list[RequestOutput]],
    with_usage: bool,
) -> AsyncIterator[bytes]:
    """Server-sent events of a whole answer."""
    ends: list[RequestOutput] = []
    begun: set[int] = set()

    def write(outputs: Sequence[RequestOutput]) -> bytes:
        out: list[bytes] = []
        for output in outputs:
            index = place[output.id] + output.index
            if writer.chat and index not in begun:
                begun.add(index)
                out.append(_event(writer.chunk(index, None, with_usage)))
            if output.finish_reason is not None:
                ends.append(output)
            if output.text or output.finish_reason is not None or output.logprobs:
                out.append(_event(writer.chunk(index, output, with_usage)))
        return b"".join(out)

    try:
        yield write(first)
        async for outputs in news:
            written = write(outputs)
            if written:
                yield written
        if with_usage:
            yield _event(writer.last(protocol.usage(ends)))
    except (ApiError, RequestError) as error:  # its status was sent long ago, so it is told as an event
        refused = as_api_error(error) if isinstance(error, RequestError) else error
        yield _event(parse_json(bytes(refused.response().body)))
    yield b"data: [DONE]\n\n"


def _event(value: Any) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode("utf-8", "replace")
