"""Numbers as people read them: bytes, parameters, durations."""

from __future__ import annotations


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
