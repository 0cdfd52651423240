"""The tools of a request: which functions a model is offered, and which of them it may or must call.

A tool goes to the chat template as it was sent, so that it reads as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    Tag,
    ValidatorFunctionWrapHandler,
    model_validator,
)

from graftlm.formatting import quote
from graftlm.serving.engine.prompts import PromptEncoder
from graftlm.serving.engine.tool_call_forms import CallForm
from graftlm.serving.engine.tool_call_parser import ToolCallParser
from graftlm.serving.engine.tool_grammar import CallConstraint, Function
from graftlm.serving.http.fields import BRANCH, Read, Text, expecting, fault, word_or_named

MOST_TOOLS = 256
_NAMES = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.:/-")


def _function_name(name: str) -> str:
    if not 1 <= len(name) <= 128 or not _NAMES.issuperset(name):
        raise fault(f"is {quote(name)}, and 1 to 128 letters, digits and _ . : / - are expected")
    return name


def _arguments(schema: dict[str, Any]) -> dict[str, Any]:
    kind = schema.get("type", "object")
    if kind != "object":
        raise fault(f'is {quote(kind)}, and arguments are an object: write "object"', "type")
    return schema


FunctionName = Annotated[str, AfterValidator(_function_name)]
Parameters = Annotated[dict[str, Any], AfterValidator(_arguments)]


class _AsSent(BaseModel):
    """Keeps what was sent, key by key. Keys that are not known are part of what the model reads."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    _sent: dict[str, Any] = PrivateAttr(default_factory=dict[str, Any])

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, given: Any, read: ValidatorFunctionWrapHandler) -> Self:
        found = read(given)
        if isinstance(given, dict):
            found._sent = given
        return found

    @property
    def sent(self) -> dict[str, Any]:
        return self._sent


class FunctionTool(_AsSent):
    """A function that is offered."""

    name: FunctionName
    description: Text | None = None
    parameters: Parameters | None = None
    strict: bool | None = Field(None, description="hold the arguments of every call to the schema in `parameters`")


class Tool(_AsSent):
    type: Literal["function"]
    function: FunctionTool

    @property
    def as_called(self) -> Function:
        """The function with the schema of its arguments; without one it takes none."""
        none = {"type": "object", "properties": {}, "additionalProperties": False}
        given = self.function.parameters
        schema = none if given is None else given if "$ref" in given else {"type": "object", **given}
        return Function(self.function.name, schema)


Tools = Annotated[list[Tool], Field(max_length=MOST_TOOLS, fail_fast=True)]


class NamedFunction(Read):
    name: Text


class NamedTool(Read):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")] | Annotated[NamedTool, Tag(f"{BRANCH}named")],
    expecting(word_or_named, '"none", "auto", "required" or an object that names a function'),
]


def check_tools(tools: Sequence[Tool], choice: ToolChoice | None, function: Sequence[str] = ("function",)) -> None:
    """Raise a fault for a name that two functions have, or a choice of what is not there. `function`: where in a tool its
    name is."""
    names: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.function.name in names:
            raise fault(
                f"is {quote(tool.function.name)}, and another function of this request has this name; rename one",
                "tools", index, *function, "name",
            )  # fmt: skip
        names.add(tool.function.name)
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        known = f"tools has {', '.join(sorted(names))[:200]}" if names else "tools is missing or empty"
        raise fault(f"is {quote(choice.function.name)}, and {known}", "tool_choice", *function, "name")
    if choice == "required" and not names:
        raise fault('is "required", and tools is missing or empty; give tools, or leave it out', "tool_choice")


@dataclass(frozen=True, slots=True)
class OfferedTools:
    """The tools of one request, and what may be called of them."""

    form: CallForm
    prompt: list[dict[str, Any]]
    """What the chat template gets."""
    constraint: CallConstraint | None
    """What an answer is held to; None where the model writes as it likes."""
    names: frozenset[str]
    parallel: bool

    def parser(self) -> ToolCallParser:
        """Reads the calls of one answer."""
        return ToolCallParser(self.form.name, self.names, None if self.parallel else 1)


def offered_tools(
    encoder: PromptEncoder, tools: Sequence[Tool], choice: ToolChoice | None, *, parallel: bool,
    schema: dict[str, Any] | None,
) -> OfferedTools | None:  # fmt: skip
    """The tools that a model is offered; None where it is offered none. `schema`: what an answer without calls is held to.

    With the choice "none" the model is not told of them. Raises RequestError for a model that cannot be given tools.
    """
    if not tools or choice == "none":
        return None
    form = encoder.call_form()
    prompt = [tool.sent for tool in tools]
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    free = choice in (None, "auto")
    constraint = None
    if not free or schema is not None or any(tool.function.strict for tool in tools):
        functions = [
            tool.as_called if not free or tool.function.strict else Function(tool.function.name, {"type": "object"})
            for tool in tools
        ]
        constraint = CallConstraint(form, functions, parallel, optional=free, instead=schema)
    return OfferedTools(form, prompt, constraint, frozenset(tool.function.name for tool in tools), parallel)
