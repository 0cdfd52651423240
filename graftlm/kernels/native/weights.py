"""Quantize and dequantize in C (`kernels.c`), bit-identical to the reference, with both quantizations in one loop."""

from __future__ import annotations

import torch
from torch import Tensor

from graftlm.kernels import reference
from graftlm.kernels.native.library import BLOCK_KINDS, TYPES, address, calls
from graftlm.kernels.reference_blocks import blocks_dequantize as blocks_truth
from graftlm.kernels.reference_blocks import sample_blocks
from graftlm.kernels.self_check import sample
from graftlm.kernels.stored import BLOCK, GROUP, GgufBlocks, Int8, Nf4, Quantized

LARGE_BYTES = 16 << 20  # larger results do not fit a cache, and get large pages


def nf4_quantize(weight: Tensor) -> Nf4:
    flat = weight.detach().reshape(-1).contiguous()  # (n,)
    n = flat.numel()
    blocks = -(-n // BLOCK)
    packed = torch.empty(-(-n // 2), dtype=torch.uint8)
    largest = torch.empty(blocks, dtype=torch.float32)
    threads = torch.get_num_threads()
    calls().graft_nf4_quantize(address(flat), TYPES[flat.dtype], n, address(packed), address(largest), threads)
    offset = largest.mean() if blocks else torch.zeros(())
    absmax = torch.empty(blocks, dtype=torch.uint8)
    scale = torch.empty(-(-blocks // GROUP), dtype=torch.float32)
    calls().graft_absmax_quantize(address(largest), blocks, address(offset), address(absmax), address(scale), threads)
    return Nf4(packed, absmax, scale, offset, tuple(weight.shape))


def nf4_pointers(weight: Nf4) -> tuple[int, int, int, int]:
    return (
        address(weight.packed),
        address(weight.absmax),
        address(weight.absmax_scale),
        address(weight.offset),
    )


def dequantize_into(out: Tensor, weight: Quantized, row: int = 0, column: int = 0, stream: bool = False) -> None:
    """W[row : row + rows, column : column + columns] into the contiguous `out` (rows, columns)."""
    rows, columns = out.shape
    inner = weight.shape[-1]
    first = row * inner + column
    to = (address(out), TYPES[out.dtype], int(stream), torch.get_num_threads())
    if isinstance(weight, Nf4):
        calls().graft_nf4_dequantize(*nf4_pointers(weight), weight.start + first, rows, inner, columns, *to)
    elif isinstance(weight, GgufBlocks):
        data = address(weight.data) + row * weight.data.shape[-1]
        calls().graft_blocks_dequantize(
            data, BLOCK_KINDS[weight.kind], rows, inner, column, columns, to[0], to[1], to[3]
        )  # `stream` is left aside: blocks are decoded through the first-level cache
    else:
        values, scale = address(weight.values) + first, address(weight.scale) + 4 * row
        calls().graft_int8_dequantize(values, scale, rows, inner, columns, *to)


def nf4_dequantize(weight: Nf4, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    out, stream = _result(out, weight.shape, dtype)
    dequantize_into(out.view(1, -1), weight.view(1, weight.numel), stream=stream)
    return out


def int8_dequantize(weight: Int8, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    out, stream = _result(out, weight.shape, dtype)
    if weight.numel:
        rows = Int8(weight.values.flatten(0, -2).contiguous(), weight.scale.flatten().contiguous())
        dequantize_into(out.flatten(0, -2), rows, stream=stream)
    return out


def blocks_dequantize(weight: GgufBlocks, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    out, _ = _result(out, weight.shape, dtype)
    if weight.numel:
        rows = GgufBlocks(weight.data.contiguous().view(-1, weight.data.shape[-1]), weight.kind)
        dequantize_into(out.view(-1, weight.shape[-1]), rows)
    return out


def _result(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, bool]:
    """The tensor for a dense weight, and whether to write it with non-temporal stores.

    A large new result gets large pages and is written normally, since the system has just zeroed those pages in the caches. A
    given one has its pages already.
    """
    if out is None:
        out = torch.empty(shape, dtype=dtype)
        if out.nbytes >= LARGE_BYTES:
            calls().graft_huge_pages(address(out), out.nbytes)
        return out, False
    if tuple(out.shape) != shape or not out.is_contiguous():
        raise ValueError(f"out must be contiguous and of shape {shape}; it has shape {tuple(out.shape)}")
    return out, out.nbytes >= LARGE_BYTES


# ---- the checks before first use ----------------------------------------------------------------------------------


def check_nf4_quantize() -> bool:
    """Every stored bit, from each float type."""
    weight = sample(37, 1001, sizes=97)
    pairs = ((nf4_quantize(w), reference.nf4_quantize(w)) for w in (weight, weight.bfloat16(), weight.half()))
    return all(torch.equal(t, truth.tensors()[name]) for ours, truth in pairs for name, t in ours.tensors().items())


def check_nf4_dequantize() -> bool:
    """Every bit in each float type, of a weight and of a part of it."""
    weight = reference.nf4_quantize(sample(37, 1001, sizes=97))
    return all(
        torch.equal(nf4_dequantize(part, dtype), reference.nf4_dequantize(part, dtype))
        for part in (weight, weight.narrow(3, 7))
        for dtype in TYPES
    )


def check_int8_dequantize() -> bool:
    """Every bit in each float type."""
    weight = reference.int8_quantize(sample(13, 77, sizes=97))
    return all(torch.equal(int8_dequantize(weight, t), reference.int8_dequantize(weight, t)) for t in TYPES)


def check_blocks_dequantize() -> bool:
    """Every bit of each kind in each float type, of whole rows and of columns that begin and end within a block."""
    for kind in BLOCK_KINDS:
        weight = sample_blocks(kind, 3, 768)
        if not all(torch.equal(blocks_dequantize(weight, dtype), blocks_truth(weight, dtype)) for dtype in TYPES):
            return False
        part = torch.empty(2, 600)
        dequantize_into(part, weight, 1, 77)
        if not torch.equal(part, blocks_truth(weight)[1:, 77:677]):
            return False
    return True
