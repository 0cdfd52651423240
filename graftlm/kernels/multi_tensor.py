"""Many small tensors at once on a GPU, by PyTorch's multi-tensor operations: an adapter has hundreds, and a launch of its own
for each would take longer than the work.

    adamw_steps        float32 parameters with moments in float32, the bits of `reference_adamw.adamw`: every operation is a
                       launch of its own and so rounds by itself
    sums_of_squares    of gradients of any size, in float64
    copy_together      into tensors of another dtype

The first two are compared with the reference once, at first use on a GPU.
"""

# PyTorch's multi-tensor operations have no other names.
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from graftlm.kernels import reference_adamw as reference
from graftlm.kernels.moments import Moments
from graftlm.kernels.reference_adamw import Update
from graftlm.kernels.self_check import SelfCheck, sample

LARGEST = 1 << 20  # values of a tensor that is worth taking with others
TOGETHER = 1 << 23  # values taken at once: three copies of them exist, 96 MiB

Step = tuple[Tensor, Tensor, Moments, Update]
"""A parameter, its gradient, its moments, the numbers of its update."""


def fits(step: Step) -> bool:
    """Whether a joint step takes this parameter: a small one in float32 on a GPU, all of it there."""
    parameter, gradient, moments, update = step
    return (
        parameter.device.type == "cuda"
        and update.gate is None
        and parameter.dtype == gradient.dtype == torch.float32
        and not moments.eight_bit
        and parameter.numel() <= LARGEST
        and parameter.is_contiguous()
        and parameter.device == gradient.device == moments.device
    )


def adamw_steps(steps: Sequence[Step]) -> None:
    """One step of each parameter, in place; beta1, beta2, epsilon and `fix` are the same for all."""
    for some in _pieces(steps):
        parameters = [p.detach().view(-1) for p, _, _, _ in some]
        m, v = [s[2].mean for s in some], [s[2].square for s in some]
        updates = [s[3] for s in some]
        first = updates[0]
        g = torch._foreach_mul([s[1].detach().reshape(-1) for s in some], [u.factor for u in updates])
        torch._foreach_mul_(m, first.beta1)
        torch._foreach_add_(m, torch._foreach_mul(g, 1 - first.beta1))
        torch._foreach_mul_(v, first.beta2)
        torch._foreach_mul_(g, g)
        torch._foreach_mul_(g, 1 - first.beta2)
        torch._foreach_add_(v, g)
        del g
        bottom = torch._foreach_sqrt(v)
        torch._foreach_mul_(bottom, first.fix)
        torch._foreach_add_(bottom, first.epsilon)
        change = torch._foreach_div(m, bottom)
        torch._foreach_mul_(change, [u.rate for u in updates])
        torch._foreach_mul_(parameters, [u.decay for u in updates])
        torch._foreach_sub_(parameters, change)


def _pieces(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """The steps in runs of at most TOGETHER values."""
    some: list[Step] = []
    values = 0
    for step in steps:
        count = step[0].numel()
        if some and values + count > TOGETHER:
            yield some
            some, values = [], 0
        some.append(step)
        values += count
    if some:
        yield some


def sums_of_squares(tensors: Sequence[Tensor]) -> Tensor | None:
    """Each tensor's sum of squares (n,), float64 on their device; None where this is not for them."""
    if not tensors or any(t.device.type != "cuda" for t in tensors):
        return None
    if not self_check.allows("sums_of_squares", tensors[0].device):
        return None
    return torch.stack(torch._foreach_norm([t.detach() for t in tensors], 2.0, torch.float64)).square()


@torch.no_grad()
def copy_together(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into the target at its place, of its shape; all targets have one dtype, and all sources."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


# ---- the checks before first use ----------------------------------------------------------------------------------


def check_adamw_steps(device: torch.device) -> bool:
    return reference.many_agree(adamw_steps, device)


def check_sums_of_squares(device: torch.device) -> bool:
    """In both types, and where a value is not finite."""
    tensors = [sample(7, 13, device=device), sample(1001, device=device).bfloat16(), sample(3, device=device) / 0]
    norms = torch._foreach_norm(tensors, 2.0, torch.float64)
    expected = [reference.sum_of_squares(t) for t in tensors]
    close = all(abs(float(n) ** 2 / float(e) - 1) < 1e-12 for n, e in zip(norms[:2], expected))
    return close and not bool(norms[2].isfinite())


self_check = SelfCheck(
    "multi-tensor operations", lambda: "", {"adamw_steps": check_adamw_steps, "sums_of_squares": check_sums_of_squares}
)
