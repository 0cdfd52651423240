"""A plan as values: for a model on a card, what each method takes, where it fits, and advice.

    plan_model(model, card, config, dataset)  ->  ModelPlan          PlanReport: the card, and a plan for each model

`commands/plan.py` finds the models and reads the data; nothing is read here.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from graftlm import terminal
from graftlm.config import PlanConfig
from graftlm.errors import ConfigError
from graftlm.formatting import duration
from graftlm.planning.activations import Workload
from graftlm.planning.advice import Advice, advise
from graftlm.planning.facts import Facts
from graftlm.planning.fitting import (
    Change,
    PlanCase,
    changes,
    fits,
    largest_batch,
    longest_example,
    smallest_card,
)
from graftlm.planning.hardware import Card
from graftlm.planning.layouts import ONE, Cluster, Layout, cards_needed, layout_of
from graftlm.planning.memory import MemoryRequirement
from graftlm.planning.method import TrainingSetting, methods_of
from graftlm.planning.models import NamedModel, built_in
from graftlm.planning.perplexity import DomainShift
from graftlm.planning.quoted_figures import QuotedFigure, quoted_figures
from graftlm.planning.timing import EFFICIENCY, StepTime, step_time

if TYPE_CHECKING:
    from rich.console import Console

    from graftlm.data.dataset import Dataset

DEFAULT_MICRO_BATCH_TOKENS = 4096
"""What `graft train` takes where memory allows."""
SOME_TOKENS, DAY = 1_000_000, 86_400.0


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """One method on one model."""

    requirement: MemoryRequirement
    checkpointed: int
    """Bytes at the peak with activation checkpointing."""
    fits: bool
    cards: int | None
    """How many of the card it takes, split over them; None for more than 64."""
    layout: Layout | None
    """How it lies on the `--gpus` and `--nodes` that were asked for; None where it does not fit, or one GPU was asked for."""
    smallest: Card | None
    """The smallest known card that it fits."""
    batch: int
    """Most examples of the planned length in one micro-batch."""
    length: int
    """Most tokens of one example."""
    time: StepTime | None
    changes: tuple[Change, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, in bytes and seconds."""
        found, how = self.requirement, self.requirement.setting
        return {
            "method": how.key, "label": how.label.strip(), "options": how.flags, "precision": how.precision,
            "compute_dtype": how.compute_dtype, "trainable_parameters": found.trained, "parts": found.parts.to_json(),
            "highest_at": found.moment, "peak_bytes": found.peak, "training_bytes": found.training,
            "loading_bytes": found.loading, "host_bytes": found.host, "saved_bytes": found.saved,
            "checkpointed_bytes": self.checkpointed, "fits": self.fits, "cards": self.cards,
            "layout": None if self.layout is None else self.layout.to_json(),
            "smallest_card": None if self.smallest is None else self.smallest.key,
            "largest_batch": self.batch, "longest_example": self.length,
            "seconds_per_step": None if self.time is None else self.time.step,
            "tokens_per_second": None if self.time is None else self.time.tokens_per_second,
            "bound": None if self.time is None else self.time.bound,
            "changes": [{"text": c.text, "peak_bytes": c.peak} for c in self.changes],
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """Everything about one model."""

    model: NamedModel
    case: PlanCase
    rows: tuple[MethodPlan, ...]
    advice: Advice
    facts: Facts
    quoted: tuple[QuotedFigure, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        shape, load = self.case.shape, self.case.load
        data = None
        if self.facts.rows:
            data = {"rows": self.facts.rows, "tokens": self.facts.tokens, "target_tokens": self.facts.target_tokens}
        return {
            "model": self.model.name,
            "architecture": shape.architecture,
            "parameters": shape.parameters,
            "layers": shape.layers,
            "width": shape.width,
            "vocabulary": shape.vocabulary,
            "packs": shape.packs,
            "load": {
                "micro_batch_tokens": load.tokens,
                "target_tokens_per_micro_batch": load.target_tokens,
                "examples_per_micro_batch": load.examples,
                "tokens_per_example": load.longest,
                "micro_batches_per_step": load.micro_batches,
            },
            "data": data,
            "domain_shift": None if self.facts.domain_shift is None else self.facts.domain_shift.to_json(),
            "methods": [row.to_json() for row in self.rows],
            "advice": self.advice.to_json(),
            "known": [answer.to_json() for answer in self.quoted],
            "notes": list(self.notes),
        }


@dataclass(frozen=True, kw_only=True, repr=False)
class PlanReport:
    """What `graft plan` found."""

    card: Card
    plans: tuple[ModelPlan, ...]
    data: tuple[str, ...]
    """The data as they were named."""
    epochs: float
    price_per_hour: float | None
    cluster: Cluster = ONE
    """How many of the card were asked about."""
    explain: bool = False
    """Whether the advice is printed with the measurements behind it."""

    def __repr__(self) -> str:
        return terminal.as_text(self._draw)

    def _repr_html_(self) -> str:
        return terminal.as_html(self._draw)

    def _draw(self, where: Console) -> None:
        from graftlm.planning.report import render

        render(self, where)

    def to_json(self) -> dict[str, Any]:
        """One JSON object: the card, and a plan for each model."""
        card = {
            "key": self.card.key, "name": self.card.name, "kind": self.card.kind, "memory_bytes": self.card.memory,
            "usable_bytes": self.card.usable, "compute_dtype": self.card.compute_dtype, "here": self.card.here,
            "efficiency": EFFICIENCY[self.card.kind],
        }  # fmt: skip
        plans = [{**plan.to_json(), "epoch": self._epochs(plan)} for plan in self.plans]
        return {"card": card, "gpus": self.cluster.gpus, "nodes": self.cluster.nodes, "plans": plans}

    def _epochs(self, plan: ModelPlan) -> dict[str, Any] | None:
        """Seconds, and cost, of `--epochs` with each method."""
        if not plan.facts.rows:
            return None
        found: dict[str, Any] = {}
        for row in plan.rows:
            seconds = self.seconds(plan, row)
            if seconds is not None:
                found[row.requirement.setting.key] = {"seconds": seconds, "cost": self.cost(seconds, row.cards or 1)}
        return found

    def command(self, plan: ModelPlan) -> str:
        """The command that follows the advice; empty where nothing fits."""
        if not plan.advice.command:
            return ""
        name = built_in()[plan.model.name]["hub"] if plan.model.name in built_in() else plan.model.name
        data = "".join(f" --data {shlex.quote(text)}" for text in self.data)
        return f"graft train --model {shlex.quote(name)}{data} {plan.advice.command}"

    def seconds(self, plan: ModelPlan, row: MethodPlan) -> float | None:
        """How long `--epochs` take."""
        if row.time is None or not plan.facts.tokens:
            return None
        return plan.facts.tokens * self.epochs / row.time.tokens_per_second

    def cost(self, seconds: float, cards: int) -> float | None:
        """What so many seconds on so many cards cost."""
        return None if self.price_per_hour is None else seconds / 3600 * self.price_per_hour * cards


def plan_model(
    model: NamedModel,
    card: Card,
    config: PlanConfig,
    dataset: Dataset | None = None,
    domain_shift: DomainShift | None = None,
    notes: Sequence[str] = (),
) -> ModelPlan:
    """What each method takes of a model on a card; with a dataset for its examples, without for `--max-length`.

    `notes` are those of reading the data. Raises ConfigError for a length that the model has no positions for.
    """
    notes = list(notes)
    load = _load(model, config, dataset, notes)
    fused = card.kind == "cpu" or find_spec("triton") is not None
    case = PlanCase(shape=model.shape, targets=config.targets, rank=config.rank, load=load, card=card, fused=fused)
    facts = Facts(
        case=case,
        rows=0 if dataset is None else dataset.rows,
        tokens=0 if dataset is None else dataset.tokens,
        target_tokens=0 if dataset is None else dataset.target_tokens,
        domain_shift=domain_shift,
        goal=config.goal,
        variants=config.variants,
    )
    if not model.shape.packs:
        notes.append(
            f"{model.shape.architecture} runs on batches of equally long examples with its own attention, whose scores take "
            "memory with the square of an example's length."
        )
    if not fused:
        notes.append(
            "Planned without triton, which is not installed here and comes with PyTorch for GPUs on Linux: with it norms and "
            "gated products are one operation each, and less is saved for backward."
        )
    rows = tuple(
        _row(case, s, config) for s in methods_of(case.shape) if not (s.offload_optimizer and card.kind != "cuda")
    )
    notes += _slow(rows, card)
    return ModelPlan(
        model=model, case=case, rows=rows, advice=advise(facts), facts=facts,
        quoted=tuple(quoted_figures(model.name, case)), notes=tuple(notes),
    )  # fmt: skip


def _slow(rows: tuple[MethodPlan, ...], card: Card) -> list[str]:
    """A note where a machine would take days for little data."""
    lora = next(row for row in rows if row.requirement.setting.key == "lora")
    seconds = 0.0 if lora.time is None else SOME_TOKENS / lora.time.tokens_per_second
    if seconds < DAY:
        return []
    return [
        f"On {card.name}, LoRA would read {SOME_TOKENS:,} tokens in about {duration(seconds)}; --gpu says what a card would "
        "take."
    ]


def _row(case: PlanCase, setting: TrainingSetting, config: PlanConfig) -> MethodPlan:
    setting = setting.checkpointed() if config.activation_checkpointing else setting
    setting = replace(setting, compute_dtype=case.card.compute_dtype)
    found = case.of(setting)
    good = fits(found, case.card)
    cluster = Cluster(gpus=config.gpus, nodes=config.nodes)
    count = cards_needed(case, setting) if case.card.kind == "cuda" else (1 if good else None)
    return MethodPlan(
        requirement=found,
        checkpointed=case.of(setting.checkpointed()).peak,
        fits=good,
        cards=count,
        layout=layout_of(case, setting, cluster) if cluster.ranks > 1 else None,
        smallest=smallest_card(found) if case.card.kind == "cuda" else None,
        batch=largest_batch(case, setting),
        length=longest_example(case, setting),
        time=step_time(
            case.shape,
            setting,
            case.adapter_shape(setting),
            case.load,
            case.card,
            found.trained,
            fused=case.fused,
            cards=count or 1,
        ),
        changes=() if good else tuple(changes(case, setting)),
    )


def _load(model: NamedModel, config: PlanConfig, dataset: Dataset | None, notes: list[str]) -> Workload:
    """The heaviest micro-batch: as many of the longest examples as a micro-batch holds."""
    length = config.max_length or (dataset.longest if dataset is not None else 0)
    if dataset is not None:
        length = min(length, dataset.longest)
    most = model.shape.max_positions
    if most and length > most:
        if "max_length" in config.model_fields_set and config.max_length > most:
            raise ConfigError(
                f"max-length is {length:,}, and the longest position of {model.name} is {most:,}; take at most that"
            )
        length = most
    share = dataset.target_tokens / dataset.tokens if dataset is not None else 1.0
    most_tokens = config.micro_batch_tokens or DEFAULT_MICRO_BATCH_TOKENS
    together = max(1, min(config.batch_size, most_tokens // length))
    tokens = together * length
    if dataset is not None and dataset.longest > length:
        notes.append(f"The longest example has {dataset.longest:,} tokens; planned with {length:,}.")
    return Workload(
        tokens=tokens, target_tokens=max(1, round(share * (tokens - together))), longest=length, examples=together,
        micro_batches=-(-config.batch_size // together), small=most_tokens < DEFAULT_MICRO_BATCH_TOKENS,
    )  # fmt: skip
