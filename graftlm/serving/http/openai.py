"""The routes of chats, completions and embeddings; responses are whole or server-sent events."""

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
from graftlm.serving.http.json_body import JsonRoute
from graftlm.serving.http.middleware import PARSED
from graftlm.serving.http.model_registry import ServedModel
from graftlm.serving.http.protocol import ChatRequest, CompletionRequest, EmbeddingRequest, ResponseWriter

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions", responses=ANSWERS, response_model=None)
async def chat(body: ChatRequest, request: Request, state: StateDep, tenant: TenantDep) -> Response:
    """Answer a conversation; with `stream` as server-sent events."""
    served = _open(state, body.model, tenant)
    encoder = await _encoder(state, served)
    messages = [message.plain() for message in body.messages]
    ids = await _encoded(sum(len(m["content"]) for m in messages), lambda: encoder.chat(messages))
    return await _answer(state, "chat", body, request, tenant, served, encoder, [ids])


@router.post("/v1/completions", responses=ANSWERS, response_model=None)
async def completions(body: CompletionRequest, request: Request, state: StateDep, tenant: TenantDep) -> Response:
    """Continue one prompt or several; with `stream` as server-sent events."""
    served = _open(state, body.model, tenant)
    encoder = await _encoder(state, served)
    ids = await _texts(encoder, body.prompts)
    return await _answer(state, "text", body, request, tenant, served, encoder, ids)


@router.post("/v1/embeddings", responses=ERRORS, response_model=None)
async def embeddings(body: EmbeddingRequest, request: Request, state: StateDep, tenant: TenantDep) -> Response:
    """The mean of the last layer's states over each input, scaled to length 1."""
    served = _open(state, body.model, tenant)
    encoder = await _encoder(state, served)
    ids = await _texts(encoder, body.prompts)
    requests = [_engine_request(state, tenant, served, encoder, one, 0, embed=True) for one in ids]
    by_id = {one.id: i for i, one in enumerate(requests)}
    ends: dict[int, RequestOutput] = {}
    async with _aborted_on_disconnect(request, state, requests):
        async for outputs in _outputs(state, requests, served):
            ends.update({by_id[p.id]: p for p in outputs if p.finish_reason is not None})
    data: list[dict[str, Any]] = []
    for i in range(len(requests)):
        vector = ends[i].embedding or []
        length = sum(v * v for v in vector) ** 0.5 or 1.0
        scaled = protocol.embedding([v / length for v in vector], body.encoding_format or "float")
        data.append({"object": "embedding", "index": i, "embedding": scaled})
    used = protocol.usage(list(ends.values()))
    response = {
        "object": "list",
        "data": data,
        "model": body.model,
        "usage": {k: used[k] for k in ("prompt_tokens", "total_tokens")},
    }
    return JSONResponse(response, headers=version_headers(served))


def _open(state: ServerState, model: str, tenant: Tenant) -> ServedModel:
    """The model of this name, if this server still takes requests."""
    if state.draining:
        raise ApiError(503, "this server is shutting down; ask another one", headers={"Retry-After": "5"})
    if not state.async_engine.alive:
        raise ApiError(503, "the engine of this server has died; restart it")
    return state.model_registry.find(model, tenant)


async def _encoder(state: ServerState, served: ServedModel) -> PromptEncoder:
    known = state.prompt_encoders.known(served.digest)
    if known is not None:
        return known
    try:
        return await run_in_threadpool(state.prompt_encoders.of, served.digest, served.folder, served.manifest)
    except GraftError as error:
        raise ApiError(
            500, f"adapter '{served.label}' cannot be used: {without_paths(str(error), served)}", "adapter_invalid"
        ) from None


async def _texts(encoder: PromptEncoder, given: list[str] | list[list[int]]) -> list[list[int]]:
    """Prompts as tokens, those that are text encoded."""
    length = sum(len(p) for p in given if isinstance(p, str))
    return await _encoded(length, lambda: [p if isinstance(p, list) else encoder.text(p) for p in given])


async def _encoded(length: int, encode: Callable[[], Any]) -> Any:
    """Text to tokens: of a short one here, of more than a page in a thread, since it would block the event loop."""
    return _encode(encode) if length <= _PAGE else await run_in_threadpool(_encode, encode)


_PAGE = 4000  # characters, about a millisecond: less than a thread may wait for its turn beside the engine


def _encode(encode: Callable[[], Any]) -> Any:
    """Text to tokens. Raises RequestError for what is no text (half of a surrogate pair)."""
    try:
        return encode()
    except (UnicodeError, TypeError) as error:
        raise RequestError(f"the prompt cannot be read as text: {str(error)[:200]}", field="prompt") from None


def _engine_request(
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
        id=protocol.new_id("q"),
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


async def _answer(
    state: ServerState, kind: Literal["chat", "text"], body: ChatRequest | CompletionRequest, request: Request, tenant: Tenant,
    served: ServedModel, encoder: PromptEncoder, ids: Sequence[Sequence[int]],
) -> Response:  # fmt: skip
    grammar = None
    if body.response_format is not None and body.response_format.type != "text":
        schema = body.response_format.wanted
        grammar = await run_in_threadpool(lambda: state.grammar_compiler(encoder).json(schema))
    state.async_engine.engine.check_tokens("stop_token_ids", body.stop_token_ids or ())
    n = body.n or 1
    sampling = body.sampling()
    state.async_engine.engine.check_tokens("logit_bias", sampling.bias)
    stop_ids = encoder.stop_ids.union(body.stop_token_ids or ())
    requests = [
        _engine_request(
            state, tenant, served, encoder, one, _max_tokens(state, body.max_new_tokens, len(one)), n=n, sampling=sampling,
            stop_ids=stop_ids, stop=body.stops, logprobs=body.alternatives, grammar=grammar,
        )
        for one in ids
    ]  # fmt: skip
    news = _outputs(state, requests, served)
    place = {one.id: i * n for i, one in enumerate(requests)}
    writer = ResponseWriter(kind, body.model, state.fingerprint[:16], encoder)
    async with _aborted_on_disconnect(request, state, requests):
        if body.stream:
            # Nothing is sent before the first token, so that an error until then has its status.
            first = await anext(news)
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            events = _events(writer, place, first, news, with_usage)
            return StreamingResponse(
                events, media_type="text/event-stream", headers={**version_headers(served), "Cache-Control": "no-cache"}
            )
        answers: list[list[RequestOutput]] = [[] for _ in range(n * len(requests))]
        async for outputs in news:
            for output in outputs:
                answers[place[output.id] + output.index].append(output)
    used = protocol.usage([p for outputs in answers for p in outputs])
    return JSONResponse(writer.whole(answers, used), headers=version_headers(served))


@contextlib.asynccontextmanager
async def _aborted_on_disconnect(
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


async def _outputs(
    state: ServerState, requests: Sequence[EngineRequest], served: ServedModel
) -> AsyncIterator[list[RequestOutput]]:
    """The engine's outputs. Raises ApiError for what went wrong; aborts the requests when the caller leaves."""
    began = time.monotonic()
    first = True
    async with contextlib.aclosing(state.async_engine.generate(requests, served.folder)) as news:
        async for outputs in news:
            if first:
                first = False
                state.metrics.first_token.observe(time.monotonic() - began)
            for output in outputs:
                if output.refused:
                    raise RequestError(output.error, field="response_format")
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


async def _events(
    writer: ResponseWriter,
    place: dict[str, int],
    first: list[RequestOutput],
    news: AsyncIterator[list[RequestOutput]],
    with_usage: bool,
) -> AsyncIterator[bytes]:
    """An answer as server-sent events."""
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
    except (ApiError, RequestError) as error:  # the status was sent long ago, so it is an event
        refused = as_api_error(error) if isinstance(error, RequestError) else error
        yield _event(parse_json(bytes(refused.response().body)))
    yield b"data: [DONE]\n\n"


def _event(value: Any) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode("utf-8", "replace")
