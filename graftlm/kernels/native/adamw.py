"""AdamW's step and the sum of a gradient's squares in C (`adamw.c`), bit-identical to the reference, memory read once."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from graftlm.kernels import reference_adamw as reference
from graftlm.kernels.counter_rng import word_keys
from graftlm.kernels.moments import Moments
from graftlm.kernels.native.library import TWO_TYPES, address, calls, get
from graftlm.kernels.self_check import sample

_pointer, _float, _int = ctypes.c_void_p, ctypes.c_float, ctypes.c_int


class _Code(ctypes.Structure):
    """`struct code` of adamw.c."""

    _fields_ = (
        ("values", _pointer), ("starts", _float * reference.DECADES),
        *((name, _float * (reference.DECADES + 1)) for name in ("density", "last", "bend")),
        ("offset", ctypes.c_int32), ("largest", ctypes.c_int32),
    )  # fmt: skip


class _Step(ctypes.Structure):
    """`struct graft_adamw` of adamw.c."""

    _fields_ = (
        *((name, _pointer) for name in (
            "parameter", "gradient", "mean", "square", "mean_scale", "square_scale", "mean_code", "square_code",
        )),
        ("count", ctypes.c_int64),
        *((name, _float) for name in (
            "factor", "beta1", "rest1", "beta2", "rest2", "epsilon", "decay", "rate", "fix",
        )),
        ("start", ctypes.c_uint32), ("turn", ctypes.c_uint32), ("parameter_type", _int), ("gradient_type", _int),
    )  # fmt: skip


def _described(code: reference.Code) -> _Code:
    parts = (code.starts, code.density, code.last, code.bend)
    floats = [(_float * len(part))(*part.tolist()) for part in parts]
    return _Code(address(code.values), *floats, code.offset, code.largest)


_MEAN, _SQUARE = _described(reference.MEAN), _described(reference.SQUARE)


def fits(parameter: Tensor, gradient: Tensor, moments: Moments) -> bool:
    """Whether the C code supports these dtypes and this layout; the gradient may have any strides."""
    return (
        parameter.dtype in TWO_TYPES
        and gradient.dtype in TWO_TYPES
        and parameter.is_contiguous()
        and parameter.device.type == gradient.device.type == moments.device.type == "cpu"
    )


def step(parameter: Tensor, gradient: Tensor, moments: Moments, update: reference.Update, level: int = -1) -> None:
    """One step of `reference_adamw.adamw`; `level` limits the instruction set (0 plain C, 1 AVX2)."""
    if update.gate is not None and not math.isfinite(float(update.gate)):
        return
    gradient = gradient.detach().contiguous()
    start, turn = word_keys(*update.key)
    scales = (moments.mean_scale, moments.square_scale)
    given = _Step(
        address(parameter), address(gradient), address(moments.mean), address(moments.square),
        *(None if scale is None else address(scale) for scale in scales), ctypes.addressof(_MEAN), ctypes.addressof(_SQUARE),
        parameter.numel(), update.factor, update.beta1, 1 - update.beta1, update.beta2, 1 - update.beta2,
        update.epsilon, update.decay, update.rate, update.fix, (start + update.first) & 0xFFFFFFFF, turn,
        TWO_TYPES[parameter.dtype], TWO_TYPES[gradient.dtype],
    )  # fmt: skip
    calls().graft_adamw(ctypes.byref(given), _allowed(level), torch.get_num_threads())


def sum_of_squares(tensor: Tensor, level: int = -1) -> Tensor:
    """The sum of all squares, () float64."""
    flat = tensor.detach().contiguous()
    parts = torch.empty(calls().graft_sum_parts(flat.numel()), dtype=torch.float64)
    threads = torch.get_num_threads()
    total = calls().graft_sum_of_squares(
        address(flat), TWO_TYPES[flat.dtype], flat.numel(), address(parts), _allowed(level), threads
    )
    return torch.tensor(total, dtype=torch.float64)


def _allowed(level: int) -> int:
    return get().widest if level < 0 else level


# ---- the checks before first use ----------------------------------------------------------------------------------


def check_step() -> bool:
    """Whether three steps over 1001 values end in the reference's bits, in both types and both kinds of moments."""
    return reference.agrees(step, torch.device("cpu"))


def check_sum_of_squares() -> bool:
    """Whether the sum of squares is the reference's to rounding."""
    wave = sample(40_001)
    return all(
        abs(float(sum_of_squares(x)) / float(reference.sum_of_squares(x)) - 1) < 1e-12 for x in (wave, wave.bfloat16())
    )
