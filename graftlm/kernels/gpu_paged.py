"""Attention of single tokens straight from the blocks of a paged KV cache: PyTorch's `varlen_attn` with a block table.

PyTorch's own flash attention refuses block tables; FlashAttention 3 (H100) and 4 have them, where they are installed and
activated (`torch.nn.attention.activate_flash_attention_impl("FA3")`). Elsewhere `usable` says no, and `gpu_attention` has other
ways.

Letters: n sequences, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from graftlm.kernels import reference
from graftlm.kernels.native.rows import DecodeAttention
from graftlm.kernels.self_check import SelfCheck, close, sample

WIDEST = 256  # heads that flash attention takes


@functools.cache
def _call() -> Any:
    """PyTorch's `varlen_attn` if it has block tables, else None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"block_table", "seqused_k", "enable_gqa", "window_size"} <= set(known) else None


def _activated() -> str | None:
    """The flash attention that was activated in place of PyTorch's own, such as FA3."""
    current: Any = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return None if current is None else current()


def usable(q: Tensor, keys: Tensor, values: Tensor, softcap: float) -> bool:
    """Whether `attend_rows` takes these: one 16-bit type, equal widths, and on this GPU an implementation with block tables."""
    width = q.shape[-1]
    return (
        not softcap
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.dtype == keys.dtype == values.dtype
        and width == values.shape[-1]
        and width <= WIDEST
        and not width % 8
        and _activated() is not None
        and _call() is not None
        and self_check.allows("paged attention", q.device)
    )


def attend_rows(
    q: Tensor, keys: Tensor, values: Tensor, out: Tensor, of: DecodeAttention, *, scale: float, window: int = 0
) -> None:
    """As `gpu_attention.attend_rows`: q (T, H, D), keys and values (positions, K, D), out (T, H, D)."""
    if "paged" not in of.kept:  # the same for all layers
        ends = torch.arange(len(of.rows) + 1, dtype=torch.int32, device=q.device)
        longest = max(of.lengths, default=of.table.shape[1] * of.block)  # a bound will do
        of.kept["paged"] = ends, of.visible.to(torch.int32), of.table.to(torch.int32), longest
    ends, visible, table, longest = of.kept["paged"]
    answer = _call()(
        q[of.rows], keys.unflatten(0, (-1, of.block)), values.unflatten(0, (-1, of.block)), ends, None, 1, longest,
        scale=scale, window_size=(window - 1, 0) if window else (-1, 0), enable_gqa=q.shape[1] != keys.shape[1],
        seqused_k=visible, block_table=table,
    )  # fmt: skip
    out.index_copy_(0, of.rows, answer)


# ---- the check before first use -----------------------------------------------------------------------------------


def check(device: torch.device) -> bool:
    """Shared heads, blocks out of order, a window that cuts one sequence."""
    q, keys, values = (
        sample(*shape, step=step, device=device).bfloat16()
        for shape, step in (((4, 6, 64), 0.7), ((80, 2, 64), 0.3), ((80, 2, 64), 0.2))
    )
    rows, visible = torch.tensor([3, 0], device=device), torch.tensor([37, 5], device=device)
    table = torch.tensor([[2, 0, 3], [4, 1, 1]], device=device)
    for window in (0, 9):
        out, wanted = torch.zeros_like(q), torch.zeros_like(q, dtype=torch.float32)
        attend_rows(q, keys, values, out, DecodeAttention(rows, visible, table, 16, (37, 5)), scale=0.2, window=window)
        reference.attend_rows(
            q.float(), keys.float(), values.float(), wanted, rows=rows, visible=visible, table=table, block=16, scale=0.2,
            window=window, softcap=0.0,
        )  # fmt: skip
        if not close(out, wanted, 2e-2):
            return False
    return True


self_check = SelfCheck("paged attention", lambda: "", {"paged attention": check})
