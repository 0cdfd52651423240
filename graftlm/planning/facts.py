"""What the advice is based on: a model on a card, the data, what was measured of both, and what the user wants."""

from __future__ import annotations

import math
from dataclasses import dataclass

from graftlm.config.plan import Goal
from graftlm.planning import rules
from graftlm.planning.fitting import PlanCase
from graftlm.planning.method import TrainingSetting, adapter_shape, methods_of
from graftlm.planning.perplexity import DomainShift

RANKS = (8, 16, 32, 64, 128, 256)
LARGEST_RANK = RANKS[-1]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known; without data zeros and None."""

    case: PlanCase
    rows: int = 0
    tokens: int = 0
    target_tokens: int = 0
    domain_shift: DomainShift | None = None
    goal: Goal = "balanced"
    variants: int = 1

    @property
    def nf4_damages(self) -> bool:
        """Whether NF4 raises this base's loss on these data by more than the rule allows; False where it was not measured."""
        damage = None if self.domain_shift is None else self.domain_shift.nf4_damage
        return damage is not None and damage.value > rules.NF4_DAMAGE

    def bits_held(self, rank: int) -> float:
        """What an adapter of a rank can hold."""
        case = self.case
        return adapter_shape(case.shape, case.targets, rank).values(case.shape) * rules.BITS_PER_VALUE

    @property
    def bits_to_learn(self) -> float:
        """The most that training can add: the base's loss on every target token, in bits."""
        return self.target_tokens * self.bits_per_token

    @property
    def bits_per_token(self) -> float:
        """The base's loss on a target token, in bits; an assumption where it was not measured."""
        loss = self.domain_shift.answer_loss.value if self.domain_shift is not None else rules.ASSUMED_LOSS
        return loss / math.log(2)

    def by_key(self, key: str) -> TrainingSetting:
        """A method of this model."""
        return next(m for m in methods_of(self.case.shape) if m.key == key)
