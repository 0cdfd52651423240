"""Elementwise operations in C (`fused.c`): RMSNorm, gated activations, rotary positions, cross entropy.

Functions and letters are those of `reference_fused.py`. float32 and bfloat16; non-contiguous rows are copied first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graftlm.kernels import reference_fused as reference
from graftlm.kernels.native.library import TWO_TYPES, address, calls
from graftlm.kernels.reference_fused import GATES, Gate
from graftlm.kernels.self_check import close, sample

_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ROWS_PER_BLOCK = 64  # of fused.c


def _values(tensor: Tensor) -> Tensor:
    """Contiguous float32 values, as C reads every small operand."""
    return tensor.detach().to(torch.float32).contiguous()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float) -> tuple[Tensor, Tensor]:  # (rows, n), (rows,)
    x, w = x.contiguous(), _values(weight)
    y, r = torch.empty_like(x), torch.empty(len(x))
    calls().graft_norm(
        address(x), address(w), offset, epsilon, *x.shape, address(y), address(r), TWO_TYPES[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return y, r


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, offset: float, wants_weight: bool
) -> tuple[Tensor, Tensor | None]:
    dy, x, w = dy.to(x.dtype).contiguous(), x.contiguous(), _values(weight)
    rows, n = x.shape
    dx = torch.empty_like(x)
    dw = torch.empty(n) if wants_weight else None
    partial = torch.empty(-(-rows // _ROWS_PER_BLOCK), n) if wants_weight else None
    calls().graft_norm_back(
        address(dy), address(x), address(w), offset, address(r), rows, n, address(dx),
        None if dw is None else address(dw), None if partial is None else address(partial), TWO_TYPES[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return dx, dw


def _side_by_side(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, int]:
    """Both with the same row stride and contiguous rows; and that stride."""
    if gate.stride(1) != 1 or up.stride(1) != 1 or gate.stride(0) != up.stride(0):
        gate, up = gate.contiguous(), up.contiguous()
    return gate, up, gate.stride(0)


def gated(gate: Tensor, up: Tensor, kind: Gate) -> Tensor:
    gate, up, row = _side_by_side(gate, up)
    y = torch.empty(gate.shape, dtype=gate.dtype)
    calls().graft_gate(
        address(gate), address(up), row, *gate.shape, address(y), GATES.index(kind), TWO_TYPES[gate.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def gated_backward(dy: Tensor, gate: Tensor, up: Tensor, kind: Gate) -> tuple[Tensor, Tensor]:
    """If gate and up are halves of one tensor, so are their gradients."""
    gate, up, row = _side_by_side(gate, up)
    dy = dy.to(gate.dtype).contiguous()
    rows, n = gate.shape
    halves = row == 2 * n and address(up) == address(gate) + n * gate.element_size()
    if halves:
        dg, du = torch.empty(rows, 2 * n, dtype=gate.dtype).chunk(2, dim=1)
    else:
        dg, du = (torch.empty(gate.shape, dtype=gate.dtype) for _ in range(2))
    calls().graft_gate_back(
        address(dy), address(gate), address(up), row, rows, n, address(dg), address(du), dg.stride(0),
        GATES.index(kind), TWO_TYPES[gate.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return dg, du


class _RotaryStruct(ctypes.Structure):
    """`struct rotary` of fused.c."""

    _fields_ = (
        ("x", _pointer), ("y", _pointer), ("heads", _long), ("x_token", _long), ("x_head", _long), ("y_token", _long),
        ("y_head", _long), ("unused", _long),
    )  # fmt: skip


def rotary(parts: Sequence[Tensor], cos: Tensor, sin: Tensor, back: bool) -> list[Tensor]:
    """Rotate each of `parts` (tokens, heads, D); with `back` rotate gradients back."""
    table: Any = (_RotaryStruct * len(parts))()
    parts = [x if x.stride(2) == 1 else x.contiguous() for x in parts]
    out = [torch.empty(x.shape, dtype=x.dtype) for x in parts]
    for part, x, y in zip(table, parts, out):
        part.x, part.y, part.heads = address(x), address(y), x.shape[1]
        (part.x_token, part.x_head), (part.y_token, part.y_head) = x.stride()[:2], y.stride()[:2]
    c, s, first = _values(cos), _values(sin), parts[0]
    calls().graft_rotary(
        ctypes.addressof(table), len(parts), len(first), first.shape[2], c.shape[1], address(c), address(s),
        max(len(c), 1), int(back), TWO_TYPES[first.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out


def cross_entropy_in_place(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    own = logits.contiguous()
    labels, losses = labels.to(torch.int64).contiguous(), torch.empty(len(logits))
    scale = None if weights is None else _values(weights)
    if calls().graft_cross_entropy(
        address(own), *own.shape, address(labels), None if scale is None else address(scale), address(losses),
        TWO_TYPES[logits.dtype], torch.get_num_threads(),
    ):  # fmt: skip
        raise IndexError(f"a label is not in 0 .. {logits.shape[-1] - 1}")
    if weights is not None and own is not logits:
        logits.copy_(own)
    return losses


# ---- the check before first use -----------------------------------------------------------------------------------


def check() -> bool:
    """All of them on odd shapes against the reference, in both float types."""
    return all(_agrees(dtype, tolerance) for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 8e-3)))


def _agrees(dtype: torch.dtype, tolerance: float) -> bool:
    x, dy, u, w = (sample(71, 53, step=s, sizes=3).to(dtype) for s in (0.7, 1.1, 1.7, 2.3))
    y, r = reference.rms_norm(x, w[0], 1e-5, 1.0)
    dx, dw = reference.rms_norm_backward(dy, x, w[0], r, 1.0, True)
    found = [*rms_norm(x, w[0], 1e-5, 1.0), *rms_norm_backward(dy, x, w[0], r, 1.0, True)]
    wanted: list[Tensor | None] = [y, r, dx, dw]
    for kind in GATES:
        found += [gated(x, u, kind), *gated_backward(dy, x, u, kind)]
        wanted += [reference.gated(x, u, kind), *reference.gated_backward(dy, x, u, kind)]
    q, k = sample(6, 3, 46, step=0.3, sizes=3).to(dtype), sample(6, 2, 46, step=0.5, sizes=3).to(dtype)
    c, s = sample(3, 42, step=0.9, sizes=3), sample(3, 42, step=1.3, sizes=3)
    found += [*rotary((q, k), c, s, False), *rotary((q, k), c, s, True)]
    wanted += [turn(t, c, s) for turn in (reference.rotary, reference.rotary_backward) for t in (q, k)]
    labels, weights = torch.arange(71) % 53, sample(71, step=0.1, sizes=3)
    ours, theirs = x.clone(), x.clone()
    found += [cross_entropy_in_place(ours, labels, weights), ours]
    wanted += [reference.cross_entropy_in_place(theirs, labels, weights), theirs]
    return all(a is not None and b is not None and close(a, b, tolerance) for a, b in zip(found, wanted, strict=True))
