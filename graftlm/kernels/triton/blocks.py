"""Weights in the blocks of GGUF files on a GPU, dequantized."""

from __future__ import annotations

import torch
from torch import Tensor

from graftlm.kernels.reference_blocks import blocks_dequantize as truth
from graftlm.kernels.reference_blocks import sample_blocks
from graftlm.kernels.stored import BLOCK_SIZES, GgufBlocks
from graftlm.kernels.triton.device import FLOATS, agree, ceil, launch

KINDS = {kind: i for i, kind in enumerate(BLOCK_SIZES)}  # KIND of the programs
TILE = 2048  # values of a program


def words_of(weight: GgufBlocks) -> Tensor:
    """Its blocks as words of two bytes, end to end, of which two begin at a multiple of four bytes."""
    data = weight.data.contiguous()
    return (data.clone() if data.storage_offset() % 4 else data).view(torch.int16)


def blocks_dequantize(weight: GgufBlocks, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if out.numel():
        launch(
            "blocks", "dequantize", (ceil(out.numel(), TILE),), out, words_of(weight), out, out.numel(),
            KIND=KINDS[weight.kind], TILE=TILE, fuse=False,
        )  # fmt: skip
    return out


# ---- the check before first use -----------------------------------------------------------------------------------


def check_dequantize(device: torch.device) -> bool:
    """Every kind in every float type."""
    weights = (sample_blocks(kind, 5, 768, device=device).narrow(1, 3) for kind in BLOCK_SIZES)
    return all(agree(blocks_dequantize(w, t), truth(w, t)) for w in weights for t in FLOATS)
