"""What the fake card writes down, as `fake_card.py` counts it and as a test reads it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass
class Trace:
    """What was asked of the card; keys are operations, or what happened and where."""

    launches: Counter[str] = field(default_factory=Counter[str])
    synchronisations: Counter[str] = field(default_factory=Counter[str])
    """The host waits for a value: `item at graftlm/training/trainer.py:170`."""
    copies: Counter[str] = field(default_factory=Counter[str])
    """Between host and card, as `to card, pageable at ...`; a pageable copy waits for the card too, a pinned one need not."""
    astray: Counter[str] = field(default_factory=Counter[str])
    """Triton programs that were launched on another card than their tensors are on."""
    peak_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Trace:
        """What `to_json` made; what a scenario says beside it is left out."""
        given = {one.name: found[one.name] for one in fields(cls)}
        return cls(**{name: Counter(value) if isinstance(value, dict) else value for name, value in given.items()})

    @property
    def pageable(self) -> int:
        """Copies from or to pageable memory."""
        return sum(count for what, count in self.copies.items() if "pageable" in what)

    def __str__(self) -> str:
        """For a failed test: what was most often launched, waited for and copied."""
        parts = [
            f"{self.launches.total()} launches: " + ", ".join(f"{n} {k}" for k, n in self.launches.most_common(12))
        ]
        for name in ("synchronisations", "copies", "astray"):
            found: Counter[str] = getattr(self, name)
            parts.append("\n    ".join([f"{found.total()} {name}", *(f"{n} {k}" for k, n in found.most_common(12))]))
        return "\n".join([*parts, f"peak {self.peak_bytes / 2**20:.2f} MiB"])


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a step may ask of a card: for each layer, and beside the layers."""

    launches: tuple[int, int]
    synchronisations: tuple[int, int] = (0, 2)
    pageable: tuple[int, int] = (0, 0)
    """Copies between the card and pageable memory."""

    def check(self, one: Trace, two: Trace) -> None:
        """Raise AssertionError where a step of one or of two layers takes more than this, or so much less that it is stale."""
        for name in ("launches", "synchronisations", "pageable"):
            first, second = (_total(getattr(trace, name)) for trace in (one, two))
            found = second - first, 2 * first - second
            allowed: tuple[int, int] = getattr(self, name)
            too_many = found[0] > allowed[0] or found[1] > allowed[1]
            stale = sum(allowed) > 1.1 * sum(found) + 5
            if too_many or stale:
                what = "more than" if too_many else "so much less than"
                raise AssertionError(
                    f"{found[0]} {name} a layer and {found[1]} beside them, {what} {allowed[0]} and {allowed[1]}, the budget"
                    f"{'' if too_many else ': lower it'}\n{two}"
                )

    def of(self, layers: int) -> int:
        """Launches of a model with so many layers."""
        return self.launches[0] * layers + self.launches[1]


def _total(found: Counter[str] | int) -> int:
    return found if isinstance(found, int) else found.total()
