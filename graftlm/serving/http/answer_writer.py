"""Answers as OpenAI writes them: whole, or as the chunks of a stream."""

from __future__ import annotations

import base64
import secrets
import string
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from graftlm.serving.engine.answer_parser import AnswerParser, Piece, Reasoning
from graftlm.serving.engine.prompts import PromptEncoder
from graftlm.serving.engine.request import RequestOutput
from graftlm.serving.engine.tool_call_parser import CallDelta
from graftlm.serving.http.logprobs_writer import Echo, LogprobsWriter

_ID_LETTERS = string.ascii_letters + string.digits


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def new_call_id() -> str:
    """Nine letters and digits, since Mistral's templates take no other; too many to be guessed or to come twice."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(9))


def usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Tokens of a whole answer, from the last outputs of each of its prompts and choices."""
    ends = [p for p in outputs if p.finish_reason is not None]
    read = sum(p.prompt_tokens for p in ends if p.index == 0)
    written = sum(p.completion_tokens for p in ends)
    return {
        "prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(p.cached_tokens for p in ends if p.index == 0)},
    }  # fmt: skip


def put_together(pieces: Sequence[Piece]) -> tuple[str, str, list[tuple[str, str]]]:
    """Reasoning, content, and the calls (name and arguments) that are not broken, of a whole answer."""
    calls: dict[int, list[str]] = {}
    for piece in pieces:
        if isinstance(piece, CallDelta):
            name, arguments = calls.get(piece.index, ["", ""])
            calls[piece.index] = [name or piece.name, arguments + piece.arguments]
            if piece.broken:
                del calls[piece.index]
    reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
    content = "".join(piece for piece in pieces if isinstance(piece, str))
    return reasoning, content, [(name, arguments) for name, arguments in calls.values()]


class ResponseWriter:
    """Writes one answer's objects: the same id, moment, model and fingerprint in all of them."""

    def __init__(
        self, kind: Literal["chat", "text"], model: str, fingerprint: str, prompts: PromptEncoder,
        parser: Callable[[], AnswerParser] = lambda: AnswerParser(None, None),
        echo: Callable[[int], Echo | None] = lambda index: None,
    ) -> None:  # fmt: skip
        """`parser` makes what reads the answer of one choice, `echo` gives the prompt that the text of a choice begins with."""
        self.chat = kind == "chat"
        self.id = new_id("chatcmpl" if self.chat else "cmpl")
        self._parser, self._echo, self._logprobs = parser, echo, LogprobsWriter(prompts)
        self._common = {"id": self.id, "created": int(time.time()), "model": model, "system_fingerprint": fingerprint}
        self._parsers: dict[int, AnswerParser] = {}

    def whole(self, answers: Sequence[Sequence[RequestOutput]], used: dict[str, Any]) -> dict[str, Any]:
        """A complete answer; `answers` has the outputs of each choice."""
        choices: list[dict[str, Any]] = []
        for index, outputs in enumerate(answers):
            text = "".join(p.text for p in outputs)
            reports = [c for p in outputs for c in p.logprobs]
            finish_reason: str | None = outputs[-1].finish_reason
            if self.chat:
                parser = self._parser()
                said: dict[str, Any] = {"message": _message(parser.push(text, last=True))}
                finish_reason = _finish_reason(outputs[-1], parser)
                logprobs = self._logprobs.of_chat(reports)
            else:
                echo = self._echo(index)
                said = {"text": echo.text + text if echo is not None else text}
                logprobs = self._logprobs.of_text(index, reports, self._read(echo, outputs))
            choices.append({"index": index, **said, "logprobs": logprobs, "finish_reason": finish_reason})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._common, "object": kind, "choices": choices, "usage": used}

    def first(self, index: int, output: RequestOutput, with_usage: bool) -> list[dict[str, Any]]:
        """The event of a stream that begins choice `index`, before its first output; none for a text without echo."""
        if self.chat:
            return [self._event(index, {"delta": {"role": "assistant", "content": ""}}, with_usage)]
        echo = self._echo(index)
        if echo is None:
            return []
        logprobs = self._logprobs.of_text(index, [], self._read(echo, [output]))
        return [self._event(index, {"text": echo.text}, with_usage, logprobs)]

    def chunks(self, index: int, output: RequestOutput, with_usage: bool) -> list[dict[str, Any]]:
        """The events of a stream for what is new of choice `index`; none where nothing is certain yet."""
        finish_reason: str | None = output.finish_reason
        if self.chat:
            parser = self._parsers.get(index) or self._parsers.setdefault(index, self._parser())
            pieces = parser.push(output.text, last=finish_reason is not None)
            said: list[dict[str, Any]] = [{"delta": delta} for delta in map(_delta, pieces) if delta]
            finish_reason = _finish_reason(output, parser)
            empty: dict[str, Any] = {"delta": {}}
            logprobs = self._logprobs.of_chat(output.logprobs)
        else:
            said, empty = ([{"text": output.text}] if output.text else []), {"text": ""}
            logprobs = self._logprobs.of_text(index, output.logprobs)
        if not said and (finish_reason is not None or logprobs is not None):
            said = [empty]
        last = len(said) - 1
        return [
            self._event(index, one, with_usage, logprobs if i == 0 else None, finish_reason if i == last else None)
            for i, one in enumerate(said)
        ]

    def last(self, used: dict[str, Any]) -> dict[str, Any]:
        """The event after the last choice that says what the answer cost."""
        return {**self._chunk(), "choices": [], "usage": used}

    def _read(self, echo: Echo | None, outputs: Sequence[RequestOutput]) -> Echo | None:
        """An echo with its log probabilities, which the first answer to its prompt brings for all of them."""
        if echo is not None:
            echo.reports = next((p.prompt_logprobs for p in outputs if p.prompt_logprobs is not None), echo.reports)
        return echo

    def _event(
        self, index: int, said: dict[str, Any], with_usage: bool, logprobs: Any = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._chunk(), "choices": [choice], **({"usage": None} if with_usage else {})}

    def _chunk(self) -> dict[str, Any]:
        return {**self._common, "object": "chat.completion.chunk" if self.chat else "text_completion"}


def _message(pieces: Sequence[Piece]) -> dict[str, Any]:
    reasoning, content, calls = put_together(pieces)
    message: dict[str, Any] = {
        "role": "assistant",
        "content": content if content or not calls else None,
        "refusal": None,
    }
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [_call(new_call_id(), name, arguments) for name, arguments in calls]
    return message


def _delta(piece: Piece) -> dict[str, Any]:
    """What a stream says of a piece: of a call first its id and name, then its arguments."""
    if isinstance(piece, str):
        return {"content": piece}
    if isinstance(piece, Reasoning):
        return {"reasoning_content": piece.text}
    if piece.name:
        return {"tool_calls": [{"index": piece.index, **_call(new_call_id(), piece.name, "")}]}
    return (
        {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.arguments}}]} if piece.arguments else {}
    )


def _call(id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _finish_reason(output: RequestOutput, parser: AnswerParser) -> str | None:
    return "tool_calls" if output.finish_reason == "stop" and parser.called else output.finish_reason


def embedding(values: Sequence[float], encoding: str) -> list[float] | str:
    """A vector as numbers, or as little-endian float32 in base 64, which OpenAI's client asks for."""
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode() if encoding == "base64" else list(values)
