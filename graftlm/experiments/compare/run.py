"""The runs of a comparison, each in its own process, and where everything lies in its folder.

    compare.json         the options; at the end also every figure and the verdict
    report.md .html      the same for people
    runs/lora/seed-0/    an ordinary run folder, with result.json (its summary) and scores.json (general text, task)
    search/              short runs that chose the learning rates; rows/ are the training rows they used
    base/nf4.json        what the untrained base scores in each precision
    rows/                rows that were in memory, as files

Runs go seed by seed, so an interrupted comparison compares like with like; with several workers, as many at once, and each
comes out the same. Called again, a finished run is not repeated and a
stopped one resumes from its checkpoint. A method that cannot be trained (no memory, a loss that is not finite) is a result
too: the others go on, and the report says why it is missing.

`commands/compare.py` puts these together: learning rates, runs, scores, report.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftlm.config import CompareConfig, TrainConfig
from graftlm.config.aliases import renamed, renamed_summary
from graftlm.config.compare import Variant
from graftlm.errors import Diverged, GraftError, ModelError, RunError, TrainingError
from graftlm.experiments.compare.data import ComparisonData, write_search_rows
from graftlm.experiments.compare.learning_rate import (
    RateSearch,
    TriedRate,
    first_rate,
    search_learning_rate,
    search_steps,
)
from graftlm.experiments.compare.scoring import SCORES, ScoringRequest, Target
from graftlm.experiments.row_files import ROWS
from graftlm.experiments.subprocess_run import score_in_subprocess, train_in_subprocess
from graftlm.experiments.workers import Worker, spread
from graftlm.files import write_json
from graftlm.jsonfile import parse_json, read_json
from graftlm.training.run_files import LOCK

if TYPE_CHECKING:
    from graftlm.experiments.compare.view import CompareView

MARK = "compare.json"
RESULT = "result.json"
_WRITTEN = {MARK, "report.md", "report.html", "runs", "search", "base", ROWS}


@dataclass
class Progress:
    """How far a comparison has come."""

    learning_rates: dict[str, RateSearch] = field(default_factory=dict[str, RateSearch])
    failed: dict[str, str] = field(default_factory=dict[str, str])
    """Why a variant has no result."""


# ---- the folder -----------------------------------------------------------------------------------------------------


def run_folder(config: CompareConfig, variant: Variant, seed: int) -> Path:
    """The folder of one run."""
    return config.out / "runs" / variant.folder / f"seed-{seed}"


def search_folder(config: CompareConfig, variant: Variant, rate: float) -> Path:
    """The folder of a short run of the search for a variant's learning rate."""
    return config.out / "search" / variant.folder / f"{rate:g}"


def base_scores(config: CompareConfig, precision: str) -> Path:
    """The file of what the untrained base scores in a precision."""
    return config.out / "base" / f"{precision}.json"


def claim(out: Path) -> None:
    """Make `out` a comparison's folder; RunError where it holds something that no comparison wrote."""
    held = sorted(p.name for p in out.iterdir() if p.name != LOCK and not p.name.startswith("."))
    others = [name for name in held if name not in _WRITTEN]
    if others or (held and MARK not in held):
        raise RunError(f"--out {out} holds '{(others or held)[0]}', which no comparison wrote; take another folder")
    if not held:
        write_json(out / MARK, {"written_by": "graft compare"})


# ---- learning rates -------------------------------------------------------------------------------------------------


def search_learning_rates(
    config: CompareConfig, comparison_data: ComparisonData, done: Progress, view: CompareView, workers: Sequence[Worker]
) -> None:
    """Find a learning rate for every variant that was given none; a variant whose every rate diverges has failed."""
    steps = search_steps(config.search_steps, comparison_data.steps)
    known: dict[bool, float] = {}
    files: tuple[tuple[str, ...], str] | None = None
    for variant in config.variants:
        given = config.given_rate(variant)
        if given is not None:
            done.learning_rates[variant.name] = RateSearch(given)
            known.setdefault(variant.adapter, given)
            continue
        files = files or write_search_rows(comparison_data, config.batch_size, steps, config.out / "search" / "rows")
        start, blind = first_rate(
            variant.adapter, known, config.training(variant, seed=0, rate=None, out=config.out).peak_learning_rate
        )
        try:
            runs = _ShortRuns(config, variant, steps, files, view, workers)
            found = search_learning_rate(start, runs.losses, blind=blind)
        except (ModelError, TrainingError) as error:
            done.failed[variant.name] = str(error)
            view.failed(variant.name, str(error))
            continue
        if found is None:
            done.failed[variant.name] = f"every learning rate that was tried around {start:g} diverged"
            view.failed(variant.name, done.failed[variant.name])
            continue
        done.learning_rates[variant.name] = found
        known[variant.adapter] = found.rate
        view.rate(variant.name, found)


@dataclass(frozen=True)
class _ShortRuns:
    """The runs of the search for one variant's learning rate."""

    config: CompareConfig
    variant: Variant
    steps: int
    files: tuple[tuple[str, ...], str]
    """Rows to train on and rows to score on."""
    view: CompareView
    workers: Sequence[Worker]

    def losses(self, rates: Sequence[float]) -> list[TriedRate]:
        """The loss after a short run with each rate."""
        found: dict[float, TriedRate] = {}
        spread(rates, self.workers, self._loss, found.__setitem__)
        return [found[rate] for rate in rates]

    def _loss(self, rate: float, worker: Worker) -> TriedRate:
        out = search_folder(self.config, self.variant, rate)
        data, eval_data = self.files
        changes: dict[str, Any] = {"steps": self.steps, "epochs": None, "eval_every": self.steps}
        training = self.config.training(
            self.variant, seed=0, rate=rate, out=out, data=data, eval_data=eval_data, **changes
        )
        with self.view.running(f"search {self.variant.name}, {rate:g}", self.steps) as stepped:
            try:
                summary = run_once(training, stepped, worker)
            except Diverged as error:
                write_json(out / RESULT, {"asked": _options(training), "diverged": str(error)})
                return TriedRate(rate, float("inf"))
        for unused in ("adapter", "model", "checkpoints"):  # only the loss was wanted
            shutil.rmtree(out / unused, ignore_errors=True)
        return TriedRate(rate, summary["eval_loss_after"], summary["eval_loss_before"])


# ---- runs -----------------------------------------------------------------------------------------------------------


def train_variants(
    config: CompareConfig, comparison_data: ComparisonData, done: Progress, view: CompareView, workers: Sequence[Worker]
) -> None:
    """Train every variant with every seed; those that cannot be trained are noted in `done.failed`."""

    def train(run: tuple[Variant, int], worker: Worker) -> dict[str, Any] | GraftError | None:
        variant, seed = run
        if variant.name in done.failed:
            return None
        rate = done.learning_rates[variant.name].rate
        training = config.training(variant, seed=seed, rate=rate, out=run_folder(config, variant, seed))
        try:
            with view.running(f"{variant.name}, seed {seed}", comparison_data.steps) as stepped:
                summary = run_once(training, stepped, worker)
        except (ModelError, TrainingError) as error:
            return error
        _same_data(training.out, comparison_data)
        return summary

    def ended(run: tuple[Variant, int], result: dict[str, Any] | GraftError | None) -> None:
        variant, seed = run
        if isinstance(result, GraftError):
            if variant.name not in done.failed:
                done.failed[variant.name] = f"seed {seed}: {result}"
                view.failed(variant.name, str(result))
        elif result is not None:
            view.trained(f"{variant.name}, seed {seed}", result)

    runs = [(variant, seed) for seed in range(config.seeds) for variant in config.variants]
    spread(runs, workers, train, ended)


def _options(config: TrainConfig) -> dict[str, Any]:
    """The options of a run, apart from where it lies."""
    return {name: value for name, value in config.to_json().items() if name not in ("out", "resume")}


def run_once(config: TrainConfig, stepped: Any, worker: Worker) -> dict[str, Any]:
    """The summary of a run: read if it is finished, else trained, from its checkpoint where it left one.

    Raises RunError where the folder holds a run of other options, and Diverged again for a run that diverged.
    """
    out, options = config.out, _options(config)
    known = _read(out / RESULT)
    if known is not None:
        # An option that is newer than the run had its default then.
        before = renamed(known["asked"])
        then = {name: before.get(name, TrainConfig.model_fields[name].default) for name in options}
        changed = [
            f"{name.replace('_', '-')} was {then[name]!r}, now {value!r}"
            for name, value in parse_json(json.dumps(options)).items()
            if parse_json(json.dumps(then[name])) != value
        ]
        if changed:
            raise RunError(f"{out} was run with other options: {'; '.join(changed)}. Take the same, or another --out")
        if "diverged" in known:
            raise Diverged(known["diverged"])
        return renamed_summary(known["summary"])
    if (out / "adapter").exists() or (out / "model").exists():
        shutil.rmtree(out)  # it was killed after its end, before its summary was written
    began = (out / "config.json").is_file()
    summary = train_in_subprocess(config.model_copy(update={"resume": True}) if began else config, stepped, worker)
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(out / RESULT, {"asked": options, "summary": summary, "finished": finished})
    return summary


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = read_json(path, RunError)
    except RunError:
        return None
    return found if "asked" in found else None


def _same_data(out: Path, comparison_data: ComparisonData) -> None:
    """Raise RunError where a finished run was trained or evaluated on other rows than the files hold now."""
    data = read_json(out / "data.json", RunError)
    for name, now in (("train", comparison_data.train), ("eval", comparison_data.eval_dataset)):
        if data[name]["digest"] != now.digest:
            raise RunError(f"the {name} data have changed since {out} was run; put them back, or take another --out")


# ---- scores ---------------------------------------------------------------------------------------------


def score_models(
    config: CompareConfig, comparison_data: ComparisonData, done: Progress, view: CompareView, workers: Sequence[Worker]
) -> None:
    """Measure the loss on general text and the task score of the bases and of every trained model that has none yet."""
    requests = [request for request in _requests(config, comparison_data, done) if request.left()]
    left = sum(len(request.left()) for request in requests)
    if not left or (comparison_data.general is None and config.metric is None):
        return
    with view.running("general text" + (f", {config.metric}" if config.metric else ""), left) as stepped:
        count, counting = 0, threading.Lock()

        def heard(event: dict[str, Any]) -> None:
            nonlocal count
            if event["event"] == "scored":
                with counting:
                    count += 1
                    stepped({"event": "step", "step": count, "steps": left})

        def score(request: ScoringRequest, worker: Worker) -> None:
            score_in_subprocess(request, heard, worker)

        spread(requests, workers, score, lambda request, result: None)


def _requests(config: CompareConfig, comparison_data: ComparisonData, done: Progress) -> Iterator[ScoringRequest]:
    """One for each base: the model in each precision with its adapters, and each model that was trained in full."""

    def request(model: str, precision: Any, targets: list[Target]) -> ScoringRequest:
        return ScoringRequest(
            model=model,
            precision=precision,
            compute_dtype=config.compute_dtype,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
            general=str(comparison_data.general) if comparison_data.general else None,
            metric=config.metric,
            prompts=comparison_data.prompts,
            max_tokens=2 * comparison_data.longest_answer,
            template_date=config.template_date,
            targets=tuple(targets),
        )

    by_precision: dict[str, list[Target]] = {}
    for variant in config.variants:
        if variant.name in done.failed:
            continue
        precision = config.training(variant, seed=0, rate=None, out=config.out).stored_precision
        targets = by_precision.setdefault(precision, [Target(str(base_scores(config, precision)))])
        for seed in range(config.seeds):
            folder = run_folder(config, variant, seed)
            if variant.adapter:
                targets.append(Target(str(folder / SCORES), str(folder / "adapter")))
            else:
                yield request(str(folder / "model"), precision, [Target(str(folder / SCORES))])
    for precision, targets in by_precision.items():
        yield request(config.model, precision, targets)
