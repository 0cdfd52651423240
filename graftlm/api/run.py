"""A run as values: what its folder holds. Made by `graft.train`, and by `Run.open` for any run folder, the CLI's too."""

from __future__ import annotations

from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from graftlm.config.aliases import renamed, renamed_summary
from graftlm.errors import RunError
from graftlm.experiments.reports import charts
from graftlm.experiments.reports.charts import Line, loss_chart
from graftlm.formatting import size
from graftlm.jsonfile import read_json
from graftlm.training.run_files import SO_FAR, SUMMARY, read_metrics


class Run:
    """One run, read from its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """The run folder."""

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """A run by its folder, finished or not. Raises RunError for a folder that holds none."""
        place = Path(folder)
        if not (place / "config.json").is_file():
            what = "has no config.json" if place.is_dir() else "is not there"
            raise RunError(f"{place} is not a run folder: it {what}; name the --out of a run")
        return cls(place)

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def config(self) -> dict[str, Any]:
        """Every option, resolved. Raises RunError."""
        return renamed(read_json(self.folder / "config.json", RunError))

    @property
    def plan(self) -> dict[str, Any]:
        """What was predicted before the first step, in bytes and seconds, and what was measured. Raises RunError."""
        return read_json(self.folder / "plan.json", RunError)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: `step`, `kind` (train, eval, event), `loss` or `eval_loss` in nats a target token,
        `eval_score` where the run has a score, ..."""
        file = self.folder / "metrics.jsonl"
        return read_metrics(file) if file.is_file() else []

    def _result(self, kind: str) -> Path | None:
        places = (self.folder / kind, self.folder / SO_FAR.format(kind))
        return next((place for place in places if place.is_dir()), None)

    @property
    def adapter(self) -> Path | None:
        """The adapter, a PEFT folder, of a stopped run the best so far; None for full training or without a result."""
        return self._result("adapter")

    @property
    def model_folder(self) -> Path | None:
        """The model that full training made, a Hugging Face folder; None for an adapter, or before a result."""
        return self._result("model")

    @property
    def stopped(self) -> bool:
        """Whether it was stopped before its end and can go on: the same call with `resume=True`."""
        return not any((self.folder / kind).is_dir() for kind in ("adapter", "model"))

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What it was and did: losses in nats a target token, sizes in bytes, times in seconds, the adapter's digest.

        Of a run that wrote no summary.json, as those before it existed, what the other files say. Raises RunError.
        """
        if (self.folder / SUMMARY).is_file():
            return renamed_summary(read_json(self.folder / SUMMARY, RunError))
        return self._pieced_together()

    def _pieced_together(self) -> dict[str, Any]:
        config, lines = self.config, self.metrics
        steps = [line for line in lines if line.get("kind") == "train"]
        losses = [(line["step"], line["eval_loss"]) for line in lines if line.get("kind") == "eval"]
        scores = {line["step"]: line["eval_score"] for line in lines if line.get("eval_score") is not None}
        after = [pair for pair in losses if pair[0] > 0]
        by_score = config.get("best_by") == "score"
        best = min(after, key=lambda pair: (-scores.get(pair[0], 0.0) if by_score else 0.0, pair[1]), default=None)
        return {
            "out": str(self.folder),
            **({"adapter_folder": str(self.adapter)} if self.adapter else {}),
            **({"model_folder": str(self.model_folder)} if self.model_folder else {}),
            "method": config.get("method"),
            "model": config.get("model"),
            "base_precision": config.get("base_precision"),
            "compute_dtype": config.get("compute_dtype"),
            "steps": steps[-1]["step"] if steps else 0,
            "train_loss": steps[-1]["loss"] if steps else None,
            "eval_loss_before": next((loss for step, loss in losses if step == 0), None),
            "eval_loss_after": best[1] if best else None,
            "score": config.get("score"),
            "eval_score_before": scores.get(0),
            "eval_score_after": scores.get(best[0]) if best else None,
            "saved_step": best[0] if best else steps[-1]["step"] if steps else 0,
            **(self.plan.get("measured") or {} if (self.folder / "plan.json").is_file() else {}),
        }

    # ---- how it looks --------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        found = self.summary
        before, after = found.get("eval_loss_before"), found.get("eval_loss_after")
        loss = f", eval loss {before:.4f} to {after:.4f}" if before is not None and after is not None else ""
        score = f", {text}" if (text := _score_text(found)) else ""
        state = ", stopped" if self.stopped else ""
        return (
            f"Run('{self.folder}': {found['method']} on {found['model']}, {found['steps']} steps{loss}{score}{state})"
        )

    def _repr_html_(self) -> str:
        found = self.summary
        facts: list[tuple[str, str]] = [("base", f"{found['model']} as {found.get('base_precision')}")]
        facts.append(("method", f"{found['method']}, {found['steps']:,} steps"))
        if found.get("eval_loss_before") is not None and found.get("eval_loss_after") is not None:
            facts.append(("eval loss", f"{found['eval_loss_before']:.4f} to {found['eval_loss_after']:.4f}"))
        if text := _score_text(found):
            facts.append(("score", text))
        if found.get("peak_memory_bytes"):
            facts.append(("peak memory", size(found["peak_memory_bytes"])))
        place = self.adapter or self.model_folder
        saved = f" ({size(found['saved_bytes'])})" if found.get("saved_bytes") else ""
        facts.append(("saved", f"{place}{saved}" if place else "nothing yet"))
        if self.stopped:
            facts.append(("state", "stopped; resume=True goes on with it"))
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in facts)
        return f"<div><table>{rows}</table>{self._curve()}</div>"

    def _curve(self) -> str:
        """Loss by step: of training batches faint and smoothed, of the eval set strong."""
        lines = self.metrics
        train = [(int(m["step"]), float(m["loss"])) for m in lines if m.get("kind") == "train"]
        evals = [(int(m["step"]), float(m["eval_loss"])) for m in lines if m.get("kind") == "eval"]
        if len(train) + len(evals) < 2:
            return ""
        drawn = [Line(charts.smoothed(train), "c0 faint"), Line(evals, "c1", dots=True)]
        svg = loss_chart("loss by step", [line for line in drawn if line.points])
        return charts.in_notebook(svg, "Line with dots: eval loss. Faint line: training batches, smoothed.")


def _score_text(summary: dict[str, Any]) -> str:
    """The score before and after training as text; empty for a run without one."""
    before, after = summary.get("eval_score_before"), summary.get("eval_score_after")
    if after is None:
        return ""
    return f"{summary['score']} " + (f"{after:.4g}" if before is None else f"{before:.4g} to {after:.4g}")
