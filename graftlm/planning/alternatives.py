"""What would change the advice: other data, other memory, other goals; each with the rule that it follows."""

from __future__ import annotations

from dataclasses import replace

from graftlm.formatting import size
from graftlm.planning import rules
from graftlm.planning.facts import LARGEST_RANK, Facts
from graftlm.planning.fitting import fits
from graftlm.planning.method import TrainingSetting
from graftlm.planning.rules import Reason


def alternatives(facts: Facts, setting: TrainingSetting | None) -> list[Reason]:
    """Sentences about what speaks for something else than `setting`."""
    found: list[Reason] = []
    if setting is not None and not setting.full:
        found += _distance(facts)
        found += _of_adapter(facts, setting)
    if setting is not None and setting.full:
        lora = facts.case.of(facts.by_key("lora"))
        found.append(
            Reason(
                rules.LORA,
                f"Several variants on one base, or less memory: LoRA takes {size(lora.peak)} and saves {size(lora.saved)} "
                f"instead of {size(facts.case.of(setting).saved)}; `graft compare` measures what it gives up.",
            )
        )
    if setting is not None and setting.activation_checkpointing:
        found += _shorter(facts, setting)
    return found


def _distance(facts: Facts) -> list[Reason]:
    """What full training was ahead by on data as far from their base as these."""
    shift = facts.domain_shift
    if shift is None:
        if not facts.rows:
            return []
        return [
            Reason(
                rules.DISTANCE,
                "How far the data are from the base was not measured (its weights are not here, or reading would take long; "
                "--ask-base yes measures it).",
            )
        ]
    text = (
        f"The data are {rules.DISTANCE_WORDS[shift.kind]} this base (excess loss on the prompts {shift.excess_loss} nats a "
        f"token): {rules.GIVEN_UP[shift.kind]} --goal quality plans full training."
    )
    return [Reason(rules.DISTANCE, text)]


def _of_adapter(facts: Facts, setting: TrainingSetting) -> list[Reason]:
    found: list[Reason] = []
    if facts.variants == 1 and facts.goal != "cost":
        tokens = facts.bits_held(LARGEST_RANK) / facts.bits_per_token
        found.append(
            Reason(
                rules.CAPACITY,
                f"More than about {_round(tokens):,} target tokens would be more than an adapter of rank {LARGEST_RANK} holds, "
                "and would speak for full training.",
            )
        )
    again = setting.activation_checkpointing
    if setting.key == "lora":
        lean = facts.case.of(replace(facts.by_key("qlora"), activation_checkpointing=again))
        text = f"Less memory, or many trials at once: QLoRA takes {size(lean.peak)} and {_time_of_qlora(facts)}"
        damage = None if facts.domain_shift is None else facts.domain_shift.nf4_damage
        if damage is not None:
            text += f"; in NF4 the base's loss on the answers changes by {damage:+} nats a token"
        found.append(Reason(rules.NF4, text + "."))
    if setting.method == "qlora":
        dense = facts.case.of(replace(facts.by_key("lora"), activation_checkpointing=again))
        found.append(
            Reason(
                rules.FEWER_BITS,
                f"A card with {size(dense.peak)} free would take LoRA without rounding the base to 4 bits.",
            )
        )
    if facts.goal == "inference":
        found.append(
            Reason(
                rules.MERGE,
                "Speed of inference: `graft merge` makes one plain model of base and adapter, as fast as the base.",
            )
        )
    return found


def _time_of_qlora(facts: Facts) -> str:
    return "up to a tenth more time" if facts.case.card.kind == "cpu" else "more time, which was not measured on GPUs"


def _shorter(facts: Facts, setting: TrainingSetting) -> list[Reason]:
    """Whether examples of half the length would fit without activation checkpointing."""
    load = facts.case.load
    shorter = load.longest // 2
    if shorter < 128:
        return []
    half = replace(load, tokens=load.tokens // 2, target_tokens=max(1, load.target_tokens // 2), longest=shorter)
    plain = replace(facts.case, load=half).of(replace(setting, activation_checkpointing=False))
    if not fits(plain, facts.case.card):
        return []
    faster = "1.7 to 2.5 times as fast" if facts.case.card.kind == "cpu" else "up to a third faster"
    return [
        Reason(
            rules.CHECKPOINTING,
            f"Examples of at most {shorter:,} tokens would fit without activation checkpointing, {faster}.",
        )
    ]


def _round(value: float) -> int:
    """To two digits."""
    return int(float(f"{value:.1e}"))
