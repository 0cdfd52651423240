"""A trial: the parameters of one adapter, or of the whole model, and everything that moves them.

`graft train` runs one; a sweep runs many beside each other on one base. A trial owns its optimizer, learning rate,
order of examples, clipping and stop, and no generator state: all its randomness follows from (seed, draw, position,
layer).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import nn

from graftlm.data.dataset import Example
from graftlm.data.sampler import Sampler

if TYPE_CHECKING:
    from graftlm.training.optimizer import AdamW, LRSchedule
    from graftlm.training.scoring import Scorer


@dataclass(frozen=True)
class ExampleLoss:
    """What the model makes of one evaluation row."""

    row: str
    target_tokens: int
    loss: float
    """Summed over the row's target tokens."""


@dataclass(frozen=True)
class Evaluation:
    """Losses on the eval rows at one step, and the score of the answers to their prompts."""

    step: int
    rows: tuple[ExampleLoss, ...]
    score: float | None = None
    """Higher is better; None without a scorer."""

    @property
    def loss(self) -> float:
        """Mean loss of a target token, in nats."""
        return math.fsum(r.loss for r in self.rows) / sum(r.target_tokens for r in self.rows)


def name_rows(rows: Sequence[str]) -> str:
    """Rows for a message: the first four and how many more."""
    return ", ".join(rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")


@dataclass(eq=False, kw_only=True)
class Trial:
    """One line of training."""

    name: str
    slot: int
    """Where its adapter sits in the bank; 0 when the base itself is trained."""
    seed: int
    parameters: dict[str, nn.Parameter]
    optimizer: AdamW
    schedule: LRSchedule
    examples: Sequence[Example]
    sampler: Sampler
    eval_examples: Sequence[Example] = ()
    max_grad_norm: float = 1.0
    eval_every: int = 0
    scorer: Scorer | None = None
    """Scores answers at each evaluation."""
    best_by: Literal["loss", "score"] = "loss"
    step: int = 0
    """Optimizer steps taken."""
    tokens: int = 0
    target_tokens: int = 0
    first: Evaluation | None = None
    last: Evaluation | None = None
    best: Evaluation | None = None
    """The one with the lowest loss, or the highest score, after at least one step."""
    evaluations: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    """(step, loss)."""
    scores: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    """(step, score)."""
    notes: list[str] = field(default_factory=list[str])
    """What the loop found that a user should know."""
    stop_reason: str | None = None
    """Why it ends before its last step; None while it does not."""

    @property
    def complete(self) -> bool:
        """Whether it has taken its last step."""
        return self.step >= self.sampler.steps

    @property
    def done(self) -> bool:
        """Whether it takes no further step."""
        return self.complete or self.stop_reason is not None

    @property
    def wants_evaluation(self) -> bool:
        """Before the first step, every `eval_every` steps, and at the end."""
        if not self.eval_examples or self.stop_reason is not None:
            return False
        return self.step == 0 or self.done or (self.eval_every > 0 and self.step % self.eval_every == 0)

    def next_examples(self) -> list[tuple[int, Example]]:
        """(draw, example) of the batch of the next step; the same until `step` moves on."""
        return [(draw, self.examples[i]) for draw, i in self.sampler.step(self.step)]

    def record(self, evaluation: Evaluation) -> bool:
        """Remember an evaluation; returns whether it is the best so far. An evaluation before the first step never is."""
        self.first = self.first or evaluation
        self.last = evaluation
        self.evaluations.append((evaluation.step, evaluation.loss))
        if evaluation.score is not None:
            self.scores.append((evaluation.step, evaluation.score))
        better = evaluation.step > 0 and (self.best is None or self._better(evaluation, self.best))
        if better:
            self.best = evaluation
        return better

    @property
    def watched(self) -> list[tuple[int, float]]:
        """(step, loss or score) of every evaluation: what the best one is chosen by."""
        return self.scores if self.best_by == "score" else self.evaluations

    def _better(self, evaluation: Evaluation, than: Evaluation) -> bool:
        """Whether `evaluation` is better. Scores of few short answers are often equal; the lower loss then decides."""
        if self.best_by == "loss" or evaluation.score is None or than.score is None:
            return evaluation.loss < than.loss
        return (evaluation.score, -evaluation.loss) > (than.score, -than.loss)
