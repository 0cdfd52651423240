"""The routes of chats, completions and embeddings; responses are whole or server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from graftlm.errors import RequestError
from graftlm.serving.engine.request import RequestOutput
from graftlm.serving.http.answer_writer import ResponseWriter, embedding, usage
from graftlm.serving.http.answering import (
    Asked,
    aborted_on_disconnect,
    ask_chat,
    ask_texts,
    engine_request,
    error_event,
    open_model,
    outputs_of,
    prompt_encoder,
    prompts_of,
    sse,
)
from graftlm.serving.http.dependencies import (
    ANSWERS,
    ERRORS,
    ApiError,
    ServerState,
    StateDep,
    TenantDep,
    version_headers,
)
from graftlm.serving.http.json_body import JsonRoute
from graftlm.serving.http.protocol import ChatRequest, CompletionRequest, EmbeddingRequest

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions", responses=ANSWERS, response_model=None)
async def chat(body: ChatRequest, request: Request, state: StateDep, tenant: TenantDep) -> Response:
    """Answer a conversation; with `stream` as server-sent events."""
    served = open_model(state, body.model, tenant)
    asked = await ask_chat(state, tenant, served, await prompt_encoder(state, served), body)
    return await _answer(state, request, asked, body)


@router.post("/v1/completions", responses=ANSWERS, response_model=None)
async def completions(body: CompletionRequest, request: Request, state: StateDep, tenant: TenantDep) -> Response:
    """Continue one prompt or several; with `stream` as server-sent events."""
    served = open_model(state, body.model, tenant)
    asked = await ask_texts(state, tenant, served, await prompt_encoder(state, served), body)
    return await _answer(state, request, asked, body)


async def _answer(
    state: ServerState, request: Request, asked: Asked, body: ChatRequest | CompletionRequest
) -> Response:
    kind = "chat" if isinstance(body, ChatRequest) else "text"
    writer = ResponseWriter(kind, body.model, state.fingerprint[:16], asked.encoder, asked.parser, asked.echo)
    news = outputs_of(state, asked.requests, asked.served, asked.guided_by)
    place, headers = asked.places, version_headers(asked.served)
    async with aborted_on_disconnect(request, state, asked.requests):
        if body.stream:
            # Nothing is sent before the first token, so that an error until then has its status.
            first = await anext(news)
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            events = _events(writer, place, first, news, with_usage, in_thread=bool(asked.echoes))
            return StreamingResponse(
                events, media_type="text/event-stream", headers={**headers, "Cache-Control": "no-cache"}
            )
        answers: list[list[RequestOutput]] = [[] for _ in range(asked.n * len(asked.requests))]
        async for outputs in news:
            for output in outputs:
                answers[place[output.id] + output.index].append(output)
    used = usage([p for outputs in answers for p in outputs])

    def write() -> Response:
        return JSONResponse(writer.whole(answers, used), headers=headers)

    return await run_in_threadpool(write) if asked.echoes else write()


@router.post("/v1/embeddings", responses=ERRORS, response_model=None)
async def embeddings(body: EmbeddingRequest, request: Request, state: StateDep, tenant: TenantDep) -> Response:
    """The mean of the last layer's states over each input, scaled to length 1."""
    served = open_model(state, body.model, tenant)
    encoder = await prompt_encoder(state, served)
    ids = await prompts_of(encoder, body.prompts)
    requests = [engine_request(state, tenant, served, encoder, one, 0, embed=True) for one in ids]
    by_id = {one.id: i for i, one in enumerate(requests)}
    ends: dict[int, RequestOutput] = {}
    async with aborted_on_disconnect(request, state, requests):
        async for outputs in outputs_of(state, requests, served):
            ends.update({by_id[p.id]: p for p in outputs if p.finish_reason is not None})
    data: list[dict[str, Any]] = []
    for i in range(len(requests)):
        vector = ends[i].embedding or []
        length = sum(v * v for v in vector) ** 0.5 or 1.0
        scaled = embedding([v / length for v in vector], body.encoding_format or "float")
        data.append({"object": "embedding", "index": i, "embedding": scaled})
    used = usage(list(ends.values()))
    response = {
        "object": "list",
        "data": data,
        "model": body.model,
        "usage": {k: used[k] for k in ("prompt_tokens", "total_tokens")},
    }
    return JSONResponse(response, headers=version_headers(served))


async def _events(
    writer: ResponseWriter,
    place: dict[str, int],
    first: list[RequestOutput],
    news: AsyncIterator[list[RequestOutput]],
    with_usage: bool,
    *,
    in_thread: bool,
) -> AsyncIterator[bytes]:
    """An answer as server-sent events. `in_thread`: choices begin with their prompts, whose tokens and alternatives may be
    so many that writing them would block the event loop."""
    ends: list[RequestOutput] = []
    begun: set[int] = set()

    def write(outputs: Sequence[RequestOutput]) -> bytes:
        out: list[bytes] = []
        for output in outputs:
            index = place[output.id] + output.index
            if index not in begun:
                begun.add(index)
                out += [sse(chunk) for chunk in writer.first(index, output, with_usage)]
            if output.finish_reason is not None:
                ends.append(output)
            out += [sse(chunk) for chunk in writer.chunks(index, output, with_usage)]
        return b"".join(out)

    try:
        yield await run_in_threadpool(write, first) if in_thread else write(first)
        async for outputs in news:
            begins = in_thread and any(place[output.id] + output.index not in begun for output in outputs)
            written = await run_in_threadpool(write, outputs) if begins else write(outputs)
            if written:
                yield written
        if with_usage:
            yield sse(writer.last(usage(ends)))
    except (ApiError, RequestError) as error:  # the status was sent long ago, so it is an event
        yield sse(error_event(error))
    yield b"data: [DONE]\n\n"
