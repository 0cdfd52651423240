"""Attention on a GPU by PyTorch's own operations, in bounded memory: for a server's paged KV cache.

    attend_rows    single tokens, each over its own sequence's past (decode): from its blocks, where a kernel can
    causal         the last L of M tokens: a prompt, or a part of one over what is cached (prefill)

Single tokens are read from their blocks by FlashAttention where it is activated (`gpu_paged`), else by our own program
(`triton/paged.py`). Where neither can, blocks are gathered: keys and values are never copied once more for each query head
that shares them, and no sequence is padded to a much longer one. Sequences are taken in groups of like length, so that the
copies that a group gathers from its blocks, and the scores of a part of a prompt, hold at most MOST_VALUES values each. A
sequence whose own keys have more is a group of its own; its copies are as large as its share of one layer's cache. Nothing
here reads a value from the GPU.

Letters: n sequences, H query heads, K key-value heads, G = H / K, D head width, V width of a value, L queries, M keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm.kernels import gpu_paged, triton
from graftlm.kernels.native.rows import DecodeAttention

MOST_VALUES = 1 << 26  # 128 MiB in 16 bits
WIDEST_FLASH = 256  # heads that PyTorch's flash attention takes


@dataclass(frozen=True)
class _Gathered:
    """Sequences `first .. last` of a step; the same for all layers with the same window and widths."""

    first: int
    last: int
    places: Tensor  # (n, M) positions in the cache; where a sequence has fewer, its first one again
    seen: Tensor | None  # (n, 1, 1, M) which of them count, None for all


def group_bounds(lengths: Sequence[int], most: int) -> list[tuple[int, int]]:
    """(first, last) of runs of sequences, in order, whose number times the longest length is at most `most`, or of one."""
    found: list[tuple[int, int]] = []
    first, longest = 0, 0
    for i, length in enumerate(lengths):
        if i > first and max(longest, length) * (i + 1 - first) > most:
            found.append((first, i))
            first, longest = i, 0
        longest = max(longest, length)
    return [*found, (first, len(lengths))] if lengths else []


def _groups(of: DecodeAttention, window: int, most: int) -> list[_Gathered]:
    key = window, most
    if key not in of.kept:
        limited = [min(n, window) if window else n for n in of.lengths]
        of.kept[key] = [_group(of, a, b, limited[a:b], window) for a, b in group_bounds(limited, most)]
    return of.kept[key]


def _group(of: DecodeAttention, first: int, last: int, lengths: Sequence[int], window: int) -> _Gathered:
    visible, table = of.visible[first:last, None], of.table[first:last]  # (n, 1), (n, blocks)
    counted = visible.clamp_max(window) if window else visible
    at = torch.arange(max(lengths), device=visible.device)[None]  # (1, M)
    seen = at < counted  # (n, M)
    position = torch.where(seen, visible - counted + at, 0)
    places = table.gather(1, position // of.block) * of.block + position % of.block
    return _Gathered(first, last, places, None if len(set(lengths)) == 1 else seen[:, None, None])


def attend_rows(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    of: DecodeAttention,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> None:
    """out[rows] (T, H, V) = attention of q[rows] (T, H, D) over keys (positions, K, D) and values (positions, K, V).

    Needs the lengths on the host (`of.lengths`) only where blocks are gathered, see `reads_blocks`.
    """
    if gpu_paged.usable(q, keys, values, softcap):
        gpu_paged.attend_rows(q, keys, values, out, of, scale=scale, window=window)
        return
    if triton.usable("attend_rows", q) and triton.paged.fits(q, keys, values, out):
        triton.paged.attend_rows(q, keys, values, out, of, scale=scale, window=window, softcap=softcap)
        return
    assert len(of.lengths) == len(of.rows)
    most = max(1, MOST_VALUES // (keys.shape[1] * max(keys.shape[2], values.shape[2])))
    for group in _groups(of, window, most):
        rows = of.rows[group.first : group.last]  # (n,)
        out.index_copy_(0, rows, _of_group(q[rows], keys, values, group, scale, softcap))


def reads_blocks(keys: Tensor, values: Tensor) -> bool:
    """Whether tokens of the dtype of keys (positions, K, D) and values are read from their blocks by our own program."""
    like = keys.new_empty(1, 1, keys.shape[2])
    return triton.usable("attend_rows", keys) and triton.paged.fits(like, keys, values, like)


def _of_group(q: Tensor, keys: Tensor, values: Tensor, group: _Gathered, scale: float, softcap: float) -> Tensor:
    """q (n, H, D) over the group's positions of keys and values -> (n, H, V); the copies end with this call."""
    k, v = (t[group.places].transpose(1, 2).to(q.dtype) for t in (keys, values))  # (n, K, M, D)
    return _attend(q.unflatten(1, (k.shape[1], -1)), k, v, group.seen, scale, softcap).flatten(1, 2)


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, softcap: float | None) -> Tensor:
    """q (n, H, L, D), k and v (n, K, M, D) with M >= L -> (n, H, L, V); queries are the last L of M.

    `window` is how many keys a query sees, itself the last, None all. Differentiable.
    """
    (n, heads, length, width), (_, key_heads, total, _) = q.shape, k.shape
    groups = heads // key_heads
    window = None if window is None or window >= total else window
    if window is None and softcap is None and length in (1, total):
        if (
            groups > 1 and length > 1 and (q.dtype == torch.float32 or width > WIDEST_FLASH)
        ):  # no other kernel shares heads
            k, v, groups = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1), 1
        if length > 1:
            return F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=True, enable_gqa=groups > 1)
        answer = F.scaled_dot_product_attention(q.unflatten(1, (key_heads, -1)).flatten(2, 3), k, v, scale=scale)
        return answer.unflatten(2, (groups, 1)).flatten(1, 2)
    factor = width**-0.5 if scale is None else scale
    at = torch.arange(total, device=q.device)
    rows = max(1, MOST_VALUES // (n * heads * total))
    parts: list[Tensor] = []
    for first in range(0, length, rows):
        part = q[:, :, first : first + rows].unflatten(1, (key_heads, -1))  # (n, K, G, l, D)
        queries_at = at[total - length :][first : first + rows, None]  # (l, 1)
        seen = queries_at >= at  # (l, M)
        if window is not None:
            seen &= queries_at - at < window
        count = part.shape[3]
        answer = _attend(part.flatten(2, 3), k, v, seen.repeat(groups, 1), factor, softcap or 0.0)  # (n, K, G l, V)
        parts.append(answer.unflatten(2, (groups, count)).flatten(1, 2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, softcap: float) -> Tensor:
    """q (n, K, L, D), k (n, K, M, D), v (n, K, M, V), each query over the keys that `seen` (..., L or 1, M) allows."""
    if not softcap:
        mask = None if seen is None else seen.expand(*seen.shape[:-2], q.shape[2], -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap)) * softcap  # (n, K, L, M)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
