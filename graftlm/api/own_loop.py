"""An adapter that its caller trains: forward and backward, optimizer step, save.

    batch = model.encode(rows)
    loss = model.forward_backward(batch)          # gradients add up until the step
    model.optimizer_step(learning_rate=1e-4)

The forward pass, the loss and AdamW are those of `graft.train`; what is left out is its schedule, its order of examples, its
evaluations and its run folder. Dropout is keyed by (seed, how many examples were shown before), as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import Adapter, attach, detach
from graftlm.base.chat import Encoder
from graftlm.base.loading import Base
from graftlm.config import TrainConfig
from graftlm.data.dataset import Dataset, Example
from graftlm.errors import ConfigError, Diverged
from graftlm.files import atomic_folder
from graftlm.planning.plan import DEFAULT_MICRO_BATCH_TOKENS
from graftlm.training.micro_batch import BatchItem, backward, collate, count_target_tokens, forward, micro_batches
from graftlm.training.optimizer import clip_factor
from graftlm.training.run import make_optimizer, new_adapter_for
from graftlm.training.run_folder import describe_inputs, manifest_of

SLOT = 2
"""Of the caller's adapter; a run on the same base has 1, engines take higher ones."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows as the model reads them."""

    dataset: Dataset
    encoder: Encoder
    train_on: str

    @property
    def examples(self) -> tuple[Example, ...]:
        return self.dataset.examples

    @property
    def tokens(self) -> int:
        return self.dataset.tokens

    @property
    def target_tokens(self) -> int:
        """Tokens that the loss counts."""
        return self.dataset.target_tokens

    def __len__(self) -> int:
        return self.dataset.rows

    def __repr__(self) -> str:
        return f"Batch({len(self)} examples, {self.tokens:,} tokens, {self.target_tokens:,} of them targets)"


class OwnLoop:
    """One adapter in its slot, and its optimizer."""

    def __init__(self, base: Base, config: TrainConfig) -> None:
        """`config` describes the adapter, as for a run. Raises ConfigError."""
        self.base, self.config = base, config
        self.adapter: Adapter = new_adapter_for(base, config)
        attach(base, self.adapter, SLOT)
        self.parameters = self.adapter.parameters()
        self.optimizer = make_optimizer(config, self.parameters, base.device)
        self.shown = 0
        self.steps = 0
        self._last: Batch | None = None

    def forward_backward(self, batch: Batch, micro_batch_tokens: int | None = None) -> float:
        """Add the gradient of the batch's mean loss to what is there; returns that loss, in nats a target token.

        Raises Diverged for a loss that is not finite; the gradients are then gone.
        """
        weight = 1.0 / count_target_tokens(batch.examples)
        seed = self.config.seed
        items = [BatchItem(e, SLOT, (seed, self.shown + i), weight) for i, e in enumerate(batch.examples)]
        total = 0.0
        with torch.enable_grad():
            for group in micro_batches(self.base, items, micro_batch_tokens or DEFAULT_MICRO_BATCH_TOKENS):
                loss, losses = forward(self.base, collate(self.base, group))
                backward(loss)
                total += float(losses.double().sum())
        self.shown += len(batch)
        mean = total * weight
        if not torch.isfinite(torch.tensor(mean)):
            self.optimizer.zero_grad()
            raise Diverged(f"the loss is {mean} after step {self.steps}; lower learning_rate, or look at these rows")
        self._last = batch
        return mean

    def optimizer_step(self, learning_rate: float, max_grad_norm: float = 1.0) -> float:
        """One step of AdamW by the gradients that are there, clipped to a common norm; returns their norm before.

        Raises ConfigError where there are none, Diverged where one is not finite; nothing has changed then.
        """
        if learning_rate <= 0:
            raise ConfigError(f"learning_rate is {learning_rate:g}; take a number above 0, such as 1e-4")
        if all(p.grad is None for p in self.parameters.values()):
            raise ConfigError("there is no gradient to step by; call forward_backward(batch) first")
        norm = self.optimizer.gradient_norm()
        if not torch.isfinite(torch.tensor(norm)):
            self.optimizer.zero_grad()
            raise Diverged(f"the gradient norm is {norm} in step {self.steps + 1}; lower learning_rate")
        self.optimizer.step(learning_rate, clip_factor(norm, max_grad_norm))
        self.optimizer.zero_grad()
        self.steps += 1
        return norm

    def save(self, folder: Path, name: str) -> Path:
        """Write the adapter as a PEFT folder. Raises ConfigError before the first batch, AdapterError, OSError."""
        batch = self._last
        if batch is None:
            raise ConfigError("the adapter was trained on nothing yet; call forward_backward(batch) first")
        config = self.config.model_copy(
            update={"model": name, "train_on": batch.train_on, "template_date": batch.encoder.date}
        )
        description = describe_inputs(config, self.base, batch.encoder, batch.dataset, None)
        manifest = manifest_of(config, batch.encoder, {**description, "steps": self.steps, "changes": []}, None, None)
        with atomic_folder(folder) as place:
            adapter_format.save(self.base, self.adapter, place, manifest)
        return folder

    def close(self) -> None:
        """Take the adapter off the base."""
        detach(self.base, SLOT)


def refuse_other_options(given: Sequence[str]) -> None:
    """Refuse options of a run that an adapter has no use for. Raises ConfigError."""
    for name in given:
        extra = TrainConfig.model_fields[name].json_schema_extra
        group = extra.get("group") if isinstance(extra, dict) else None
        kept = group == "adapter" or name in _OF_THE_OPTIMIZER
        if not kept or name in ("from_adapter", "store"):
            raise ConfigError(
                f"option '{name}' is for graft.train; new_adapter takes what the adapter and AdamW are made of, such as rank, "
                "alpha, targets, seed, beta1, weight_decay"
            )


_OF_THE_OPTIMIZER = ("loraplus_lr_ratio", "seed", "beta1", "beta2", "epsilon", "weight_decay", "optimizer")
