"""What is wrong with a request, in words: the field, the value found, what is expected, and the way out.

    max_tokens is true, and an integer is expected
    stop has 17 items, and at most 16 are allowed
    messages[0].content[1].type is "image_url", and this server reads and writes text only; give parts of type "text"

The codes are OpenAI's, and the field stands in `param` as there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from graftlm.formatting import QUOTED, plain_number, quote
from graftlm.jsonfile import parse_json
from graftlm.serving.http.fields import BRANCH

_EXPECTED = {
    "int_type": "an integer", "int_from_float": "an integer", "float_type": "a number", "bool_type": "true or false",
    "string_type": "text", "list_type": "a list", "dict_type": "an object", "model_type": "an object",
    "model_attributes_type": "an object",
}  # fmt: skip
_BOUNDS = {
    "greater_than": ("gt", "more than {} is expected", "below_min"),
    "greater_than_equal": ("ge", "at least {} is expected", "below_min"),
    "less_than": ("lt", "less than {} is allowed", "above_max"),
    "less_than_equal": ("le", "at most {} is allowed", "above_max"),
}
_LENGTHS = {
    "string_too_long": "characters",
    "string_too_short": "characters",
    "too_long": "items",
    "too_short": "items",
}


def explain(problem: Mapping[str, Any], body: Any) -> tuple[str, str | None, str]:
    """The first thing that is wrong with a request (an error of pydantic's, `loc` beginning with `body`), as message, param
    and code of an error of OpenAI's; `body` is what was read.
    """
    context: Mapping[str, Any] = problem.get("ctx") or {}
    place = [*_place(problem["loc"][1:], body), *context.get("field", ())]
    field = _path(place)
    said, code = _said(str(problem["type"]), str(problem["msg"]), context, problem["input"])
    return f"{field or 'the body'} {said}", field or None, code


def _said(kind: str, message: str, context: Mapping[str, Any], found: Any) -> tuple[str, str]:
    """What is to be said behind the name of the field, and the code."""
    if kind == "fault":
        return message, str(context["code"])
    if kind == "missing":
        return "is missing, and this request needs it", "missing_required_parameter"
    if kind == "only":
        return f"is {quote(found)}, and {context['why']}; leave it out", "unsupported_value"
    if kind == "finite_number" or (kind == "float_type" and type(found) is int):
        return f"is {quote(found)}; at most 1.8e308 can be read", "invalid_value"
    if kind == "literal_error":
        return f"is {quote(found)}, and {context['expected']} is expected", "invalid_value"
    if kind in _BOUNDS:
        key, words, which = _BOUNDS[kind]
        number = "integer" if isinstance(found, int) else "decimal"
        return f"is {quote(found)}, and {words.format(plain_number(context[key]))}", f"{number}_{which}_value"
    if kind in _LENGTHS:
        long = kind.endswith("long")
        limit = context["max_length" if long else "min_length"]
        words = f"at most {limit} are allowed" if long else f"at least {limit} is needed"
        what = "string" if kind.startswith("string") else "array"
        return (
            f"has {len(found)} {_LENGTHS[kind]}, and {words}",
            f"{what}_{'above_max' if long else 'below_min'}_length",
        )
    expected = message if kind == "expected" else _EXPECTED.get(kind)
    if expected is None:
        return f"is {quote(found)}, which is not what this field takes", "invalid_value"
    return f"is {quote(found)}, and {expected} is expected{_way_out(kind, found)}", "invalid_type"


def _way_out(kind: str, found: Any) -> str:
    if isinstance(found, str) and kind in ("int_type", "float_type", "bool_type"):
        try:
            bare = parse_json(found[:QUOTED])
        except ValueError:
            return ""
        wanted = (bool,) if kind == "bool_type" else (int,) if kind == "int_type" else (int, float)
        return f": write {found[:QUOTED]} without quotes" if type(bare) in wanted else ""
    if kind in ("int_type", "int_from_float") and isinstance(found, float) and found.is_integer() and abs(found) < 1e15:
        return f": write {int(found)}"
    return ""


def _place(loc: Sequence[str | int], body: Any) -> list[str | int]:
    """The place in the body: `loc` without the names of branches of unions, which stand where the value is no object, or
    begin with BRANCH."""
    at: Any = body
    place: list[str | int] = []
    for part in loc:
        if isinstance(part, str) and (not isinstance(at, dict) or part.startswith(BRANCH)):
            continue
        place.append(part)
        try:
            at = at[part]
        except (LookupError, TypeError):
            at = None
    return place


def _path(place: Sequence[str | int]) -> str:
    """`messages[0].content`; a name that is long or odd is quoted in part."""
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", part) else quote(part)
            text += f".{name}" if text else name
    return text
