"""Runs that test the rules of the advice on the bundled base and E2E: ranks, targets, epochs, large batches.

    python bench/advice.py                    # every run, one after another; interrupted, the same command goes on
    python bench/advice.py --only batch
    python bench/advice.py --no-run           # write the tables of what is there

    rank     ranks 1 to 64 and full training, 3 epochs over 264 and 2,110 rows
    distance excess loss on the prompts and NF4's damage, as `graft plan --data` measures them, in each regime of quality.py
    batch    LoRA and full training over the same 2,110 rows in batches of 8 and 128, each at two rates
    targets  LoRA on attention alone, on all linear layers, and with the embedding trained too, once over 2,110 rows
    epochs   LoRA for 1, 3 and 10 epochs over 264 rows, for 1 and 3 over 2,110

Needs the folder shared/data beside the checkout, and for real bases their packages (quality.py names them). Figures go to
bench/results/advice.json, tables to advice.md. A loss is that of the best evaluation, in nats a target token over 453 eval
rows of prompts that are in no training row; one seed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quality import REGIMES, Absent, base_of, data_of

ROOT = Path(__file__).resolve().parent.parent
E2E = ROOT.parent / "shared" / "data" / "e2e"
RESULTS = ROOT / "bench" / "results" / "advice.json"
ROWS, RANKS, BATCHES = (264, 2110), (1, 4, 16, 64), (8, 128)
EPOCHS = {264: (1, 3, 10), 2110: (1, 3)}
RATES = {"lora": 6.3e-3, "full": 2e-3}
"""Found by `graft compare` on this base and data (quality.md)."""
SPREAD = (1.0, 10**0.5)
PARTS = ("distance", "targets", "epochs", "rank", "batch")
TARGETS: dict[str, dict[str, Any]] = {
    "attention": {"targets": ("attention",)}, "all-linear": {}, "and embedding": {"modules_to_save": ("embeddings",)},
}  # fmt: skip
Part = Literal["distance", "rank", "targets", "epochs", "batch"]


@dataclass(frozen=True)
class Point:
    """One run; runs that two parts need are made once."""

    method: Literal["lora", "full"]
    rows: int
    epochs: int
    batch: int = 16
    rank: int = 16
    rate: float = 1.0
    """A factor of the method's rate."""
    targets: str = "all-linear"

    @property
    def name(self) -> str:
        rank = f"-r{self.rank}" if self.method == "lora" else ""
        targets = "" if self.targets == "all-linear" else f"-{self.targets.replace(' ', '-')}"
        return f"{self.method}{rank}-{self.rows}x{self.epochs}-b{self.batch}-{self.rate:.2f}{targets}"


def distances(found: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Measure each base on each data set that is not in `found` yet, on the rows that quality.py trains on; a turn for each."""
    from graftlm.commands.plan import plan
    from graftlm.config import PlanConfig

    for name, regime in REGIMES.items():
        if f"distance-{name}" in found:
            continue
        with tempfile.TemporaryDirectory() as place:
            try:
                model, (rows, _) = base_of(regime, Path(place)), data_of(regime, Path(place))
            except Absent as absent:
                sys.stdout.write(f"distance-{name}: {absent}\n")
                continue
            report = plan(PlanConfig(models=(model,), data=(rows,), max_length=0))
        shift = report.plans[0].facts.domain_shift
        if shift is not None:
            found[f"distance-{name}"] = {"base": regime.base, "data": regime.data, **shift.to_json()}
            yield


def points(part: Part) -> list[Point]:
    """The runs of a part."""
    if part == "distance":
        return []
    if part == "rank":
        ranks = [Point("lora", rows, 3, rank=rank) for rows in reversed(ROWS) for rank in RANKS]
        return [*(Point("full", rows, 3) for rows in reversed(ROWS)), *ranks]
    if part == "batch":
        methods: tuple[Literal["lora", "full"], ...] = ("lora", "full")
        return [
            Point(method, ROWS[-1], 1, batch=batch, rate=rate)
            for method in methods
            for batch in BATCHES
            for rate in SPREAD
        ]
    if part == "targets":
        return [Point("full", ROWS[-1], 1)] + [Point("lora", ROWS[-1], 1, targets=targets) for targets in TARGETS]
    return [Point("lora", rows, epochs) for rows in ROWS for epochs in EPOCHS[rows]]


def run(point: Point) -> dict[str, Any]:
    """Train one point; its figures."""
    from graftlm.commands.train import train
    from graftlm.config import TrainConfig
    from graftlm.experiments.compare.capacity import measure
    from graftlm.training.run_files import read_metrics

    with tempfile.TemporaryDirectory() as place:
        lines = (E2E / "train.jsonl").read_text(encoding="utf-8").splitlines()
        random.Random(0).shuffle(lines)  # the file has the rows of one prompt together
        (Path(place) / "rows.jsonl").write_text("\n".join(lines[: point.rows]) + "\n", encoding="utf-8")
        values = {"rank": point.rank, **TARGETS[point.targets]} if point.method == "lora" else {}
        summary = train(
            TrainConfig.build(
                {
                    "model": "demo", "data": [f"{place}/rows.jsonl"], "eval_data": str(E2E / "valid.jsonl"),
                    "method": point.method, "epochs": point.epochs, "batch_size": point.batch,
                    "learning_rate": RATES[point.method] * point.rate, "out": f"{place}/run", **values,
                }
            )
        )  # fmt: skip
        evaluations = [m for m in read_metrics(Path(place) / "run" / "metrics.jsonl") if m["kind"] == "eval"]
        used = measure(Path(summary["adapter_folder"])) if point.method == "lora" else None
    return {
        "method": point.method, "rows": point.rows, "epochs": point.epochs, "batch": point.batch,
        "rank": point.rank if point.method == "lora" else None, "learning_rate": RATES[point.method] * point.rate,
        "steps": summary["steps"], "trainable_parameters": summary["trainable_parameters"],
        "target_tokens": summary["target_tokens"], "loss_before": summary["eval_loss_before"],
        "effective_rank": None if used is None else used.effective,
        "rank_share": None if used is None else used.share,
        "eval_losses": [(m["step"], round(m["eval_loss"], 5)) for m in evaluations],
        "loss": summary["eval_loss_after"], "seconds": round(summary["seconds_training"], 1),
    }  # fmt: skip


def tables(found: dict[str, dict[str, Any]]) -> str:
    """The tables of Markdown."""
    parts = [_distances(found), _ranks(found), _targets(found), _epochs(found), _batches(found)]
    return "# Rules of the advice, tested\n\n`python bench/advice.py`, figures in `advice.json`. " + (
        "The bundled base on E2E, one seed; loss in nats a target token\nover 453 eval rows of unseen prompts, at the best "
        "evaluation. Rates: LoRA 6.3e-3, full 2e-3.\n\n"
    ) + "\n\n".join(parts) + "\n"  # fmt: skip


def _loss(found: dict[str, dict[str, Any]], point: Point) -> float | None:
    return found[point.name]["loss"] if point.name in found else None


def _cell(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def _table(head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return "Not run yet."
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _distances(found: dict[str, dict[str, Any]]) -> str:
    def within(value: dict[str, float], sign: str = "") -> str:
        return f"{value['value']:{sign}.2f} ± {2 * value['standard_error']:.2f}"

    rows = [
        [
            line["base"], line["data"], within(line["excess_loss"]), line["kind"], within(line["answer_loss"]),
            within(line["nf4_damage"], "+"),
        ]
        for name, line in found.items()
        if name.startswith("distance-")
    ]  # fmt: skip
    head = ["base", "data", "excess loss on the prompts", "so", "loss on the answers", "in NF4"]
    return (
        "## Distances\n\nNats a token, with two standard errors, from at most 4,096 tokens of the training rows.\n\n"
        f"{_table(head, rows)}"
    )


def _ranks(found: dict[str, dict[str, Any]]) -> str:
    by_point = [found.get(Point("lora", count, 3, rank=rank).name) for count in ROWS for rank in RANKS]
    shares = ", ".join(
        f"{line['rank_share']:.0%} of {line['rank']} ({line['rows']:,} rows)" for line in by_point if line is not None
    )
    head = ["rows (3 epochs)", "target tokens of an epoch", "base", *(f"rank {r}" for r in RANKS), "full"]
    rows: list[list[str]] = []
    for count in ROWS:
        full = found.get(Point("full", count, 3).name)
        if full is None:
            continue
        before = full["loss_before"]
        cells = [f"{count:,}", f"{full['target_tokens'] // 3:,}", f"{before:.3f}"]
        for rank in RANKS:
            loss = _loss(found, Point("lora", count, 3, rank=rank))
            cells.append("-" if loss is None else f"{loss:.3f} ({(before - loss) / (before - full['loss']):.1%})")
        rows.append([*cells, f"{full['loss']:.3f}"])
    values = {
        r: found[Point("lora", ROWS[0], 3, rank=r).name]["trainable_parameters"]
        for r in RANKS
        if Point("lora", ROWS[0], 3, rank=r).name in found
    }
    text = ", ".join(f"rank {r} {count:,}" for r, count in values.items())
    above = f"Trained values: {text}. In brackets the share of full's gain.\n\n" if rows else ""
    below = f"\n\nThe rank in use (median of layers): {shares}." if rows else ""
    return f"## Ranks\n\n{above}{_table(head, rows)}{below}"


def _targets(found: dict[str, dict[str, Any]]) -> str:
    full = found.get(Point("full", ROWS[-1], 1).name)
    rows: list[list[str]] = []
    for targets in TARGETS:
        line = found.get(Point("lora", ROWS[-1], 1, targets=targets).name)
        if line is not None and full is not None:
            share = (line["loss_before"] - line["loss"]) / (full["loss_before"] - full["loss"])
            rows.append([targets, f"{line['trainable_parameters']:,}", f"{line['loss']:.3f}", f"{share:.1%}"])
    if full is not None:
        rows.append(["full", f"{full['trainable_parameters']:,}", f"{full['loss']:.3f}", "100.0%"])
    head = ["targets", "trained values", "loss", "share of full's gain"]
    return f"## Targets\n\nRank 16, {ROWS[-1]:,} rows once.\n\n{_table(head, rows)}"


def _batches(found: dict[str, dict[str, Any]]) -> str:
    def best(method: Literal["lora", "full"], batch: int) -> tuple[float, float] | None:
        own = [Point(method, ROWS[-1], 1, batch=batch, rate=rate) for rate in SPREAD]
        losses = [(found[p.name]["loss"], found[p.name]["learning_rate"]) for p in own if p.name in found]
        return min(losses) if len(losses) == len(SPREAD) else None

    head = ["batch", "steps", "full", "its rate", "LoRA", "its rate", "share of full's gain"]
    rows: list[list[str]] = []
    for batch in BATCHES:
        full, lora = best("full", batch), best("lora", batch)
        if full is None or lora is None:
            continue
        before = found[Point("full", ROWS[-1], 1, batch=batch).name]["loss_before"]
        share = (before - lora[0]) / (before - full[0])
        steps = found[Point("full", ROWS[-1], 1, batch=batch).name]["steps"]
        rows.append(
            [
                f"{batch}",
                f"{steps}",
                f"{full[0]:.3f}",
                f"{full[1]:.1e}",
                f"{lora[0]:.3f}",
                f"{lora[1]:.1e}",
                f"{share:.1%}",
            ]
        )
    return f"## Batches\n\n{ROWS[-1]:,} rows once, the better of two rates.\n\n{_table(head, rows)}"


def _epochs(found: dict[str, dict[str, Any]]) -> str:
    most = max(EPOCHS.values(), key=len)
    head = ["rows", *(f"{e} {'epoch' if e == 1 else 'epochs'}" for e in most)]
    rows = [[f"{count:,}", *(_cell(_loss(found, Point("lora", count, e))) for e in most)] for count in ROWS]
    return f"## Epochs\n\nLoRA of rank 16, batches of 16.\n\n{_table(head, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--no-run", action="store_true", help="write the tables of what is there")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of the figures")
    asked = parser.parse_args()
    parts: list[Part] = [asked.only] if asked.only else list(PARTS)
    found: dict[str, dict[str, Any]] = {}
    if asked.results.is_file():
        found = json.loads(asked.results.read_text(encoding="utf-8"))
    if not asked.no_run and not E2E.is_dir():
        sys.exit(f"the rows are not there: {E2E}")
    if not asked.no_run and "distance" in parts:
        for _ in distances(found):
            asked.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for point in [] if asked.no_run else [p for part in parts for p in points(part)]:
        if point.name in found:
            continue
        found[point.name] = run(point)
        sys.stdout.write(f"{point.name}: {found[point.name]['loss']:.3f} in {found[point.name]['seconds']} s\n")
        sys.stdout.flush()
        asked.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    asked.results.with_suffix(".md").write_text(tables(found), encoding="utf-8")


if __name__ == "__main__":
    main()
