"""From the run folders of a comparison to its figures: one line a variant, losses by row and seed, and the verdict."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from graftlm import terminal
from graftlm.config import CompareConfig
from graftlm.config.aliases import renamed_summary
from graftlm.config.compare import Variant
from graftlm.errors import RunError
from graftlm.experiments.compare import capacity
from graftlm.experiments.compare.data import ComparisonData
from graftlm.experiments.compare.learning_rate import RateSearch, TriedRate
from graftlm.experiments.compare.run import RESULT, base_scores, run_folder
from graftlm.experiments.compare.scoring import SCORES, read_scores
from graftlm.experiments.compare.statistics import Floats, Interval, PairedBootstrap
from graftlm.experiments.compare.verdict import Verdict, judge
from graftlm.jsonfile import read_json
from graftlm.training.run_files import read_evaluation, read_metrics

WHEN = {
    "full": "the last point of quality, or more data than an adapter holds; one model to serve, memory at hand",
    "lora": "the default: near full's quality, small files, many variants on one base, exact base in 16 bits",
    "qlora": "memory is short, many trials, or a model too large in 16 bits, if NF4 does not raise its loss by much",
}


@dataclass(frozen=True)
class Curve:
    """The losses of one run by step."""

    seed: int
    train: tuple[tuple[int, float], ...]
    """(step, mean loss of a target token in that step's batch), in nats."""
    eval_losses: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class VariantResult:
    """One variant's line of the table; figures of several seeds are means, speeds medians."""

    name: str
    method: str
    trained: str
    trainable_parameters: int
    base_parameters: int
    base_precision: str
    base_bytes: int
    peak_planned: int | None
    """Bytes, as the plan of the first run has it; None where there is no plan."""
    peak_measured: int
    """Bytes, highest of all seeds."""
    idle: int
    """Bytes of the process before it loaded anything; part of the peak."""
    saved_bytes: int
    learning_rate: float
    tried: tuple[TriedRate, ...]
    """Rates of the search, by rate; empty where the rate was given."""
    at_edge: bool
    """Whether the best rate was the highest or lowest tried."""
    loss_before: float
    loss: float
    losses: tuple[float, ...]
    """By seed."""
    std: float | None
    share: float | None
    """Gain over the base as a share of the reference's."""
    share_interval: Interval | None
    task_score: float | None
    task_scores: tuple[float, ...]
    task_score_before: float | None
    general_before: float | None
    general_after: float | None
    tokens_per_second: float | None
    seconds: float
    """Of the optimizer steps of one run."""
    shares_base: bool
    when: str
    curves: tuple[Curve, ...]
    capacity: capacity.Capacity | None


@dataclass(frozen=True, repr=False)
class Comparison:
    """The figures and the verdict of a comparison."""

    config: CompareConfig
    lines: tuple[VariantResult, ...]
    failed: dict[str, str]
    reference: str
    """The variant whose gain is 100 %: full where it was run, else the best."""
    verdict: Verdict
    data: dict[str, Any]
    notes: tuple[str, ...]
    environment: dict[str, Any]

    def __repr__(self) -> str:
        return terminal.as_text(self._draw)

    def _repr_html_(self) -> str:
        return terminal.as_html(self._draw)

    def _draw(self, where: Console) -> None:
        from graftlm.experiments.compare.view import CompareView

        CompareView(where).comparison(self)

    def to_json(self) -> dict[str, Any]:
        """Every figure as plain JSON values."""
        return {
            "asked": self.config.to_json(), "reference": self.reference, "lines": [asdict(line) for line in self.lines],
            "failed": self.failed, "verdict": asdict(self.verdict), "data": self.data, "notes": list(self.notes),
            "environment": self.environment,
        }  # fmt: skip


def collect(
    config: CompareConfig,
    comparison_data: ComparisonData,
    rates: Mapping[str, RateSearch],
    failed: Mapping[str, str],
) -> Comparison:
    """Read every run and judge. Raises RunError where runs do not belong together."""
    variants = [v for v in config.variants if v.name not in failed]
    losses: dict[str, Floats] = {}
    bases: dict[str, Floats] = {}
    # In the order of the eval examples; `train_variants` has checked that every run had the same ones.
    tokens = np.array([int(d.loss_mask[1:].sum()) for d in comparison_data.eval_dataset.examples], np.int64)
    for variant in variants:
        found: list[Floats] = []
        for seed in range(config.seeds):
            folder = run_folder(config, variant, seed)
            lines = read_evaluation(folder / "evaluation.jsonl")
            if [line["target_tokens"] for line in lines] != tokens.tolist():
                raise RunError(f"{folder / 'evaluation.jsonl'} has other rows than --eval-data; take another --out")
            found.append(np.array([line["loss_after"] for line in lines], np.float64))
            bases[variant.name] = np.array([line["loss_before"] for line in lines], np.float64)
        losses[variant.name] = np.stack(found)
    _same_base(config, variants)
    mean = {name: float(found.sum()) for name, found in losses.items()}
    reference = next((v.name for v in variants if v.method == "full"), min(mean, key=lambda name: mean[name]))
    bootstrap = PairedBootstrap(losses, bases[reference], tokens, comparison_data.groups)
    drawn = [
        _line(config, v, bootstrap, reference, float(bases[v.name].sum() / tokens.sum()), rates[v.name])
        for v in variants
    ]
    costs = {line.name: _cost(config, line) for line in drawn}
    verdict = judge(bootstrap, costs, config)
    first = run_folder(config, variants[0], 0)
    environment = read_json(first / "environment.json", RunError)
    data = {
        "rows": comparison_data.train.rows,
        "tokens": comparison_data.train.tokens,
        "target_tokens": comparison_data.train.target_tokens,
        "digest": comparison_data.train.digest,
        "eval_rows": comparison_data.eval_dataset.rows,
        "groups": bootstrap.groups,
        "eval_tokens": int(tokens.sum()),
        "eval_digest": comparison_data.eval_dataset.digest,
        "steps": comparison_data.steps,
        "prompts_answered": len(comparison_data.prompts),
    }
    return Comparison(config, tuple(drawn), dict(failed), reference, verdict, data, comparison_data.notes, environment)


def _cost(config: CompareConfig, line: VariantResult) -> tuple[float, ...]:
    """Costs of a method, that of `--cost` first; the others decide between equals."""
    kinds = {"memory": line.peak_measured, "size": line.saved_bytes, "time": line.seconds}
    return (float(kinds.pop(config.cost)), *(float(v) for v in kinds.values()))


def _same_base(config: CompareConfig, variants: Sequence[Variant]) -> None:
    """Raise RunError where two runs were trained on bases of different content."""
    known: dict[str, Path] = {}
    for variant in variants:
        for seed in range(config.seeds):
            folder = run_folder(config, variant, seed) / ("adapter" if variant.adapter else "model")
            manifest = read_json(folder / "graft.json", RunError)
            known.setdefault(str(manifest["base"]["fingerprint"]), folder)
    if len(known) > 1:
        one, other = list(known.values())[:2]
        raise RunError(f"{one} and {other} were trained on different bases; take another --out")


def _line(
    config: CompareConfig,
    variant: Variant,
    bootstrap: PairedBootstrap,
    reference: str,
    before: float,
    rate: RateSearch,
) -> VariantResult:
    folders = [run_folder(config, variant, seed) for seed in range(config.seeds)]
    summaries = [renamed_summary(read_json(f / RESULT, RunError)["summary"]) for f in folders]
    training = config.training(variant, seed=0, rate=None, out=config.out)
    bare = read_scores(base_scores(config, training.stored_precision)) or {}
    scores = [read_scores(f / SCORES) or {} for f in folders]
    steps = [[m for m in read_metrics(f / "metrics.jsonl") if m["kind"] == "train"] for f in folders]
    first = summaries[0]
    share = bootstrap.share(variant.name, reference)
    tasks = tuple(float(s["task_score"]) for s in scores if "task_score" in s)
    general = [float(s["general_loss"]) for s in scores if "general_loss" in s]
    speeds = [s["tokens_per_second"] for s in summaries if s["tokens_per_second"]]
    return VariantResult(
        name=variant.name,
        method=variant.method,
        trained="every weight" if not variant.adapter else _trained(training),
        trainable_parameters=first["trainable_parameters"],
        base_parameters=first["base_parameters"],
        base_precision=first["base_precision"],
        base_bytes=first["base_bytes"],
        peak_planned=planned_peak(folders[0]),
        peak_measured=max(s["peak_memory_bytes"] for s in summaries),
        idle=max(s["idle_memory_bytes"] for s in summaries),
        saved_bytes=first["saved_bytes"],
        learning_rate=rate.rate,
        tried=rate.tried,
        at_edge=rate.at_edge,
        loss_before=before,
        loss=bootstrap.loss(variant.name),
        losses=tuple(float(v) for v in bootstrap.by_seed[variant.name]),
        std=bootstrap.std(variant.name),
        share=share[0] if share else None,
        share_interval=share[1] if share else None,
        task_score=statistics.fmean(tasks) if tasks else None,
        task_scores=tasks,
        task_score_before=bare.get("task_score"),
        general_before=bare.get("general_loss"),
        general_after=statistics.fmean(general) if general else None,
        tokens_per_second=statistics.median(speeds) if speeds else None,
        seconds=statistics.median(sum(m["seconds"] for m in found) for found in steps),
        shares_base=variant.adapter,
        when=WHEN[variant.method],
        curves=tuple(_curve(seed, folder) for seed, folder in enumerate(folders)),
        capacity=capacity.measure(folders[0] / "adapter") if variant.adapter else None,
    )


def _trained(training: Any) -> str:
    ranks = sorted({training.rank, *training.rank_pattern.values()})
    whole = f", {' and '.join(training.modules_to_save)} whole" if training.modules_to_save else ""
    return f"A, B of rank {' and '.join(map(str, ranks))} on {', '.join(training.targets)}{whole}"


def planned_peak(folder: Path) -> int | None:
    """The predicted peak that a run's plan.json holds, in bytes; None where it holds none."""
    try:
        plan = read_json(folder / "plan.json", RunError)
        return int(plan["predicted"]["peak_bytes"])
    except (RunError, ValueError, KeyError, TypeError):
        return None


def _curve(seed: int, folder: Path) -> Curve:
    lines = read_metrics(folder / "metrics.jsonl")

    def points(kind: str) -> tuple[tuple[int, float], ...]:
        key = "eval_loss" if kind == "eval" else "loss"
        return tuple((int(m["step"]), float(m[key])) for m in lines if m["kind"] == kind)

    return Curve(seed, points("train"), points("eval"))
