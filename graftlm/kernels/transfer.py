"""Small tensors of the host on a device (indices, positions, labels), and numbers of devices on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

_K = TypeVar("_K")


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


def by_device(tensors: Mapping[_K, Tensor]) -> list[list[_K]]:
    """The keys of tensors, those on one device together: some may be in the host's memory."""
    found: dict[torch.device, list[_K]] = {}
    for key, tensor in tensors.items():
        found.setdefault(tensor.device, []).append(key)
    return list(found.values())


def read_numbers(numbers: Sequence[Tensor]) -> list[float]:
    """Numbers (), all of a device read at once, for each read waits for it."""
    found = [0.0] * len(numbers)
    for here in by_device(dict(enumerate(numbers))):
        for i, value in zip(here, torch.stack([numbers[i] for i in here]).tolist()):
            found[i] = value
    return found
