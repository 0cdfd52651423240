"""What one rank of a split model holds at each moment of a step: its rows, and what FSDP2 has gathered.

Of the ranks that share the weights each has its rows of every matrix, and in full training of gradients and moments; vectors,
adapters and their states are whole. What is gathered follows from PyTorch 2.13's source, `torch/distributed/fsdp/_fully_shard`;
no count is fitted. L is a layer's matrices as they are stored, V their values, H the head:

    gathering       a unit's rows come in one buffer, and its tensors are copied out of it (`foreach_all_gather_copy_out`): 2
    forward         a layer's buffer stays until the next layer's tensors are copied (`wait_for_unshard`): 3 L between two
    loss            the last layer's buffer is there until the pass ends: L + 2 H, and L + H while logits are
    backward        the buffer of the layer before is fetched while one runs (`_backward_prefetch`): 2 L
    .. trained      and this layer's gradients, beside 4 V bytes: the copy in float32 that the sum of the last layer's was made
                    from, which stays until the next is made (`reduce_scatter_states`)
    its end         head and embedding are gathered by hand: their whole gradients wait for the end, where they are summed
    over nodes      each layer's rows of that sum in float32 stay until the backward pass ends (`AllReduceState`), beside the
                    gradients that are made of them, if these are others: in 16 bits, or added to an earlier micro-batch's
    on the host     a layer's rows are on the card while its buffer is filled: 2 L and a part, less than between two layers

`bench/ranks.py` holds all of it against simulated steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from graftlm.planning.activations import FLOAT32, Workload
from graftlm.planning.memory import (
    NF4_BLOCK,
    NF4_GROUP,
    MemoryParts,
    MemoryRequirement,
    bytes_per_value,
    optimizer_bytes,
    stored_bytes,
    weight_bytes,
)
from graftlm.planning.method import TrainingSetting
from graftlm.planning.shapes import ModelShape, Weights

SUMMED_AT_ONCE = 4 << 25  # bytes of gradients that are added up at once: `distributed/group.py`


LayoutName = Literal["replicate", "hybrid", "shard"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a model lies on the ranks."""

    shards: int
    """Ranks that share one copy of the weights; 1 where each has all of them."""
    copies: int = 1
    """Copies of the model: each rank's gradients are summed with those of the ranks that have the same rows."""
    offloaded: int = 0
    """Layers whose rows wait in the host's memory."""

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.shards * self.copies


WHOLE = Split(shards=1)


def split_of(gpus: int, nodes: int, layout: LayoutName, offloaded: int = 0) -> Split:
    """How a layout lies on so many GPUs of each node."""
    if layout == "replicate":
        return Split(shards=1, copies=gpus * nodes)
    if layout == "hybrid":
        return Split(shards=gpus, copies=nodes, offloaded=offloaded)
    return Split(shards=gpus * nodes, offloaded=offloaded)


@dataclass(frozen=True, kw_only=True)
class SplitSizes:
    """Bytes and values of a model's units, those that are gathered together, and of what stays whole."""

    layers: int
    layer: int
    """Bytes of a layer's matrices, as they are stored."""
    embedding: int
    head: int
    """0 where it is tied to the embedding."""
    whole: int
    """Of what every rank has: vectors, routers; of a GGUF file also embedding and head."""
    layer_values: int
    matrix_values: int
    """Of a layer's largest matrix."""
    embedding_values: int
    head_values: int
    value: int
    """Bytes of a trained value's gradient; 0 where the weights are frozen."""

    @classmethod
    def of(cls, shape: ModelShape, setting: TrainingSetting) -> SplitSizes:
        split = [w for w in shape.weights if w.part != "router"]
        values = sum(w.values for w in split)
        wide = 4.0 if setting.precision == "float32" else 2.0
        stored = sum(stored_bytes(w, setting.precision) for w in split)
        if setting.precision == "gguf":  # the file's blocks, alike for all matrices
            stored, wide = int(values * shape.gguf_bytes / shape.parameters), 0.0  # embedding and head are not split
        layers = max(1, shape.layers)
        embedding, head = int(shape.embedding * wide), int(shape.head * wide)
        return cls(
            layers=layers, layer=stored // layers, embedding=embedding, head=head,
            whole=max(0, weight_bytes(shape, setting) - stored - embedding - head), layer_values=values // layers,
            matrix_values=max((w.values // w.count for w in split), default=0), embedding_values=shape.embedding,
            head_values=shape.head, value=bytes_per_value(shape, setting) if setting.full else 0,
        )  # fmt: skip

    @property
    def outer_values(self) -> int:
        """Of embedding and head."""
        return self.embedding_values + self.head_values

    def rows(self, split: Split) -> int:
        """Bytes of one rank's rows on its card."""
        left = self.layers - split.offloaded
        return math.ceil((self.layer * left + self.embedding + self.head) / split.shards)


def of_one_rank(took: MemoryRequirement, shape: ModelShape, load: Workload, split: Split) -> MemoryRequirement:
    """What one rank takes of a training that alone would take `took`, with its own micro-batch, `load`."""
    if split.ranks == 1:
        return took
    if split.shards == 1:
        return _highest(took, {**took.moments, "update": _summing(took.moments["update"], took.trained)})
    setting = took.setting
    step = _StepOfRank(took, SplitSizes.of(shape, setting), split, load, shape.width)
    sizes = step.sizes
    beside = took.loading - weight_bytes(shape, setting)
    gathered = max(3 * sizes.layer, sizes.layer + 2 * max(sizes.head, sizes.embedding))
    states = optimizer_bytes(took.trained, setting) if setting.offload_optimizer and setting.full else 0
    return replace(
        _highest(took, step.trained() if setting.full else step.frozen()),
        loading=step.held + max(beside, gathered),
        host=took.host - states + states // split.shards + _host_bytes(shape, setting, split),
    )


def _host_bytes(shape: ModelShape, setting: TrainingSetting, split: Split) -> int:
    """Bytes of offloaded layers in the host's memory, of one rank: its rows, and where they are trained their gradients and
    moments. Rows and gradients are pinned, each tensor in a block of a power of two (PyTorch's `CachingHostAllocator`)."""
    found = 0.0
    for weights in shape.weights if split.offloaded else ():
        if weights.part == "router":
            continue
        values = weights.values // weights.count
        pinned = _tensors(shape, weights, setting)
        if setting.full and not setting.optimizer_in_backward:
            pinned.append(values * bytes_per_value(shape, setting))
        states = optimizer_bytes(values, setting) if setting.full and not setting.offload_optimizer else 0
        one = sum(1 << (math.ceil(size / split.shards) - 1).bit_length() for size in pinned) + states / split.shards
        found += one * weights.count * split.offloaded / max(1, shape.layers)
    return math.ceil(found)


def _tensors(shape: ModelShape, weights: Weights, setting: TrainingSetting) -> list[int]:
    """Bytes of the tensors of one stored matrix that are split: codes and scales are tensors of their own."""
    values = weights.values // weights.count
    if setting.precision == "gguf":
        return [math.ceil(values * shape.gguf_bytes / shape.parameters)]
    if setting.precision == "nf4":
        return [values // 2, values // NF4_BLOCK, 4 * values // (NF4_BLOCK * NF4_GROUP)]
    if setting.precision == "int8":
        return [values, 4 * values // weights.inner]
    return [stored_bytes(weights, setting.precision) // weights.count]


def _highest(took: MemoryRequirement, moments: dict[str, MemoryParts]) -> MemoryRequirement:
    moment, parts = max(moments.items(), key=lambda item: item[1].total)
    return replace(took, moments=moments, moment=moment, parts=parts)


def _summing(update: MemoryParts, values: int) -> MemoryParts:
    """The update, or the sum of whole gradients in front of it: they are added up in a copy, a buffer at a time."""
    return replace(update, workspace=max(update.workspace, min(SUMMED_AT_ONCE, FLOAT32 * values)))


class _StepOfRank:
    """The moments of a step on one rank."""

    def __init__(self, took: MemoryRequirement, sizes: SplitSizes, split: Split, load: Workload, width: int) -> None:
        self.took, self.sizes, self.split, self.setting = took, sizes, split, took.setting
        self.held = sizes.rows(split) + sizes.whole
        self.passing = load.tokens * width * (2 if self.setting.compute_dtype == "bfloat16" else FLOAT32)
        """Bytes of the hidden states, and of their gradient."""
        self.several = load.micro_batches > 1 and not self.setting.optimizer_in_backward
        """Whether an earlier micro-batch has left gradients."""
        self.running = min(2, sizes.layers) * sizes.layer  # a layer that runs back, and the one that is fetched

    def frozen(self) -> dict[str, MemoryParts]:
        """Of a step in which adapters are trained."""
        found = {name: replace(parts, weights=self.held) for name, parts in self.took.moments.items()}
        return {
            **found,
            **self._forward(found["loss"]),
            "backward": replace(found["backward"], gathered=self.running),
            "end": replace(found["end"], gathered=self.running),
            "update": _summing(found["update"], self.took.trained),
            **self._answers({"weights": self.held}),
        }

    def trained(self) -> dict[str, MemoryParts]:
        """Of a step in which all weights are trained."""
        sizes, setting = self.sizes, self.setting
        vectors = self.took.trained - sizes.layer_values * sizes.layers - sizes.outer_values
        left = sizes.layers - self.split.offloaded
        own = (sizes.layer_values * left + sizes.outer_values) // self.split.shards + vectors
        held = {"weights": self.held, "optimizer": 0 if setting.offload_optimizer else optimizer_bytes(own, setting)}
        update = replace(
            self.took.moments["update"], **held, activations=0, logits=0,
            gradients=0 if setting.optimizer_in_backward else own * sizes.value,
        )  # fmt: skip
        head = (sizes.head_values or sizes.embedding_values) * sizes.value  # all of its gradient
        found = {"backward": 0, "layer": 1, "end": max(1, sizes.layers - 2)}
        return {
            **self._forward(replace(self.took.moments["loss"], **held, gradients=self._rows(0, own))),
            **{name: self._layer(done, replace(self.took.moments["backward"], **held, gradients=self._rows(done, own) + head))
               for name, done in found.items()},
            "summing": replace(
                update, workspace=0, activations=self.passing, gathered=FLOAT32 * sizes.embedding_values,
                gradients=self._rows(sizes.layers, own) + sizes.outer_values * sizes.value,
            ),
            "update": _summing(update, vectors),
            **self._answers(held),
        }  # fmt: skip

    def _answers(self, held: dict[str, int]) -> dict[str, MemoryParts]:
        """While answers are generated, if any are: a forward pass for each of their tokens gathers what others do."""
        found = self.took.moments.get("answers")
        if found is None:
            return {}
        gathered = max(parts.gathered for parts in self._forward(found).values())
        return {"answers": replace(found, **held, gathered=gathered)}

    def _forward(self, loss: MemoryParts) -> dict[str, MemoryParts]:
        """Of a forward pass; `loss` has what is there while the logits are, but what is gathered."""
        layer, tied = self.sizes.layer, not self.sizes.head
        head = self.sizes.head or self.sizes.embedding
        states = replace(loss, logits=self.passing)
        return {
            "lookup": replace(states, activations=0, gathered=2 * self.sizes.embedding),
            "forward": replace(states, gathered=min(3, self.sizes.layers + 1) * layer + (head if tied else 0)),
            "head": replace(states, gathered=layer + (1 if tied else 2) * head),  # a tied one stays for all of the pass
            "loss": replace(loss, gathered=layer + head),
        }

    def _layer(self, done: int, backward: MemoryParts) -> MemoryParts:
        """Of a layer's backward pass after so many: when its activations are most, or when the last of its gradients is made.

        `backward` is that of the first one, with the gradients that are there before.
        """
        sizes, checkpointed = self.sizes, self.setting.activation_checkpointing
        kept = self.took.moments["loss"].activations
        each = kept // sizes.layers  # what was saved of one layer
        recomputed = max(0, backward.activations - kept) if checkpointed else each
        activations = max(0, backward.activations - done * each)
        gathered = self.running + (FLOAT32 * sizes.layer_values if done else 0)
        high = replace(
            backward, activations=activations, gathered=gathered,
            gradients=backward.gradients + sizes.matrix_values * sizes.value,
        )  # fmt: skip
        last = replace(
            backward, activations=max(0, activations - recomputed) + 2 * self.passing, workspace=0, gathered=gathered,
            gradients=backward.gradients + sizes.layer_values * sizes.value,
        )  # fmt: skip
        return max(high, last, key=lambda parts: parts.total)

    def _rows(self, done: int, own: int) -> int:
        """Gradients of this rank's rows once so many layers have run back, of `own` trained values; and, in float32, those of
        the sum over nodes."""
        sizes, split = self.sizes, self.split
        there = 0 if self.setting.optimizer_in_backward else sizes.layer_values * done // split.shards
        apart = split.copies > 1 and (self.several or sizes.value != FLOAT32)
        summed = FLOAT32 * sizes.layer_values * done // split.shards if apart else 0
        return (own if self.several else min(there, own)) * sizes.value + summed
