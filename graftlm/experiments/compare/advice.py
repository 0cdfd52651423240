"""What to try next, as sentences from the measurements: is the rank used up, and what may narrow the gap to full?"""

from __future__ import annotations

from graftlm.experiments.compare.capacity import ROOMY
from graftlm.experiments.compare.results import Comparison, VariantResult
from graftlm.experiments.compare.verdict import Standing

STILL_FALLING = 0.02
"""More steps are worth trying if the last tenth of the steps brings at least this share of the whole gain."""


def capacity_sentences(found: Comparison) -> list[str]:
    """For every adapter: how much of its rank is in use, and whether a higher or lower rank is worth trying."""
    places = {s.name: s for s in found.verdict.standings}
    return [_rank(line, places[line.name], found.verdict.best) for line in found.lines if line.capacity is not None]


def _rank(line: VariantResult, standing: Standing, best: str) -> str:
    capacity = line.capacity
    assert capacity is not None
    used = f"{line.name}: its change is spread over {capacity.effective:.1f} of {capacity.rank} directions (median of layers)"
    behind = standing.place in ("behind", "open") and standing.behind > 0
    if behind and capacity.saturated:
        more = f"{line.method}:rank={4 * capacity.rank}"
        return f"{used}, so the rank is used up while {best} is ahead: a higher rank is worth trying, {more}."
    if behind:
        return f"{used}, so the rank is not what holds it back from {best}."
    if capacity.saturated:
        return f"{used}; it uses all of its rank, and nothing here shows that more would bring more."
    if capacity.share <= ROOMY and capacity.rank > 1:
        less = f"{line.method}:rank={capacity.rank // 2}"
        return f"{used}: a lower rank may do as well, {less}, with a file half the size."
    return f"{used}: the rank is enough."


def gap_sentences(found: Comparison) -> list[str]:
    """What may narrow the gap of an adapter to full; empty where full is not ahead."""
    best = next(line for line in found.lines if line.name == found.verdict.best)
    if best.method != "full":
        return []
    said: list[str] = []
    for standing in found.verdict.standings:
        line = next(x for x in found.lines if x.name == standing.name)
        if standing.place in ("behind", "open") and line.capacity is not None and standing.behind > 0:
            share = "" if line.share is None else f" ({line.share:.1%} of full's gain)"
            said.append(f"What may narrow the gap of {line.name}{share}: {'; '.join(_ways(found, line))}.")
    return said


def _ways(found: Comparison, line: VariantResult) -> list[str]:
    """Rank, targets, learning rate, steps: each with the measurement that speaks for it."""
    training = found.config.training(
        next(v for v in found.config.variants if v.name == line.name), seed=0, rate=None, out=found.config.out
    )
    ways: list[str] = []
    assert line.capacity is not None
    if line.capacity.saturated:
        ways.append(f"rank, for it is used up: {line.method}:rank={4 * line.capacity.rank}")
    if training.targets != ("all-linear",):
        ways.append("targets, for only some layers are adapted: targets=all-linear")
    elif not training.modules_to_save:
        ways.append("targets, for full trains the embeddings too: modules-to-save=embeddings")
    if line.at_edge:
        ways.append("learning rate, for the best one tried was the last one tried: a wider search")
    elif not line.tried:
        ways.append("learning rate, for it was given and not searched: leave --learning-rate out")
    falling = still_falling(line)
    if falling is not None and falling > STILL_FALLING:
        ways.append(f"steps, for its loss was still falling, by {falling:.1%} of its gain in a tenth of the steps")
    return ways or ["more or other data, for nothing in the run itself stands out"]


def still_falling(line: VariantResult) -> float | None:
    """Share of the whole gain between the last two evaluations, scaled to a tenth of the steps."""
    found: list[float] = []
    for curve in line.curves:
        if len(curve.eval_losses) < 3:
            continue
        (first, before), (last, after) = curve.eval_losses[-2:]
        gain = curve.eval_losses[0][1] - after
        if gain > 0 and last > first:
            found.append((before - after) / gain * (0.1 * last / (last - first)))
    return sum(found) / len(found) if found else None
