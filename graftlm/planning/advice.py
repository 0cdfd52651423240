"""Advice with its reasons: a method and its settings, as sentences with the user's own numbers.

The rules and their sources:

    method        LoRA unless there is a reason. Full where the data are far from the base or very many, it fits, and one
                  model is served. QLoRA where 16-bit weights do not fit, or cost decides (Dettmers et al. 2023).
    targets       all linear layers: attention alone learns less at the same size (Schulman et al. 2025; Dettmers et al. 2023)
    rank          enough values for the data: an adapter holds about 2 bits a value (Allen-Zhu and Li 2024), and what training
                  can add is at most the base's loss on the target tokens
    learning rate an adapter's is about ten times full training's (Schulman et al. 2025), less for wider models
    batch         small: adapters lose more by large batches than full training does (Schulman et al. 2025)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from graftlm.config.plan import Goal
from graftlm.formatting import count, size
from graftlm.planning.fitting import PlanCase, cards_needed, changes, fits
from graftlm.planning.memory import MemoryRequirement
from graftlm.planning.method import METHODS, TrainingSetting, adapter_shape, methods_of
from graftlm.planning.perplexity import DomainShift

MANY_ROWS = 100_000
BITS_PER_VALUE = 2.0
_RANKS = (8, 16, 32, 64, 128, 256)
_RATE, _RATE_WIDTH = 2e-4, 4096  # of an adapter on a model of that width


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the advice is based on."""

    case: PlanCase
    rows: int = 0
    tokens: int = 0
    target_tokens: int = 0
    domain_shift: DomainShift | None = None
    goal: Goal = "balanced"
    variants: int = 1


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A method and its settings, the reasons, and what would change them."""

    setting: TrainingSetting | None
    """None where nothing fits."""
    rank: int | None
    learning_rate: float
    batch_size: int
    epochs: int
    reasons: tuple[str, ...]
    would_change: tuple[str, ...]
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

    def to_json(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            "method": None if self.setting is None else self.setting.key, "options": self.command, "rank": self.rank,
            "learning_rate": self.learning_rate, "batch_size": self.batch_size, "epochs": self.epochs, "cards": self.cards,
            "reasons": list(self.reasons), "would_change": list(self.would_change),
        }  # fmt: skip


def advise(facts: Facts) -> Advice:
    """Advice from facts; it says which facts are missing."""
    reasons: list[str] = []
    setting, cards = _method(facts, reasons)
    if setting is None:
        reasons += [f"Instead: {change.text} ({size(change.peak)})." for change in changes(facts.case, METHODS[-1])]
    full = setting is not None and setting.full
    rank = None if full or setting is None else _rank(facts, reasons)
    rate = _rate(facts, full)
    kind = "Full training" if full else "An adapter"
    reasons.append(
        f"Learning rate {rate:g}: {kind.lower()} of a model {facts.case.shape.width:,} wide; "
        f"{'an adapter would take' if full else 'full training would take'} about ten times {'more' if full else 'less'}."
    )
    batch, epochs = _batch(facts)
    if facts.rows:
        reasons.append(
            f"Batch {batch} and {epochs} {'epoch' if epochs == 1 else 'epochs'}: {facts.rows:,} rows make "
            f"{max(1, facts.rows * epochs // batch):,} steps; adapters lose more by large batches than full training does."
        )
    else:
        reasons.append("Without --data, rank, batch and epochs are defaults, not advice.")
    return Advice(
        setting=setting, rank=rank, learning_rate=rate, batch_size=batch, epochs=epochs, reasons=tuple(reasons),
        would_change=tuple(_would_change(facts, setting)), cards=cards,
    )  # fmt: skip


# ---- the method ------------------------------------------------------------------------------------------------------


def _by_key(facts: Facts, key: str) -> TrainingSetting:
    return next(m for m in methods_of(facts.case.shape) if m.key == key)


def _first_that_fits(facts: Facts, keys: tuple[str, ...]) -> tuple[TrainingSetting, MemoryRequirement] | None:
    """The first of the methods that fits the card, each first as it is and then with activation checkpointing."""
    for key in keys:
        for setting in (_by_key(facts, key), _by_key(facts, key).checkpointed()):
            found = facts.case.of(setting)
            if fits(found, facts.case.card):
                return setting, found
    return None


_FULL = ("full", "full-bfloat16", "full-8bit", "full-in-backward")


def _method(facts: Facts, reasons: list[str]) -> tuple[TrainingSetting | None, int]:
    card = facts.case.card
    wanted = _reason_for_full(facts)
    keys = _FULL + (("full-offload",) if card.kind == "cuda" else ())
    if wanted:
        found = _first_that_fits(facts, keys)
        if found is not None:
            reasons.append(f"{wanted} Full training can move every weight, and fits: {_fit(found, facts)}.")
            return found[0], 1
        many = cards_needed(facts.case.of(_by_key(facts, "full-8bit").checkpointed()), facts.case.shape, card)
        if facts.goal == "quality" and many is not None and card.kind == "cuda":
            reasons.append(
                f"{wanted} Full training in bfloat16 with 8-bit AdamW needs {many} x {card.name}, its weights split over them."
            )
            return _by_key(facts, "full-8bit").checkpointed(), many
        least = facts.case.of(_by_key(facts, "full-in-backward").checkpointed())
        reasons.append(
            f"{wanted} But even its leanest form takes {size(least.peak)} of the {size(card.usable)} there are."
        )
    if facts.goal == "cost":
        found = _first_that_fits(facts, ("qlora", "lora-int8", "lora"))
        if found is not None:
            reasons.append(f"Cost decides, and a 4-bit base leaves room for a cheaper card: {_fit(found, facts)}.")
            return found[0], 1
    found = _first_that_fits(facts, ("lora", "lora-int8", "qlora"))
    if found is None:
        least = facts.case.of(METHODS[-1].checkpointed())
        reasons.append(
            f"Nothing fits {card.name}: QLoRA with activation checkpointing still takes {size(least.peak)} of "
            f"{size(card.usable)}."
        )
        return None, 1
    setting = found[0]
    if setting.key == "lora":
        text = "Nothing speaks for moving every weight" if not wanted else "So LoRA"
        if facts.variants > 1:
            text = f"{facts.variants} variants share one base when each is an adapter of {size(found[1].saved)}"
        reasons.append(f"{text}; LoRA on a 16-bit base is the default, and fits: {_fit(found, facts)}.")
    else:
        dense = facts.case.of(_by_key(facts, "lora").checkpointed())
        what = "an 8-bit base" if setting.key == "lora-int8" else "a 4-bit base"
        reasons.append(
            f"LoRA on a 16-bit base takes {size(dense.peak)}, more than the {size(card.usable)} there are; {what} fits: "
            f"{_fit(found, facts)}."
        )
    return setting, 1


def _reason_for_full(facts: Facts) -> str:
    """Why every weight should move, in a sentence; empty for no reason."""
    if facts.variants > 1 or facts.goal == "cost":
        return ""
    if facts.rows >= MANY_ROWS:
        return f"{facts.rows:,} rows are more than an adapter should hold ({MANY_ROWS:,} and more)."
    if facts.domain_shift is not None and facts.domain_shift.kind == "far":
        return (
            f"The data are far from this base: {facts.domain_shift.excess_loss} nats a token of excess loss on "
            "their prompts "
            f"(loss {facts.domain_shift.prompt_loss.value:.2f}, it expects {facts.domain_shift.prompt_entropy.value:.2f})."
        )
    return "The last point of quality counts." if facts.goal == "quality" else ""


def _fit(found: tuple[TrainingSetting, MemoryRequirement], facts: Facts) -> str:
    again = ", with activation checkpointing" if found[0].activation_checkpointing else ""
    return f"{size(found[1].peak)} of {size(facts.case.card.usable)}{again}"


# ---- the numbers -----------------------------------------------------------------------------------------------------


def bits_to_learn(facts: Facts) -> float:
    """The most that training can add: the base's loss on every target token, in bits; 2 nats a token where it is unknown."""
    loss = facts.domain_shift.answer_loss.value if facts.domain_shift is not None else 2.0
    return facts.target_tokens * loss / math.log(2)


def _rank(facts: Facts, reasons: list[str]) -> int:
    """The least usual rank that holds the data, 16 at least; 64 for data that are far."""
    shape, targets = facts.case.shape, facts.case.targets
    wanted = bits_to_learn(facts)
    far = facts.domain_shift is not None and facts.domain_shift.kind == "far"
    least = 64 if far else facts.case.rank
    rank = next(
        (r for r in _RANKS if r >= least and adapter_shape(shape, targets, r).values(shape) * BITS_PER_VALUE >= wanted),
        256,
    )
    rank = max(rank, facts.case.rank)
    values = adapter_shape(shape, targets, rank).values(shape)
    where = "all linear layers" if targets == ("all-linear",) else ", ".join(targets)
    text = f"Rank {rank} on {where}: {count(values)} values hold about {size(values * BITS_PER_VALUE / 8)}"
    if facts.target_tokens:
        text += f", and {facts.target_tokens:,} target tokens can teach at most {size(wanted / 8)}"
    if far and facts.domain_shift is not None:
        text += "; far data want more than the usual 16"
    reasons.append(text + ".")
    return rank


def _rate(facts: Facts, full: bool) -> float:
    """The learning rate falls with the width (Yang et al. 2022), within what is usual; one significant digit."""
    rate = min(1e-2, max(5e-5, _RATE * _RATE_WIDTH / facts.case.shape.width)) / (10 if full else 1)
    power = 10 ** math.floor(math.log10(rate))
    return round(round(rate / power) * power, 12)


def _batch(facts: Facts) -> tuple[int, int]:
    """A batch that leaves at least a hundred steps, 4 to 32; epochs so that few rows are seen more than once."""
    if not facts.rows:
        return 16, 1
    epochs = 3 if facts.rows < 20_000 else 1
    steps = facts.rows * epochs
    batch = 4
    while batch < 32 and steps / (batch * 2) >= 100:
        batch *= 2
    return batch, epochs


# ---- what would change it --------------------------------------------------------------------------------------------


def _would_change(facts: Facts, setting: TrainingSetting | None) -> list[str]:
    said: list[str] = []
    card = facts.case.card
    if facts.domain_shift is None and facts.rows:
        said.append(
            "How far the data are from the base was not measured (its weights are not here, or reading would take long; "
            "--ask-base yes measures it): excess loss of more than 1 nat on the prompts would speak for full training."
        )
    elif facts.domain_shift is not None and facts.domain_shift.kind != "far":
        said.append(
            f"The base is at home in these prompts (excess loss {facts.domain_shift.excess_loss} nats a token, "
            "far begins at 1); "
            "data of another kind would speak for full training."
        )
    if setting is not None and not setting.full:
        if facts.rows < MANY_ROWS:
            said.append(f"{MANY_ROWS:,} rows and more would speak for full training.")
        again = setting.activation_checkpointing
        if setting.method == "lora" and setting.precision in ("bfloat16", "gguf"):
            lean = facts.case.of(replace(_by_key(facts, "qlora"), activation_checkpointing=again))
            said.append(
                f"Less memory, or many trials at once: QLoRA takes {size(lean.peak)} and about a fifth more time."
            )
        if setting.method == "qlora":
            dense = facts.case.of(replace(_by_key(facts, "lora"), activation_checkpointing=again))
            said.append(
                f"A card with {size(dense.peak)} free would take LoRA on a 16-bit base: faster, and no rounding."
            )
        if facts.goal == "inference":
            said.append(
                "Speed of inference: `graft merge` makes one plain model of base and adapter, as fast as the base."
            )
    if setting is not None and setting.full:
        lora = facts.case.of(_by_key(facts, "lora"))
        said.append(
            f"Several variants on one base, or less memory: LoRA takes {size(lora.peak)} and saves {size(lora.saved)} "
            f"instead of {size(facts.case.of(setting).saved)}; `graft compare` measures what it gives up."
        )
    shorter = facts.case.load.longest // 2
    if setting is not None and setting.activation_checkpointing and shorter >= 128:
        half = replace(
            facts.case.load,
            tokens=facts.case.load.tokens // 2,
            target_tokens=max(1, facts.case.load.target_tokens // 2),
            longest=shorter,
        )
        plain = replace(facts.case, load=half).of(replace(setting, activation_checkpointing=False))
        if fits(plain, card):
            said.append(
                f"Examples of at most {shorter:,} tokens would fit without activation checkpointing, a quarter faster."
            )
    return said
