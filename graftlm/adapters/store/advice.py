"""`graft adapters` commands in messages: complete, including the store, so that they can be copied and run."""

from __future__ import annotations

import shlex
from pathlib import Path

DEFAULT = Path("adapters")


def command(*words: object, store: Path | None = None) -> str:
    """`graft adapters ...`, quoted for a shell; `store` is included if it is not the default one."""
    place = [] if store is None or store == DEFAULT else ["--store", str(store)]
    return shlex.join(["graft", "adapters", *(str(word) for word in words), *place])


__all__ = ["DEFAULT", "command"]
