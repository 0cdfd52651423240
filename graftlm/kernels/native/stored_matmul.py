"""Matmul with a stored weight, on processors where PyTorch's own matmul is used for dense ones.

For few rows of x the codes are decoded in registers. For more, panels of W are dequantized into a buffer that stays in the
cache and multiplied with PyTorch's matmul, so that W never exists in dense form as a whole.

Letters: x (rows, in), W (out, in), y (rows, out), dy (rows, out), dx (rows, in).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from graftlm.kernels import reference
from graftlm.kernels.native.library import BLOCK_KINDS, address, calls
from graftlm.kernels.native.weights import dequantize_into, nf4_pointers
from graftlm.kernels.reference_blocks import sample_blocks
from graftlm.kernels.self_check import close, sample
from graftlm.kernels.stored import BLOCK, GgufBlocks, Int8, Nf4, Quantized

FEW_ROWS = 16  # up to here the codes are decoded once for every 8 rows; beyond, panels are faster
PANEL_BYTES, PANEL_BYTES_FOR_MANY = 8 << 20, 16 << 20  # of dense W at once, for fewer than MANY_ROWS and for more
MANY_ROWS = 512


def _matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the matmul: most CPUs multiply 16-bit matrices more slowly than float32 ones (measured)."""
    return dtype if dtype == torch.bfloat16 and _has_bfloat16_tiles() else torch.float32


def _has_bfloat16_tiles() -> bool:
    check: Callable[[], bool] = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return bool(check())


def _contiguous(weight: Quantized) -> Quantized:
    if isinstance(weight, Int8):
        return Int8(weight.values.contiguous(), weight.scale.contiguous())
    return weight.contiguous() if isinstance(weight, GgufBlocks) else weight


def _panel(length: int, other: int, rows: int, dtype: torch.dtype) -> int:
    """Size of a panel along the summed dimension, `length`: equal panels, in whole blocks."""
    size = PANEL_BYTES if rows < MANY_ROWS else PANEL_BYTES_FOR_MANY
    most = max(size // (max(other, 1) * dtype.itemsize), BLOCK)
    panels = max(math.ceil(length / most), 1)
    return max(math.ceil(length / panels / BLOCK), 1) * BLOCK


def matmul(x: Tensor, weight: Quantized) -> Tensor:
    """x (rows, in) -> x @ W.T (rows, out)."""
    weight = _contiguous(weight)
    return _few_rows(x, weight) if len(x) <= FEW_ROWS else _panels(x, weight)


def matmul_t(dy: Tensor, weight: Quantized) -> Tensor:
    """dy (rows, out) -> dy @ W (rows, in)."""
    return _panels_t(dy, _contiguous(weight))


def _few_rows(x: Tensor, weight: Quantized) -> Tensor:
    outer, inner = weight.shape
    dtype, x = x.dtype, x.float()  # (rows, in)
    if x.stride(1) != 1:
        x = x.contiguous()
    y = torch.empty(len(x), outer)  # (rows, out) float32
    of_x = (address(x), x.stride(0), len(x), address(y), torch.get_num_threads())
    if isinstance(weight, Nf4):
        if calls().graft_nf4_matvec(*nf4_pointers(weight), weight.start, outer, inner, *of_x):
            raise MemoryError(f"no memory for a copy of x {tuple(x.shape)}")
    elif isinstance(weight, GgufBlocks):
        calls().graft_blocks_matvec(address(weight.data), BLOCK_KINDS[weight.kind], outer, inner, *of_x)
    else:
        calls().graft_int8_matvec(address(weight.values), address(weight.scale), outer, inner, *of_x)
    return y.to(dtype)


def _panels(x: Tensor, weight: Quantized) -> Tensor:
    outer, inner = weight.shape
    dtype = _matmul_dtype(x.dtype)
    dense_x = x.to(dtype)  # (rows, in)
    step = _panel(inner, outer, len(x), dtype)
    scratch = torch.empty(outer * min(step, inner), dtype=dtype)
    y = torch.empty(len(x), outer, dtype=dtype)
    for first in range(0, inner, step):
        count = min(step, inner - first)
        panel = scratch[: outer * count].view(outer, count)
        dequantize_into(panel, weight, 0, first)
        y.addmm_(dense_x[:, first : first + count], panel.T, beta=1.0 if first else 0.0)
    return y.to(x.dtype)


def _panels_t(dy: Tensor, weight: Quantized) -> Tensor:
    outer, inner = weight.shape
    dtype = _matmul_dtype(dy.dtype)
    rows = dy.to(dtype)  # (rows, out)
    step = _panel(outer, inner, len(rows), dtype)
    scratch = torch.empty(min(step, outer), inner, dtype=dtype)
    dx = torch.empty(len(rows), inner, dtype=dtype)
    for first in range(0, outer, step):
        count = min(step, outer - first)
        dequantize_into(scratch[:count], weight, first, 0)
        dx.addmm_(rows[:, first : first + count], scratch[:count], beta=1.0 if first else 0.0)
    return dx.to(dy.dtype)


# ---- the checks before first use ----------------------------------------------------------------------------------


def _checked_weights() -> list[Quantized]:
    dense = sample(13, 331, sizes=97)
    weight = reference.nf4_quantize(dense)
    blocks = [sample_blocks(kind, 13, 512) for kind in BLOCK_KINDS]
    return [weight, weight.narrow(3, 5), reference.int8_quantize(dense), *blocks]


def check_matmul() -> bool:
    """One row, several, and enough for panels, with each form of weight."""
    xs = [sample(rows, 512, sizes=97) for rows in (1, FEW_ROWS - 1, FEW_ROWS + 1)]
    return all(
        close(matmul(x[:, : w.shape[1]], w), reference.matmul(x[:, : w.shape[1]], w))
        for x in xs
        for w in _checked_weights()
    )


def check_matmul_t() -> bool:
    """Each form of weight."""
    pairs = ((sample(5, w.shape[0], sizes=97), w) for w in _checked_weights())
    return all(close(matmul_t(dy, w), reference.matmul_t(dy, w)) for dy, w in pairs)
