"""Weights in the blocks of GGUF files on a GPU: decoded, and multiplied with a few rows without ever being dense."""

from __future__ import annotations

import torch
from torch import Tensor

from graftlm.kernels import reference
from graftlm.kernels.reference_blocks import blocks_dequantize as truth
from graftlm.kernels.reference_blocks import sample_blocks
from graftlm.kernels.self_check import close, sample
from graftlm.kernels.stored import BLOCK_SIZES, GgufBlocks
from graftlm.kernels.triton.device import FLOATS, STAGES, agree, ceil, launch, needs_upcast

_KINDS = {kind: i for i, kind in enumerate(BLOCK_SIZES)}  # KIND of the programs


def blocks_dequantize(weight: GgufBlocks, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if out.numel():
        launch(
            "blocks", "dequantize", (ceil(out.numel(), 1024),), out,
            weight.data.contiguous(), out, out.numel(),
            KIND=_KINDS[weight.kind], TILE=1024, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def few_rows(x: Tensor, weight: GgufBlocks, transposed: bool, most_rows: int, tile: tuple[int, int]) -> Tensor:
    """x (rows, summed) -> y (rows, made), rows at most `most_rows`; `tile`: columns made, and values summed, at a time."""
    outer, inner = weight.shape
    summed, made = (outer, inner) if transposed else (inner, outer)
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(len(x), made, dtype=x.dtype, device=x.device)
    launch(
        "blocks", "few_rows", (ceil(made, tile[0]),), x,
        x, weight.data.contiguous(), y, len(x), summed, made, inner, x.stride(0), KIND=_KINDS[weight.kind],
        TRANSPOSED=transposed, ROWS=most_rows, MADE=tile[0], SUMMED=tile[1], UPCAST=needs_upcast(x), num_stages=STAGES,
        enable_fp_fusion=False,
    )  # fmt: skip
    return y


# ---- the check before first use -----------------------------------------------------------------------------------


def check_dequantize(device: torch.device) -> bool:
    """Every kind in every float type."""
    weights = (sample_blocks(kind, 5, 768, device=device).narrow(1, 3) for kind in BLOCK_SIZES)
    return all(agree(blocks_dequantize(w, t), truth(w, t)) for w in weights for t in FLOATS)


def check_few_rows(device: torch.device, transposed: bool, most_rows: int, tile: tuple[int, int]) -> bool:
    """Every kind, in either orientation."""
    for weight in (sample_blocks(kind, 21, 256, device=device) for kind in BLOCK_SIZES):
        x = sample(5, 21 if transposed else 256, device=device)
        dense = reference.dequantize(weight).double()
        wanted = x.double() @ (dense if transposed else dense.T)
        if not close(few_rows(x, weight, transposed, most_rows, tile), wanted.float()):
            return False
    return True
