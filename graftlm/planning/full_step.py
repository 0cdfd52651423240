"""The end of a full training step on a GPU: the first layer's backward pass, the lookup's, and the optimizer's update.

There the order in which gradients come and activations go is what decides; on a processor the allocator's gaps do
(`memory.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from graftlm.planning.activations import SavedActivations, Workload
from graftlm.planning.method import TrainingSetting
from graftlm.planning.shapes import ModelShape

if TYPE_CHECKING:
    from graftlm.planning.memory import MemoryParts

HOST_SLAB = 1 << 24  # values whose states come from the host at once: `kernels/triton/adamw.py`
SQUARES_SLAB = 1 << 22  # values whose squares are summed at once, in float64: `kernels/reference_adamw.py`


def full_ends(
    shape: ModelShape,
    setting: TrainingSetting,
    load: Workload,
    present: MemoryParts,
    saved: SavedActivations,
    value: int,
    workspace: int,
    states: int,
) -> dict[str, MemoryParts]:
    """The moments `end` and `update`. `present` is there all the time; `value` are the bytes of a trained value; `workspace`
    those of a layer's backward pass; `states` those of the pieces of states that come from the host.

    While the first layer runs back the lookup's gradient is not there yet, and when that is made the layers' activations are
    gone; a tied head's gradient waits for it. With steps in the backward pass there is one gradient at a time, the squares of
    which are summed in float64 before its step; the largest is the head's, made while all activations are there.
    """
    embedding, tied = shape.embedding * value, not shape.head
    passing = (
        load.tokens * shape.width * (2 if setting.compute_dtype == "bfloat16" else 4)
    )  # the gradient past the layers
    layer = replace(present, activations=saved.outside - saved.behind + saved.layer, workspace=workspace)
    lookup = replace(present, activations=passing)
    if not setting.optimizer_in_backward:
        gradients = shape.parameters * value
        ends = (
            replace(layer, gradients=gradients - (0 if tied else embedding)),
            replace(lookup, gradients=gradients + (embedding if tied else 0)),
        )
        return {"end": max(ends, key=_total), "update": replace(present, gradients=gradients, workspace=states)}
    one = max(w.values // w.count for w in shape.weights) * value
    step = max(states, 8 * min(SQUARES_SLAB, shape.largest))
    updates = [replace(lookup, gradients=(2 if tied else 1) * embedding, workspace=step)]
    if not tied:
        held = saved.outside + (saved.inputs if setting.activation_checkpointing else saved.layers)
        updates.append(replace(present, gradients=shape.head * value, activations=held + 2 * passing, workspace=step))
    return {
        "end": replace(layer, gradients=one + (embedding if tied else 0)),
        "update": max(updates, key=_total),
    }


def _total(parts: MemoryParts) -> int:
    return parts.total
