"""Small tensors of the host on a device: indices, positions, labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of one dtype, copied to `device`; those that are there already are given back.

    To a GPU it is one copy from pinned memory for all of them, which waits for nothing: a copy from other memory waits for the
    GPU to finish what it was given before.
    """
    if device.type != "cuda" or not tensors or tensors[0].device.type != "cpu":
        return [tensor.to(device) for tensor in tensors]
    assert all(tensor.dtype == tensors[0].dtype for tensor in tensors)
    joined = torch.cat([tensor.reshape(-1) for tensor in tensors]).pin_memory()
    parts = joined.to(device, non_blocking=True).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]
