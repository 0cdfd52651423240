"""Attention of single tokens straight from the blocks of a paged KV cache, in one launch or two.

What is launched depends on the number of tokens, never on how much each of them sees, which the programs read on the GPU: so
a step of decoding can be captured once and replayed.

Letters: T tokens, n of them in `of`, H query heads, K key-value heads, D head width, V width of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graftlm.kernels import reference
from graftlm.kernels.native.rows import DecodeAttention
from graftlm.kernels.self_check import close, sample
from graftlm.kernels.triton.device import FLOATS, STAGES, launch, needs_upcast

WIDEST = 256  # head that a program holds
# Numbers of keys, or of values, that a program reads at once. Float32 is multiplied without tensor cores, from registers.
TILE_NUMBERS = {2: 1 << 13, 4: 1 << 11}  # by bytes of one
LEAST_TILE = 16  # of heads: what tensor cores take
PROGRAMS = 256  # that fill a large GPU
MOST_SPLITS = 16


def fits(q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> bool:
    """Whether a program takes these: one float type, heads up to WIDEST, cache and result end to end."""
    return (
        q.dtype in FLOATS
        and q.dtype == keys.dtype == values.dtype == out.dtype
        and max(keys.shape[2], values.shape[2]) <= WIDEST
        and q.stride(2) == 1
        and keys.is_contiguous()
        and values.is_contiguous()
        and out.is_contiguous()
    )


def splits_of(tokens: int, key_heads: int) -> int:
    """Into how many parts each token's past is divided, so that few tokens fill a GPU: a power of two."""
    wanted = max(1, PROGRAMS // (tokens * key_heads))
    return min(MOST_SPLITS, 1 << (wanted.bit_length() - 1))


def positions_of(width: int, itemsize: int) -> int:
    """Positions that a program takes at once, for a head of `width` padded to a power of two."""
    return max(16, min(128, TILE_NUMBERS[itemsize] // width))


def _power(n: int) -> int:
    return max(LEAST_TILE, 1 << max(n - 1, 0).bit_length())


def attend_rows(
    q: Tensor, keys: Tensor, values: Tensor, out: Tensor, of: DecodeAttention, *, scale: float, window: int = 0,
    softcap: float = 0.0, splits: int | None = None,
) -> None:  # fmt: skip
    """As the reference's: out[rows] (T, H, V) = attention of q[rows] (T, H, D) over keys (positions, K, D) and values.

    `splits`: see `splits_of`, whose answer is the default.
    """
    n, heads, (_, key_heads, width), value_width = len(of.rows), q.shape[1], keys.shape, values.shape[2]
    splits, padded = splits or splits_of(n, key_heads), _power(max(width, value_width))
    parts, sums = out, out
    if splits > 1:
        parts = torch.empty(n, heads, splits, value_width, dtype=torch.float32, device=q.device)
        sums = torch.empty(n, heads, splits, dtype=torch.float32, device=q.device)
    launch(
        "paged", "attend", (n, key_heads, splits), q, q, q.stride(0), q.stride(1), keys, values, of.rows, of.visible, of.table,
        of.table.stride(0), parts, sums, heads, width, value_width, scale, softcap or 1.0, window, GROUP=heads // key_heads,
        GROUP_TILE=_power(heads // key_heads), WIDTH=_power(width), VALUE_WIDTH=_power(value_width), BLOCK=of.block,
        POSITIONS=positions_of(padded, q.element_size()), SPLITS=splits, WINDOWED=window > 0, CAPPED=softcap > 0,
        UPCAST=needs_upcast(q), num_stages=STAGES, fuse=True,
    )  # fmt: skip
    if splits > 1:
        launch(
            "paged", "combine", (n, heads), q, parts, sums, of.rows, out, heads, value_width,
            VALUE_WIDTH=_power(value_width), SPLITS=splits, fuse=True,
        )  # fmt: skip


# ---- the check before first use -----------------------------------------------------------------------------------


def check(device: torch.device) -> bool:
    """Shared heads, odd widths, blocks out of order, a window and a soft cap; a past in one part and in several."""
    keys, values = (sample(45 * 7, 2, width, step=step, device=device) for width, step in ((24, 0.3), (21, 0.2)))
    rows, visible = torch.tensor([3, 0], device=device), torch.tensor([300, 5], device=device)
    order = torch.arange(45, device=device) * 8 % 45
    table, q = torch.stack([order, order.flip(0)]), sample(4, 6, 24, step=0.7, device=device)
    for dtype, tolerance, window, softcap, splits in (
        (torch.float32, 1e-5, 0, 1.5, 2), (torch.bfloat16, 2e-2, 170, 0.0, 4), (torch.float16, 3e-3, 0, 0.0, 1)
    ):  # fmt: skip
        query, k, v = (t.to(dtype) for t in (q, keys, values))
        out, wanted = (torch.zeros(4, 6, 21, dtype=t, device=device) for t in (dtype, torch.float32))
        of = DecodeAttention(rows, visible, table, 7)
        attend_rows(query, k, v, out, of, scale=0.4, window=window, softcap=softcap, splits=splits)
        reference.attend_rows(
            query.float(), k.float(), v.float(), wanted, rows=rows, visible=visible, table=table, block=7, scale=0.4,
            window=window, softcap=softcap,
        )  # fmt: skip
        if not close(out, wanted, tolerance):
            return False
    return True
