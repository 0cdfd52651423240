"""The section of docs/performance.md that `gpu.py` writes from bench/results/gpu.json; without figures it says so."""

from __future__ import annotations

from typing import Any

BEGIN, END = "<!-- gpu: written by `python bench/gpu.py --page` -->", "<!-- /gpu -->"
NONE = "*Not yet run on a GPU; traced.* Figures will stand here."
GIB = 1 << 30


def with_section(page: str, result: dict[str, Any] | None) -> str:
    """A page with what was measured between its marks. Raises ValueError if they are missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks the marks {BEGIN} and {END}")
    return f"{before}{begin}\n{section(result)}\n{end}{after}"


def section(result: dict[str, Any] | None) -> str:
    """The tables as Markdown. Raises ValueError for figures of tiny shapes or of a CPU, which are for trying the script."""
    if result is None:
        return NONE
    jobs: dict[str, Any] = result["jobs"]
    if any(job["small"] or job["device"] == "cpu" for job in jobs.values()):
        raise ValueError("these figures are of tiny shapes or of a CPU; run bench/gpu.py on a GPU, without --small")
    parts = [
        _machine(jobs),
        _checks(jobs),
        _correct(jobs),
        _steps(jobs),
        _decode(jobs),
        _kernels(jobs),
        _unfinished(jobs),
    ]
    return "\n\n".join(part for part in parts if part)


def _figures(jobs: dict[str, Any], name: str) -> dict[str, Any]:
    return jobs.get(name, {}).get("figures", {})


def _machine(jobs: dict[str, Any]) -> str:
    found = _figures(jobs, "environment")
    if "torch" not in found:
        return ""
    rate = found.get("matrix rate", {}).get("found")
    words = f"; a matmul of {rate['matrix']} reaches {rate['flops'] / 1e12:.0f} TFLOP/s" if rate else ""
    return f"{found['torch']['name']}, torch {found['torch']['version']}, {jobs['environment']['date'][:10]}{words}."


def _checks(jobs: dict[str, Any]) -> str:
    checks: dict[str, Any] = _figures(jobs, "environment").get("self checks", {})
    if not checks:
        return ""
    bad = {name: found.get("error", "differs") for name, found in checks.items() if not found.get("found")}
    said = "".join(f"\n- {name}: {why}" for name, why in bad.items())
    return f"{len(checks) - len(bad)} of {len(checks)} checks of kernels against the reference passed.{said}"


def _correct(jobs: dict[str, Any]) -> str:
    found = _figures(jobs, "correct")
    rows = [
        f"| {name} | {one['found']['cpu_loss']:.5f} | {one['found']['loss']:.5f} | {one['found']['worst_gradient']:.1e} |"
        if "found" in one else f"| {name} | | | {one['error']} |"
        for name, one in found.items() if name != "resumed"
    ]  # fmt: skip
    if not rows:
        return ""
    head = [
        "| the bundled base | loss, CPU | loss, GPU | largest difference of a gradient, relative |",
        "|---|---:|---:|---:|",
    ]
    resumed = found.get("resumed", {})
    said = resumed.get("error") or ("the same bits" if resumed.get("found", {}).get("same bits") else "other bits")
    return "\n".join([*head, *rows, "", f"A run stopped and resumed with `--deterministic`: {said}."])


def _steps(jobs: dict[str, Any]) -> str:
    rows: list[str] = []
    for job in ("7b-qlora", "7b-lora", "7b-full", "70b-qlora"):
        peers = _figures(jobs, f"peft-{job}")
        for name, one in _figures(jobs, job).items():
            if "plan" in one:
                rows.append(f"| {job} {name} | {' | '.join(_step(one, peers.get(name)))} |")
    if not rows:
        return ""
    head = "| step | tokens/s | of matmul rate | GPU busy | launches | allocated GiB | reserved | plan | PEFT tokens/s | GiB |"
    return "\n".join([head, "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|", *rows])


def _step(one: dict[str, Any], peer: dict[str, Any] | None) -> list[str]:
    """The cells of a point."""
    plan = f"{one['plan']['bytes'] / GIB:.2f}"
    theirs = ["", ""] if peer is None else _speed(peer)[::2]
    if "tokens_per_second" not in one:
        return ["out of memory", "", "", "", "", "", plan, *theirs]
    speed, reserved, allocated = _speed(one)
    profile = one.get("profile", {})
    busy = [f"{profile['busy']:.0%}", f"{profile['launches']:,}"] if profile else ["", ""]
    return [speed, f"{one['share']:.0%}", *busy, allocated, reserved, plan, *theirs]


def _speed(one: dict[str, Any]) -> list[str]:
    """Tokens a second, reserved and allocated memory."""
    if "tokens_per_second" not in one:
        return ["out of memory" if one.get("out_of_memory") else one.get("left out", "failed"), "", ""]
    return [
        f"{one['tokens_per_second']:,.0f}",
        *("" if one[k] is None else f"{one[k] / GIB:.2f}" for k in ("reserved", "allocated")),
    ]


def _decode(jobs: dict[str, Any]) -> str:
    found = _figures(jobs, "decode")
    copy = found.get("copy", {}).get("bytes_per_second")
    rows = [
        f"| {name} | {one['tokens_per_second']:,.0f} | {1e3 * one['seconds_per_step']:.1f} | "
        f"{one['bytes_per_second'] / copy:.0%} | {sum(one.get('synchronisations', {}).values())} |"
        for name, one in found.items() if "tokens_per_second" in one
    ]  # fmt: skip
    if not rows:
        return ""
    head = "| decode of 7B | tokens/s | ms a step | weights read, of a copy's rate | synchronisations |"
    return "\n".join([head, "|---|---:|---:|---:|---:|", *rows])


def _kernels(jobs: dict[str, Any]) -> str:
    rows: list[str] = []
    for group, found in _figures(jobs, "kernels").items():
        for name, one in found.items():
            if isinstance(one, dict):
                rate = f"{one['gb_per_second']:,.0f}" if "gb_per_second" in one else ""
                rows.append(f"| {group}: {name} | {one['microseconds']:,.0f} | {rate} |")
    return "\n".join(["| kernel | µs | GB/s |", "|---|---:|---:|", *rows]) if rows else ""


def _unfinished(jobs: dict[str, Any]) -> str:
    return "\n".join(f"- **{name}**: {job['error']}" for name, job in jobs.items() if job.get("error"))
