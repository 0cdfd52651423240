"""The GPU kernels behind the reference's functions: shapes, grids and launches; the kernels are in `kernels.py`.

Which tensor goes to which slot's matrices is data: a table of tiles (first token, last token, slot) and one address for
each slot's A and B, so one launch serves any mixture of adapters and ranks.

    forward        h = x A^T          shrink over `in`       y += s h B^T      expand over `out`
    backward       dh = s dy B        shrink over `out`      dx += dh A        expand over `in`

The gradients to A and B are sums over a slot's own tokens: plain products, left to the reference's loop over ranges.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graftlm.kernels import reference
from graftlm.kernels.reference import Range, Slots
from graftlm.kernels.stored import Int8, Nf4, Stored
from graftlm.kernels.trust import Trust

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FEW_ROWS = 16  # rows up to which a product decodes the weight itself; beyond, it is made dense for the vendor's product
STAGES = 2  # loads in flight; more need more shared memory than consumer GPUs have (99 KiB)
LARGEST_RANK = 128  # one program holds a whole row of h; larger ranks go to the reference


def _ready() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return ""


@functools.cache
def _kernels() -> Any:
    from graftlm.kernels.triton import kernels

    return kernels


def usable(operation: str, tensor: Tensor) -> bool:
    """Whether `operation` may run here on `tensor`: on a CUDA or ROCm device, in a float type we know, and checked."""
    if tensor.device.type != "cuda" or (tensor.is_floating_point() and tensor.dtype not in FLOATS):
        return False
    return trust.allows(operation, tensor.device)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _widen(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and _interpreted()


def _ceil(n: int, step: int) -> int:
    return -(-n // step)


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    return reference.NF4_CODE.to(device), reference.DYNAMIC_CODE.to(device)


# ---- stored weights -----------------------------------------------------------------------------------------------


def nf4_dequantize(weight: Nf4, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if out.numel():
        _kernels().nf4_dequantize[(_ceil(out.numel(), 1024),)](
            *weight.tensors().values(), *_tables(weight.device), out, weight.start, out.numel(), TILE=1024,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def int8_dequantize(weight: Int8, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if out.numel():
        values, scale = weight.values.contiguous(), weight.scale.contiguous()
        _kernels().int8_dequantize[(_ceil(out.numel(), 1024),)](
            values, scale, out, weight.shape[-1], out.numel(), TILE=1024
        )
    return out


def dequantize(weight: Stored, dtype: torch.dtype) -> Tensor:
    return nf4_dequantize(weight, dtype) if isinstance(weight, Nf4) else int8_dequantize(weight, dtype)


def _few_rows(x: Tensor, weight: Nf4, transposed: bool) -> Tensor:
    """x (rows, summed) -> y (rows, made), rows at most FEW_ROWS."""
    outer, inner = weight.shape
    summed, made = (outer, inner) if transposed else (inner, outer)
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(len(x), made, dtype=x.dtype, device=x.device)
    _kernels().nf4_product[(_ceil(made, 32),)](
        x, *weight.tensors().values(), *_tables(x.device), y, weight.start, len(x), summed, made, inner, x.stride(0),
        TRANSPOSED=transposed, ROWS=16, MADE=32, SUMMED=64, WIDEN=_widen(x),
        num_stages=STAGES, enable_fp_fusion=False,
    )  # fmt: skip
    return y


def matmul(x: Tensor, weight: Stored) -> Tensor:
    """x (..., in) -> x @ W.T (..., out)."""
    outer, inner = weight.shape
    rows = x.reshape(-1, inner)
    if isinstance(weight, Nf4) and 0 < len(rows) <= FEW_ROWS:
        return _few_rows(rows, weight, False).view(*x.shape[:-1], outer)
    return x @ dequantize(weight, x.dtype).T


def matmul_t(dy: Tensor, weight: Stored) -> Tensor:
    """dy (..., out) -> dy @ W (..., in)."""
    outer, inner = weight.shape
    rows = dy.reshape(-1, outer)
    if isinstance(weight, Nf4) and 0 < len(rows) <= FEW_ROWS:
        return _few_rows(rows, weight, True).view(*dy.shape[:-1], inner)
    return dy @ dequantize(weight, dy.dtype)


# ---- routed low-rank products -------------------------------------------------------------------------------------


class _Routes:
    """Tiles and slots of one call as the kernels want them; it keeps alive what the addresses point at."""

    def __init__(self, ranges: Sequence[Range], A: Slots, B: Slots, scale: Sequence[float], like: Tensor) -> None:
        self.A = [None if a is None else a.detach().to(like.dtype).contiguous() for a in A]
        self.B = [None if b is None else b.detach().to(like.dtype).contiguous() for b in B]
        ranks = [0 if a is None or b is None else len(a) for a, b in zip(A, B, strict=True)]
        used = [ranks[slot] for first, last, slot in ranges if first < last]
        self.largest = max(used, default=0)
        tokens = max((last - first for first, last, slot in ranges if ranks[slot]), default=0)
        self.tokens = 64 if tokens > 32 else 32 if tokens > 16 else 16
        tiles = [
            (begin, min(begin + self.tokens, last), slot)
            for first, last, slot in ranges
            if ranks[slot]
            for begin in range(first, last, self.tokens)
        ]
        device = like.device
        self.tiles = torch.tensor(tiles, dtype=torch.int32, device=device)
        self.ranks = torch.tensor(ranks, dtype=torch.int32, device=device)
        self.scale = torch.tensor(list(scale), dtype=torch.float32, device=device)
        self.pointers = [
            torch.tensor([0 if m is None else m.data_ptr() for m in side], dtype=torch.int64, device=device)
            for side in (self.A, self.B)
        ]

    @property
    def padded(self) -> int:
        """The least power of two that the tensor cores take and every rank fits."""
        return max(16, 1 << (self.largest - 1).bit_length())

    def shrink(self, x: Tensor, side: int, scaled: bool) -> Tensor:
        """h (tokens, largest rank) = x M^T, M = A (side 0) or B^T (side 1); rows outside all tiles are not written."""
        h = torch.empty(len(x), self.largest, dtype=x.dtype, device=x.device)
        if len(self.tiles):
            _kernels().shrink[(len(self.tiles),)](
                x, x.stride(0), self.tiles, self.pointers[side], self.ranks, self.scale, h, h.stride(0), x.shape[1],
                RANK_FIRST=side == 0, SCALED=scaled, TOKENS=self.tokens, R=self.padded, WIDE=64,
                WIDEN=_widen(x), num_stages=STAGES,
            )  # fmt: skip
        return h

    def expand(self, h: Tensor, y: Tensor, side: int, scaled: bool) -> None:
        """y += h M in place, M = A (side 0) or B^T (side 1)."""
        if len(self.tiles):
            _kernels().expand[(len(self.tiles), _ceil(y.shape[1], 64))](
                h, h.stride(0), self.tiles, self.pointers[side], self.ranks, self.scale, y, y.stride(0), y.shape[1],
                RANK_FIRST=side == 0, SCALED=scaled, TOKENS=self.tokens, R=self.padded, WIDE=64,
                WIDEN=_widen(h), num_stages=STAGES,
            )  # fmt: skip


def fits(x: Tensor, y: Tensor, A: Slots) -> bool:
    """Whether the routed kernels take these: one float type, rows without gaps inside, ranks up to LARGEST_RANK."""
    ranks = [len(a) for a in A if a is not None]
    return x.dtype == y.dtype and x.stride(1) == y.stride(1) == 1 and max(ranks, default=0) <= LARGEST_RANK


def low_rank_routed(
    y: Tensor, x: Tensor, ranges: Sequence[Range], A: Slots, B: Slots, scale: Sequence[float]
) -> list[Tensor | None]:
    """As the reference's: y += s (x A^T) B^T, each range with its slot; returns h of each range."""
    routes = _Routes(ranges, A, B, scale, x)
    h = routes.shrink(x, 0, scaled=False)  # (tokens, R)
    routes.expand(h, y, 1, scaled=True)
    return [
        None if a is None or B[slot] is None or first == last else h[first:last, : len(a)]
        for (first, last, slot) in ranges
        for a in (A[slot],)
    ]


def low_rank_routed_backward(
    dy: Tensor,
    x: Tensor,
    hidden: Sequence[Tensor | None],
    ranges: Sequence[Range],
    A: Slots,
    B: Slots,
    scale: Sequence[float],
    dx: Tensor | None = None,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """As the reference's: gradients to each slot's A and B; the one to x is added to `dx`."""
    routes = _Routes(ranges, A, B, scale, dy)
    dh = routes.shrink(dy, 1, scaled=True)  # (tokens, R)
    if dx is not None:
        routes.expand(dh, dx, 0, scaled=False)
    dA: list[Tensor | None] = [None] * len(A)
    dB: list[Tensor | None] = [None] * len(B)
    for (first, last, slot), h in zip(ranges, hidden, strict=True):
        a, b = A[slot], B[slot]
        if h is None or a is None or b is None:
            continue
        da = (dh[first:last, : len(a)].T @ x[first:last]).to(a.dtype)  # (r, in)
        db = (dy[first:last].T @ h).mul_(scale[slot]).to(b.dtype)  # (out, r)
        old_a, old_b = dA[slot], dB[slot]
        dA[slot] = da if old_a is None else old_a.add_(da)
        dB[slot] = db if old_b is None else old_b.add_(db)
    return dA, dB


# ---- the check before first use -----------------------------------------------------------------------------------


def _sample(device: torch.device, *shape: int) -> Tensor:
    n = torch.Size(shape).numel()
    return (torch.arange(n, dtype=torch.float32).mul_(0.7).sin_()).view(shape).to(device)


def _close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool(((a - b).norm() <= tolerance * b.norm()).item())


def agree(ours: Tensor, truth: Tensor) -> bool:
    """Bit for bit; but Triton's interpreter cuts bfloat16 off where a GPU rounds, so there it may be one step away."""
    if ours.dtype == torch.bfloat16 and _interpreted():
        return bool(((ours.float() - truth.float()).abs() <= truth.float().abs() * 2**-7).all().item())
    return torch.equal(ours, truth)


def _check_nf4_dequantize(device: torch.device) -> bool:
    weight = reference.nf4_quantize(_sample(device, 37, 201))
    parts = (weight, weight.narrow(3, 7))
    return all(agree(nf4_dequantize(w, t), reference.nf4_dequantize(w, t)) for w in parts for t in FLOATS)


def _check_int8_dequantize(device: torch.device) -> bool:
    weight = reference.int8_quantize(_sample(device, 13, 77))
    return all(agree(int8_dequantize(weight, t), reference.int8_dequantize(weight, t)) for t in FLOATS)


def _check_matmul(device: torch.device) -> bool:
    weight = reference.nf4_quantize(_sample(device, 45, 201)).narrow(3, 40)
    x = _sample(device, 5, 201)
    return _close(matmul(x, weight), (x.double() @ reference.dequantize(weight).double().T).float())


def _check_matmul_t(device: torch.device) -> bool:
    weight = reference.nf4_quantize(_sample(device, 45, 201)).narrow(3, 40)
    dy = _sample(device, 5, 40)
    return _close(matmul_t(dy, weight), (dy.double() @ reference.dequantize(weight).double()).float())


def _check_low_rank_routed(device: torch.device) -> bool:
    A: Slots = [None, _sample(device, 3, 23), _sample(device, 17, 23)]
    B: Slots = [None, _sample(device, 70, 3), _sample(device, 70, 17)]
    ranges, scale = [(0, 4, 1), (4, 5, 0), (5, 40, 2), (41, 43, 1)], [1.0, 0.5, 2.0]
    x, dy = _sample(device, 43, 23), _sample(device, 43, 70)
    outcomes: list[list[Tensor]] = []
    # The truth in float64: a GPU's float32 products may be rounded to TF32, depending on PyTorch's settings.
    for routed, backward, dtype in (
        (low_rank_routed, low_rank_routed_backward, torch.float32),
        (reference.low_rank_routed, reference.low_rank_routed_backward, torch.float64),
    ):
        y, dx = torch.ones(43, 70, dtype=dtype, device=device), torch.ones(43, 23, dtype=dtype, device=device)
        hidden = routed(y, x.to(dtype), ranges, A, B, scale)
        backward(dy.to(dtype), x.to(dtype), hidden, ranges, A, B, scale, dx)
        outcomes.append([y.float(), dx.float()])
    return all(_close(ours, truth) for ours, truth in zip(*outcomes, strict=True))


trust = Trust(
    "Triton kernels",
    _ready,
    {
        "nf4_dequantize": _check_nf4_dequantize,
        "int8_dequantize": _check_int8_dequantize,
        "matmul": _check_matmul,
        "matmul_t": _check_matmul_t,
        "low_rank_routed": _check_low_rank_routed,
    },
)


def status() -> str:
    """Whether Triton's kernels are used, or why not."""
    reason = _ready() or trust.reason
    return f"PyTorch without Triton kernels: {reason}" if reason else "Triton kernels"
