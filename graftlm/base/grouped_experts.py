"""A mixture's experts in one launch for each of their two matmuls, where a GPU and the weights allow it.

    uses     [ t0 t2 | t1 | | t0 t1 t2 ]        S = T k rows, sorted by expert; `ends` says where each expert's end

How many rows an expert gets stays on the GPU: the host waits for nothing, and launches no more for many experts than for few.

Letters: T tokens, k experts of a token, S = T k uses, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftlm.base.modules import StoredStack


@dataclass(frozen=True)
class ExpertUses:
    """Which tokens go where; all on the GPU."""

    experts: Tensor  # (S,) ascending
    order: Tensor  # (S,) the number t k + j of each use
    rows: Tensor  # (S,) its token t
    ends: Tensor  # (E,) int32
    of_token: int  # k


def expert_uses(top_k_index: Tensor, experts: int) -> ExpertUses:
    """top_k_index (T, k), the experts of each token, all below `experts`."""
    chosen, order = top_k_index.reshape(-1).sort(stable=True)  # an expert's uses stay in the order of tokens
    ends = torch.searchsorted(chosen, torch.arange(experts, device=chosen.device), right=True, out_int32=True)
    k = top_k_index.shape[1]
    return ExpertUses(chosen, order, order // k, ends, k)


def grouped_experts(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor | None:
    """As `surgery.experts_forward`: hidden (T, in), top_k_index and top_k_weights (T, k) -> (T, in); None where it cannot.

    Differentiable; the outputs of a token's experts are added in the same order each time.
    """
    first: StoredStack = module.gate_up_proj if module.has_gate else module.up_proj
    last: StoredStack = module.down_proj
    if getattr(module, "_is_expert_parallel", False) or not (first.groups(hidden) and last.groups(hidden)):
        return None
    uses = expert_uses(top_k_index, module.num_experts)
    spread = _Spread.apply(hidden, uses)
    assert isinstance(spread, Tensor)
    h = first.of_all(spread, uses.ends)  # (S, 2 inner) or (S, inner)
    first_bias = getattr(module, "gate_up_proj_bias" if module.has_gate else "up_proj_bias", None)
    if first_bias is not None:
        h = h + first_bias[uses.experts]
    h = module._apply_gate(h) if module.has_gate else module.act_fn(h)  # (S, inner)
    y = last.of_all(h, uses.ends)  # (S, in)
    last_bias = getattr(module, "down_proj_bias", None)
    if last_bias is not None:
        y = y + last_bias[uses.experts]
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    weighted = y * top_k_weights.reshape(-1).index_select(0, uses.order)[:, None]
    out = _Collect.apply(weighted.to(hidden.dtype), uses)
    assert isinstance(out, Tensor)
    return out


def _spread(x: Tensor, uses: ExpertUses) -> Tensor:
    """x (T, in) -> the row of each use's token (S, in)."""
    return x.index_select(0, uses.rows)


def _collect(y: Tensor, uses: ExpertUses) -> Tensor:
    """y (S, in) -> the sum of each token's uses (T, in). Without atomic additions, whose order would vary."""
    unsorted = torch.empty_like(y).index_copy_(0, uses.order, y)
    return unsorted.view(-1, uses.of_token, y.shape[1]).sum(1)


class _Spread(torch.autograd.Function):
    """`_spread`, whose gradient is `_collect`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, uses: ExpertUses) -> Tensor:
        ctx.uses = uses
        return _spread(x, uses)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return _collect(grads[0], ctx.uses), None


class _Collect(torch.autograd.Function):
    """`_collect`, whose gradient is `_spread`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, uses: ExpertUses) -> Tensor:
        ctx.uses = uses
        return _collect(y, uses)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return _spread(grads[0], ctx.uses), None
