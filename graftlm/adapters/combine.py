"""Combine several adapters' updates of one weight.

    linear        W + sum of w_i U_i                                    U_i is adapter i's update, s B A for LoRA
    ties          W + the mean, over those that agree on the sign, of w_i trim(U_i)        TIES (Yadav et al. 2023)
    dare-linear   W + sum of w_i drop(U_i)                              DARE (Yu et al. 2024)
    dare-ties     W + the mean, over those that agree, of w_i drop(U_i)

`trim` keeps the share `density` of largest values, `drop` keeps each value with probability `density` and divides it by that.
The elected sign is the sign of the sum of the remaining values, before the weights, as in PEFT. All operations are on the
updates themselves, the task vectors of both papers. PEFT's `linear`, `ties` and `dare_*` work on A and B separately, so that
B A also has terms of one adapter's A with another's B; its `cat` and `*_svd` at full rank equal ours.

Letters: n rows of a weight W (out, in).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftlm.config.merge import Combine
from graftlm.kernels.counter_rng import hash_words, keep_mask


@dataclass(frozen=True)
class MergeRecipe:
    """How updates are combined."""

    kind: Combine = "linear"
    density: float = 1.0
    seed: int = 0


def threshold(update: Tensor, density: float) -> float:
    """The smallest absolute value among the `density` share of largest ones in U (out, in); infinite if there are none."""
    count = int(density * update.numel())
    if count == 0:
        return float("inf")
    if count == update.numel():
        return 0.0
    return float(update.abs().flatten().kthvalue(update.numel() - count + 1).values)


def dropped(update: Tensor, density: float, seed: int, key: tuple[str, int, int], first: int) -> Tensor:
    """drop(U) for n rows of U from row `first` on; the mask depends on seed, weight, expert, adapter and position."""
    if density >= 1:
        return update
    rows = torch.arange(first, first + len(update), dtype=torch.int32)
    keep = keep_mask(rows, hash_words(seed, "dare", *key), update.shape[1], 1.0 - density)  # (n, in)
    return update * keep / density


def combine(updates: Sequence[Tensor], weights: Sequence[float], kind: Combine) -> Tensor:
    """Updates (n, in), already trimmed or dropped, with their weights -> the update to add to W, (n, in)."""
    stacked = torch.stack(list(updates))  # (k, n, in)
    weighted = stacked * torch.tensor(weights, dtype=stacked.dtype)[:, None, None]
    if kind in ("linear", "dare-linear"):
        return weighted.sum(0)
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)  # (n, in)
    agree = stacked.sign() == elected  # (k, n, in); a trimmed or dropped value has sign 0 and never agrees
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)
