"""The verdict of a comparison, in sentences; "cannot tell" is a possible one.

    best     the lowest mean eval loss
    within   at most the margin behind the best: the whole interval is below it (a non-inferiority test)
    behind   more than the margin behind: the whole interval is above it
    open     neither; more rows or seeds would show which

The choice is the cheapest of the best and those within. It is certain if nothing cheaper is open and there are at least two
seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from graftlm.config import CompareConfig
from graftlm.experiments.compare.statistics import MOST_ROWS, MOST_SEEDS, Difference, Needed, PairedBootstrap

Place = Literal["best", "within", "behind", "open"]
_EQUAL = 1.02
"""Costs up to this factor over the lowest count as equal."""
_CHEAP = {"memory": "least peak memory", "size": "smallest saved file", "time": "shortest training"}


@dataclass(frozen=True)
class Standing:
    """One variant compared with the best."""

    name: str
    place: Place
    behind: float
    """Nats a token behind the best."""
    needed: Needed | None
    """The rows or seeds that would show whether an open variant is within the margin."""


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison."""

    best: str
    choice: str | None
    """The recommended variant; None where no method is better than the untrained base."""
    certain: bool
    margin: float
    """Nats a token."""
    standings: tuple[Standing, ...]
    """By loss, the best first."""
    differences: tuple[Difference, ...]
    """Every pair, the worse one first."""
    sentences: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.sentences)


def judge(bootstrap: PairedBootstrap, costs: Mapping[str, tuple[float, ...]], config: CompareConfig) -> Verdict:
    """Judge all variants; `costs` holds the cost that `--cost` names first, then those that decide between equals."""
    names = sorted(costs, key=bootstrap.loss)
    best = names[0]
    margin = config.margin / 100 * max(0.0, bootstrap.gain(best))
    differences = bootstrap.differences(names[::-1])
    against = {d.first: d for d in differences if d.second == best}
    standings = [Standing(best, "best", 0.0, None)]
    for name in names[1:]:
        found = against[name]
        standings.append(Standing(name, _place(found, margin), found.mean, None))
    standings = [
        s if s.place != "open" or bootstrap.seeds < 2
        else Standing(s.name, s.place, s.behind, bootstrap.needed(against[s.name], abs(margin - s.behind)))
        for s in standings
    ]  # fmt: skip
    sentences = [_losses(bootstrap, names), *(_pair(d, bootstrap, margin) for d in differences)]
    if bootstrap.gain(best) <= 0:
        sentences.append(
            f"No method is better than the untrained base ({bootstrap.base:.3f}): more data, more steps or other learning "
            "rates are needed before a choice means anything."
        )
        return Verdict(best, None, False, margin, tuple(standings), tuple(differences), tuple(sentences))
    choice = _cheapest([s.name for s in standings if s.place in ("best", "within")], costs)
    rivals = [s for s in standings if s.place == "open" and _cheapest([s.name, choice], costs) == s.name]
    certain = bootstrap.seeds > 1 and not rivals
    sentences = [*_choice(bootstrap, config, standings, choice, rivals), *sentences]
    return Verdict(best, choice, certain, margin, tuple(standings), tuple(differences), tuple(sentences))


def _place(found: Difference, margin: float) -> Place:
    if found.interval.high <= margin:
        return "within"
    return "behind" if found.interval.low > margin else "open"


def _cheapest(names: list[str], costs: Mapping[str, tuple[float, ...]]) -> str:
    """The cheapest; where costs are the same within 2 %, the next kind of cost decides."""
    left = names
    for kind in range(len(costs[names[0]])):
        lowest = min(costs[name][kind] for name in left)
        left = [name for name in left if costs[name][kind] <= _EQUAL * lowest]
    return left[0]


def _losses(bootstrap: PairedBootstrap, names: list[str]) -> str:
    found = ", ".join(f"{name} {bootstrap.loss(name):.3f}" for name in names)
    seeds = f"means of {bootstrap.seeds} seeds" if bootstrap.seeds > 1 else "one seed"
    drawn = f" ({bootstrap.groups} prompts)" if bootstrap.groups < bootstrap.rows else ""
    return f"Eval loss from {bootstrap.base:.3f} to: {found} ({seeds}, {bootstrap.rows} rows{drawn}, nats a token)."


def _pair(found: Difference, bootstrap: PairedBootstrap, margin: float) -> str:
    low, high = found.interval.low, found.interval.high
    size = f"{abs(found.mean):.3f}" if abs(found.mean) >= 0.001 else f"{abs(found.mean):.1e}"
    interval = f"95 % interval {low:+.3f} to {high:+.3f}"
    if found.distinguishable:
        return f"{found.second} is better than {found.first} by {size} ({interval})."
    if found.seed_error is None:
        way = "lower" if low > 0 else "not surely lower even on these rows"
        return (
            f"{found.second} against {found.first}: {size} {way} with this one seed ({interval}, of rows alone). Cannot tell: "
            "another seed may turn it; --seeds 3 would show."
        )
    return (
        f"{found.second} and {found.first} are indistinguishable at this n: {size} apart ({interval}). "
        f"{_deciding(found, bootstrap, margin)}"
    )


def _deciding(found: Difference, bootstrap: PairedBootstrap, margin: float) -> str:
    """The n that would decide, or why none is needed."""
    if max(abs(found.interval.low), abs(found.interval.high)) <= margin:
        return "The whole interval lies within the margin: for the choice they are equal."
    needed = found.needed
    if needed is None:
        return f"So small a difference would take more than {MOST_ROWS:,} eval rows or {MOST_SEEDS} seeds to show."
    return f"If it is as large as it looks, {enough(needed, bootstrap)} would show it, four times of five."


def enough(needed: Needed, bootstrap: PairedBootstrap) -> str:
    """Needed numbers in words, with the present ones."""
    ways: list[str] = []
    if needed.both is not None:
        rows, seeds = needed.both
        return f"about {rows:,} eval rows (now {bootstrap.rows:,}) with {seeds} seeds (now {bootstrap.seeds})"
    if needed.rows is not None:
        ways.append(f"about {needed.rows:,} eval rows (now {bootstrap.rows:,})")
    if needed.seeds is not None:
        ways.append(f"{needed.seeds} seeds (now {bootstrap.seeds})")
    return " or ".join(ways)


def _choice(
    bootstrap: PairedBootstrap, config: CompareConfig, standings: list[Standing], choice: str, rivals: list[Standing]
) -> list[str]:
    best = standings[0].name
    margin = f"{config.margin:g} % of {best}'s gain"
    within = [s.name for s in standings if s.place == "within"]
    said: list[str] = []
    if bootstrap.seeds == 1:
        said.append(
            f"Cannot tell: with one seed nothing here is more than a hint. On these rows {choice} would be the choice "
            f"({_CHEAP[config.cost]} within {margin})."
        )
    elif rivals:
        for rival in rivals:
            more = f": {enough(rival.needed, bootstrap)} would show it" if rival.needed is not None else ""
            said.append(f"Cannot tell whether {rival.name}, which is cheaper, is within {margin}{more}.")
        said.append(f"Until then {choice} is the safe choice.")
    elif choice != best:
        said.append(f"Take {choice}: of all shown to be within {margin} it has the {_CHEAP[config.cost]}.")
    elif within:
        said.append(f"Take {choice}: it has the lowest loss and the {_CHEAP[config.cost]} of all within {margin}.")
    elif len(standings) > 1:
        said.append(f"Take {choice}: no other is shown to be within {margin}.")
    return said
