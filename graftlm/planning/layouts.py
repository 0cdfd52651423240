"""One training on several GPUs, of one node or several: what each of them holds, and what they send one another in a step.

    replicate         each GPU has the whole model; gradients are added up once a step
    hybrid            each node has the whole model, split over its GPUs; gradients are added up over nodes (HSDP)
    shard             all GPUs share one: each has a part of every matrix, of its gradient and its moments, and gathers a layer
                      when it runs (FSDP2)
    shard, offloaded  the parts of some layers wait in the host's memory

The first that fits is taken, with the largest micro-batch that does: each asks more of the links than the one before. What a
GPU holds is in `rank_memory.py`; NCCL's buffers come on top. It sends or receives (n - 1) / n of what n GPUs gather, and of
what they add up, twice that where each of them gets the whole sum. All of it goes around a ring, in which a node's last GPU
alone sends to the next node: of what N GPUs on each of several nodes send, a part of 1 / N leaves the node. An offloaded
layer's part crosses PCIe twice a micro-batch, in full training its gradients once. `graft train` has all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from graftlm.planning.activations import FLOAT32, Workload
from graftlm.planning.hardware import NCCL_BYTES
from graftlm.planning.method import TrainingSetting
from graftlm.planning.rank_memory import LayoutName, SplitSizes, of_one_rank, split_of

if TYPE_CHECKING:
    from graftlm.planning.fitting import PlanCase

GPUS_OF_A_NODE, MOST_GPUS = 8, 64  # of which `cards_needed` counts with


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs that train together."""

    gpus: int
    """On each node."""
    nodes: int = 1

    @property
    def ranks(self) -> int:
        """Processes, one on each GPU."""
        return self.gpus * self.nodes

    @property
    def words(self) -> str:
        """How many, in front of the GPU's name."""
        return f"{self.gpus}" if self.nodes == 1 else f"{self.nodes} nodes of {self.gpus}"


ONE = Cluster(gpus=1)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a training lies on several GPUs."""

    name: LayoutName
    cluster: Cluster
    offloaded: int
    """Layers whose parts wait in the host's memory."""
    bytes: int
    """On each GPU, at the highest moment."""
    host: int
    """Of each GPU's parts in the host's memory, in blocks as they are pinned."""
    within: int
    """Sent by each GPU to others of its node in an optimizer step."""
    between: int
    """And to those of other nodes."""
    copied: int
    """Between each GPU and the host in an optimizer step, over PCIe."""
    load: Workload
    """The micro-batch of each GPU, and how many of them it has in a step."""

    @property
    def sent(self) -> int:
        """Bytes that each GPU sends in a step."""
        return self.within + self.between

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
            "layout": self.name, "cards": self.cluster.ranks, "gpus": self.cluster.gpus, "nodes": self.cluster.nodes,
            "offloaded_layers": self.offloaded, "bytes_per_card": self.bytes, "host_bytes_per_card": self.host,
            "sent_within_node_bytes_per_step": self.within, "sent_between_nodes_bytes_per_step": self.between,
            "pcie_bytes_per_step": self.copied, "micro_batch_tokens": self.load.tokens,
            "micro_batches_per_card": self.load.micro_batches,
        }  # fmt: skip


def laid_out(
    case: PlanCase, setting: TrainingSetting, cluster: Cluster, name: LayoutName, offloaded: int = 0
) -> Layout:
    """A training in one layout; `case.load` is the micro-batch of each GPU, and how many of them it has in a step."""
    load, shape = case.load, case.shape
    split = split_of(cluster.gpus, cluster.nodes, name, offloaded)
    alone = case.of(setting)
    setting = alone.setting
    found, sizes = of_one_rank(alone, shape, load, split), SplitSizes.of(shape, setting)
    values = 0 if name == "replicate" else sizes.layer_values * sizes.layers + sizes.outer_values
    summed = FLOAT32 * load.micro_batches * (values if setting.full else 0)
    gathered = load.micro_batches * (2 * sizes.layer * sizes.layers + sizes.embedding + sizes.head) if values else 0
    whole = FLOAT32 * (found.trained - (values if setting.full else 0))
    nodes = 1 if name == "hybrid" else cluster.nodes
    sent = [
        _ring(gathered + summed, split.shards, nodes),
        _ring(2 * summed // split.shards, split.copies, split.copies),  # each rank's rows, over the nodes
        _ring(2 * whole, cluster.ranks, cluster.nodes),
    ]
    part = math.ceil(offloaded * sizes.layer / split.shards)
    gradients = math.ceil(offloaded * sizes.layer_values * sizes.value / split.shards)
    return Layout(
        name=name, cluster=cluster, offloaded=offloaded, load=load,
        bytes=found.peak + (NCCL_BYTES if cluster.ranks > 1 else 0),
        host=found.host,
        within=sum(inside for inside, _ in sent), between=sum(outside for _, outside in sent),
        copied=load.micro_batches * (2 * part + gradients),
    )  # fmt: skip


def layout_of(case: PlanCase, setting: TrainingSetting, cluster: Cluster) -> Layout | None:
    """The first layout that fits so many GPUs, with the largest micro-batch that does; if none does without the host, with as
    few offloaded layers as that takes; None where none fits. `case.load` is the step of one GPU alone, which they share."""
    loads = list(loads_of_one(case.load, setting, cluster.ranks))
    found = _without_host(case, setting, cluster, loads)
    if found is not None or "shard" not in layout_names(setting, cluster):
        return found
    fitting = [
        layout
        for load in loads
        if (layout := with_host_layers(replace(case, load=load), setting, cluster, "shard")) is not None
    ]
    return min(fitting, key=lambda layout: layout.copied + layout.sent, default=None)


def layout_names(setting: TrainingSetting, cluster: Cluster) -> list[LayoutName]:
    """The layouts that a training can have, in the order in which they are tried."""
    if cluster.ranks == 1:
        return ["replicate"]
    names: list[LayoutName] = [] if setting.optimizer_in_backward else ["replicate"]  # frees gradients before their sum
    return [*names, *(["hybrid"] if min(cluster.gpus, cluster.nodes) > 1 else []), "shard"]


def loads_of_one(load: Workload, setting: TrainingSetting, ranks: int) -> Iterator[Workload]:
    """The micro-batches that one of the ranks may have of a step, the largest first: halves, down to one example. With steps
    in the backward pass there is one of all its examples."""
    own = max(1, -(-load.examples * load.micro_batches // ranks))
    count, least = (own, own) if setting.optimizer_in_backward else (min(load.examples, own), 1)
    while count >= least:
        part = count / load.examples
        yield replace(
            load, tokens=math.ceil(load.tokens * part), target_tokens=max(1, round(load.target_tokens * part)),
            examples=count, micro_batches=-(-own // count),
        )  # fmt: skip
        count //= 2


def _without_host(
    case: PlanCase, setting: TrainingSetting, cluster: Cluster, loads: Sequence[Workload]
) -> Layout | None:
    for name in layout_names(setting, cluster):
        for load in loads:
            found = laid_out(replace(case, load=load), setting, cluster, name)
            if found.bytes <= case.card.usable:
                return found
    return None


def with_host_layers(case: PlanCase, setting: TrainingSetting, cluster: Cluster, name: LayoutName) -> Layout | None:
    """A layout that splits the model, with as few layers on the host as fit; None where even all of them there are too few.
    `case.load` is the micro-batch of each GPU, and how many of them it has in a step."""
    low, high = 0, case.shape.layers
    found = laid_out(case, setting, cluster, name, high)
    if found.bytes > case.card.usable:
        return None
    while low < high:
        middle = (low + high) // 2
        tried = laid_out(case, setting, cluster, name, middle)
        if tried.bytes <= case.card.usable:
            found, high = tried, middle
        else:
            low = middle + 1
    return found


def cards_needed(
    case: PlanCase, setting: TrainingSetting, *, gpus: int = GPUS_OF_A_NODE, most: int = MOST_GPUS
) -> int | None:
    """How many of the card a training needs without the host, its micro-batch on each: in powers of two up to `most`, on nodes
    of at most `gpus`; None where these are too few."""
    count = 1
    while count <= most:
        here = min(count, gpus)
        cluster = Cluster(gpus=here, nodes=-(-count // here))
        load = replace(case.load, micro_batches=max(1, -(-case.load.micro_batches // count)))
        if _without_host(case, setting, cluster, [load]) is not None:
            return count
        count *= 2
    return None


def _ring(count: int, ranks: int, nodes: int) -> tuple[int, int]:
    """Bytes that each of the ranks sends to its own node and to another, on average, so that `count` go around a ring."""
    sent = (ranks - 1) * count // ranks
    between = sent * nodes // ranks if nodes > 1 else 0
    return sent - between, between
