"""Matmuls with a stored weight on a GPU: x W^T, and dy W on the way back.

A few rows take one launch and no dense copy; for more, the weight is dequantized for the vendor's matmul.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graftlm.kernels import reference
from graftlm.kernels.reference_blocks import sample_blocks
from graftlm.kernels.self_check import close, sample
from graftlm.kernels.stored import BLOCK, BLOCK_SIZES, GgufBlocks, Int8, Nf4, Quantized
from graftlm.kernels.triton import blocks, weights
from graftlm.kernels.triton.device import STAGES, ceil, launch, needs_upcast, programs

FEW_ROWS = 16
# (columns of the result, values summed at a time) of a program, x W^T and dy W. The codes of one row of W lie side by side: for
# x W^T few columns and long runs, which also makes programs for every core of a large GPU; for dy W the row is what is made.
# Float32 is multiplied without tensor cores, from registers: there smaller ones.
TILES: dict[tuple[type, int], tuple[tuple[int, int], tuple[int, int]]] = {  # by form, and bytes of x's dtype
    (Nf4, 2): ((16, 256), (64, 64)),
    (Nf4, 4): ((16, 64), (64, 32)),
    (GgufBlocks, 2): ((32, 128), (128, 32)),
    (GgufBlocks, 4): ((16, 128), (128, 16)),
}

WARPS: dict[tuple[type, int], int] = {(GgufBlocks, 4): 8}  # of a program; 4 elsewhere


def dequantize(weight: Quantized, dtype: torch.dtype) -> Tensor:
    """Any stored weight, dense in `dtype`."""
    if isinstance(weight, GgufBlocks):
        return blocks.blocks_dequantize(weight, dtype)
    if isinstance(weight, Int8):
        return weights.int8_dequantize(weight, dtype)
    return weights.nf4_dequantize(weight, dtype)


def matmul(x: Tensor, weight: Quantized) -> Tensor:
    """x (..., in) -> x @ W.T (..., out)."""
    return _product(x, weight, False)


def matmul_t(dy: Tensor, weight: Quantized) -> Tensor:
    """dy (..., out) -> dy @ W (..., in)."""
    return _product(dy, weight, True)


def _product(x: Tensor, weight: Quantized, transposed: bool) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if 0 < len(rows) <= FEW_ROWS and isinstance(weight, Nf4 | GgufBlocks) and fits(weight):
        return few_rows(rows, weight, transposed).view(*x.shape[:-1], -1)
    dense = dequantize(weight, x.dtype)
    return x @ (dense if transposed else dense.T)


def fits(weight: Nf4 | GgufBlocks) -> bool:
    """Whether a program decodes this weight for a product: not an empty one, nor in NF4 one whose rows are not whole blocks."""
    whole = not isinstance(weight, Nf4) or not (weight.start % BLOCK or weight.shape[1] % BLOCK)
    return whole and weight.numel > 0


def few_rows(x: Tensor, weight: Nf4 | GgufBlocks, transposed: bool) -> Tensor:
    """x (rows, in) -> x W^T (rows, out), or where `transposed` x (rows, out) -> x W (rows, in).

    At most FEW_ROWS rows, and a weight that `fits`.
    """
    outer, inner = weight.shape
    summed, made = (outer, inner) if transposed else (inner, outer)
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(len(x), made, dtype=x.dtype, device=x.device)
    if isinstance(weight, Nf4):
        stored, start, decode, kind = weights.nf4_arguments(weight), weight.start, programs("weights").nf4_tile, 0
    else:
        stored, start, decode, kind = blocks.words_of(weight), 0, programs("blocks").tile, blocks.KINDS[weight.kind]
    form = type(weight), x.element_size()
    columns, values = TILES[form][int(transposed)]
    launch(
        "product", "few_rows", (ceil(made, columns),), x, x, stored, y, start, len(x), summed, made, inner, x.stride(0),
        DECODE=decode, KIND=kind, TRANSPOSED=transposed, ROWS=FEW_ROWS, MADE=columns, SUMMED=values,
        UPCAST=needs_upcast(x), num_stages=STAGES, num_warps=WARPS.get(form, 4), fuse=False,
    )  # fmt: skip
    return y


# ---- the check before first use -----------------------------------------------------------------------------------


def check(device: torch.device, transposed: bool) -> bool:
    """NF4 and every kind of GGUF block, more values than a tile has; and NF4 in rows that are not whole blocks."""
    stored: list[Nf4 | GgufBlocks] = [sample_blocks(kind, 21, 256, device=device) for kind in BLOCK_SIZES]
    stored.append(reference.nf4_quantize(sample(75, 320, device=device)).narrow(3, 70))
    stored.append(reference.nf4_quantize(sample(45, 201, device=device)).narrow(3, 40))
    for weight in stored:
        x = sample(5, weight.shape[0 if transposed else 1], device=device)
        dense = reference.dequantize(weight).double()
        wanted = x.double() @ (dense if transposed else dense.T)
        if not close(_product(x, weight, transposed), wanted.float()):
            return False
    return True
