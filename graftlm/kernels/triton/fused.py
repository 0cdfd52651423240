"""Norms, gated activations and rotary positions on a GPU: one launch each, and one more for the gradient of a norm's weight.

Functions and letters are those of `reference_fused.py`. Inputs are read as they lie, and none is overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graftlm.kernels import reference_fused as reference
from graftlm.kernels.reference_fused import GATES, Gate
from graftlm.kernels.self_check import close, sample
from graftlm.kernels.triton.device import FLOATS, ceil, launch

WIDEST_NORM = 1 << 14  # values of a row that a program holds; a wider one goes to the reference
NORM_VALUES = 1 << 11  # values of several short rows that a program takes together
NORM_PROGRAMS = 512  # of a backward pass at most, each with a sum of its own for the weight's gradient
TILE = 1024
HEADS = 8  # rotated at once


def _rows(x: Tensor) -> Tensor:
    """x with rows that have no gaps inside."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _norm_tile(features: int) -> dict[str, int]:
    tile = _power(features)
    return {"ROWS": max(1, NORM_VALUES // tile), "TILE": tile, "num_warps": 4 if tile <= 2048 else 8}


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float) -> tuple[Tensor, Tensor]:
    rows, features = x.shape
    if features > WIDEST_NORM:
        return reference.rms_norm(x, weight, epsilon, offset)
    x, tile = _rows(x), _norm_tile(features)
    y, r = (
        torch.empty(s, dtype=t, device=x.device) for s, t in (((rows, features), x.dtype), ((rows,), torch.float32))
    )
    if rows:
        launch(
            "fused", "rms_norm", (ceil(rows, tile["ROWS"]),), x, x, x.stride(0), weight.detach().contiguous(), y, r, rows,
            features, epsilon, offset, fuse=True, **tile,
        )  # fmt: skip
    return y, r


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, offset: float, wants_weight: bool
) -> tuple[Tensor, Tensor | None]:
    rows, features = x.shape
    if features > WIDEST_NORM or not rows:
        return reference.rms_norm_backward(dy, x, weight, r, offset, wants_weight)
    dy, x, tile = _rows(dy), _rows(x), _norm_tile(features)
    programs = min(ceil(rows, tile["ROWS"]), NORM_PROGRAMS)
    dx = torch.empty(rows, features, dtype=x.dtype, device=x.device)
    dw = torch.empty(programs, features, dtype=torch.float32, device=x.device) if wants_weight else dx
    launch(
        "fused", "rms_norm_backward", (programs,), x, dy, dy.stride(0), x, x.stride(0), weight.detach().contiguous(), r, dx,
        dw, rows, features, offset, programs * tile["ROWS"], WEIGHT=wants_weight, fuse=True, **tile,
    )  # fmt: skip
    return dx, (dw[0] if programs == 1 else dw.sum(0)) if wants_weight else None


def gated(gate: Tensor, up: Tensor, kind: Gate) -> Tensor:
    gate, up = _rows(gate), _rows(up)
    rows, features = gate.shape
    y = torch.empty(rows, features, dtype=gate.dtype, device=gate.device)
    if y.numel():
        launch(
            "fused", "gated", (rows, ceil(features, TILE)), gate, gate, gate.stride(0), up, up.stride(0), y, features,
            GELU=kind == GATES[1], TILE=TILE, fuse=True,
        )  # fmt: skip
    return y


def gated_backward(dy: Tensor, gate: Tensor, up: Tensor, kind: Gate) -> tuple[Tensor, Tensor]:
    """If gate and up are halves of one tensor, so are their gradients."""
    dy, gate, up = _rows(dy), _rows(gate), _rows(up)
    rows, features = gate.shape
    whole = gate._base
    if whole is not None and whole is up._base and whole.numel() == 2 * gate.numel():
        dgate, dup = torch.empty(rows, 2 * features, dtype=gate.dtype, device=gate.device).chunk(2, dim=1)
    else:
        dgate, dup = (torch.empty(rows, features, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if gate.numel():
        launch(
            "fused", "gated_backward", (rows, ceil(features, TILE)), gate, dy, dy.stride(0), gate, gate.stride(0), up,
            up.stride(0), dgate, dup, dgate.stride(0), features, GELU=kind == GATES[1], TILE=TILE, fuse=True,
        )  # fmt: skip
    return dgate, dup


def rotary(parts: Sequence[Tensor], cos: Tensor, sin: Tensor, back: bool) -> list[Tensor]:
    """Rotate one or two tensors (tokens, heads, D); with `back` rotate gradients back."""
    parts = [_rows(x) for x in parts]
    out = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in parts]
    q, k, yq, yk = parts[0], parts[-1], out[0], out[-1]
    tokens, _, width = q.shape
    period, turned = cos.shape
    if tokens:
        launch(
            "fused", "rotary", (tokens,), q, q, q.stride(0), q.stride(1), k, k.stride(0), k.stride(1), yq, yk, q.shape[1],
            k.shape[1] if len(parts) > 1 else 0, width, cos.contiguous(), sin.contiguous(), period, turned, BACK=back,
            HEADS=HEADS, HALF=_power(turned // 2), REST=0 if turned == width else _power(width - turned), fuse=True,
        )  # fmt: skip
    return out


# ---- the check before first use -----------------------------------------------------------------------------------


def check(device: torch.device) -> bool:
    """All of them on odd shapes, rows with gaps between them included, in every float type."""
    tolerances = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}
    return all(_agrees(dtype, tolerances[dtype], device) for dtype in FLOATS)


def _agrees(dtype: torch.dtype, tolerance: float, device: torch.device) -> bool:
    def values(*shape: int, step: float) -> Tensor:
        return sample(*shape, step=step, sizes=3, device=device).to(dtype)

    x, dy, u = (values(71, 106, step=step)[:, :53] for step in (0.7, 1.1, 1.7))
    w = values(53, step=2.3)
    found: list[Tensor | None] = []
    wanted: list[Tensor | None] = []
    for offset in (0.0, 1.0):
        y, r = reference.rms_norm(x, w, 1e-5, offset)
        wanted += [y, r, *reference.rms_norm_backward(dy, x, w, r, offset, True)]
        found += [*rms_norm(x, w, 1e-5, offset), *rms_norm_backward(dy, x, w, r, offset, True)]
    gate, up = values(7, 2 * 1100, step=0.9).chunk(2, dim=1)
    for kind in GATES:
        for g, v, d in ((x, u, dy), (gate, up, up)):
            wanted += [reference.gated(g, v, kind), *reference.gated_backward(d, g, v, kind)]
            found += [gated(g, v, kind), *gated_backward(d, g, v, kind)]
    q, k = values(6, 9, 30, step=0.3), values(2, 6, 30, step=0.5).transpose(0, 1)
    for turned in (30, 22):
        c, s = values(3, turned, step=0.9), values(3, turned, step=1.3)
        wanted += [turn(part, c, s) for turn in (reference.rotary, reference.rotary_backward) for part in (q, k)]
        found += [*rotary((q, k), c, s, False), *rotary((q, k), c, s, True)]
    return all(a is not None and b is not None and close(a, b, tolerance) for a, b in zip(found, wanted))
