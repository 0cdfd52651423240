"""How far data are from a base: its own loss on them, beside the loss that it expects.

A model that is at home in a text is as surprised by it expects to be: averaged over text from its own distribution,
its loss -log p(token) is the entropy H of what it predicts. What the loss is above H is surprise that the model did not
reckon with, and it is read where nothing is to be learned: on the prompts. A new voice over known prompts is near (the
loss on the answers says how much there is to learn); prompts of an unknown kind are far.

Both are in nats per token. `domain_shift.py` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SAMPLE_TOKENS = 8192  # enough for a mean that is right to a few hundredths
NEAR, FAR = 0.5, 1.0  # nats of surprise; the bundled base: its own products -0.05, held-out tasks 0.3, E2E 2.3
FEW_PROMPT_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class DomainShift:
    """What a base makes of data that it was not tuned on."""

    answer_loss: float
    """Of the target tokens."""
    prompt_loss: float
    """Of the tokens that are read and not trained; of all of them where hardly any is untrained."""
    prompt_entropy: float
    """What the base expects that loss to be."""
    rows: int
    tokens: int

    @property
    def excess_loss(self) -> float:
        """Loss above what the base expects."""
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
