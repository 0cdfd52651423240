"""The same bits in every repeat on a GPU (`--deterministic`).

On a CPU Graft's results are the same bits anyway. On a GPU some of PyTorch's operations add floats in the order in which
blocks of threads end: attention's backward pass the gradients of queries, gathering hidden states theirs. PyTorch has other
ways for them, and cuBLAS one if its workspace has a fixed size.

What it costs: flash attention's backward keeps ceil(processors / (examples x heads)) partial sums of the queries' gradients in
float32 instead of one, and adds them up at its end (Dao 2023, the parameter `deterministic` of flash-attn). For one example of
4,096 tokens with 32 heads of 128 on the 132 processors of an H200 that is 5 x 64 MiB, freed after each layer. The estimate
before training counts it (`planning/memory.py`); the time has not been measured.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from graftlm.errors import ConfigError

_WORKSPACE, _SIZES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


@contextmanager
def deterministic_algorithms(device: torch.device, *, loaded: bool = False) -> Iterator[None]:
    """Use only algorithms that give the same bits again, on a GPU; no change on a CPU.

    PyTorch reads cuBLAS's setting once, at its first matmul: `loaded` says that there may have been one. Raises ConfigError
    where it is too late to set it, and for a setting that is not deterministic.
    """
    if device.type == "cpu":
        yield
        return
    size = os.environ.get(_WORKSPACE)
    if size not in _SIZES and (loaded or size is not None):
        raise ConfigError(
            f"--deterministic needs the environment variable {_WORKSPACE} to be {_SIZES[0]} before the first matmul on a GPU, "
            f"and it is {'not set' if size is None else repr(size)}; set it before Python starts"
        )
    os.environ[_WORKSPACE] = size or _SIZES[0]
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # a check for programmers, a launch for each new tensor
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        if size is None:
            del os.environ[_WORKSPACE]
