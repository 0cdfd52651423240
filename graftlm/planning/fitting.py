"""What fits where: cards for a requirement, one or several; the largest batch and length for a card; and what to change.

How a training lies on several cards is in `layouts.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from graftlm.planning.activations import Workload
from graftlm.planning.hardware import Card, cards
from graftlm.planning.layouts import GPUS_OF_A_NODE, Cluster, cards_needed, layout_of
from graftlm.planning.memory import MemoryRequirement, requirement
from graftlm.planning.method import AdapterShape, TrainingSetting, adapter_shape
from graftlm.planning.shapes import ModelShape

_LONGEST = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PlanCase:
    """Everything that a need is computed from, but the method."""

    shape: ModelShape
    targets: tuple[str, ...]
    rank: int
    load: Workload
    card: Card
    fused: bool

    def of(self, setting: TrainingSetting) -> MemoryRequirement:
        """What a method takes here."""
        setting = replace(setting, compute_dtype=self.card.compute_dtype)
        return requirement(
            self.shape, setting, self.adapter_shape(setting), self.load, self.card.kind, fused=self.fused,
            fused_dequant=self.card.fused_dequant,
        )  # fmt: skip

    def adapter_shape(self, setting: TrainingSetting) -> AdapterShape:
        """The adapter of a method; none for full training."""
        return AdapterShape() if setting.full else adapter_shape(self.shape, self.targets, self.rank)


def fits(found: MemoryRequirement, card: Card) -> bool:
    """Whether a training finds room on one card."""
    return found.peak <= card.usable


def smallest_card(found: MemoryRequirement) -> Card | None:
    """The known card with the least memory on which a training fits alone."""
    return next((c for c in cards().values() if c.kind == "cuda" and fits(found, c)), None)


def largest_batch(case: PlanCase, setting: TrainingSetting) -> int:
    """Most examples of the given length that one micro-batch can hold; 0 where not one fits."""
    load = case.load

    def at(count: int) -> bool:
        share = load.target_tokens / load.tokens
        tokens = count * load.longest
        grown = replace(load, tokens=tokens, target_tokens=max(1, round(tokens * share)), examples=count)
        return fits(replace(case, load=grown).of(setting), case.card)

    return _most(at, 1 << 14)


def longest_example(case: PlanCase, setting: TrainingSetting) -> int:
    """Most tokens of a single example that fits; 0 where the weights alone do not."""
    share = case.load.target_tokens / case.load.tokens

    def at(length: int) -> bool:
        one = Workload(
            tokens=length,
            target_tokens=max(1, round(length * share)),
            longest=length,
            micro_batches=case.load.micro_batches,
            small=case.load.small,
        )
        return fits(replace(case, load=one).of(setting), case.card)

    found = _most(at, _LONGEST)
    return min(found, case.shape.max_positions or found)


def _most(good: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` for which `good` holds, which it does for all smaller ones; 0 for none."""
    low, high = 0, 1
    while high <= limit and good(high):
        low, high = high, high * 2
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


@dataclass(frozen=True, kw_only=True)
class Change:
    """One thing to do so that a training fits."""

    text: str
    peak: int
    """Bytes with it."""


def changes(case: PlanCase, setting: TrainingSetting) -> list[Change]:
    """What makes a training fit that does not, cheapest first: each alone if one is enough, else one on top of the other.

    In order of cost: a little speed, then a third more time, then copies to the host, then precision, then length, then cards.
    """
    done: list[Change] = []
    now, how = case, setting

    def add(text: str, then: PlanCase, by: TrainingSetting) -> bool:
        nonlocal now, how
        peak = then.of(by).peak
        if peak >= 0.99 * now.of(how).peak:  # no help worth a word
            return False
        now, how = then, by
        done.append(Change(text=text, peak=peak))
        return peak <= case.card.usable

    load = case.load
    if load.examples > 1:
        share = load.target_tokens / load.tokens
        one = replace(
            load, tokens=load.longest, target_tokens=max(1, round(load.longest * share)), examples=1,
            micro_batches=load.micro_batches * load.examples, small=True,
        )  # fmt: skip
        if add(
            f"--micro-batch-tokens {load.longest}: one example at a time, the same result", replace(now, load=one), how
        ):
            return done
    if not how.activation_checkpointing and case.shape.layers:
        text = "--activation-checkpointing: activations are recomputed in the backward pass, about a third more time"
        if add(text, now, how.checkpointed()):
            return done
    if how.activation_checkpointing and not how.offload_activations and case.card.kind == "cuda":
        text = "--offload-activations: what checkpointing keeps waits in the host's memory, copied beside the computing"
        if add(text, now, replace(how, offload_activations=True)):
            return done
    for text, by in _lower(how):
        if add(text, now, by):
            return done
    shorter = longest_example(now, how)
    if shorter >= 64:
        text = f"--max-length {shorter} --overlong truncate: longer examples lose their ends"
        add(text, *_cut(now, how, shorter))
        return done
    count = cards_needed(now, how)
    here = min(count or 1, GPUS_OF_A_NODE)
    found = None if count is None else layout_of(now, how, Cluster(gpus=here, nodes=count // here))
    if found is not None and case.card.kind == "cuda":
        text = f"{count} x {case.card.name}, weights split over them (FSDP; docs/distributed.md)"
        done.append(Change(text=text, peak=found.bytes))
    return done


def _lower(how: TrainingSetting) -> list[tuple[str, TrainingSetting]]:
    """The rungs below a method, in their order."""
    if not how.full:
        steps = [
            ("--base-precision int8: the base in 8 bits", replace(how, precision="int8")),
            ("--method qlora: the base in 4 bits", replace(how, method="qlora", precision="nf4")),
        ]
        narrower = {"int8": ("nf4",), "nf4": ()}.get(how.precision, ("int8", "nf4"))
        return [(text, by) for text, by in steps if by.precision in narrower]
    found: list[tuple[str, TrainingSetting]] = []
    if how.precision == "float32":
        how = replace(how, precision="bfloat16")
        found.append(("--base-precision bfloat16: weights and gradients in 16 bits, rounded at random", how))
    if how.optimizer == "adamw":
        how = replace(how, optimizer="adamw-8bit")
        found.append(("--optimizer adamw-8bit: its two moments in 8 bits each", how))
    if not how.optimizer_in_backward:
        how = replace(how, optimizer_in_backward=True)
        found.append(("--optimizer-in-backward: no gradient stays; one micro-batch a step", how))
    lora = TrainingSetting(
        key="lora", label="", method="lora", precision="bfloat16",
        activation_checkpointing=how.activation_checkpointing, offload_activations=how.offload_activations,
    )  # fmt: skip
    found.append(("--method lora: a small adapter is trained, the base stays", lora))
    found.append(("--method qlora: and the base is stored in 4 bits", replace(lora, method="qlora", precision="nf4")))
    return found


def _cut(case: PlanCase, setting: TrainingSetting, length: int) -> tuple[PlanCase, TrainingSetting]:
    share = case.load.target_tokens / case.load.tokens
    load = replace(case.load, tokens=length, longest=length, target_tokens=max(1, round(length * share)), examples=1)
    return replace(case, load=load), setting
