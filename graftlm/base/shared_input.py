"""Layers that a module calls with the same input (q, k and v; gate and up), on a GPU computed at the first of these calls.

A model's code calls them one after the other. At the first call one autograd function computes all: their adapters' A lie below
each other, so that x A^T is one matmul, as is the gradient to all A, and the gradients to x are added in one tensor. The other
outputs wait in the forward context for their own calls, which are known by the same input. Layers whose calls do not come are
computed alone after a few such disappointments.

    find_shared_inputs(model)      once, when a base is loaded
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from graftlm.base import context

NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
MOST_UNUSED = 3  # outputs that nobody took, after which the layers are computed alone


@dataclass(eq=False)
class SharedInput:
    """The layers `names` of `parent`, each a `StoredLinear`."""

    parent: nn.Module
    names: Sequence[str]
    unused: int = 0

    @property
    def layers(self) -> list[Any]:
        return [getattr(self.parent, name) for name in self.names]

    def output_of(self, layer: Any, x: Tensor) -> Tensor | None:
        """x (..., in) -> the layer's output (T, out) without its bias; None where it must be computed alone."""
        forward = context.active()
        if forward is None or self.unused >= MOST_UNUSED:
            return None
        waiting = forward.waiting
        if waiting is None or waiting.x is not x or layer not in waiting.outputs:
            layers = self.layers
            outputs = layer.bank.together(x.reshape(-1, layer.in_features), layers)
            if outputs is None:
                return None
            if waiting is not None:
                waiting.owner.unused += 1
            waiting = forward.waiting = Waiting(self, x, dict(zip(layers, outputs)))
        y = waiting.outputs.pop(layer)
        if not waiting.outputs:
            forward.waiting = None
        return y


@dataclass(eq=False)
class Waiting:
    """Outputs (T, out) of layers that have been computed and not been called yet, and their input."""

    owner: SharedInput
    x: Tensor
    outputs: dict[Any, Tensor]


def find_shared_inputs(model: nn.Module) -> None:
    """Tell the stored layers that have one of NAMES of each other."""
    for module in model.modules():
        children = dict(module.named_children())
        for names in NAMES:
            layers: list[Any] = [children.get(name) for name in names]
            if all(hasattr(layer, "shared_input") for layer in layers) and len({x.in_features for x in layers}) == 1:
                shared = SharedInput(module, names)
                for layer in layers:
                    layer.shared_input = shared
