"""Commands as messages advise them: whole, with the store they are about, so that they run as they stand."""

from __future__ import annotations

import shlex
from pathlib import Path

DEFAULT = Path("adapters")


def command(*words: object, store: Path | None = None) -> str:
    """`graft adapters ...`, quoted for a shell; `store` is named where it is not the default one."""
    place = [] if store is None or store == DEFAULT else ["--store", str(store)]
    return shlex.join(["graft", "adapters", *(str(word) for word in words), *place])


__all__ = ["DEFAULT", "command"]
