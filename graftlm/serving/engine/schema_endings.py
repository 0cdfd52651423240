"""Whether a JSON schema can be answered at all: each of its parts needs an answer that ends.

    {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}     {"next":{"next":{"next":...
    {"$ref": "#"}                                                                       nothing at all

llguidance follows such a schema to the limit of tokens, or writes nothing. A part ends when all it requires does, and when of
alternatives one does: a graph of nodes that hold once `need` of their children hold. Holding spreads from the parts that
require nothing, each edge once (Dowling and Gallier 1984, doi:10.1016/0743-1066(84)90014-1); what is left does not end.

Read are `$ref` within the schema, `type`, `enum`, `const`, `anyOf`, `oneOf`, `allOf` and the members of objects and arrays. Any
other keyword is taken to end, as is a part without a `type`: a number would do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote


@dataclass
class _Node:
    place: str
    need: int = 0
    children: list[int] = field(default_factory=list[int])


def endless(schema: dict[str, Any]) -> str | None:
    """The place (a JSON pointer, such as `#/properties/next`) of a part that needs itself again and again; None for none."""
    nodes = _Parts(schema).nodes
    parents: list[list[int]] = [[] for _ in nodes]
    for number, node in enumerate(nodes):
        for child in node.children:
            parents[child].append(number)
    left = [node.need for node in nodes]
    ready = [number for number, need in enumerate(left) if need <= 0]
    while ready:
        for parent in parents[ready.pop()]:
            left[parent] -= 1
            if left[parent] == 0:
                ready.append(parent)
    at = next((number for number, need in enumerate(left) if need > 0), None)
    seen: set[int] = set()
    while at is not None and at not in seen:  # from what fails to what makes it fail, until that comes again
        seen.add(at)
        at = next((child for child in nodes[at].children if left[child] > 0), at)
    return None if at is None else nodes[at].place


class _Parts:
    """The nodes of a schema: one for each of its parts, and some between them."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self.nodes: list[_Node] = []
        self._root = schema
        self._of: dict[int, int] = {}  # the node of a part, by its id
        self._unread: list[tuple[Any, int]] = []
        self._part(schema, "#")
        while self._unread:
            part, number = self._unread.pop()
            children = list(self._required(part, self.nodes[number].place))
            self.nodes[number].children, self.nodes[number].need = children, len(children)

    def _part(self, part: Any, place: str) -> int:
        found = self._of.get(id(part)) if isinstance(part, dict) else None
        if found is None:
            found = self._node(place)
            if isinstance(part, dict):
                self._of[id(part)] = found
                self._unread.append((part, found))
        return found

    def _node(self, place: str, need: int = 0, children: Iterable[int] = ()) -> int:
        self.nodes.append(_Node(place, need, list(children)))
        return len(self.nodes) - 1

    def _required(self, part: dict[str, Any], place: str) -> Iterable[int]:
        """All of what must hold for a part to end."""
        if "enum" in part or "const" in part:
            return
        if isinstance(part.get("$ref"), str):
            target = self._target(part["$ref"])
            if target is not None:
                yield self._part(target, part["$ref"])
        for number, one in enumerate(_list(part.get("allOf"))):
            yield self._part(one, f"{place}/allOf/{number}")
        for key in ("anyOf", "oneOf"):
            if key in part:
                among = [self._part(one, f"{place}/{key}/{i}") for i, one in enumerate(_list(part[key]))]
                yield self._node(place, 1, among)
        objects = self._node(
            place, *_all(self._object(part, place))
        )  # read whatever the type: what may be written must end
        arrays = self._node(place, *_all(self._array(part, place)))
        kinds = {part["type"]} if isinstance(part.get("type"), str) else set(map(str, _list(part.get("type"))))
        if kinds and kinds <= {"object", "array"}:
            yield self._node(place, 1, [{"object": objects, "array": arrays}[kind] for kind in kinds])

    def _object(self, part: dict[str, Any], place: str) -> Iterable[int]:
        given = part.get("properties")
        listed = {
            key: self._part(one, f"{place}/properties/{_escaped(key)}")
            for key, one in (given.items() if isinstance(given, dict) else ())
        }
        patterns = part.get("patternProperties")
        others = [
            self._part(one, f"{place}/patternProperties/{_escaped(key)}")
            for key, one in (patterns.items() if isinstance(patterns, dict) else ())
        ]
        more = part.get("additionalProperties", True)
        if more is not False:
            others.append(self._part(more, f"{place}/additionalProperties"))
        required = {key for key in _list(part.get("required")) if isinstance(key, str)}
        yield from (listed[key] for key in required if key in listed)
        least = part.get("minProperties", 0)
        besides = (least if isinstance(least, int) else 0) - len(required)
        unlisted = any(key not in listed for key in required)
        if unlisted or besides > 0:
            optional = [node for key, node in listed.items() if key not in required]
            enough = [self._node(place, besides, optional)] if besides > 0 and not unlisted else []
            yield self._node(place, 1, [*others, *enough])

    def _array(self, part: dict[str, Any], place: str) -> Iterable[int]:
        items = part.get("items", True)
        first = _list(items) or _list(part.get("prefixItems"))
        rest = part.get("additionalItems", True) if isinstance(items, list) else items
        key = "items" if isinstance(items, list) else "prefixItems"
        begun = [self._part(one, f"{place}/{key}/{i}") for i, one in enumerate(first)]
        then = self._part(rest, f"{place}/{'additionalItems' if isinstance(items, list) else 'items'}")
        least = part.get("minItems", 0)
        least = least if isinstance(least, int) else 0
        yield from {*begun[: max(least, 0)]}
        if least > len(begun):
            yield then

    def _target(self, reference: str) -> Any:
        """What a reference within the schema points at; None for one that points elsewhere, or at nothing."""
        base, _, fragment = reference.partition("#")
        if base not in ("", self._root.get("$id")) or fragment[:1] not in ("", "/"):
            return None
        at = self._root
        for key in map(unquote, fragment.split("/")[1:]):
            name = key.replace("~1", "/").replace("~0", "~")
            if isinstance(at, dict):
                at = at.get(name)
            else:
                at = at[int(name)] if isinstance(at, list) and name.isdecimal() and int(name) < len(at) else None
        return at


def _all(children: Iterable[int]) -> tuple[int, list[int]]:
    found = list(children)
    return len(found), found


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
