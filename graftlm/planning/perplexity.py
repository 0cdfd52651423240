"""How far data are from a base: its loss on them, beside its predictive entropy.

On in-distribution text a model's mean loss, -log p(token), equals the entropy H of its predictions; the excess over H measures
domain shift. It is measured on the prompts, which are not trained on. A new style of answers to familiar prompts is near (the
loss on the answers says how much there is to learn); prompts of an unfamiliar kind are far.

The base reads a sample of the examples, so each figure has a standard error. Both are in nats a token. `domain_shift.py`
measures them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SAMPLE_TOKENS = 4096
"""Most tokens of a sample. Standard errors of the excess loss: 0.06 nats on GSM8K with SmolLM2, 0.02 on the bundled data."""
FEWEST_TOKENS = 1024
"""Fewest tokens that are worth reading."""
PAIRED_TOKENS = 2048
"""Tokens that are read a second time in 4 bits; a difference on the same tokens needs fewer than a mean."""
NEAR, FAR = 0.5, 1.0  # nats of excess loss; the bundled base: product descriptions -0.05, unseen tasks 0.3, E2E 2.3
FEW_PROMPT_TOKENS = 64
SURE = 2.0
"""Standard errors on either side of an estimate that make its interval: 95 % of a normal error."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over the tokens of all examples, estimated from some of them."""

    value: float
    error: float = 0.0
    """Its standard error; 0 where every example was read."""

    @property
    def interval(self) -> tuple[float, float]:
        """About 95 %."""
        return self.value - SURE * self.error, self.value + SURE * self.error

    def __str__(self) -> str:
        return format(self, "")

    def __format__(self, sign: str) -> str:
        """`1.18 ± 0.09`; with a sign as `+0.29 ± 0.05`."""
        value = f"{self.value:{sign}.2f}"
        return f"{value} ± {SURE * self.error:.2f}" if self.error else value

    def to_json(self) -> dict[str, float]:
        """As plain JSON values."""
        return {"value": self.value, "standard_error": self.error}


@dataclass(frozen=True, kw_only=True)
class DomainShift:
    """Loss and entropy of a base on a sample of data that it was not tuned on."""

    answer_loss: Estimate
    """Of the target tokens."""
    prompt_loss: Estimate
    """Of the tokens that are not targets; of all tokens where nearly all are."""
    prompt_entropy: Estimate
    """Mean entropy of the predictions of those tokens."""
    excess_loss: Estimate
    """Loss minus entropy."""
    nf4_damage: Estimate | None = None
    """By how much the loss on the target tokens rises when the linear layers are stored in NF4; None where not measured."""
    rows: int
    """Rows that were read."""
    tokens: int
    of_rows: int
    """Rows that there are."""

    @property
    def kind(self) -> Literal["near", "between", "far"]:
        """How far the data are."""
        return "near" if self.excess_loss.value < NEAR else "far" if self.excess_loss.value > FAR else "between"

    def to_json(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            "answer_loss": self.answer_loss.to_json(), "prompt_loss": self.prompt_loss.to_json(),
            "prompt_entropy": self.prompt_entropy.to_json(), "excess_loss": self.excess_loss.to_json(), "kind": self.kind,
            "nf4_damage": None if self.nf4_damage is None else self.nf4_damage.to_json(),
            "rows": self.rows, "tokens": self.tokens, "of_rows": self.of_rows,
        }  # fmt: skip
