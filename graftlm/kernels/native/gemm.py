"""Our own matmul (`gemm.c`), for processors that are not Intel's.

    C (M, N) [+]= alpha * sum over terms of A (M, K) B (K, N)

A is float32, B float32, bfloat16, or a stored weight; either may be transposed. `library.py` decides whether it is used: it
needs AVX2 or AVX-512, and on Intel's processors MKL is as fast. On others ours is twice as fast as PyTorch's with AVX-512;
with AVX2 it is as fast, but it decodes a stored weight while packing it and adds an adapter's low-rank term in the same call.

Letters: M, N, K as above; T tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graftlm.kernels import reference
from graftlm.kernels.native.library import BLOCK_KINDS, TWO_TYPES, address, calls, get
from graftlm.kernels.reference_blocks import sample_blocks
from graftlm.kernels.self_check import close, sample
from graftlm.kernels.stored import GgufBlocks, Nf4, Weight

_FLOAT32, _BFLOAT16, _NF4, _INT8 = range(4)  # enum matrix_kind in kernels.h


class Matrix(ctypes.Structure):
    """`struct graft_matrix` of kernels.h."""

    _fields_ = (
        ("start", ctypes.c_int64), ("row", ctypes.c_int64), ("values", ctypes.c_void_p), ("absmax", ctypes.c_void_p),
        ("scale", ctypes.c_void_p), ("offset", ctypes.c_void_p), ("kind", ctypes.c_int), ("along", ctypes.c_int),
        ("narrow", ctypes.c_int), ("unused", ctypes.c_int),
    )  # fmt: skip


def _fill(matrix: Matrix, value: Weight, transposed: bool, summed: int) -> Any:
    """Fill the C description of a matrix; `summed` is the dimension of `value` (after transposing) that is summed over.

    Returns the tensors that must stay alive until the call returns.
    """
    if isinstance(value, Tensor):
        seen = value.T if transposed else value
        if seen.stride(1) != 1 and seen.stride(0) != 1:
            seen = seen.contiguous()
        rows = seen.stride(1) == 1  # the rows of memory are the rows of what is seen
        if seen.dtype not in (torch.float32, torch.bfloat16):
            seen = seen.float()
        matrix.kind = _BFLOAT16 if seen.dtype == torch.bfloat16 else _FLOAT32
        matrix.start, matrix.row, matrix.values = 0, seen.stride(0) if rows else seen.stride(1), address(seen)
        matrix.along = int(rows == (summed == 0))
        return seen
    matrix.along = int(not transposed)
    matrix.row = value.shape[-1]
    if isinstance(value, Nf4):
        matrix.kind, matrix.start, matrix.values = _NF4, value.start, address(value.packed)
        matrix.absmax, matrix.scale = address(value.absmax), address(value.absmax_scale)
        matrix.offset = address(value.offset)
        return value
    if isinstance(value, GgufBlocks):
        blocks = value.data.contiguous()
        matrix.kind, matrix.start, matrix.values = BLOCK_KINDS[value.kind], 0, address(blocks)
        return blocks
    values, scale = value.values.contiguous(), value.scale.contiguous()
    matrix.kind, matrix.start, matrix.values, matrix.scale = _INT8, 0, address(values), address(scale)
    return values, scale


def describe(matrix: Matrix, weight: Weight) -> Any:
    """Fill the C description of a stored weight W (out, in); returns the tensors that must stay alive while C may read it.

    Raises ValueError for a dense one that is neither float32 nor bfloat16, or not contiguous.
    """
    if isinstance(weight, Tensor) and not (weight.is_contiguous() and weight.dtype in TWO_TYPES):
        raise ValueError(
            f"a dense weight of {weight.dtype}, strides {weight.stride()}; expected 32 or 16 bits, end to end"
        )
    return _fill(matrix, weight, True, 0)


def multiply(
    terms: Sequence[tuple[Tensor, Weight, bool]],
    *,
    out: Tensor | None = None,
    alpha: float = 1.0,
    add: bool = False,
    bf16_matmul: bool = False,
) -> Tensor:
    """Sum over (A, W, transposed) of A (M, K) times W (K, N), or times W^T where W (N, K) is `transposed`; returns C
    (M, N) float32.

    A is a float32 tensor of any strides, W a float32 or bfloat16 tensor or a stored weight. `out` takes
    the result; with `add` the result is added to it. `bf16_matmul` rounds both inputs of the first term to bfloat16 and
    accumulates in float32, on processors that support it.
    """
    if out is not None and out.shape[-1] > 1 and out.stride(-1) != 1:  # C writes rows without gaps
        return out.copy_(multiply(terms, out=out.contiguous(), alpha=alpha, add=add, bf16_matmul=bf16_matmul))
    count = len(terms)
    a, b, k = (Matrix * count)(), (Matrix * count)(), (ctypes.c_int64 * count)()
    alive: list[Any] = []
    m, n = len(terms[0][0]), 0
    for i, (left, right, transposed) in enumerate(terms):
        n = right.shape[-2] if transposed else right.shape[-1]
        k[i] = left.shape[1]
        alive += [_fill(a[i], left, False, 1), _fill(b[i], right, transposed, 0)]
    b[0].narrow = int(bf16_matmul)
    if out is None:
        out = torch.empty(m, n)
    if not any(k) and not add:
        return out.zero_()
    if calls().graft_gemm(
        m, n, k, count, a, b, address(out), out.stride(0) if m > 1 else n, alpha, int(add), torch.get_num_threads()
    ):
        raise MemoryError(f"no memory to multiply {m} by {k[0]} by {n}")
    return out


# ---- training -----------------------------------------------------------------------------------------------------


def weight_gradient(dy: Tensor, x: Tensor, bf16_matmul: bool = False) -> Tensor:
    """dy (rows, out), x (rows, in) -> dy^T x (out, in)."""
    return multiply([(dy.T, x, False)], bf16_matmul=bf16_matmul)


def low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y (tokens, out) += scale * (x A^T) B^T in place; returns scale * x A^T (tokens, r) for the backward."""
    h = multiply([(x, A, True)], alpha=scale)
    multiply([(h, B, True)], out=y, add=True)
    return h


def low_rank_backward(
    dy: Tensor, x: Tensor, h: Tensor, A: Tensor, B: Tensor, scale: float, dx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of `low_rank` to A (r, in) and B (out, r); the one to x is added to `dx`."""
    dh = multiply([(dy, B, False)], alpha=scale)  # (tokens, r)
    if dx is not None:
        multiply([(dh, A, False)], out=dx, add=True)
    return multiply([(dh.T, x, False)]), multiply([(dy.T, h, False)])


def lora_linear(
    x: Tensor, weight: Weight, A: Tensor, B: Tensor, scale: float, bf16_matmul: bool = False
) -> tuple[Tensor, Tensor]:
    """x W^T + scale * (x A^T) B^T (rows, out) in one call, and scale * x A^T for the backward."""
    h = multiply([(x, A, True)], alpha=scale)  # (rows, r)
    return multiply([(x, weight, True), (h, B, True)], bf16_matmul=bf16_matmul), h


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Weight,
    h: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    wants_dx: bool,
    bf16_matmul: bool = False,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients of `lora_linear` to x (rows, in), A (r, in) and B (out, r)."""
    dh = multiply([(dy, B, False)], alpha=scale)  # (rows, r)
    dx = multiply([(dy, weight, False), (dh, A, False)], bf16_matmul=bf16_matmul) if wants_dx else None
    return dx, multiply([(dh.T, x, False)]), multiply([(dy.T, h, False)])


# ---- the check before first use -----------------------------------------------------------------------------------


def check() -> bool:
    """Check edges of every panel, each kind of weight in both orientations, two terms, and bfloat16 inputs."""
    x, dense = sample(53, 331, sizes=97), sample(77, 331, sizes=97)
    dy = sample(53, 77, sizes=97)
    weights: tuple[Weight, ...] = (
        dense,
        dense.bfloat16(),
        reference.nf4_quantize(dense),
        reference.nf4_quantize(dense).narrow(3, 50),
        reference.int8_quantize(dense),
    )
    good = _check_blocks() and all(
        close(multiply([(x, w, True)]), reference.matmul(x, w))
        and close(multiply([(dy[:, : w.shape[0]], w, False)]), reference.matmul_t(dy[:, : w.shape[0]], w))
        for w in weights
    )
    good = good and (not get().has_bf16_matmul or _check_bf16(x, dy, weights))
    narrow = multiply([(x, dense, True), (x[:, :5], dense[:, :5], True)], alpha=0.5)
    transposed = multiply([(x.T, dense[:53], False)], out=torch.ones(331, 331), add=True)
    return (
        good
        and close(narrow, 0.5 * (x @ dense.T + x[:, :5] @ dense[:, :5].T))
        and close(transposed, 1 + x.T @ dense[:53])
    )


def _check_blocks() -> bool:
    """Each kind of block in both orientations, also rounded."""
    x, dy = sample(23, 512, sizes=97), sample(23, 41, sizes=97)
    for weight in (sample_blocks(kind, 41, 512) for kind in BLOCK_KINDS):
        dense = reference.dequantize(weight)
        both = ((x, True, dense.T), (dy, False, dense))
        if not all(close(multiply([(left, weight, turned)]), left @ right) for left, turned, right in both):
            return False
        rounded = dy.bfloat16().float() @ dense.bfloat16().float()
        if get().has_bf16_matmul and not close(multiply([(dy, weight, False)], bf16_matmul=True), rounded):
            return False
    return True


def _check_bf16(x: Tensor, dy: Tensor, weights: Sequence[Weight]) -> bool:
    """The same with both inputs rounded: each kind of weight in both orientations, and a weight's gradient."""

    def rounded(value: Weight) -> Tensor:
        return (value if isinstance(value, Tensor) else reference.dequantize(value)).bfloat16().float()

    def good(left: Tensor, weight: Weight, transposed: bool) -> bool:
        right = rounded(weight)
        found = multiply([(left, weight, transposed)], bf16_matmul=True)
        return close(found, rounded(left) @ (right.T if transposed else right))

    forward = all(good(x, w, True) for w in weights if w.shape[0] > 64)  # fewer columns are not rounded
    back = all(good(dy[:, : w.shape[0]], w, False) for w in weights)
    return forward and back and close(weight_gradient(dy, x, bf16_matmul=True), rounded(dy).T @ rounded(x))
