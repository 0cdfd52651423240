"""Each message that docs/troubleshooting.md quotes is one that the package raises."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
_VALUE = "\0"  # stands in a message of the source for a value


def quoted() -> list[str]:
    """The messages of the page: its indented lines."""
    return [line.strip() for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("    ")]


def _text(node: ast.expr) -> str:
    """A string of the source, its values left open."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    parts = node.values if isinstance(node, ast.JoinedStr) else []
    return "".join(_text(part) if isinstance(part, ast.Constant) else _VALUE for part in parts)


@functools.cache
def _messages() -> str:
    """Every string of the package, a line each."""
    found: list[str] = []
    for path in sorted((ROOT / "graftlm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Constant, ast.JoinedStr)):
                found.append(_text(node).replace("\n", " "))
    return "\n".join(found)


def is_raised(message: str) -> bool:
    """Whether the fixed words of each part of a message stand in their order in one string of the source.

    A fault of a row is put together of three strings: found; expected. Way out.
    """
    return all(_stands_there(part) for part in re.split(r"(?:columns: |; expected |\. )", message) if part)


def _stands_there(part: str) -> bool:
    pieces = [re.escape(piece.strip()) for piece in re.split(r"<[^>]*>", part) if piece.strip(" ()'.;,:")]
    return re.search(r"[^\n]*".join(pieces), _messages(), flags=re.IGNORECASE) is not None


@pytest.mark.parametrize("message", quoted())
def test_a_message_of_the_page_is_one_of_the_package(message: str) -> None:
    assert is_raised(message), f"no string of graftlm/ says: {message}"


def test_the_page_has_at_least_twenty_messages() -> None:
    assert len(set(quoted())) >= 20


def test_a_message_that_nobody_raises_is_found() -> None:
    assert not is_raised("target '<name>' matches no module of this model")
    assert not is_raised("<folder> holds no adapter; buy <one>")
