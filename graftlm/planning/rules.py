"""The rules of the advice: what each says, where it begins, and the measurement that supports it.

`advice.py` applies them and gives every sentence its rule; `graft plan --explain` prints the measurements, and
`docs/planning.md` has them as a table, which a test compares with this file:

    python -m graftlm.planning.rules        the table
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule."""

    name: str
    says: str
    threshold: str
    """Where it begins to apply, or the constants that it computes with."""
    measurement: str
    """What was measured, on what, and where the figures are; or that the rule is arithmetic or a choice."""

    def to_json(self) -> dict[str, str]:
        """As plain JSON values."""
        return {"rule": self.name, "threshold": self.threshold, "measurement": self.measurement}


@dataclass(frozen=True)
class Reason:
    """A sentence of the advice, and the rule that it follows."""

    rule: Rule
    text: str

    def __str__(self) -> str:
        return self.text

    def to_json(self) -> dict[str, str]:
        """As plain JSON values."""
        return {"text": self.text, **self.rule.to_json()}


def plain(text: str) -> str:
    """Markdown's links as their text alone."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)


def table(rules: tuple[Rule, ...]) -> str:
    """The rules as a table of Markdown."""
    lines = ["| rule | says | threshold | measurement |", "|---|---|---|---|"]
    lines += [f"| {rule.name} | {rule.says} | {rule.threshold} | {rule.measurement} |" for rule in rules]
    return "\n".join(lines)


BITS_PER_VALUE = 2.0
"""Bits that a trained value can hold (Allen-Zhu and Li 2024)."""
ASSUMED_LOSS = 2.0
"""Nats a target token of a base that was not asked."""
NF4_DAMAGE = 0.1
"""Nats a target token."""
LEAST_SHARE = 94.8
"""Percent of full's gain that LoRA of rank 16 reached in every comparison of bench/results/quality.json."""
RATE, RATE_WIDTH, RATE_BOUNDS = 3e-4, 4096, (5e-5, 1e-2)
"""An adapter's learning rate on a model of that width, and what it stays within."""
ADAPTER_OVER_FULL = 10.0
GEMMA_3 = (1 / 3, 1 / 10)
"""Parts of that rate, for an adapter and for full training, that suit Gemma 3: its normalizations multiply by 10 to 120."""
BATCHES, ENOUGH_STEPS = (4, 32), 100
FEW_ROWS, EPOCHS_OF_FEW = 20_000, 3

_QUALITY = "[quality.md](../bench/results/quality.md)"
_TESTED = "[advice.md](../bench/results/advice.md)"
_SCHULMAN = "Schulman et al. 2025"

LORA = Rule(
    name="LoRA",
    says="LoRA unless another rule speaks",
    threshold="-",
    measurement=(
        f"LoRA of rank 16 reached at least {LEAST_SHARE} % of full's gain on every base and data set that was "
        f"compared at the best rates of both ({_QUALITY}); {_SCHULMAN} found no gap while an adapter has room for "
        "the data"
    ),
)
QUALITY = Rule(
    name="full for quality",
    says="`--goal quality`: full, if it fits and one model is served",
    threshold="-",
    measurement=(
        f"where a comparison could tell them apart, full was ahead of LoRA, by up to {100 - LEAST_SHARE:.1f} % of "
        f"its gain ({_QUALITY})"
    ),
)
CAPACITY = Rule(
    name="capacity",
    says="full where the data can teach more bits than the largest usual adapter holds",
    threshold="the base's loss on all target tokens, in bits, over 2 bits a value of rank 256",
    measurement=(
        f"{_SCHULMAN} saw LoRA fall behind full once the data held more than an adapter has room for; on E2E no "
        f"more was gained by room to spare: rank 64 94.5 %, rank 16 94.8 % of full's gain ({_QUALITY})"
    ),
)
DISTANCE = Rule(
    name="distance",
    says="says what LoRA gave up on data as far from their base; does not choose the method",
    threshold="near below 0.5 nats of excess loss a token, far above 1",
    measurement=(
        "share of full's gain that LoRA reached, by excess loss: bundled base, -0.1 nats 99.8 % and 2.3 nats 94.8 %; "
        "SmolLM2, 0.0 nats 97.8 %, 0.6 nats 100.6 %, 0.9 nats 99.0 %, 1.5 nats 102.1 %; Gemma 3 270M, 0.8 nats 100.5 %, "
        f"1.3 nats 99.2 % ({_QUALITY}, {_TESTED})"
    ),
)
FEWER_BITS = Rule(
    name="fewer bits",
    says="16 bits (or a GGUF file's blocks), else 8, else 4: the most that fit",
    threshold="the planned peak over the memory",
    measurement=(
        "57 of 59 plans were within 10 % of the measured peak ([memory.md](../bench/results/memory.md)); QLoRA was "
        f"never ahead of LoRA, and on real bases up to 5.3 % of full's gain behind it ({_QUALITY})"
    ),
)
COST = Rule(
    name="cost",
    says="`--goal cost`: the fewest bits",
    threshold="-",
    measurement=(
        "an NF4 base has the smallest measured peaks of a model ([memory.md](../bench/results/memory.md)); on the"
        f" bundled base QLoRA and LoRA could not be told apart ({_QUALITY})"
    ),
)
NF4 = Rule(
    name="NF4's damage",
    says="NF4 last, after 8 bits and a file's own blocks, where it raises the base's loss on the answers",
    threshold="0.1 nats a target token",
    measurement=(
        "where NF4 changed the base's loss by -0.01 to +0.13 nats QLoRA was within 2 % of LoRA's share (four comparisons); "
        "where it rose by 0.27 to 0.71 QLoRA reached 92.5 to 98.3 % of full's gain and LoRA 97.8 to 102.1 % (four), and LoRA "
        f"on int8 as much as LoRA or more (three) ({_QUALITY}); its time is 1.0 to 1.1 times LoRA's "
        "([cpu.md](../bench/results/cpu.md))"
    ),
)
VARIANTS = Rule(
    name="variants",
    says="adapters for several versions of one base",
    threshold="2 versions",
    measurement="arithmetic: the bytes of an adapter a version against those of a model",
)
RANK = Rule(
    name="rank",
    says="the least of 8 to 256 that holds the data, and at least `--rank`",
    threshold="2 bits a value (Allen-Zhu and Li 2024)",
    measurement=(
        "E2E on the bundled base filled rank 16 (684,000 bits to learn, room for 664,000), and rank 64 brought no"
        " more: 94.5 and 94.8 % of full's gain; on SmolLM2 640 rows of it fitted every rank: 97.4, 97.9, 97.8 and 97.7 % with "
        f"ranks 1, 4, 16 and 64 ({_QUALITY})"
    ),
)
LEARNING_RATE = Rule(
    name="learning rate",
    says="falls with the model's width; a tenth for full training; for Gemma 3 a third of the one, a tenth of the other",
    threshold="3e-4 x 4096 / width, between 5e-5 and 1e-2",
    measurement=(
        "rates that searches found: bundled base (width 192) LoRA 6.3e-3 and full 2e-3, the rule gives 6e-3 and 6e-4; SmolLM2 "
        "(576) 2e-3 and 2e-4 on E2E and T0, 2e-3 and 6e-5 on GSM8K, the rule 2e-3 and 2e-4, "
        "and three times as much on a style; Gemma 3 270M (640) 6e-4 and "
        f"2e-5 on T0 and E2E, where width alone gives 2e-3 and 2e-4 ({_QUALITY}); for Llama 3 of width 4096 {_SCHULMAN} "
        "have 2.9e-4"
    ),
)
BATCH = Rule(
    name="batch",
    says="doubled from 4 to 32 while enough steps are left",
    threshold="100 steps",
    measurement=(
        f"{_SCHULMAN}: LoRA loses more than full by large batches, at every rank; not measured here. 100 steps is "
        "a choice"
    ),
)
EPOCHS = Rule(
    name="epochs",
    says="3 where there are few rows, else 1",
    threshold="20,000 rows",
    measurement=(
        "on E2E, LoRA's loss after 1, 3 and 10 epochs over 264 rows: 2.440, 1.875, 1.837 and rising after the "
        f"fifth; after 1 and 3 over 2,110 rows: 1.500, 1.280 ({_TESTED}). Where it ends, 20,000 rows, is a choice"
    ),
)
CHECKPOINTING = Rule(
    name="activation checkpointing",
    says="only where nothing else fits",
    threshold="-",
    measurement=(
        "on two cores a checkpointed step took 1.7 to 2.5 times as long ([cpu.md](../bench/results/cpu.md)); that"
        " a GPU takes a third longer is arithmetic: one forward pass more"
    ),
)
MERGE = Rule(
    name="merge",
    says="`--goal inference`: merge the adapter",
    threshold="-",
    measurement="arithmetic: a merged model has the base's matmuls and no others",
)
DISTANCE_WORDS = {"near": "near", "between": "neither near nor far from", "far": "far from"}
GIVEN_UP = {
    "near": "on such data LoRA reached 97.8 to 99.8 % of full training's gain.",
    "between": f"LoRA reached at least {LEAST_SHARE} % of full training's gain on data of any distance.",
    "far": f"on the farthest data that were tried LoRA reached {LEAST_SHARE} % of full training's gain.",
}

ALL = (
    LORA, QUALITY, CAPACITY, DISTANCE, FEWER_BITS, COST, NF4, VARIANTS, RANK, LEARNING_RATE, BATCH, EPOCHS, CHECKPOINTING,
    MERGE,
)  # fmt: skip


def main() -> None:
    """Print the table."""
    sys.stdout.write(table(ALL) + "\n")


if __name__ == "__main__":
    main()
