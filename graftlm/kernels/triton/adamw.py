"""AdamW's step on a GPU: one launch for a parameter, with moments in 32 or in 8 bits, there or in the host's memory; and one
launch for many small parameters with moments in 32 bits, as an adapter has them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from graftlm.kernels import reference_adamw as reference
from graftlm.kernels.counter_rng import word_keys
from graftlm.kernels.moments import MOMENT_BLOCK, ZERO_MEAN_CODE, Moments
from graftlm.kernels.transfer import to_device
from graftlm.kernels.triton.device import ceil, launch

BLOCKS = 4  # of 256 values in a program: 8 values a thread
TILE = 2048  # values of a small parameter in a program
PARAMETERS = (torch.float32, torch.bfloat16)
SLAB = 1 << 24  # values whose moments come from the host at once, whole blocks: 128 MiB in 32 bits


def fits(parameter: Tensor, gradient: Tensor, moments: Moments) -> bool:
    """Whether the program takes these: types it knows, end to end, and moments beside the parameter or on the host."""
    return (
        parameter.dtype in PARAMETERS
        and parameter.is_contiguous()
        and parameter.device == gradient.device
        and moments.device in (parameter.device, torch.device("cpu"))
    )


@functools.cache
def _code_of(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """A code's 256 values, and its starts, density, last and bend (4, 8), those of no decade first."""
    code = reference.MEAN if signed else reference.SQUARE
    starts = torch.cat([torch.zeros(1), code.starts])
    return code.values.to(device), torch.stack([starts, code.density, code.last, code.bend]).to(device)


def _signed(word: int) -> int:
    """A 32-bit word as the signed number of the same bits."""
    return (word + (1 << 31)) % (1 << 32) - (1 << 31)


def step(parameter: Tensor, gradient: Tensor, moments: Moments, update: reference.Update) -> None:
    """One step of `reference_adamw.adamw`, in place; moments on the host come and go a slab at a time, without waiting."""
    torch.autograd.graph.increment_version(parameter)  # PyTorch does not see what a program writes
    if moments.device == parameter.device:
        return _launch(parameter, gradient, moments, update)
    flat, gradient, device = parameter.detach().view(-1), gradient.detach().reshape(-1), parameter.device
    for first in range(0, flat.numel(), SLAB):
        last = min(first + SLAB, flat.numel())
        part = reference.moments_of(moments, first, last)
        fetched = Moments(**{name: t.to(device, non_blocking=True) for name, t in part.tensors().items()})
        _launch(flat[first:last], gradient[first:last], fetched, update, first)
        for name, tensor in part.tensors().items():
            tensor.copy_(fetched.tensors()[name], non_blocking=True)
    return None


def _launch(parameter: Tensor, gradient: Tensor, moments: Moments, update: reference.Update, first: int = 0) -> None:
    """The step for the values of a parameter from number `first` on, all on one device."""
    count, rounded = parameter.numel(), parameter.dtype == torch.bfloat16
    if not count:
        return
    start, turn = word_keys(*update.key)
    start += update.first + first
    codes = [_code_of(signed, parameter.device) for signed in (True, False)]
    mean_scale, square_scale = moments.mean_scale, moments.square_scale
    launch(
        "adamw", "step", (ceil(count, MOMENT_BLOCK * BLOCKS),), parameter,
        parameter.detach().view(torch.int16) if rounded else parameter.detach(), gradient.detach().contiguous(),
        moments.mean, moments.square, moments.mean if mean_scale is None else mean_scale,
        moments.square if square_scale is None else square_scale, codes[0][0], codes[1][0], codes[0][1], codes[1][1],
        moments.mean if update.gate is None else update.gate, count, update.factor, update.beta1, 1 - update.beta1,
        update.beta2, 1 - update.beta2, update.epsilon, update.decay, update.rate, update.fix, _signed(start),
        _signed(turn), GATED=update.gate is not None, ROUNDED=rounded, EIGHT=moments.eight_bit, BLOCKS=BLOCKS,
        ZERO=ZERO_MEAN_CODE, OTHER_BITS=reference.OTHER_BITS,
        fuse=False,
    )  # fmt: skip


def steps(some: Sequence[tuple[Tensor, Tensor, Moments, reference.Update]]) -> None:
    """`reference_adamw.adamw` of many parameters, all float32 on one device, their moments too; see `multi_tensor.fits`.

    beta1, beta2, epsilon and `fix` are the same for all. Where they lie and their rates go to the device in one small copy.
    """
    if not some:
        return
    gradients = [gradient.detach().contiguous() for _, gradient, _, _ in some]  # held until the launch
    table = torch.empty(len(some), 8, dtype=torch.int64)
    table[:, :5] = torch.tensor(
        [
            [p.data_ptr(), g.data_ptr(), moments.mean.data_ptr(), moments.square.data_ptr(), p.numel()]
            for (p, _, moments, _), g in zip(some, gradients)
        ]
    )
    table.view(torch.float32)[:, 10:13] = torch.tensor([[u.factor, u.decay, u.rate] for _, _, _, u in some])
    first, parameter = some[0][3], some[0][0]
    (there,) = to_device([table], parameter.device)
    largest = max(p.numel() for p, _, _, _ in some)
    launch(
        "adamw", "steps", (ceil(largest, TILE), len(some)), parameter, there, there.view(torch.float32), first.beta1,
        1 - first.beta1, first.beta2, 1 - first.beta2, first.epsilon, first.fix, TILE=TILE, fuse=False,
    )  # fmt: skip
    torch.autograd.graph.increment_version([p for p, _, _, _ in some])


# ---- the checks before first use ----------------------------------------------------------------------------------


def check_steps(device: torch.device) -> bool:
    """Three steps over parameters of several tiles and rates end in the reference's bits."""
    return reference.many_agree(steps, device)


def check(device: torch.device) -> bool:
    """Whether three steps over 1001 values end in the reference's bits, in both types and both kinds of moments."""
    return reference.agrees(step, device)
