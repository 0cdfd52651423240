"""One training on several cards: what each of them holds, and what they send one another in a step.

    replicate         each card has the whole model; gradients are added up once a step
    shard             each has a part of every matrix, of its gradient and its moments, and gathers a layer when it runs (FSDP2)
    shard, offloaded  the parts of some layers wait in the host's memory

The first that fits is taken: it moves the least. A card of n holds, at the highest of the moments of a step (`memory.py`),

    matrices / n + vectors    trained whole: the same of gradients and moments; an adapter, its gradients and moments are whole
    + gathered                loss: the head twice; backward: 2 layers, one that runs and one that is fetched, and between two
                              layers a copy of one; where they are trained 4: a layer's gradients, the same in float32 for
                              their sum, and one layer that is fetched
    + activations, logits, workspace of its own micro-batch, and NCCL's buffers

and sends or receives (n - 1) / n of what is gathered and summed. `bench/ranks.py` holds the bytes against simulated steps. An
offloaded layer's part crosses PCIe twice a micro-batch.

`graft train` has all of them, and `hybrid`, which is `shard` on the cards of each of several nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from graftlm.planning.activations import FLOAT32
from graftlm.planning.memory import MemoryRequirement, bytes_per_value, optimizer_bytes, stored_bytes
from graftlm.planning.method import TrainingSetting

if TYPE_CHECKING:
    from graftlm.planning.fitting import PlanCase
    from graftlm.planning.shapes import ModelShape

MOST_CARDS = 16
NCCL_BYTES = 400_000_000  # of a communicator's buffers on each card; from experience, as the context's in `hardware.py`
SUMMED_AT_ONCE = 4 << 25  # bytes of gradients that are added up at once: `distributed/group.py`


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a training lies on several cards."""

    name: Literal["replicate", "shard"]
    cards: int
    offloaded: int
    """Layers whose parts wait in the host's memory."""
    bytes: int
    """On each card, at the highest moment."""
    host: int
    """Of each card's parts in the host's memory."""
    moved: int
    """Sent by each card in an optimizer step."""
    copied: int
    """Between each card and the host in an optimizer step, over PCIe."""
    micro_batches: int
    """Of each card in a step."""

    @property
    def words(self) -> str:
        """The layout in a few words."""
        if not self.offloaded:
            return self.name
        layers = f"{self.offloaded} layer{'s' if self.offloaded > 1 else ''}"
        return f"{self.name}, {layers} on the host (--offload-layers {self.offloaded})"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, in bytes."""
        return {
            "layout": self.name, "cards": self.cards, "offloaded_layers": self.offloaded, "bytes_per_card": self.bytes,
            "host_bytes_per_card": self.host, "moved_bytes_per_step": self.moved, "pcie_bytes_per_step": self.copied,
            "micro_batches_per_card": self.micro_batches,
        }  # fmt: skip


def replicated(case: PlanCase, setting: TrainingSetting, cards: int) -> Layout:
    """The whole model on each card."""
    found = case.of(setting)
    beside = min(SUMMED_AT_ONCE, FLOAT32 * found.trained) if cards > 1 else 0
    peak = max(found.peak, found.moments["update"].total + beside) + (NCCL_BYTES if cards > 1 else 0)
    return Layout(
        name="replicate", cards=cards, offloaded=0, bytes=peak, host=found.host,
        moved=_summed(FLOAT32 * found.trained, cards), copied=0, micro_batches=_each(case, cards),
    )  # fmt: skip


def sharded(case: PlanCase, setting: TrainingSetting, cards: int, offloaded: int = 0) -> Layout:
    """A part of every matrix on each card, those of some layers in the host's memory."""
    found, sizes = case.of(setting), _Sizes.of(case, setting)
    times = _each(case, cards)
    gathered = (2 * sizes.layer * case.shape.layers + sizes.outer) * times
    trained = FLOAT32 * sizes.values * times if setting.full else 0
    whole = FLOAT32 * (case.shape.small if setting.full else found.trained)
    part = math.ceil(offloaded * sizes.layer / cards)
    states = math.ceil(offloaded * sizes.trained_layer / cards) if setting.full else 0
    return Layout(
        name="shard", cards=cards, offloaded=offloaded, bytes=max(_moments(found, sizes, case, cards, offloaded)) + NCCL_BYTES,
        host=part + states, moved=(gathered + trained) * (cards - 1) // cards + _summed(whole, cards),
        copied=2 * part * times + (math.ceil(offloaded * sizes.gradient_layer / cards) * times if setting.full else 0),
        micro_batches=times,
    )  # fmt: skip


def layout_of(case: PlanCase, setting: TrainingSetting, cards: int) -> Layout | None:
    """The first layout that fits so many cards, with as few offloaded layers as that takes; None where none does."""
    found = _without_host(case, setting, cards)
    if found is not None or cards == 1 or setting.precision == "gguf":
        return found
    low, high = 1, case.shape.layers
    if sharded(case, setting, cards, high).bytes > case.card.usable:
        return None
    while low < high:
        middle = (low + high) // 2
        fits = sharded(case, setting, cards, middle).bytes <= case.card.usable
        low, high = (low, middle) if fits else (middle + 1, high)
    return sharded(case, setting, cards, low)


def _without_host(case: PlanCase, setting: TrainingSetting, cards: int) -> Layout | None:
    found = replicated(case, setting, cards)
    if found.bytes > case.card.usable and cards > 1 and setting.precision != "gguf":
        found = sharded(case, setting, cards)
    return found if found.bytes <= case.card.usable else None


def cards_needed(case: PlanCase, setting: TrainingSetting, most: int = MOST_CARDS) -> int | None:
    """How many of the card a training needs without the host, in powers of two up to `most`; None where these are too few."""
    count = 1
    while count <= most:
        if _without_host(case, setting, count) is not None:
            return count
        count *= 2
    return None


def gathered_bytes(shape: ModelShape, setting: TrainingSetting) -> int:
    """The most that a rank of split weights holds of other ranks' parts at once: layers, or the head and, where it is trained,
    its whole gradient, that in float32 for the sum, and a copy on the way."""
    wide = 4 if setting.precision == "float32" else 2
    layer = sum(stored_bytes(w, setting.precision) for w in shape.weights) // max(1, shape.layers)
    largest = max(shape.embedding, shape.head)
    value = bytes_per_value(shape, setting) if setting.full else 0
    return max((4 if setting.full else 3) * layer, 2 * largest * wide, 3 * largest * value)


# ---- sizes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Bytes of the parts that are split."""

    layer: int
    """Of a layer's matrices, as they are stored."""
    head: int
    outer: int
    """Of embedding and head."""
    small: int
    """Of what stays whole: vectors."""
    values: int
    """Values of all matrices."""
    gradient: int
    """Bytes of the gradients of all matrices, 0 if they are frozen."""
    moments: int
    head_gradient: int
    gradient_layer: int
    trained_layer: int
    """Bytes of a layer's gradients and moments."""

    @classmethod
    def of(cls, case: PlanCase, setting: TrainingSetting) -> _Sizes:
        shape = case.shape
        stored = sum(stored_bytes(w, setting.precision) for w in shape.weights)
        wide = 4 if setting.precision == "float32" else 2
        whole = case.of(setting).parts.weights
        outer = (shape.embedding + shape.head) * wide
        values = shape.stored + shape.embedding + shape.head
        value = bytes_per_value(shape, setting) if setting.full else 0
        states = optimizer_bytes(values, setting) if setting.full and not setting.offload_optimizer else 0
        gradients = 0 if setting.optimizer_in_backward else values * value
        layers = max(1, shape.layers)
        return cls(
            layer=stored // layers, head=shape.vocabulary * shape.width * wide, outer=outer, small=whole - stored - outer,
            values=values, gradient=gradients, moments=states, head_gradient=shape.vocabulary * shape.width * value,
            gradient_layer=shape.stored * value // layers,
            trained_layer=(gradients + states) * shape.stored // max(1, values) // layers,
        )  # fmt: skip


def _moments(found: MemoryRequirement, sizes: _Sizes, case: PlanCase, cards: int, offloaded: int) -> list[int]:
    """Bytes on a card at each moment of a step."""
    setting = found.setting
    left = case.shape.layers - offloaded
    weights = (sizes.layer * left + sizes.outer) / cards + sizes.small
    loss, backward = found.moments["loss"], found.moments["backward"]
    coming = 2 * sizes.layer / cards if offloaded else 0  # from the host
    if not setting.full:
        end, update = found.moments["end"], found.moments["update"]
        between = replace(backward, activations=loss.activations, workspace=0)
        own = [
            (loss, 2 * sizes.head),
            (backward, 2 * sizes.layer),
            (between, 3 * sizes.layer),
            (end, 2 * sizes.layer),
            (update, 0),
        ]
        return [math.ceil(weights + coming + parts.total - parts.weights + gathered) for parts, gathered in own]
    fetched = coming + 4 * sizes.layer
    summed = 2 * sizes.layer / cards  # a layer's own gradients in float32, as they come from the sum
    away = sizes.trained_layer * offloaded
    states = max(0, sizes.moments - away * sizes.moments // max(1, sizes.moments + sizes.gradient)) / cards
    gradients = max(0, sizes.gradient - away * sizes.gradient // max(1, sizes.moments + sizes.gradient)) / cards
    before = gradients if case.load.micro_batches > 1 else 0
    present = weights + states
    passing = case.load.tokens * case.shape.width * (2 if setting.compute_dtype == "bfloat16" else 4)
    outside = found.moments["end"].activations
    return [
        math.ceil(total)
        for total in (
            present + before + loss.activations + loss.logits + loss.workspace + 2 * sizes.head,
            present + before + sizes.head_gradient + backward.activations + backward.workspace + fetched + summed,
            present + gradients + sizes.head_gradient + outside + backward.workspace + fetched + summed / 2,
            present + gradients + 3 * sizes.head_gradient + passing,
            present + gradients + found.moments["update"].workspace,
        )
    ]


def _summed(count: int, cards: int) -> int:
    """Bytes that each of the cards sends so that all have the sum of `count` bytes: a ring's all-reduce."""
    return 2 * (cards - 1) * count // cards


def _each(case: PlanCase, cards: int) -> int:
    return max(1, -(-case.load.micro_batches // cards))
