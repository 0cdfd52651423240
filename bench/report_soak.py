"""The page of the figures of `soak.py`, and the two statistics it needs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

_T = 2.12  # Student's t at 97.5 %, 16 degrees of freedom: the 18 points of three minutes
GROUP = 10.0  # seconds whose mean is one point: neighbours within one are not independent


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile (nearest rank) and largest."""
    if not values:
        return {"count": 0, "p50": float("nan"), "p99": float("nan"), "most": float("nan")}
    ordered = sorted(values)
    rank = -(-99 * len(ordered) // 100) - 1
    return {"count": len(ordered), "p50": statistics.median(ordered), "p99": ordered[rank], "most": ordered[-1]}


def slope(samples: Sequence[tuple[float, int]]) -> dict[str, float]:
    """Least squares over (seconds, bytes): MB a minute, its 95 % interval from means of ten seconds, and the mean in MB."""
    groups: dict[int, list[tuple[float, int]]] = {}
    for moment, size in samples:
        groups.setdefault(int(moment // GROUP), []).append((moment, size))
    points = [(statistics.fmean(t for t, _ in g), statistics.fmean(b for _, b in g)) for g in groups.values()]
    if len(points) < 4:
        return {"points": len(points), "mb_a_minute": float("nan"), "within": float("nan"), "mean_mb": float("nan")}
    times, sizes = [t for t, _ in points], [b / 1e6 for _, b in points]
    fit = statistics.linear_regression(times, sizes)
    rest = [s - (fit.slope * t + fit.intercept) for t, s in zip(times, sizes)]
    middle = statistics.fmean(times)
    error = (sum(r * r for r in rest) / (len(points) - 2) / sum((t - middle) ** 2 for t in times)) ** 0.5
    return {
        "points": len(points), "mb_a_minute": 60 * fit.slope, "within": 60 * _T * error,
        "mean_mb": statistics.fmean(sizes),
    }  # fmt: skip


def page(found: Mapping[str, Any]) -> str:
    """All figures and their required values."""
    run = found.get("soak")
    pairs = [pair for name, pair in found.items() if name.startswith("fairness")]
    rows = [*(_soak_rows(run) if run else []), *(row for fair in pairs for row in _fair_rows(fair))]
    lines = ["# A server under everything at once", "", "`python bench/soak.py --json bench/results/soak.json`", ""]
    lines += ["| | found | must |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows), ""]
    return "\n".join([*lines, *(_soak(run) if run else []), *(line for fair in pairs for line in _fairness(fair))])


def _soak_rows(run: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The rows of the soak."""
    size, flat, right = run["size"], run["flat"], run["answers"].get("equal to its reference", 0)
    complete = right + run["answers"].get("other than its reference", 0)
    zero = " (holds 0)" if abs(flat["mb_a_minute"]) <= flat["within"] else ""
    full = run["refusals"].get("429 the queue is full", 0)
    return [
        ("crashes, hangs, unexpected answers", f"{len(run['faults'])}, below" if run["faults"] else "none", "none"),
        ("complete answers equal to their reference", f"{right:,} of {complete:,}", "all"),
        (
            f"memory after {size['settle']:g} s, mean {flat['mean_mb']:.1f} MB",
            f"{flat['mb_a_minute']:+.2f} MB a minute, 95 % interval ± {flat['within']:.2f}{zero}", "0 within noise",
        ),
        ("answers that waited, at most", f"{run['most_waiting']}, and {full:,} times 429", f"{size['queue']}"),
    ]  # fmt: skip


def _soak(run: Mapping[str, Any]) -> list[str]:
    """Counts and latencies of the soak."""
    size, wait = run["size"], run["first_token_seconds"]
    return [
        f"{size['clients']} clients for {size['seconds']:g} s on the bundled base in float32, {size['slots']} slots for 10 "
        f"adapters of ranks 1 to 33, a batch of {size['running']}, a queue of {size['queue']}; {run['references']} references; "
        f"{_where(run)}.", "",
        f"{run['tokens']:,} tokens generated. First token after {_ms(wait['p50'])} in the median, {_ms(wait['p99'])} at the "
        f"99th percentile, the wait in the queue included; the slowest /healthz took {_ms(run['slowest_health_seconds'])}.", "",
        *(_counts(title, run[key]) for title, key in (("Answers", "answers"), ("Refusals", "refusals"), ("Deeds", "deeds"))),
        *(["Faults:", "", *(f"- {fault}" for fault in run["faults"]), ""] if run["faults"] else []),
    ]  # fmt: skip


def _fair_rows(fair: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    quiet, loud = fair["rate"], 100 * fair["rate"]
    p99 = {name: _ms(fair[name]["seconds"]["p99"]) for name in _TURNS}
    return [
        (
            f"{_base(fair)}: 99th percentile of a tenant with {quiet:g} requests a second, beside one with "
            f"{loud:g}",
            f"{fair['seconds_p99_ratio']:.2f}x ({p99['beside']}, alone {p99['alone']})", "2x",
        ),
        (
            "the same, relative to the tenant alone while the other client's requests go to another process on the same cores",
            f"{fair['elsewhere_p99_ratio']:.2f}x ({p99['beside']}, {p99['elsewhere']})", "",
        ),
    ]  # fmt: skip


_TURNS = {
    "alone": "alone", "elsewhere": "alone, while another process refuses the other client's requests", "beside": "beside",
}  # fmt: skip


def _base(fair: Mapping[str, Any]) -> str:
    """The base that is served."""
    return f"{fair['shape'] + ' of random weights' if fair['shape'] else 'bundled base'}, {fair['precision']}"


def _fairness(fair: Mapping[str, Any]) -> list[str]:
    """The two tenants, in full."""
    lines = [f"| {_base(fair)} | median | 99th percentile | most | first token, 99th |", "|---|---|---|---|---|"]
    for name, title in _TURNS.items():
        whole = [_ms(fair[name]["seconds"][which]) for which in ("p50", "p99", "most")]
        lines.append(f"| {title} | {' | '.join(whole)} | {_ms(fair[name]['first']['p99'])} |")
    statuses = ", ".join(f"{name} {count:,}" for name, count in sorted(fair["beside"]["statuses"].items()))
    turns = f"{2 * fair['seconds']:g} s each in two turns; answers of 24 tokens by one of three adapters"
    return [*lines, "", f"Fairness: {turns}; {_where(fair)}. Statuses beside the loud one: {statuses}.", ""]


def _where(part: Mapping[str, Any]) -> str:
    machine, cores = part["machine"], part["cores"]
    shared = f"{cores} cores" if cores > 1 else "one core"
    return f"{machine['processor']}, {shared} for server and clients, {machine['date'][:10]}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms"


def _counts(title: str, counts: Mapping[str, int]) -> str:
    listed = "; ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
    return f"{title}: {listed}.\n"
