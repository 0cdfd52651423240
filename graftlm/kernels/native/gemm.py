"""Matrix products of our own (`gemm.c`), for processors on which PyTorch's leave half of the machine idle.

    C (M, N) [+]= alpha * sum over terms of A (M, K) B (K, N)

A is float32, B float32, bfloat16, or a stored weight; either may be turned. `pays()` says whether these are used here:
they need AVX-512, and a processor that is not Intel's (there MKL uses all of it, so nothing is to be won).

Letters: M, N, K as above; T tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graftlm.kernels.stored import Nf4, Stored

_FLOAT32, _BFLOAT16, _NF4, _INT8 = range(4)  # enum matrix_kind in kernels.h


class Matrix(ctypes.Structure):
    """`struct graft_matrix` of kernels.h."""

    _fields_ = (
        ("start", ctypes.c_int64), ("row", ctypes.c_int64), ("values", ctypes.c_void_p), ("absmax", ctypes.c_void_p),
        ("scale", ctypes.c_void_p), ("offset", ctypes.c_void_p), ("kind", ctypes.c_int), ("along", ctypes.c_int),
        ("narrow", ctypes.c_int), ("unused", ctypes.c_int),
    )  # fmt: skip


SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "graft_gemm_level": (ctypes.c_int, []),
    "graft_gemm_narrow": (ctypes.c_int, []),
    "graft_gemm": (
        ctypes.c_int,
        [ctypes.c_int64] * 2 + [ctypes.c_void_p, ctypes.c_int] + [ctypes.c_void_p] * 3
        + [ctypes.c_int64, ctypes.c_float, ctypes.c_int, ctypes.c_int],
    ),
}  # fmt: skip

Operand = Tensor | Stored


def _fill(matrix: Matrix, value: Operand, turned: bool, summed: int) -> Any:
    """Describe a matrix to C; `summed` is the dimension of `value` (after turning) that the product sums over.

    Returns what must stay alive until the call is over.
    """
    if isinstance(value, Tensor):
        seen = value.T if turned else value
        if seen.stride(1) != 1 and seen.stride(0) != 1:
            seen = seen.contiguous()
        rows = seen.stride(1) == 1  # the rows of memory are the rows of what is seen
        if seen.dtype not in (torch.float32, torch.bfloat16):
            seen = seen.float()
        matrix.kind = _BFLOAT16 if seen.dtype == torch.bfloat16 else _FLOAT32
        matrix.start, matrix.row, matrix.values = 0, seen.stride(0) if rows else seen.stride(1), seen.data_ptr()
        matrix.along = int(rows == (summed == 0))
        return seen
    matrix.along = int(not turned)
    matrix.row = value.shape[-1]
    if isinstance(value, Nf4):
        matrix.kind, matrix.start, matrix.values = _NF4, value.start, value.packed.data_ptr()
        matrix.absmax, matrix.scale = value.absmax.data_ptr(), value.absmax_scale.data_ptr()
        matrix.offset = value.offset.data_ptr()
        return value
    values, scale = value.values.contiguous(), value.scale.contiguous()
    matrix.kind, matrix.start, matrix.values, matrix.scale = _INT8, 0, values.data_ptr(), scale.data_ptr()
    return values, scale


def multiply(
    calls: ctypes.CDLL,
    terms: Sequence[tuple[Tensor, Operand, bool]],
    *,
    out: Tensor | None = None,
    alpha: float = 1.0,
    add: bool = False,
    narrow: bool = False,
) -> Tensor:
    """Sum over (A, W, turned) of A (M, K) times W (K, N), or times W^T where W (N, K) is `turned`; returns C (M, N) float32.

    A is a float32 tensor of any strides, W a float32 or bfloat16 tensor or a stored weight. `out`, with rows of stride
    one, takes the result; with `add` it is added to. `narrow` rounds both sides of the first term to bfloat16 (their
    products are summed in float32), on processors that have instructions for it.
    """
    count = len(terms)
    a, b, k = (Matrix * count)(), (Matrix * count)(), (ctypes.c_int64 * count)()
    alive: list[Any] = []
    m, n = len(terms[0][0]), 0
    for i, (left, right, turned) in enumerate(terms):
        n = right.shape[-2] if turned else right.shape[-1]
        k[i] = left.shape[1]
        alive += [_fill(a[i], left, False, 1), _fill(b[i], right, turned, 0)]
    b[0].narrow = int(narrow)
    if out is None:
        out = torch.empty(m, n)
    if not any(k) and not add:
        return out.zero_()
    if calls.graft_gemm(
        m, n, k, count, a, b, out.data_ptr(), out.stride(0) if m > 1 else n, alpha, int(add), torch.get_num_threads()
    ):
        raise MemoryError(f"no memory to multiply {m} by {k[0]} by {n}")
    return out
