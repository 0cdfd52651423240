"""A micro-batch: examples as tensors, the forward pass over them, its backward pass, and eval losses.

    examples --micro_batches--> groups of at most N tokens --collate--> MicroBatch --forward--> loss --backward--> gradients

Examples of several trials share a micro-batch: every token uses its own trial's adapter slot, and its loss is weighted by
1 / (target tokens of its trial in this optimizer step), so how the examples are split does not change the gradient.

Letters: T tokens of the micro-batch, n target tokens among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from graftlm.base.context import ForwardContext
from graftlm.base.loading import Base
from graftlm.data.dataset import Example
from graftlm.errors import TrainingError
from graftlm.kernels import to_device
from graftlm.progress import working
from graftlm.segments import Segments, pack
from graftlm.training.loss import weighted_loss
from graftlm.training.trial import ExampleLoss


@dataclass(frozen=True)
class BatchItem:
    """One example of one trial in one micro-batch."""

    example: Example
    slot: int
    rng_key: tuple[int, int]  # (trial seed, draw index): what its dropout is keyed by
    weight: float  # of each target token's loss


@dataclass(frozen=True)
class MicroBatch:
    """Examples as tensors: all ids, and for each target token its label, its weight and the token it is predicted from."""

    segments: Segments
    ids: Tensor  # (T,)
    sources: Tensor  # (n,) index of the token in front of each target token
    labels: Tensor  # (n,)
    weights: Tensor  # (n,) float32
    target_ranges: tuple[tuple[int, int, int], ...]  # (slot, first, last) over the n
    target_counts: tuple[int, ...]  # target tokens of each example


def count_target_tokens(examples: Iterable[Example]) -> int:
    """Tokens that the loss counts: an example's first token is predicted from nothing."""
    return sum(int(example.loss_mask[1:].sum()) for example in examples)


def micro_batches(base: Base, items: Sequence[BatchItem], micro_batch_tokens: int) -> list[list[BatchItem]]:
    """Split examples into micro-batches, as the base can take them: packed, or batches of one length."""
    groups = pack(
        [len(item.example.ids) for item in items],
        [item.slot for item in items],
        micro_batch_tokens,
        equal_lengths=not base.packs,
    )
    return [[items[i] for i in group] for group in groups]


def even_passes(
    base: Base, groups: Sequence[Sequence[BatchItem]], blank: Callable[[], BatchItem]
) -> list[Sequence[BatchItem]]:
    """This rank's micro-batches and, where ranks share the weights, blank ones behind them, until all ranks make equally many
    passes: in each pass every rank sends its rows. A blank one is the example of `blank` with the weight 0."""
    (most,) = base.structure.sharing.largest([len(groups)])
    return [*groups, *([replace(blank(), weight=0.0)] for _ in range(most - len(groups)))]


def collate(base: Base, items: Sequence[BatchItem]) -> MicroBatch:
    """Lay examples end to end, in the order given."""
    segments = Segments(
        lengths=tuple(len(item.example.ids) for item in items),
        slots=tuple(item.slot for item in items),
        rng_keys=tuple(item.rng_key for item in items),
        batched=not base.packs,
    )
    targets = [np.flatnonzero(item.example.loss_mask[1:]) for item in items]  # token t is predicted from token t - 1
    sources = np.concatenate([start + t for start, t in zip(segments.starts, targets)])
    labels = np.concatenate([item.example.ids[1:][t] for item, t in zip(items, targets)])
    weights = np.concatenate([np.full(len(t), item.weight) for item, t in zip(items, targets)])
    target_ranges: list[tuple[int, int, int]] = []
    at = 0
    for item, t in zip(items, targets):
        if target_ranges and target_ranges[-1][0] == item.slot:
            target_ranges[-1] = (item.slot, target_ranges[-1][1], at + len(t))
        else:
            target_ranges.append((item.slot, at, at + len(t)))
        at += len(t)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < base.structure.vocabulary:
        raise IndexError(f"a label is not in 0 .. {base.structure.vocabulary - 1}")  # a GPU's kernels do not look
    ids = np.concatenate([item.example.ids for item in items])
    whole = [torch.from_numpy(values.astype(np.int64)) for values in (ids, sources, labels)]
    on_device = to_device(whole, base.device)
    return MicroBatch(
        segments=segments,
        ids=on_device[0],
        sources=on_device[1],
        labels=on_device[2],
        weights=to_device([torch.from_numpy(weights.astype(np.float32))], base.device)[0],
        target_ranges=tuple(target_ranges),
        target_counts=tuple(len(t) for t in targets),
    )


def forward(base: Base, micro_batch: MicroBatch, *, defer_tied_head_gradient: bool = False) -> tuple[Tensor, Tensor]:
    """The forward pass: the weighted loss (), with gradients where they are on, and each target token's loss (n,)."""
    structure = base.structure
    defer = (
        defer_tied_head_gradient and structure.weights is None
    )  # the head is not there any more in the backward pass
    return structure.in_pass(partial(_forward, base, micro_batch, defer))


def _forward(base: Base, micro_batch: MicroBatch, defer_tied_head_gradient: bool) -> tuple[Tensor, Tensor]:
    context = ForwardContext(micro_batch.segments, defer_tied_head_gradient=defer_tied_head_gradient)
    hidden = base.hidden(micro_batch.ids, context)  # (T, width)
    with base.structure.with_head():
        return weighted_loss(
            base,
            hidden[micro_batch.sources],
            micro_batch.labels,
            micro_batch.weights,
            micro_batch.target_ranges,
            context,
        )


def backward(loss: Tensor) -> None:
    """The backward pass from a loss; TrainingError where no trained tensor has a part in it."""
    if not loss.requires_grad:
        raise TrainingError(
            "no trained tensor has a part in the loss: the model's own code cuts its gradient off, as reversible layers do. "
            "Nothing was changed; take another model, or report this architecture"
        )
    loss.backward()


@torch.no_grad()
def example_losses(
    base: Base,
    examples: Sequence[Example],
    slot: int,
    micro_batch_tokens: int,
    blank: Example | None = None,
) -> list[ExampleLoss]:
    """Each example's summed loss through the adapter in `slot`, in the examples' order, without dropout.

    `blank` is any example at all, for passes that this rank makes for the others alone; needed where it may have no own.
    """
    items = [BatchItem(example, slot, (0, i), 1.0) for i, example in enumerate(examples)]
    found: dict[int, ExampleLoss] = {}
    with working("measuring eval rows", len(examples), "rows") as task:
        groups = micro_batches(base, items, micro_batch_tokens)
        for i, group in enumerate(
            even_passes(base, groups, lambda: BatchItem(blank or examples[0], slot, (0, 0), 0.0))
        ):
            micro_batch = collate(base, group)
            _, losses = forward(base, micro_batch)
            if i >= len(groups):
                task.to(len(found))  # a sign of progress
                continue
            at = 0
            for item, count in zip(group, micro_batch.target_counts):
                index = item.rng_key[1]
                found[index] = ExampleLoss(examples[index].row, count, float(losses[at : at + count].double().sum()))
                at += count
            task.to(len(found))
    return [found[i] for i in range(len(examples))]
