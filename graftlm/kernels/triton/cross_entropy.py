"""Cross entropy on a GPU: one launch for a chunk of logits, in place and in their own dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from graftlm.kernels import reference_fused as reference
from graftlm.kernels.self_check import close, sample
from graftlm.kernels.triton.device import launch

WIDEST = 8192  # values of a row at a time


def cross_entropy_in_place(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """logits (rows, V), labels (rows,) in 0 .. V - 1, which nothing checks -> losses (rows,); see `kernels.fused`."""
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        wide = logits if logits.stride(1) == 1 else logits.contiguous()
        tile = min(WIDEST, 1 << (columns - 1).bit_length())
        launch(
            "cross_entropy", "in_place", (rows,), wide, wide, wide.stride(0), labels.contiguous(),
            losses if weights is None else weights.contiguous(), losses, columns, GRADIENT=weights is not None, TILE=tile,
            fuse=True, num_warps=8 if tile > 2048 else 4,
        )  # fmt: skip
        if wide is not logits and weights is not None:
            logits.copy_(wide)
    return losses


# ---- the check before first use -----------------------------------------------------------------------------------


def check(device: torch.device) -> bool:
    """Losses and gradients, in both types, of rows of several tiles and with gaps."""
    labels, weights = (torch.arange(5, device=device) * 1999 + 3), sample(5, step=0.4, device=device)
    good = True
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        x = (sample(5, 20_000, sizes=7, device=device)[:, :9001]).to(dtype)
        ours, theirs = x.clone(), x.clone()
        found = cross_entropy_in_place(ours, labels, weights)
        wanted = reference.cross_entropy_in_place(theirs, labels, weights)
        alone = cross_entropy_in_place(x, labels, None)
        good = good and all(
            close(a, b, tolerance) for a, b in ((found, wanted), (ours, theirs), (alone, wanted))
        )  # fmt: skip
    return good
