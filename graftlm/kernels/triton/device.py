"""What every launch needs: the programs, imported at first use, and the numbers that fit them to a GPU."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch
from torch import Tensor

from graftlm.kernels.transfer import to_device

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STAGES = 2  # loads in flight; more need more shared memory than consumer GPUs have (99 KiB)


@functools.cache
def programs(name: str) -> Any:
    """The module `programs/NAME.py`. What `triton.jit` makes of its functions has no Python types."""
    return importlib.import_module(f"graftlm.kernels.triton.programs.{name}")


def launch(
    file: str, program: str, grid: tuple[int, ...], like: Tensor, *arguments: Any, fuse: bool, **options: Any
) -> None:
    """Run a program of `programs/FILE.py` on the card of `like`, whatever card is this thread's current one.

    Triton launches on the current one, and every thread begins with the first card. `fuse` lets the compiler join a
    multiplication and an addition, which then round once: not where values are the reference's bit for bit. Triton's own
    default differs between its versions.
    """
    with torch.cuda.device_of(like):
        getattr(programs(file), program)[grid](*arguments, enable_fp_fusion=fuse, **options)


@functools.lru_cache(maxsize=4096)
def constants(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on a GPU, cached: every layer of every micro-batch uses the same."""
    return to_device([torch.tensor(numbers, dtype=dtype)], device)[0]


def interpreted() -> bool:
    """Whether programs run in Triton's interpreter, on tensors of the CPU: what the tests do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def needs_upcast(x: Tensor) -> bool:
    """Whether a program must upcast x for a matmul: the interpreter has no bfloat16 matmul."""
    return x.dtype == torch.bfloat16 and interpreted()


def ceil(n: int, step: int) -> int:
    return -(-n // step)


def agree(found: Tensor, wanted: Tensor) -> bool:
    """Bit for bit; but Triton's interpreter cuts bfloat16 off where a GPU rounds, so there it may be one step away."""
    if found.dtype == torch.bfloat16 and interpreted():
        return bool(((found.float() - wanted.float()).abs() <= wanted.float().abs() * 2**-7).all().item())
    return torch.equal(found, wanted)
