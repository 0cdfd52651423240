"""Several adapters' updates of one weight made into one.

    linear        W + sum of w_i U_i                                    U_i is what adapter i changes, s B A for LoRA
    ties          W + the mean, over those that agree on the sign, of w_i trim(U_i)        TIES (Yadav et al. 2023)
    dare-linear   W + sum of w_i drop(U_i)                              DARE (Yu et al. 2024)
    dare-ties     W + the mean, over those that agree, of w_i drop(U_i)

`trim` keeps the share `density` of largest values, `drop` keeps each value with probability `density` and divides it by that;
the sign that wins is the sign of the sum of what is left, before the weights, as PEFT has it. All of it is done on the updates
themselves, the task vectors of both papers: PEFT's `linear`, `ties` and `dare_*` work on A and B apart, whose product then
holds terms of one adapter's A with another's B; equal to these here are its `cat` and `*_svd` at full rank.

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
    """How updates are added."""

    kind: Combine = "linear"
    density: float = 1.0
    seed: int = 0


def threshold(update: Tensor, density: float) -> float:
    """The least absolute value that is among the `density` share of largest ones in U (out, in); infinite for none."""
    count = int(density * update.numel())
    if count == 0:
        return float("inf")
    if count == update.numel():
        return 0.0
    return float(update.abs().flatten().kthvalue(update.numel() - count + 1).values)


def dropped(update: Tensor, density: float, seed: int, key: tuple[str, int, int], first: int) -> Tensor:
    """drop(U) for n rows of U from row `first` on: which values stay depends on seed, weight, expert, adapter and place."""
    if density >= 1:
        return update
    rows = torch.arange(first, first + len(update), dtype=torch.int32)
    keep = keep_mask(rows, hash_words(seed, "dare", *key), update.shape[1], 1.0 - density)  # (n, in)
    return update * keep / density


def combine(updates: Sequence[Tensor], weights: Sequence[float], kind: Combine) -> Tensor:
    """Updates (n, in), already trimmed or dropped, with their weights -> what is added to W, (n, in)."""
    stacked = torch.stack(list(updates))  # (k, n, in)
    weighted = stacked * torch.tensor(weights, dtype=stacked.dtype)[:, None, None]
    if kind in ("linear", "dare-linear"):
        return weighted.sum(0)
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)  # (n, in)
    agree = stacked.sign() == elected  # (k, n, in); a value that was taken away has no sign and never agrees
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)
