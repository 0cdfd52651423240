"""The request of `/v1/responses`, and the chat that it asks for.

Its items are those of a chat in other words: `instructions` is a system message, a function's call and its output are items of
their own, and reasoning stands before what it led to. Nothing is stored here, so a conversation is sent whole each time.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, Tag, model_validator

from graftlm.config.fields import MOST_TEMPERATURE
from graftlm.formatting import quote
from graftlm.serving.http.fields import (
    BRANCH,
    LeftAside,
    Name,
    Only,
    Read,
    Text,
    TextOrParts,
    expecting,
    fault,
    one_or_many,
    word_or_named,
)
from graftlm.serving.http.messages import (
    MOST_CALLS,
    TEXT_ONLY,
    CallArguments,
    CalledFunction,
    CalledName,
    CallId,
    ChatMessage,
    ToolCall,
)
from graftlm.serving.http.protocol import ChatRequest, JsonSchema, ResponseFormat
from graftlm.serving.http.tools import MOST_TOOLS, FunctionTool, NamedFunction, NamedTool, Tool, check_tools

_STORED = "this server stores no answers; send the whole conversation as input"
_ITEMS = ("message", "function_call", "function_call_output", "reasoning")
_ANY = Field(None, description="read and left aside")


class ItemPart(Read):
    """A part of an item's text."""

    type: Literal["input_text", "output_text", "summary_text", "reasoning_text"]
    text: Text
    annotations: list[Any] | None = _ANY
    logprobs: list[Any] | None = _ANY
    prompt_cache_breakpoint: dict[str, Any] | None = _ANY

    @model_validator(mode="before")
    @classmethod
    def _kind(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("type"), str) and not given["type"].endswith("_text"):
            raise fault(f'is {quote(given["type"])}, and {TEXT_ONLY}; give parts of type "input_text"', "type")
        return given


_Parts = Annotated[list[ItemPart], Field(max_length=10_000, fail_fast=True)]
_Content = Annotated[Annotated[Text, Tag("one")] | Annotated[_Parts, Tag("many")], TextOrParts]


def _text(content: str | list[ItemPart] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


class _Item(Read):
    id: LeftAside | None = None
    status: LeftAside | None = None


class MessageItem(_Item):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: _Content
    phase: LeftAside | None = None


class FunctionCallItem(_Item):
    type: Literal["function_call"]
    call_id: CallId
    name: CalledName
    arguments: CallArguments
    caller: Any = _ANY
    namespace: Annotated[Any, Only(None, why="functions have no namespaces here")] = None
    async_: Any = Field(None, alias="async", description="read and left aside")


class FunctionCallOutputItem(_Item):
    type: Literal["function_call_output"]
    call_id: CallId
    output: _Content
    caller: Any = _ANY


class ReasoningItem(_Item):
    type: Literal["reasoning"]
    summary: _Parts | None = None
    content: _Parts | None = None
    encrypted_content: Annotated[Any, Only(None, why="this server cannot read what another one encrypted")] = None


def _item_kind(value: Any) -> str | None:
    kind = value.get("type", "message") if isinstance(value, dict) else None
    return f"{BRANCH}{kind}" if kind in _ITEMS else None


Item = Annotated[
    Annotated[MessageItem, Tag(f"{BRANCH}message")]
    | Annotated[FunctionCallItem, Tag(f"{BRANCH}function_call")]
    | Annotated[FunctionCallOutputItem, Tag(f"{BRANCH}function_call_output")]
    | Annotated[ReasoningItem, Tag(f"{BRANCH}reasoning")],
    expecting(_item_kind, f"an item of type {', '.join(_ITEMS[:-1])} or {_ITEMS[-1]}"),
]
_Items = Annotated[list[Item], Field(min_length=1, max_length=10_000, fail_fast=True)]


class FlatTool(FunctionTool):
    """A function that is offered, in this endpoint's form."""

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _kind(cls, given: Any) -> Any:  # told before the fields that another kind of tool has
        if isinstance(given, dict) and isinstance(given.get("type"), str) and given["type"] != "function":
            raise fault(f"is {quote(given['type'])}, and this server has no tools of its own; give functions", "type")
        return given

    def nested(self) -> Tool:
        """In the form of chats, which models are trained on."""
        function = {key: value for key, value in self.sent.items() if key != "type" and value is not None}
        return Tool.model_validate({"type": "function", "function": function})


class FlatNamedTool(Read):
    type: Literal["function"]
    name: Text


class TextFormat(Read):
    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(max_length=64)] | None = None
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.type == "json_schema" and self.schema_ is None:
            raise fault('is missing, and type "json_schema" needs it', "schema", code="missing_required_parameter")
        if self.type != "json_schema" and self.schema_ is not None:
            raise fault(f'is given, and type is "{self.type}"; give type "json_schema", or leave it out', "schema")
        return self


class TextConfig(Read):
    format: TextFormat | None = None
    verbosity: Annotated[Any, Only(None, why="how much is written is up to the model and max_output_tokens")] = None


class ResponseRequest(Read):
    """`POST /v1/responses`."""

    model: Name
    input: Annotated[
        Annotated[Text, Tag("one")] | Annotated[_Items, Tag("many")], expecting(one_or_many, "text, or a list of items")
    ]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=1 << 30)] | None = None
    temperature: Annotated[float, Field(ge=0, le=MOST_TEMPERATURE)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    stream: bool | None = False
    stream_options: dict[str, Any] | None = _ANY
    tools: Annotated[list[FlatTool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("word")]
            | Annotated[FlatNamedTool, Tag(f"{BRANCH}named")],
            expecting(word_or_named, '"none", "auto", "required" or an object that names a function'),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = True
    text: TextConfig | None = None
    user: LeftAside | None = None
    metadata: dict[str, Any] | None = _ANY
    service_tier: LeftAside | None = None
    safety_identifier: LeftAside | None = None
    prompt_cache_key: LeftAside | None = None
    prompt_cache_retention: LeftAside | None = None
    prompt_cache_options: dict[str, Any] | None = _ANY
    store: Annotated[Any, Only(None, False, why=_STORED)] = None
    previous_response_id: Annotated[Any, Only(None, why=_STORED)] = None
    conversation: Annotated[Any, Only(None, why=_STORED)] = None
    prompt: Annotated[Any, Only(None, why="this server stores no prompts; write it as input")] = None
    background: Annotated[Any, Only(None, False, why=_STORED)] = None
    background_options: Annotated[Any, Only(None, why=_STORED)] = None
    include: Annotated[Any, Only(None, [], why="there is nothing more to include")] = None
    reasoning: Annotated[Any, Only(None, {}, why="how much is reasoned is up to the model")] = None
    truncation: Annotated[Any, Only(None, "disabled", why="this server cuts no input")] = None
    top_logprobs: Annotated[Any, Only(None, 0, why="this endpoint reports no log probabilities; chats do")] = None
    max_tool_calls: Annotated[Any, Only(None, why="this server calls no tools itself")] = None
    context_management: Annotated[Any, Only(None, [], why="this server cuts no input")] = None
    access_programs: Annotated[Any, Only(None, why="there are none")] = None
    moderation: Annotated[Any, Only(None, why="this server moderates nothing")] = None
    image: Annotated[Any, Only(None, why=TEXT_ONLY)] = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        ids: set[str] = set()
        calls = 0  # one after another, which are one message
        for index, item in enumerate(self.input if isinstance(self.input, list) else ()):
            calls = calls + 1 if isinstance(item, FunctionCallItem) else 0
            if calls > MOST_CALLS:
                raise fault(
                    f"is function_call {calls:,} in a row, and at most {MOST_CALLS:,} are read", "input", index,
                    code="array_above_max_length",
                )  # fmt: skip
            if isinstance(item, FunctionCallItem):
                ids.add(item.call_id)
            elif isinstance(item, FunctionCallOutputItem) and item.call_id not in ids:
                raise fault(
                    f"is {quote(item.call_id)}, and no function_call before it has this id", "input", index, "call_id"
                )
        check_tools([tool.nested() for tool in self.tools or ()], self.choice, ())
        return self

    @property
    def choice(self) -> Any:
        """The choice of tools as chats have it."""
        named = self.tool_choice
        if not isinstance(named, FlatNamedTool):
            return named
        return NamedTool(type="function", function=NamedFunction(name=named.name))

    def chat(self) -> ChatRequest:
        """The chat that is asked for."""
        wanted = self.text.format if self.text is not None else None
        form = None
        if wanted is not None and wanted.type != "text":
            schema = JsonSchema(schema=wanted.schema_) if wanted.schema_ is not None else None  # pyright: ignore
            form = ResponseFormat(type=wanted.type, json_schema=schema)
        return ChatRequest.model_construct(
            model=self.model, messages=self._messages(), max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature, top_p=self.top_p, stream=self.stream, response_format=form,
            tools=[tool.nested() for tool in self.tools or ()], tool_choice=self.choice,
            parallel_tool_calls=self.parallel_tool_calls,
        )  # fmt: skip

    def _messages(self) -> list[ChatMessage]:
        """The items as messages: what an assistant thought, said and called one after another is one message.

        Every part was read before, so nothing is checked again: here an error would be the server's.
        """
        new = ChatMessage.model_construct
        said = [new(role="system", content=self.instructions)] if self.instructions is not None else []
        if isinstance(self.input, str):
            return [*said, new(role="user", content=self.input)]
        turn: dict[str, Any] = {}

        def end() -> None:
            if turn:
                said.append(new(role="assistant", **turn))
                turn.clear()

        for item in self.input:
            if isinstance(item, ReasoningItem):
                end()
                turn["reasoning_content"] = _text(item.content or item.summary) or None
            elif isinstance(item, FunctionCallItem):
                function = CalledFunction(name=item.name, arguments=item.arguments)
                call = ToolCall(id=item.call_id, function=function, index=None)
                turn.setdefault("tool_calls", []).append(call)
            elif isinstance(item, FunctionCallOutputItem):
                end()
                said.append(new(role="tool", content=_text(item.output), tool_call_id=item.call_id))
            elif item.role == "assistant":
                if "content" in turn or "tool_calls" in turn:
                    end()
                turn["content"] = _text(item.content)
            else:
                end()
                said.append(new(role=item.role, content=_text(item.content)))
        end()
        return said
