"""What to try next, as sentences from the measurements: is the rank used up, and what may narrow the gap to full?

Each sentence follows a rule (`planning/rules.py`), which names what supports it; the reports print both, and
`docs/comparing.md` has the rules as a table, which a test compares with this file:

    python -m graftlm.experiments.compare.advice        the table
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import numpy as np

from graftlm.experiments.compare.capacity import ROOMY, SATURATED
from graftlm.experiments.compare.results import Comparison, VariantResult
from graftlm.experiments.compare.verdict import Standing
from graftlm.planning.rules import Reason, Rule, table

STILL_FALLING = 0.02
"""More steps are worth trying if the last third of the steps brought more than this share of the whole gain."""

_QUALITY = "[quality.md](../bench/results/quality.md)"
_TESTED = "[advice.md](../bench/results/advice.md)"
USED_UP = Rule(
    name="rank used up",
    says="a higher rank is worth trying where the adapter is behind and its change is spread over nearly all of its rank",
    threshold=f"effective rank {SATURATED:.0%} of the rank",
    measurement=(
        "a choice: on E2E with the bundled base 75 to 82 % of rank 16 were in use, and rank 64 brought nothing; with SmolLM2 "
        f"89 % of rank 4, and rank 16 brought nothing ({_TESTED}, {_QUALITY}), so it is a hint to try and no more"
    ),
)
ROOM = Rule(
    name="room in the rank",
    says="a lower rank may do as well",
    threshold=f"effective rank {ROOMY:.0%} of the rank",
    measurement=(
        f"SmolLM2 on E2E had 48 % of rank 64 in use, and ranks 16 and 4 reached as much of full's gain ({_QUALITY}); of rank "
        "16 57 to 82 % were in use on the real bases. The bound itself is a choice"
    ),
)
ALL_LINEAR = Rule(
    name="targets",
    says="all linear layers, where only some have an adapter and it is behind",
    threshold="-",
    measurement=(
        "E2E on the bundled base, 2,110 rows once: attention alone 88.3 %, all linear layers 94.3 % of full's "
        f"gain ({_TESTED})"
    ),
)
EMBEDDING = Rule(
    name="embedding",
    says="full trains the embedding too; an adapter that is behind can, with modules-to-save=embeddings",
    threshold="-",
    measurement=(
        "E2E on the bundled base, 2,110 rows once: with the embedding 95.1 %, without 94.3 % of full's gain "
        f"({_TESTED})"
    ),
)
EDGE = Rule(
    name="rate at the edge",
    says="a wider search, where the best rate was the highest or lowest that was tried",
    threshold="-",
    measurement="arithmetic: the loss fell up to the last rate, so what lies beyond it is unknown",
)
NOT_SEARCHED = Rule(
    name="rate not searched",
    says="a search, where the learning rate was given",
    threshold="-",
    measurement="arithmetic: methods have different best rates, and only a search finds them",
)
FALLING = Rule(
    name="still falling",
    says="more steps, where the loss was still falling at the end",
    threshold=f"{STILL_FALLING:.0%} of the gain in the last third of the steps",
    measurement=(
        "E2E on the bundled base: a run of 132 steps with 2.1 % in its last third gained 5.5 % of full's gain "
        "more when it was three times as long; 264 rows ten times, where the loss rose at the end, gained nothing"
        f" ({_TESTED})"
    ),
)
DATA = Rule(
    name="other data",
    says="more or other data, where nothing else stands out",
    threshold="-",
    measurement="a choice: what is left when no other rule applies",
)
ALL = (USED_UP, ROOM, ALL_LINEAR, EMBEDDING, EDGE, NOT_SEARCHED, FALLING, DATA)


def advice(found: Comparison) -> list[Reason]:
    """Every sentence: first how much of each rank is in use, then what may narrow the gap to full."""
    return [*capacity_sentences(found), *gap_sentences(found)]


def capacity_sentences(found: Comparison) -> list[Reason]:
    """For every adapter: how much of its rank is in use, and whether a higher or lower rank is worth trying."""
    places = {s.name: s for s in found.verdict.standings}
    return [_rank(line, places[line.name], found.verdict.best) for line in found.lines if line.capacity is not None]


def _rank(line: VariantResult, standing: Standing, best: str) -> Reason:
    capacity = line.capacity
    assert capacity is not None
    used = f"{line.name}: its change is spread over {capacity.effective:.1f} of {capacity.rank} directions (median of layers)"
    behind = _is_behind(standing)
    if behind and capacity.saturated:
        more = f"{line.method}:rank={4 * capacity.rank}"
        return Reason(
            USED_UP, f"{used}, so the rank is used up while {best} is ahead: a higher rank is worth trying, {more}."
        )
    if behind:
        return Reason(USED_UP, f"{used}, so the rank is not what holds it back from {best}.")
    if capacity.saturated:
        return Reason(USED_UP, f"{used}; it uses all of its rank, and nothing here shows that more would bring more.")
    if capacity.share <= ROOMY and capacity.rank > 1:
        less = f"{line.method}:rank={capacity.rank // 2}"
        return Reason(ROOM, f"{used}: a lower rank may do as well, {less}, with a file half the size.")
    return Reason(ROOM, f"{used}: the rank is enough.")


def _is_behind(standing: Standing) -> bool:
    return standing.place in ("behind", "open") and standing.behind > 0


def gap_sentences(found: Comparison) -> list[Reason]:
    """What may narrow the gap of an adapter to full; empty where full is not ahead."""
    best = next(line for line in found.lines if line.name == found.verdict.best)
    if best.method != "full":
        return []
    said: list[Reason] = []
    for standing in found.verdict.standings:
        line = next(x for x in found.lines if x.name == standing.name)
        if _is_behind(standing) and line.capacity is not None:
            share = "" if line.share is None else f" ({line.share:.1%} of full's gain)"
            ways = _ways(found, line)
            said += [Reason(way.rule, f"What may narrow the gap of {line.name}{share}: {way}.") for way in ways]
    return said


def _ways(found: Comparison, line: VariantResult) -> list[Reason]:
    """Rank, targets, learning rate, steps: each with the measurement that speaks for it."""
    training = found.config.training(
        next(v for v in found.config.variants if v.name == line.name), seed=0, rate=None, out=found.config.out
    )
    ways: list[Reason] = []
    assert line.capacity is not None
    if line.capacity.saturated:
        ways.append(Reason(USED_UP, f"rank, for it is used up: {line.method}:rank={4 * line.capacity.rank}"))
    if training.targets != ("all-linear",):
        ways.append(Reason(ALL_LINEAR, "targets, for only some layers are adapted: targets=all-linear"))
    elif not training.modules_to_save:
        ways.append(Reason(EMBEDDING, "targets, for full trains the embeddings too: modules-to-save=embeddings"))
    if line.at_edge:
        ways.append(Reason(EDGE, "learning rate, for the best one tried was the last one tried: a wider search"))
    elif not line.tried:
        ways.append(Reason(NOT_SEARCHED, "learning rate, for it was given and not searched: leave --learning-rate out"))
    falling = still_falling(line)
    if falling is not None and falling > STILL_FALLING:
        ways.append(
            Reason(
                FALLING,
                f"steps, for its loss was still falling, by {falling:.1%} of its gain in the last third of the steps",
            )
        )
    return ways or [Reason(DATA, "more or other data, for nothing in the run itself stands out")]


def still_falling(line: VariantResult) -> float | None:
    """Share of the whole gain that came in the last third of the steps, a mean over seeds; None with fewer than three
    evaluations. The learning rate decays, so the loss of the very last steps is flat in any run."""
    found: list[float] = []
    for curve in line.curves:
        if len(curve.eval_losses) < 3:
            continue
        steps, losses = zip(*curve.eval_losses, strict=True)
        gain = losses[0] - losses[-1]
        if gain > 0:
            found.append((float(np.interp(steps[-1] * 2 / 3, steps, losses)) - losses[-1]) / gain)
    return sum(found) / len(found) if found else None


def supports(reasons: Iterable[Reason]) -> list[Rule]:
    """The rules that sentences follow, each once."""
    return list(dict.fromkeys(reason.rule for reason in reasons))


def main() -> None:
    """Print the table of the rules."""
    sys.stdout.write(table(ALL) + "\n")


if __name__ == "__main__":
    main()
