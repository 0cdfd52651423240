"""How many trials are trained at once: as many as fit in memory, planned for the largest possible trial.

    one base + n x (A and B, their gradients, their two moments) + activations of one micro-batch        <= usable memory

A micro-batch has the same size however many trials share it, so a further trial costs its adapter and its optimizer states. Of
several workers each takes its part of the trials, on a GPU with memory of its own or in its part of the processor's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from graftlm.adapters.attach import Adapter, select_layers
from graftlm.base.loading import Base
from graftlm.config import SweepConfig, TrainConfig
from graftlm.config.sweep import Choice, Range, Value
from graftlm.errors import ConfigError
from graftlm.experiments.sweep.study import trials_wanted
from graftlm.formatting import size
from graftlm.training.memory import TOO_MUCH, MemoryEstimate, estimate, refuse
from graftlm.training.run import TrainingData, make_trial, new_adapter_for
from graftlm.training.trial import Trial

AT_ONCE = 8
"""Most trials at once by default: the search learns from those that have ended."""


@dataclass(frozen=True, kw_only=True)
class Concurrency:
    """How many trials fit in memory."""

    count: int
    micro_batch_tokens: int
    bytes: int | None
    """Predicted peak with the largest trial in every slot; None where the model's shape could not be counted."""
    largest_adapter: int
    """Trained values of the largest trial."""


def plan_concurrency(config: SweepConfig, base: Base, datasets: Mapping[tuple[str, ...], TrainingData]) -> Concurrency:
    """How many trials fit on this machine. Raises ConfigError for a larger `--at-once`, TrainingError where not one fits."""
    training, trial, adapter = _largest(config, base, datasets)

    def estimate_of(count: int) -> MemoryEstimate:
        return estimate(training, base, [trial] * count, [adapter] * count, ranks=config.workers)

    def fits(found: MemoryEstimate) -> bool:
        return found.requirement is None or found.requirement.training <= found.card.usable

    one = estimate_of(1)
    refuse(one)
    wanted = trials_wanted(config)
    most = min(config.at_once or min(AT_ONCE, -(-wanted // config.workers)), wanted)
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(estimate_of(middle)) else (low, middle - 1)
    found = estimate_of(most)
    if config.at_once is not None and low < most and found.requirement is not None:
        if found.requirement.training > TOO_MUCH * found.card.usable:
            raise ConfigError(
                f"--at-once {config.at_once}: {most} trials would take {size(found.requirement.training)} and "
                f"{found.card.name} has "
                f"{size(found.card.usable)} usable; {low} fit. Give --at-once {low}, or leave it out"
            )
        low = most
    found = estimate_of(low)
    return Concurrency(
        count=low,
        micro_batch_tokens=found.micro_batch_tokens,
        bytes=found.requirement.training if found.requirement else None,
        largest_adapter=adapter.count,
    )


def _largest(
    config: SweepConfig, base: Base, datasets: Mapping[tuple[str, ...], TrainingData]
) -> tuple[TrainConfig, Trial, Adapter]:
    """The trial of the search space that takes the most memory, not attached to the base."""
    params: dict[str, Value] = {}
    for name, searched in config.space.items():
        values = searched.ends if isinstance(searched, Range) else searched.values
        params[name] = max(values, key=float) if _numbers(searched) else values[0]
    training = config.training(params, out=config.out)
    if isinstance(targets := config.space.get("targets"), Choice):
        options = [config.training({**params, "targets": value}, out=config.out) for value in targets.values]
        training = max(options, key=lambda c: len(select_layers(base, c.targets)))
    training_data = max(datasets.values(), key=lambda m: m.dataset.longest)
    adapter = new_adapter_for(base, training)
    return training, make_trial(base, training, adapter, 1, training_data.dataset, training_data.eval_dataset), adapter


def _numbers(searched: Range | Choice) -> bool:
    return isinstance(searched, Range) or all(isinstance(v, (int, float)) for v in searched.values)
