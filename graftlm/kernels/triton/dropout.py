"""LoRA's dropout on a GPU: one launch instead of the twenty of its hash and its mask."""

from __future__ import annotations

import torch
from torch import Tensor

from graftlm.kernels import counter_rng as reference
from graftlm.kernels.self_check import sample
from graftlm.kernels.triton.device import FLOATS, agree, ceil, launch

TILE = 1024


def dropped(x: Tensor, token_keys: Tensor, module_key: int, dropout: float) -> Tensor:
    """x (tokens, in), token_keys (tokens,) int32 -> drop(x) (tokens, in), as `counter_rng.dropped` makes it."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        scale = float(torch.tensor(1.0 / (1.0 - dropout), dtype=x.dtype))  # rounded as the reference's mask is
        launch(
            "dropout", "dropped", (len(x), ceil(x.shape[1], TILE)), x, x, x.stride(0), token_keys.contiguous(), out,
            x.shape[1], module_key & 0x7FFFFFFF, reference.threshold(dropout), scale, TILE=TILE, fuse=False,
        )  # fmt: skip
    return out


# ---- the check before first use -----------------------------------------------------------------------------------


def check(device: torch.device) -> bool:
    """Whether it keeps and scales what the reference does, in every float type and for rows with gaps between them."""
    keys = torch.arange(-3, 8, dtype=torch.int32, device=device) * 0x1234567
    x = sample(11, 1501, device=device)[:, :1300]
    given = keys, 0x6789ABCD, 0.3
    return all(agree(dropped(x.to(t), *given), reference.dropped(x.to(t), *given)) for t in FLOATS)
