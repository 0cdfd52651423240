"""How PyTorch's allocator takes a GPU's memory: in segments that grow.

By default it asks CUDA for a segment for each size that finds no free block, and free parts of two segments are never one. A
micro-batch's tensors have sizes of their own, so after some steps more is reserved than was ever used at once. Expandable
segments (`expandable_segments:True`) are mapped piece by piece into one range of addresses, where free neighbours join.

PyTorch takes them for the pools of CUDA graphs too: only pools with an allocator of their own go without (its
CUDACachingAllocator.cpp, `is_expandable_segments_active`; test_cuda_expandable_segments.py runs its tests of graphs so).
They are Linux's; in WSL2 the first allocation fails with them on some cards (PyTorch's issue 192330).

Set, and not run on a GPU.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

SETTING = "expandable_segments:True"
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""By which a user chooses the allocator's settings; PyTorch reads either."""
_KERNEL = Path("/proc/sys/kernel/osrelease")


def expand_segments(device: torch.device) -> bool:
    """Have a GPU's memory allocated in segments that grow; whether it is set so here, for all of the process.

    Nothing is changed where the user chose settings, in VARIABLES or in this process, nor once CUDA is initialized, when
    memory may be allocated already.
    """
    if device.type != "cuda" or any(name in os.environ for name in VARIABLES):
        return False
    if sys.platform != "linux" or torch.version.hip is not None or _in_wsl() or torch.cuda.is_initialized():
        return False
    chosen = getattr(
        torch._C, "_accelerator_getAllocatorSettings", None
    )  # for all of PyTorch's devices; there is no public one
    if chosen is None or chosen():
        return False
    torch._C._accelerator_setAllocatorSettings(SETTING)
    return True


def _in_wsl() -> bool:
    try:
        return "microsoft" in _KERNEL.read_text(encoding="utf-8").lower()
    except OSError:
        return False
