"""The messages of a conversation, with tool calls and reasoning, as chat templates read them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, Tag, model_validator

from graftlm.formatting import quote
from graftlm.jsonfile import parse_json
from graftlm.serving.http.fields import Only, Read, Text, TextOrParts, fault

MOST_CALLS = 1000
TEXT_ONLY = "this server reads and writes text only"
OLD_FUNCTIONS = "this is the older form of tools; write tools, tool_choice and tool_calls"
CallId = Annotated[str, Field(min_length=1, max_length=1000)]
CalledName = Annotated[str, Field(min_length=1, max_length=128)]


class TextPart(Read):
    type: Literal["text"]
    text: Text
    prompt_cache_breakpoint: dict[str, Any] | None = Field(None, description="read and left aside")

    @model_validator(mode="before")
    @classmethod
    def _kind(cls, given: Any) -> Any:  # told before the fields that another kind of part has
        if isinstance(given, dict) and isinstance(given.get("type"), str) and given["type"] != "text":
            raise fault(f'is {quote(given["type"])}, and {TEXT_ONLY}; give parts of type "text"', "type")
        return given


_Parts = Annotated[list[TextPart], Field(max_length=10_000, fail_fast=True)]
Content = Annotated[Annotated[Text, Tag("one")] | Annotated[_Parts, Tag("many")], TextOrParts]


def _object(arguments: str) -> str:
    try:
        whole = isinstance(parse_json(arguments or "{}"), dict)
    except ValueError:
        whole = False
    if not whole:
        raise fault(f"is {quote(arguments)}, and an object as JSON text is expected")
    return arguments or "{}"


CallArguments = Annotated[Text, AfterValidator(_object)]


class CalledFunction(Read):
    name: CalledName
    arguments: CallArguments


class ToolCall(Read):
    """A call in an assistant's message, as an answer has it."""

    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(None, description="read and left aside: what a client puts together from a stream has it")

    def plain(self) -> dict[str, Any]:
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": "function", "function": function}


class ChatMessage(Read):
    """One turn. Other parts of OpenAI's messages (images, sound) are refused.

    The message of an answer may be sent back as it came.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    reasoning_content: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_CALLS, fail_fast=True)] | None = None
    tool_call_id: CallId | None = None
    refusal: Annotated[Any, Only(None, "", why="a refusal is no text for this model")] = None
    annotations: Annotated[Any, Only(None, [], why=TEXT_ONLY)] = None
    audio: Annotated[Any, Only(None, why=TEXT_ONLY)] = None
    function_call: Annotated[Any, Only(None, why=OLD_FUNCTIONS)] = None

    @model_validator(mode="after")
    def _of_its_role(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise fault("is null or missing, and text, or a list of parts, is expected", "content", code="invalid_type")
        for name in ("tool_calls", "reasoning_content"):
            if getattr(self, name) and self.role != "assistant":
                raise fault(
                    f'stands in a message of role "{self.role}", and only assistants have it; leave it out', name
                )
        if self.role == "tool" and self.tool_call_id is None:
            raise fault(
                "is missing, and a message of role \"tool\" needs the id of the call that it answers", "tool_call_id",
                code="missing_required_parameter",
            )  # fmt: skip
        if self.role != "tool" and self.tool_call_id is not None:
            found = f'stands in a message of role "{self.role}"'
            raise fault(f"{found}, and only tools answer a call; leave it out", "tool_call_id")
        return self

    def text(self) -> str:
        """The content as one text."""
        parts = self.content
        return parts if isinstance(parts, str) else "".join(part.text for part in parts or ())

    def plain(self) -> dict[str, Any]:
        """As chat templates read it, and as training reads a row: what is not there is missing."""
        message: dict[str, Any] = {"role": self.role}
        if self.content is not None or not self.tool_calls:
            message["content"] = self.text()
        if self.tool_calls:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]
        for name in ("name", "reasoning_content", "tool_call_id"):
            if getattr(self, name):
                message[name] = getattr(self, name)
        return message


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000, fail_fast=True)]


def check_answered(messages: list[ChatMessage]) -> None:
    """Raise a fault for a tool's message that answers no call before it."""
    ids: set[str] = set()
    for index, message in enumerate(messages):
        ids.update(call.id for call in message.tool_calls or ())
        if message.tool_call_id is not None and message.tool_call_id not in ids:
            raise fault(
                f"is {quote(message.tool_call_id)}, and no assistant's message before it has a call of this id",
                "messages", index, "tool_call_id",
            )  # fmt: skip
