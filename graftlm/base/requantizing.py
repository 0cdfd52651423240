"""The linear layers of a loaded base brought to another stored precision, in place: what loading it so would give."""

from __future__ import annotations

import torch

from graftlm.base.loading import Base
from graftlm.base.modules import Stored
from graftlm.config import Precision

_ROUTER = ".stored"  # the name under which a router has its stored weight (`surgery.py`)


@torch.no_grad()
def requantize(base: Base, precision: Precision) -> None:
    """Store every linear layer and stack in `precision`, one after another; embedding, head and routers stay as they are.

    The values are those that the base computed with: one that was loaded in bfloat16 gives the rounding of bfloat16 values.
    """
    head = base.structure.head
    for name, module in base.stored().items():
        if module is head or name.endswith(_ROUTER):
            continue
        _bring(module, precision)
    base.precision = precision


def _bring(module: Stored, precision: Precision) -> None:
    original = module.original(torch.float32)
    module.register_parameter("weight", None)
    module.compressed = None
    module.precision = precision
    module.set_weight(original)
