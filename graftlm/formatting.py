"""Numbers as people read them: bytes, parameters, durations; and values as messages quote them."""

from __future__ import annotations

import json
import math
from typing import Any

QUOTED = 40
"""Characters of a text that are quoted."""


def count(values: float) -> str:
    """A number of parameters as models are named by: 900, 3.4M, 7.2B."""
    for unit, power in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if values >= power:
            return f"{values / power:.1f}{unit}"
    return f"{values:.0f}"


def size(count: float) -> str:
    """Bytes in the unit that reads best, powers of 1000 as disks and cards are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """A time to three digits, from 100 s on in one or two units: 12.5 ms, 812 ms, 1.25 s, 42 s, 5 min, 3 h 20 min, 2 d 4 h."""
    if 0 < seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 9.995:
        return f"{seconds:.3g} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def quote(value: Any) -> str:
    """A JSON value as a message quotes it: in full where it is short, else its kind and size."""
    if isinstance(value, str):
        return (
            _json(value) if len(value) <= QUOTED else f'{_json(value[: QUOTED - 3])[:-1]}…" ({len(value)} characters)'
        )
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)} items" if len(value) > 1 else "a list of 1 item" if value else "an empty list"
    if isinstance(value, dict):
        return "an object" if value else "an empty object"
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"an integer of {len(str(abs(value)))} digits"
    if isinstance(value, float) and not math.isfinite(value):
        return "a number too large to read"
    return plain_number(value) if isinstance(value, float) else _json(value)


def plain_number(value: Any) -> str:
    """A number without a fraction of zero: 5 for 5.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else repr(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
