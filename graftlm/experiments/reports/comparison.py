"""report.md and report.html of a comparison: the same sentences and table; the page also has figures, and is one file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from graftlm.config import CompareConfig
from graftlm.experiments.compare.advice import advice, supports
from graftlm.experiments.compare.results import Comparison
from graftlm.experiments.reports import charts
from graftlm.experiments.reports.plots import plots
from graftlm.experiments.reports.table import rows
from graftlm.formatting import duration
from graftlm.planning.rules import plain

_HERE = Path(__file__).parent


def write_reports(found: Comparison, out: Path) -> None:
    """Write both reports into `out`."""
    values = contents(found)
    (out / "report.md").write_text(render("report.md.jinja", values, html=False), encoding="utf-8")
    (out / "report.html").write_text(render("report.html.jinja", values, html=True), encoding="utf-8")


def render(template: str, values: dict[str, Any], *, html: bool) -> str:
    """A report from its template, the page's style in it."""
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=False,
        keep_trailing_newline=True,
    )
    page = (_HERE / "report.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(**values, style=page + charts.style())


def contents(found: Comparison) -> dict[str, Any]:
    """The contents of both reports, as plain values."""
    config, data, verdict = found.config, found.data, found.verdict
    names = [line.name for line in found.lines]
    reasons = advice(found)
    seeds = f"{config.seeds} seeds" if config.seeds > 1 else "one seed"
    return {
        "title": f"{listed(names)} on {config.model}",
        "facts": (
            f"{data['rows']:,} training rows, {data['steps']:,} steps of {config.batch_size}, {data['eval_rows']:,} "
            f"eval rows, {seeds}; {_machine(found.environment)}, {str(found.environment.get('started', ''))[:10]}"
        ),
        "headline": headline(found),
        "certain": verdict.certain,
        "sentences": verdict.sentences,
        "names": names,
        "rows": rows(found),
        "failed": found.failed,
        "plots": plots(found),
        "capacity": [reason.text for reason in reasons],
        "supports": [f"{rule.name}: {plain(rule.measurement)}" for rule in supports(reasons)],
        "method": _method(found),
        "command": command_of(config),
    }


def listed(names: list[str]) -> str:
    """`full, lora and qlora`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def headline(found: Comparison) -> str:
    """The verdict in a few words."""
    verdict = found.verdict
    if verdict.choice is None:
        return "No method is better than the untrained base."
    if len(found.lines) == 1:
        return f"{found.lines[0].name}: eval loss {found.lines[0].loss:.3f}"
    if verdict.certain:
        return f"Take {verdict.choice}."
    return f"Cannot tell; {verdict.choice} until more is known."


def _machine(environment: dict[str, Any]) -> str:
    gpus = environment.get("gpus") or []
    return str(gpus[0]) if gpus else f"CPU, {environment.get('threads', '?')} threads"


def _method(found: Comparison) -> list[str]:
    config, data = found.config, found.data
    said = [
        "Every method saw the same rows in the same order with each seed, and was evaluated on the same eval rows, "
        "each run in a process of its own.",
        "A loss is the mean over all target tokens of the eval rows, of the step with the lowest one. ± is the standard "
        "deviation between seeds.",
        f"Intervals hold 95 %: {data['groups']:,} {'rows' if data['groups'] == data['eval_rows'] else 'prompts'} drawn "
        "with replacement, the same for every method, and seeds by Student's t"
        + (" (one seed: rows alone)." if config.seeds == 1 else "; several pairs are judged together (Holm)."),
        f"Peak memory is the process's own memory at its highest, above an idle process in the second line; {config.cost} is "
        f"what counts as cheap here, and {config.margin:g} % of the best gain as near enough.",
    ]
    for line in found.lines:
        if line.tried:
            tried = ", ".join(f"{t.rate:g}: {t.loss:.3f}" if t.before else f"{t.rate:g}: diverged" for t in line.tried)
            said.append(
                f"Learning rate of {line.name}, by loss on training rows set aside: {tried}. Taken: {line.learning_rate:g}."
            )
    if any(line.general_after is not None for line in found.lines):
        said.append(
            "Loss on general text is measured on "
            + (
                "40 short texts of many kinds that come with Graft"
                if config.general_data == "general"
                else config.general_data
            )
            + ", before and after; a rise is forgetting."
        )
    if config.metric:
        said.append(f"{config.metric} scores the likeliest answers to {data['prompts_answered']} eval prompts.")
    said += [f"{note[:1].upper()}{note[1:]}." for note in found.notes]
    total = sum(line.seconds for line in found.lines) * config.seeds
    said.append(f"The optimizer steps of all runs took {duration(total)}.")
    versions = found.environment.get("versions", {})
    said.append(
        "Versions: "
        + ", ".join(f"{name} {versions[name]}" for name in ("graftlm", "torch", "transformers") if name in versions)
        + "."
    )
    return said


def command_of(config: CompareConfig) -> str:
    """The command that runs this comparison again."""
    words = ["graft", "compare"]
    for name in CompareConfig.model_fields:
        if name not in config.model_fields_set:
            continue
        value, flag = getattr(config, name), f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            pairs = [f"{key}={number:g}" if key else f"{number:g}" for key, number in value.items()]
            words += [flag, ",".join(pairs)] if pairs else []
        elif name == "data":
            words += [word for source in value for word in (flag, source)]
        elif isinstance(value, tuple):
            words += [flag, ",".join(value)]
        elif value is not None:
            words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)
