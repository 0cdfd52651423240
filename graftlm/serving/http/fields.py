"""What the fields of requests are made of: types that read strictly, and say in plain words what is wrong.

Pydantic tells of a union by every branch that failed. Here a value's own kind picks the branch, so that the one thing that is
wrong is told (`serving/http/invalid.py` finds the words). And it collects everything that is wrong: a body of 4 MB may hold a
million faults and take half a minute, so lists end at their first, and of unknown names one is told.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError, core_schema

from graftlm.errors import nearest

BRANCH = "#"
"""How the name of a union's branch begins whose value is an object."""
MOST_STOPS, MOST_PROMPTS, MOST_BIASES = 16, 256, 1024

Text = Annotated[str, Field(max_length=10_000_000)]
Name = Annotated[str, Field(max_length=10_000, description="the base, or an adapter: formal, formal@3, formal@prod")]
LeftAside = Annotated[str, Field(max_length=1000, description="read and left aside")]


def fault(message: str, *field: str | int, code: str = "invalid_value") -> PydanticCustomError:
    """An error with a message of our own about `field`, whose place is counted from the value that is being checked."""
    return PydanticCustomError("fault", "{message}", {"message": message, "field": field, "code": code})


class Read(BaseModel):
    """An object of a request: no unknown fields, and nothing is taken for something else (`true` for 1, `"5"` for 5)."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if isinstance(given, dict):
            known = [field.alias or name for name, field in cls.model_fields.items()]
            for name in given:
                if name not in known:
                    near = nearest(str(name)[:100], known)
                    raise fault(
                        f"is no field of this request{near or '; leave it out'}", name, code="unknown_parameter"
                    )
        return given


class Only:
    """Annotation of a field of OpenAI's that is not supported: values that ask for nothing are read, all others refused."""

    def __init__(self, *values: Any, why: str) -> None:
        self._values, self._why = values, why

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._read)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"enum": list(self._values), "description": self._why}

    def _read(self, given: Any) -> Any:
        if any(type(given) is type(value) and given == value for value in self._values):
            return given
        raise PydanticCustomError("only", "{why}", {"why": self._why})


def expecting(kind: Any, expected: str) -> Discriminator:
    """Which branch of a union reads a value; `kind` returns its tag, or None where there is none."""
    return Discriminator(kind, custom_error_type="expected", custom_error_message=expected)


def one_or_many(value: Any) -> str | None:
    return "one" if isinstance(value, str) else "many" if isinstance(value, list) else None


def word_or_named(value: Any) -> str | None:
    return "word" if isinstance(value, str) else f"{BRANCH}named" if isinstance(value, dict) else None


def _texts_or_ids(value: Any) -> str | None:
    if not isinstance(value, list) or not value:
        return one_or_many(value)
    return "ids" if isinstance(value[0], (int, float)) else "many ids" if isinstance(value[0], list) else "many"


TextOrParts = expecting(one_or_many, "text, or a list of parts")
# Whether an id is one of the model's vocabulary is told by who knows that (`Engine.check`).
_Ids = Annotated[list[int], Field(min_length=1, max_length=1 << 20, fail_fast=True)]
Prompt = Annotated[
    Annotated[Text, Tag("one")]
    | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True), Tag("many")]
    | Annotated[_Ids, Tag("ids")]
    | Annotated[list[_Ids], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True), Tag("many ids")],
    expecting(_texts_or_ids, "text, a list of texts, a list of token ids, or a list of such lists"),
]
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Stop = Annotated[
    Annotated[_Stop, Tag("one")] | Annotated[list[_Stop], Field(max_length=MOST_STOPS, fail_fast=True), Tag("many")],
    expecting(one_or_many, "text, or a list of texts"),
]


def _few_biases(given: Any) -> Any:
    if isinstance(given, dict):
        if len(given) > MOST_BIASES:
            raise fault(
                f"has {len(given)} entries, and at most {MOST_BIASES} are allowed", code="object_above_max_length"
            )
        for token in given:
            if not (token.isascii() and token.isdigit() and len(token) < 12) or str(int(token)) != token:
                raise fault(f'names the token {_quoted(token)}, and the id of a token is expected, such as "42"')
    return given


def _quoted(text: str) -> str:
    return f"'{text[:20]}…'" if len(text) > 20 else f"'{text}'"


_Biases = dict[str, Annotated[float, Field(ge=-100, le=100)]]
Bias = Annotated[_Biases, Field(max_length=MOST_BIASES), BeforeValidator(_few_biases)]
