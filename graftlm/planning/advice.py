"""Advice with its reasons: a method and its settings, as sentences with the user's own numbers.

Each sentence follows a rule of `rules.py`, which names the measurement that supports it:

    method        LoRA. Full for the last point of quality, or where the data hold more than an adapter can. Fewer bits where
                  16 do not fit, or cost decides; not NF4 where it damages this base on these data and something else fits.
    rank          enough values for the data: an adapter holds about 2 bits a value, and what training can add is at most the
                  base's loss on the target tokens
    learning rate falls with the model's width; an adapter's is about ten times full training's; Gemma 3 takes lower ones
    batch         small, and enough steps
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from graftlm.formatting import count, size
from graftlm.planning import rules
from graftlm.planning.alternatives import alternatives
from graftlm.planning.facts import LARGEST_RANK, RANKS, Facts
from graftlm.planning.fitting import changes, fits
from graftlm.planning.layouts import cards_needed
from graftlm.planning.memory import MemoryRequirement
from graftlm.planning.method import METHODS, TrainingSetting, adapter_shape
from graftlm.planning.rules import Reason, Rule


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A method and its settings, the reasons, and what would change them."""

    setting: TrainingSetting | None
    """None where nothing fits."""
    rank: int | None
    learning_rate: float
    batch_size: int
    epochs: int
    reasons: tuple[Reason, ...]
    would_change: tuple[Reason, ...]
    cards: int = 1

    @property
    def command(self) -> str:
        """The options of `graft train` that follow the advice."""
        if self.setting is None:
            return ""
        rank = f" --rank {self.rank}" if self.rank else ""
        return (
            f"{self.setting.flags}{rank} --learning-rate {self.learning_rate:g} --batch-size {self.batch_size}"
            + (" --max-grad-norm 0" if self.setting.optimizer_in_backward else "")
            + f" --epochs {self.epochs}"
        )

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that its sentences follow, each once."""
        return tuple(dict.fromkeys(reason.rule for reason in (*self.reasons, *self.would_change)))

    def to_json(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            "method": None if self.setting is None else self.setting.key, "options": self.command, "rank": self.rank,
            "learning_rate": self.learning_rate, "batch_size": self.batch_size, "epochs": self.epochs, "cards": self.cards,
            "reasons": [reason.to_json() for reason in self.reasons],
            "would_change": [reason.to_json() for reason in self.would_change],
        }  # fmt: skip


def advise(facts: Facts) -> Advice:
    """Advice from facts; it says which facts are missing."""
    reasons: list[Reason] = []
    setting, cards = _method(facts, reasons)
    if setting is None:
        reasons += [
            Reason(rules.FEWER_BITS, f"Instead: {change.text} ({size(change.peak)}).")
            for change in changes(facts.case, METHODS[-1])
        ]
    full = setting is not None and setting.full
    rank = None if full or setting is None else _rank(facts, reasons)
    rate = _rate(facts, full)
    kind = "full training" if full else "an adapter"
    reasons.append(
        Reason(
            rules.LEARNING_RATE,
            f"Learning rate {rate:g}: {kind} of a {_family(facts)}model {facts.case.shape.width:,} wide; "
            f"{'an adapter' if full else 'full training'} would take {_rate(facts, not full):g}.",
        )
    )
    batch, epochs = _batch(facts)
    _say_batch(facts, batch, epochs, reasons)
    return Advice(
        setting=setting, rank=rank, learning_rate=rate, batch_size=batch, epochs=epochs, reasons=tuple(reasons),
        would_change=tuple(alternatives(facts, setting)), cards=cards,
    )  # fmt: skip


# ---- the method ------------------------------------------------------------------------------------------------------


def _first_that_fits(facts: Facts, keys: tuple[str, ...]) -> tuple[TrainingSetting, MemoryRequirement] | None:
    """The first of the methods that fits the card, each first as it is and then with activation checkpointing."""
    for key in keys:
        for setting in (facts.by_key(key), facts.by_key(key).checkpointed()):
            found = facts.case.of(setting)
            if fits(found, facts.case.card):
                return setting, found
    return None


_FULL = ("full", "full-bfloat16", "full-8bit", "full-in-backward")


def _method(facts: Facts, reasons: list[Reason]) -> tuple[TrainingSetting | None, int]:
    card = facts.case.card
    wanted = _reason_for_full(facts)
    if wanted is not None:
        found = _full(facts, wanted, reasons)
        if found is not None:
            return found
    if facts.goal == "cost":
        found = _cheapest(facts, reasons)
        if found is not None:
            return found, 1
    found = _first_that_fits(facts, ("lora", "lora-int8", "qlora"))
    if found is None:
        least = facts.case.of(METHODS[-1].checkpointed())
        reasons.append(
            Reason(
                rules.FEWER_BITS,
                f"Nothing fits {card.name}: QLoRA with activation checkpointing still takes {size(least.peak)} of "
                f"{size(card.usable)}.",
            )
        )
        return None, 1
    reasons.append(_reason_for_adapter(facts, found, asked_for_full=wanted is not None))
    if found[0].method == "qlora" and facts.nf4_damages:
        reasons.append(_nf4_damage(facts))
    return found[0], 1


def _reason_for_adapter(
    facts: Facts, found: tuple[TrainingSetting, MemoryRequirement], *, asked_for_full: bool
) -> Reason:
    if found[0].key != "lora":
        dense = facts.case.of(
            facts.by_key("lora").checkpointed() if found[0].activation_checkpointing else facts.by_key("lora")
        )
        what = "an 8-bit base" if found[0].key == "lora-int8" else "a 4-bit base"
        return Reason(
            rules.FEWER_BITS,
            f"{_lora_on(facts)} takes {size(dense.peak)}, more than the {size(facts.case.card.usable)} there are; {what} "
            f"fits: {_fit(found, facts)}.",
        )
    if facts.variants > 1:
        return Reason(
            rules.VARIANTS,
            f"{facts.variants} variants share one base when each is an adapter of {size(found[1].saved)}; "
            f"{_lora_on(facts)} fits: {_fit(found, facts)}.",
        )
    text = "So LoRA: it" if asked_for_full else f"{_lora_on(facts)} is the default, and"
    return Reason(rules.LORA, f"{text} fits: {_fit(found, facts)}.")


def _lora_on(facts: Facts) -> str:
    return "LoRA on the file's own blocks" if facts.case.shape.gguf_bytes else "LoRA on a 16-bit base"


def _reason_for_full(facts: Facts) -> Reason | None:
    """Why every weight should move; None for no reason."""
    if facts.variants > 1 or facts.goal == "cost":
        return None
    if facts.bits_to_learn > facts.bits_held(LARGEST_RANK):
        return Reason(
            rules.CAPACITY,
            f"{facts.target_tokens:,} target tokens can teach up to {size(facts.bits_to_learn / 8)}, more than the "
            f"{size(facts.bits_held(LARGEST_RANK) / 8)} that an adapter of rank {LARGEST_RANK} holds.",
        )
    return Reason(rules.QUALITY, "The last point of quality counts.") if facts.goal == "quality" else None


def _full(facts: Facts, wanted: Reason, reasons: list[Reason]) -> tuple[TrainingSetting, int] | None:
    """Full training in the first form that fits, on several cards where quality is the goal; None where it does not fit."""
    card = facts.case.card
    found = _first_that_fits(facts, _FULL + (("full-offload",) if card.kind == "cuda" else ()))
    if found is not None:
        reasons.append(
            Reason(wanted.rule, f"{wanted} Full training can move every weight, and fits: {_fit(found, facts)}.")
        )
        return found[0], 1
    lean = facts.by_key("full-8bit").checkpointed()
    many = cards_needed(facts.case, lean)
    if facts.goal == "quality" and many is not None and card.kind == "cuda":
        text = f"{wanted} Full training in bfloat16 with 8-bit AdamW needs {many} x {card.name}, its weights split over them."
        reasons.append(Reason(wanted.rule, text))
        return lean, many
    least = facts.case.of(facts.by_key("full-in-backward").checkpointed())
    text = f"{wanted} But even its leanest form takes {size(least.peak)} of the {size(card.usable)} there are."
    reasons.append(Reason(wanted.rule, text))
    return None


def _cheapest(facts: Facts, reasons: list[Reason]) -> TrainingSetting | None:
    """The fewest bits that fit; NF4 last where it damages this base."""
    keys = ("qlora", "lora-int8", "lora")
    if facts.nf4_damages:
        keys = ("lora", "lora-int8", "qlora") if facts.case.shape.gguf_bytes else ("lora-int8", "lora", "qlora")
        reasons.append(_nf4_damage(facts))
    found = _first_that_fits(facts, keys)
    if found is None:
        return None
    what = {"qlora": "a 4-bit base", "lora-int8": "an 8-bit base", "lora": _lora_on(facts)}[found[0].key]
    reasons.append(
        Reason(rules.COST, f"Cost decides, and {what} leaves room for a cheaper card: {_fit(found, facts)}.")
    )
    return found[0]


def _nf4_damage(facts: Facts) -> Reason:
    assert facts.domain_shift is not None
    return Reason(
        rules.NF4,
        f"NF4 damages this base on these data: its loss on the answers rises by {facts.domain_shift.nf4_damage} nats a "
        "token, of which training makes up most but not all.",
    )


def _fit(found: tuple[TrainingSetting, MemoryRequirement], facts: Facts) -> str:
    again = ", with activation checkpointing" if found[0].activation_checkpointing else ""
    return f"{size(found[1].peak)} of {size(facts.case.card.usable)}{again}"


# ---- the numbers -----------------------------------------------------------------------------------------------------


def _rank(facts: Facts, reasons: list[Reason]) -> int:
    """The least usual rank that holds the data, and at least the plan's."""
    least = facts.case.rank
    rank = next((r for r in RANKS if r >= least and facts.bits_held(r) >= facts.bits_to_learn), LARGEST_RANK)
    rank = max(rank, least)
    values = adapter_shape(facts.case.shape, facts.case.targets, rank).values(facts.case.shape)
    where = "all linear layers" if facts.case.targets == ("all-linear",) else ", ".join(facts.case.targets)
    text = f"Rank {rank} on {where}: {count(values)} values hold about {size(facts.bits_held(rank) / 8)}"
    if facts.target_tokens:
        text += f", and {facts.target_tokens:,} target tokens can teach at most {size(facts.bits_to_learn / 8)}"
    reasons.append(Reason(rules.RANK, text + "."))
    return rank


def _rate(facts: Facts, full: bool) -> float:
    """The learning rate falls with the width (Yang et al. 2022), within what is usual; one significant digit."""
    lowest, highest = rules.RATE_BOUNDS
    rate = min(highest, max(lowest, rules.RATE * rules.RATE_WIDTH / facts.case.shape.width))
    rate /= rules.ADAPTER_OVER_FULL if full else 1
    rate *= rules.GEMMA_3[full] if _family(facts) else 1
    power = 10 ** math.floor(math.log10(rate))
    return round(round(rate / power) * power, 12)


def _family(facts: Facts) -> str:
    """What a model is called whose learning rate does not follow from its width alone; "" for all others."""
    return "Gemma 3 " if facts.case.shape.architecture.startswith("Gemma3") else ""


def _batch(facts: Facts) -> tuple[int, int]:
    """A batch that leaves enough steps; epochs so that few rows are seen more than once."""
    if not facts.rows:
        return 16, 1
    epochs = rules.EPOCHS_OF_FEW if facts.rows < rules.FEW_ROWS else 1
    batch, largest = rules.BATCHES
    while batch < largest and facts.rows * epochs / (batch * 2) >= rules.ENOUGH_STEPS:
        batch *= 2
    return batch, epochs


def _say_batch(facts: Facts, batch: int, epochs: int, reasons: list[Reason]) -> None:
    if not facts.rows:
        reasons.append(Reason(rules.BATCH, "Without --data, rank, batch and epochs are defaults, not advice."))
        return
    steps = max(1, facts.rows * epochs // batch)
    reasons.append(Reason(rules.BATCH, f"Batch {batch}: {facts.rows * epochs:,} examples make {steps:,} steps."))
    often = "once" if epochs == 1 else f"{epochs} times"
    reasons.append(
        Reason(
            rules.EPOCHS,
            f"{epochs} {'epoch' if epochs == 1 else 'epochs'}: {facts.rows:,} rows are seen {often}; training keeps the step "
            "with the lowest eval loss (--eval-data).",
        )
    )
