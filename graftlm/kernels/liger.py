"""Fused elementwise operations on a GPU by liger-kernel, with the signatures of `reference_fused.py`.

Liger (Hsu et al. 2024, "Liger Kernel") is imported at first use. Some of its functions overwrite their inputs, so they get
copies. Dtypes that it does not support go to the reference.
"""

# Liger publishes no types.
# pyright: reportMissingImports=false, reportUnknownVariableType=false

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from graftlm.kernels import reference_fused as reference
from graftlm.kernels.reference_fused import Gate
from graftlm.kernels.self_check import SelfCheck, close, sample

WIDEST_NORM = 65536  # largest row of one of its programs
_CASTING = {0.0: "llama", 1.0: "gemma"}  # its rounding: w times the rounded x r, or all in float32


def usable(device: torch.device) -> bool:
    """Whether liger-kernel is installed and has passed its check on this kind of device."""
    return device.type == "cuda" and _installed() and self_check.allows("fused", device)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def _settings(n: int) -> tuple[int, int]:
    from liger_kernel.ops.utils import calculate_settings

    return calculate_settings(n)


P = ParamSpec("P")
R = TypeVar("R")


def _on_its_card(function: Callable[P, R]) -> Callable[P, R]:
    """Run on the card of the first tensor: liger launches on the thread's current one, and threads begin with the first."""

    @functools.wraps(function)
    def call(*given: P.args, **named: P.kwargs) -> R:
        first: Any = given[0]
        with torch.cuda.device_of(first if isinstance(first, Tensor) else first[0]):
            return function(*given, **named)

    return call


@_on_its_card
def rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.rms_norm import rms_norm_forward

    y, _, r, *_ = rms_norm_forward(x.contiguous(), weight.to(x.dtype), epsilon, offset, _CASTING[offset], None)
    return y, r


@_on_its_card
def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, offset: float, wants_weight: bool
) -> tuple[Tensor, Tensor | None]:
    from liger_kernel.ops.rms_norm import _str_to_casting_mode, rms_norm_backward

    block, warps = _settings(x.shape[-1])
    mode = _str_to_casting_mode[_CASTING[offset]]
    dx, dw = rms_norm_backward(
        dy.to(x.dtype).contiguous(), x.contiguous(), weight.to(x.dtype), r, offset, mode, block, warps, False, None,
        wants_weight,
    )  # fmt: skip
    return dx, None if dw is None else dw.float()


@_on_its_card
def gated(gate: Tensor, up: Tensor, kind: Gate) -> Tensor:
    return _gate_functions(kind)[0](gate.contiguous(), up.contiguous())[2]


@_on_its_card
def gated_backward(dy: Tensor, gate: Tensor, up: Tensor, kind: Gate) -> tuple[Tensor, Tensor]:
    own = gate.clone(memory_format=torch.contiguous_format), up.clone(memory_format=torch.contiguous_format)
    return _gate_functions(kind)[1](*own, dy.to(gate.dtype).contiguous())


def _gate_functions(kind: Gate) -> tuple[Any, Any]:
    if kind == "silu":
        from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward

        return swiglu_forward, swiglu_backward
    from liger_kernel.ops.geglu import geglu_backward, geglu_forward

    return geglu_forward, geglu_backward


@_on_its_card
def rotary(parts: Sequence[Tensor], cos: Tensor, sin: Tensor, back: bool) -> list[Tensor]:
    """`cos` and `sin` must have two equal halves: Liger reads the first one only."""
    from liger_kernel.ops.rope import rope_backward, rope_forward

    tokens, period = len(parts[0]), len(cos)
    # (batch, heads, tokens of one, D), copies: Liger rotates in place
    q, k = (
        x.clone(memory_format=torch.contiguous_format).unflatten(0, (tokens // period, period)).transpose(1, 2)
        for x in (parts[0], parts[-1])
    )
    q, k, *_ = (rope_backward if back else rope_forward)(q, k, cos[None], sin[None])
    return [x.transpose(1, 2).flatten(0, 1) for x in (q, k)][: len(parts)]


def _check(device: torch.device) -> bool:
    """Each of them against the reference on a small shape."""

    def values(*shape: int, step: float) -> Tensor:
        return sample(*shape, step=step, sizes=3, device=device)

    x, dy, u = (values(37, 56, step=step) for step in (0.7, 1.1, 1.7))
    w = values(56, step=2.3)
    found: list[Tensor | None] = []
    wanted: list[Tensor | None] = []
    for offset in _CASTING:
        y, r = reference.rms_norm(x, w, 1e-5, offset)
        wanted += [y, *reference.rms_norm_backward(dy, x, w, r, offset, True)]
        found += [rms_norm(x, w, 1e-5, offset)[0], *rms_norm_backward(dy, x, w, r, offset, True)]
    for kind in reference.GATES:
        wanted += [reference.gated(x, u, kind), *reference.gated_backward(dy, x, u, kind)]
        found += [gated(x, u, kind), *gated_backward(dy, x, u, kind)]
    parts = [values(6, 4, 32, step=0.3), values(6, 2, 32, step=0.5)]
    c, s = (values(3, 16, step=step).repeat(1, 2) for step in (0.9, 1.3))
    wanted += [turn(x, c, s) for turn in (reference.rotary, reference.rotary_backward) for x in parts]
    found += [*rotary(parts, c, s, False), *rotary(parts, c, s, True)]
    return all(a is not None and b is not None and close(a, b, 1e-4) for a, b in zip(found, wanted))


self_check = SelfCheck("GPU kernels of liger-kernel", lambda: "", {"fused": _check})
