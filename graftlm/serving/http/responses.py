"""`/v1/responses`: an answer as items (reasoning, a message, calls of functions), whole or as events.

`ItemWriter` reads an answer's pieces one after another. It says of each which events a stream has for it, and keeps the items,
of which a whole answer is made: both are written by the same code.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from graftlm.errors import RequestError
from graftlm.serving.engine.answer_parser import Piece
from graftlm.serving.engine.request import RequestOutput
from graftlm.serving.engine.tool_call_parser import CallDelta
from graftlm.serving.http.answer_writer import new_call_id, new_id
from graftlm.serving.http.answering import (
    Asked,
    aborted_on_disconnect,
    ask_chat,
    error_event,
    open_model,
    outputs_of,
    prompt_encoder,
    sse,
)
from graftlm.serving.http.dependencies import ANSWERS, ApiError, StateDep, TenantDep, version_headers
from graftlm.serving.http.json_body import JsonRoute
from graftlm.serving.http.response_request import ResponseRequest

router = APIRouter(route_class=JsonRoute)
Event = dict[str, Any]
_PART = {"message": "output_text", "reasoning": "reasoning_text"}


@router.post("/v1/responses", responses=ANSWERS, response_model=None)
async def respond(body: ResponseRequest, request: Request, state: StateDep, tenant: TenantDep) -> Response:
    """Answer text or a list of items; with `stream` as server-sent events."""
    served = open_model(state, body.model, tenant)
    asked = await ask_chat(state, tenant, served, await prompt_encoder(state, served), body.chat())
    news = outputs_of(state, asked.requests, asked.served, "tools" if asked.guided_by == "tools" else "text")
    writer, headers = ItemWriter(body, asked), version_headers(asked.served)
    async with aborted_on_disconnect(request, state, asked.requests):
        if body.stream:
            first = await anext(news)  # an error until then has its status
            return StreamingResponse(
                _events(writer, first, news), media_type="text/event-stream",
                headers={**headers, "Cache-Control": "no-cache"},
            )  # fmt: skip
        async for outputs in news:
            for output in outputs:
                writer.read(output)
    return JSONResponse(writer.response(), headers=headers)


async def _events(
    writer: ItemWriter, first: list[RequestOutput], news: AsyncIterator[list[RequestOutput]]
) -> AsyncIterator[bytes]:
    """An answer as server-sent events, numbered."""
    number = 0

    def numbered(events: list[Event]) -> bytes:
        nonlocal number
        out = b""
        for event in events:
            out += sse({**event, "sequence_number": number}, event["type"])
            number += 1
        return out

    yield numbered([{"type": f"response.{kind}", "response": writer.response()} for kind in ("created", "in_progress")])
    try:
        yield numbered([event for output in first for event in writer.read(output)])
        async for outputs in news:
            written = numbered([event for output in outputs for event in writer.read(output)])
            if written:
                yield written
    except (ApiError, RequestError) as error:  # the status was sent long ago, so it is an event
        writer.error = error_event(error)["error"]
    response = writer.response()
    yield numbered([{"type": f"response.{response['status']}", "response": response}])


class ItemWriter:
    """One answer's items, and the events that tell of them."""

    def __init__(self, body: ResponseRequest, asked: Asked) -> None:
        self._body, self._parser, self._tokenizer = body, asked.parser(), asked.encoder.tokenizer
        self._id, self._created = new_id("resp"), time.time()
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the last item, while it grows
        self._broken: list[str] = []
        self._end: RequestOutput | None = None
        self.error: dict[str, Any] | None = None
        """What went wrong after the answer had begun."""

    def read(self, output: RequestOutput) -> list[Event]:
        """The events for what is new."""
        last = output.finish_reason is not None
        events = [event for piece in self._parser.push(output.text, last=last) for event in self._piece(piece)]
        if last:
            self._end = output
            events += self._close()
            if not [item for item in self._items if item["type"] != "reasoning"]:  # an answer has a message or a call
                events += [*self._begin("message"), *self._close()]
        return events

    def _piece(self, piece: Piece) -> list[Event]:
        if isinstance(piece, CallDelta):
            return self._call_events(piece)
        kind, text = ("message", piece) if isinstance(piece, str) else ("reasoning", piece.text)
        events = [] if self._open is not None and self._open["type"] == kind else [*self._close(), *self._begin(kind)]
        assert self._open is not None
        self._open["content"][0]["text"] += text
        return [*events, self._event(f"response.{_PART[kind]}.delta", content_index=0, delta=text, **_logprobs(kind))]

    def _call_events(self, piece: CallDelta) -> list[Event]:
        events: list[Event] = []
        if piece.name:
            events += [*self._close(), *self._begin("function_call", piece.name)]
        assert self._open is not None
        if piece.arguments:
            self._open["arguments"] += piece.arguments
            events.append(self._event("response.function_call_arguments.delta", delta=piece.arguments))
        if piece.broken:
            self._broken.append(self._open["id"])
            events += self._close("incomplete")
        return events

    def _begin(self, kind: str, name: str = "") -> list[Event]:
        """Open an item."""
        item: dict[str, Any] = {"id": new_id({"message": "msg", "reasoning": "rs"}.get(kind, "fc")), "type": kind}
        if kind == "function_call":
            item |= {"call_id": new_call_id(), "name": name, "arguments": ""}
        elif kind == "reasoning":
            item |= {"summary": [], "content": [{"type": "reasoning_text", "text": ""}]}
        else:
            item |= {"role": "assistant", "content": [_output_text("")]}
        item["status"] = "in_progress"
        self._items.append(item)
        self._open = item
        events = [
            self._item_event("response.output_item.added", {**item, "content": []} if "content" in item else item)
        ]
        if "content" in item:
            part = {**item["content"][0]}
            events.append(self._event("response.content_part.added", content_index=0, part=part))
        return events

    def _close(self, status: str = "completed") -> list[Event]:
        """Finish the open item."""
        item = self._open
        if item is None:
            return []
        # A call that is closed without being broken is whole, also where the answer ends behind it.
        item["status"] = "incomplete" if self._cut_off and item["type"] != "function_call" else status
        events: list[Event] = []
        if item["type"] == "function_call":
            events.append(
                self._event("response.function_call_arguments.done", arguments=item["arguments"], name=item["name"])
            )
        else:
            part = {**item["content"][0]}
            kind = item["type"]
            events += [
                self._event(f"response.{_PART[kind]}.done", content_index=0, text=part["text"], **_logprobs(kind)),
                self._event("response.content_part.done", content_index=0, part=part),
            ]
        events.append(self._item_event("response.output_item.done", item))
        self._open = None
        return events

    @property
    def _cut_off(self) -> bool:
        return self._end is not None and self._end.finish_reason == "length"

    def _event(self, type: str, **more: Any) -> Event:
        return {"type": type, "item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, **more}

    def _item_event(self, type: str, item: dict[str, Any]) -> Event:
        return {"type": type, "output_index": len(self._items) - 1, "item": {**item}}

    def response(self) -> dict[str, Any]:
        """The answer as it is now."""
        body, end = self._body, self._end
        status = "in_progress" if end is None else "incomplete" if self._cut_off else "completed"
        status = status if self.error is None else "failed"
        wanted = body.text.format if body.text is not None else None
        choice = body.tool_choice
        return {
            "id": self._id, "object": "response", "created_at": self._created, "status": status, "model": body.model,
            "output": [item for item in self._items if item["id"] not in self._broken] if end is not None else [],
            "error": self.error and {"code": "server_error", "message": self.error["message"]},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False, "previous_response_id": None, "store": False,
            "temperature": body.temperature, "top_p": body.top_p, "truncation": "disabled", "background": False,
            "text": {"format": wanted.model_dump(by_alias=True, exclude_none=True) if wanted else {"type": "text"}},
            "tools": [tool.sent for tool in body.tools or ()],
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump() if choice else "auto",
            "usage": self._usage(end) if end is not None else None,
        }  # fmt: skip

    def _usage(self, end: RequestOutput) -> dict[str, Any]:
        thought = "".join(item["content"][0]["text"] for item in self._items if item["type"] == "reasoning")
        reasoning = len(self._tokenizer.encode(thought, add_special_tokens=False)) if thought else 0
        return {
            "input_tokens": end.prompt_tokens, "output_tokens": end.completion_tokens,
            "total_tokens": end.prompt_tokens + end.completion_tokens,
            "input_tokens_details": {"cached_tokens": end.cached_tokens, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": min(reasoning, end.completion_tokens)},
        }  # fmt: skip


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _logprobs(kind: str) -> dict[str, Any]:
    """What events of text have and those of reasoning do not."""
    return {"logprobs": []} if kind == "message" else {}
