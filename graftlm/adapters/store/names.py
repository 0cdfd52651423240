"""References to versions: `formal` (the newest), `formal@3`, `formal@prod` (an alias).

Names are ASCII letters and digits, `.`, `_` and `-`, and begin with a letter or a digit, so that a name is never a path. An
alias is not a number. An adapter is given as a reference or as a folder; `looks_like_a_name` tells them apart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from graftlm.errors import StoreError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NUMBER = re.compile(r"[0-9]+")  # not `str.isdigit`, which accepts the digits of every script


@dataclass(frozen=True)
class Reference:
    """A name, with a number or an alias or neither."""

    name: str
    number: int | None = None
    alias: str | None = None

    def __str__(self) -> str:
        which = self.number if self.number is not None else self.alias
        return self.name if which is None else f"{self.name}@{which}"


def check_name(text: str, what: str = "name") -> str:
    """Return a name or alias; raises StoreError for one that is not allowed, with the rule."""
    if not _NAME.fullmatch(text):
        raise StoreError(
            f"{what} '{text}' is not allowed: at most 64 of A to Z, a to z, 0 to 9, '.', '_' and '-', the first of them a "
            "letter or a digit"
        )
    if what == "alias" and _NUMBER.fullmatch(text):
        raise StoreError(f"alias '{text}' is a number, and numbers are versions; use a word, such as prod")
    return text


def parse(text: str) -> Reference:
    """`formal`, `formal@3` or `formal@prod`. Raises StoreError."""
    name, at, which = text.partition("@")
    check_name(name)
    if not at:
        return Reference(name)
    if _NUMBER.fullmatch(which):
        if len(which) > 10 or not 0 < int(which) < 1 << 31:  # Python refuses to parse thousands of digits
            raise StoreError(f"'{text}': versions are counted from 1")
        return Reference(name, number=int(which))
    return Reference(name, alias=check_name(which, "alias"))


def looks_like_a_name(text: str) -> bool:
    """Whether an adapter that a user gave is a name in a store: there is no such folder, and it is not a path."""
    return not Path(text).is_dir() and "/" not in text and "\\" not in text and not text.startswith((".", "~"))
