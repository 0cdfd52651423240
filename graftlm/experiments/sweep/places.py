"""How many trials are trained at once: as many as memory holds, planned from the largest one there can be.

    one base + n x (A and B, their gradients, their two moments) + one pass's activations        <= what the machine has

The pass is the same size however many trials share it, so a further trial costs its adapter and its optimizer states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from graftlm.adapters.attach import Adapter, choose
from graftlm.base.load import Base
from graftlm.config import SweepConfig, TrainConfig
from graftlm.config.sweep import Choice, Range, Value
from graftlm.errors import ConfigError
from graftlm.planning.words import size
from graftlm.training.foresight import TOO_MUCH, Foresight, foresee, refuse
from graftlm.training.prepare import make_trial, untrained
from graftlm.training.session import Material
from graftlm.training.trial import Trial

AT_ONCE = 8
"""Trials at once where nothing else is asked: the search learns from those that have ended."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """How many trials there is room for."""

    count: int
    tokens_per_pass: int
    bytes: int | None
    """Predicted peak with every place taken by the largest trial; None where the model's shape could not be counted."""
    each: int
    """Trained values of the largest trial."""


def plan_places(config: SweepConfig, base: Base, materials: Mapping[tuple[str, ...], Material]) -> Places:
    """Room for trials on this machine. Raises ConfigError where `--at-once` asks for more, TrainingError where not one fits."""
    training, trial, adapter = _largest(config, base, materials)

    def ahead(count: int) -> Foresight:
        return foresee(training, base, [trial] * count, [adapter] * count)

    def fits(found: Foresight) -> bool:
        return found.need is None or found.need.training <= found.card.usable

    one = ahead(1)
    refuse(one)
    most = min(config.at_once or AT_ONCE, config.trials)
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(ahead(middle)) else (low, middle - 1)
    found = ahead(most)
    if config.at_once is not None and low < most and found.need is not None:
        if found.need.training > TOO_MUCH * found.card.usable:
            raise ConfigError(
                f"--at-once {config.at_once}: {most} trials would take {size(found.need.training)} and {found.card.name} has "
                f"{size(found.card.usable)} for them; {low} fit. Give --at-once {low}, or leave it out"
            )
        low = most
    found = ahead(low)
    return Places(
        count=low,
        tokens_per_pass=found.tokens_per_pass,
        bytes=found.need.training if found.need else None,
        each=adapter.count,
    )


def _largest(
    config: SweepConfig, base: Base, materials: Mapping[tuple[str, ...], Material]
) -> tuple[TrainConfig, Trial, Adapter]:
    """The trial that takes the most memory of all that the search may ask for, not attached to the base."""
    own: dict[str, Value] = {}
    for name, searched in config.space.items():
        values = searched.ends if isinstance(searched, Range) else searched.values
        own[name] = max(values, key=float) if _numbers(searched) else values[0]
    training = config.training(own, out=config.out)
    if isinstance(targets := config.space.get("targets"), Choice):
        options = [config.training({**own, "targets": value}, out=config.out) for value in targets.values]
        training = max(options, key=lambda c: len(choose(base, c.targets)))
    material = max(materials.values(), key=lambda m: m.dataset.longest)
    adapter = untrained(base, training)
    return training, make_trial(base, training, adapter, 1, material.dataset, material.held_out), adapter


def _numbers(searched: Range | Choice) -> bool:
    return isinstance(searched, Range) or all(isinstance(v, (int, float)) for v in searched.values)
