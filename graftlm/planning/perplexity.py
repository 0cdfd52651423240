"""How far data are from a base: its loss on them, beside its predictive entropy.

On in-distribution text a model's mean loss, -log p(token), equals the entropy H of its predictions; the excess over H measures
domain shift. It is measured on the prompts, which are not trained on. A new style of answers to familiar prompts is near (the
loss on the answers says how much there is to learn); prompts of an unfamiliar kind are far.

Both are in nats a token. `domain_shift.py` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SAMPLE_TOKENS = 8192  # enough for a mean that is right to a few hundredths
NEAR, FAR = 0.5, 1.0  # nats of excess loss; the bundled base: product descriptions -0.05, unseen tasks 0.3, E2E 2.3
FEW_PROMPT_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class DomainShift:
    """Loss and entropy of a base on data that it was not tuned on."""

    answer_loss: float
    """Of the target tokens."""
    prompt_loss: float
    """Of the tokens that are not targets; of all tokens where nearly all are."""
    prompt_entropy: float
    """Mean entropy of the predictions of those tokens."""
    rows: int
    tokens: int

    @property
    def excess_loss(self) -> float:
        """Loss minus entropy."""
        return self.prompt_loss - self.prompt_entropy

    @property
    def kind(self) -> Literal["near", "between", "far"]:
        """How far the data are."""
        return "near" if self.excess_loss < NEAR else "far" if self.excess_loss > FAR else "between"

    def to_json(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            "answer_loss": self.answer_loss, "prompt_loss": self.prompt_loss, "prompt_entropy": self.prompt_entropy,
            "excess_loss": self.excess_loss, "kind": self.kind, "rows": self.rows, "tokens": self.tokens,
        }  # fmt: skip
