"""Replace a model's norms, gated activations and rotary positions by fused operations, where they compute the same.

    fuse(model, dtype)       replace them in each module that is verified to compute the same
    unfuse(model)            restore the modules' own code

Modelling code writes RMSNorm, SwiGLU and rotary positions as five to ten operations, and autograd saves the result of each. The
fused operations (`fused_autograd.py`) read their inputs once and save little.

What a module computes is found by a test, not by its class's name: its own code and ours get the same random values, and
results and gradients must agree. A norm runs with its actual weight, which shows whether it scales by w or by 1 + w. A gated
MLP runs with stand-ins for its projections, so the test does not depend on their size or on how they are stored or adapted. A
rotation is a function that the attention's code calls by name; the attention gets a copy of its code in which that name is
ours, so other models do not change. A module that differs keeps its own code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from graftlm import kernels
from graftlm.base.function_copy import copy_function
from graftlm.base.fused_autograd import Rotary, gated, gated_halves, rms_norm
from graftlm.kernels.reference_fused import GATES, Gate

EPSILONS = ("variance_epsilon", "eps", "epsilon", "norm_eps")  # attribute names of a norm's epsilon
GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))  # gate, up, down
JOINED = (("gate_up_proj", "down_proj"),)  # gate and up as one
ROTARY = "apply_rotary_pos_emb"


@dataclass(frozen=True)
class FusedCounts:
    """How many modules of each kind run fused."""

    norms: int = 0
    gates: int = 0
    rotary: int = 0


def fuse(model: nn.Module, activation_dtype: torch.dtype) -> FusedCounts:
    """Replace every module that is verified; `activation_dtype` is the dtype of the residual stream.

    Does nothing on devices where the fused operations are not faster than PyTorch's own.
    """
    norms = gates = rotary = 0
    rotations: dict[Any, FunctionType | None] = {}
    first = next(model.parameters(), None)
    for module in model.modules():
        parameter = next(module.parameters(), first)  # one whose weights are compressed has none of its own
        device = torch.device("cpu") if parameter is None else parameter.device
        if "graft_fused" in module.__dict__ or not kernels.has_fused_ops(device, activation_dtype):
            continue
        with _random(device, activation_dtype) as sample:
            norms += _fuse_norm(module, sample)
            gates += _fuse_mlp(module, sample) or _fuse_experts(module, sample)
            rotary += _fuse_attention(module, sample, rotations)
    return FusedCounts(norms, gates, rotary)


def norm_of(module: nn.Module) -> tuple[float, float] | None:
    """(epsilon, offset) of a module that was verified to be x / rms(x) * (w + offset), else None."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, partial) and forward.func is _norm_forward:
        return forward.args[2], forward.args[3]
    return None


def gate_of(module: nn.Module) -> tuple[Sequence[str], Gate] | None:
    """The names of the projections, and the activation, of a module that was verified to be a gated MLP, else None."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, partial) and forward.func is _mlp_forward:
        return forward.args[2], forward.args[3]
    return None


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`."""
    for module in model.modules():
        name = module.__dict__.pop("graft_fused", None)
        if name is not None:
            del module.__dict__[name]


_Sample = Callable[..., Tensor]


@contextmanager
def _random(device: torch.device, dtype: torch.dtype) -> Iterator[_Sample]:
    """Random values that require gradients, from a generator of their own."""
    generator = torch.Generator().manual_seed(0)

    def sample(*shape: int, scale: float = 1.0, gradient: bool = True) -> Tensor:
        values = torch.randn(shape, generator=generator) * scale
        return values.to(device=device, dtype=dtype).requires_grad_(gradient)

    with torch.inference_mode(False), torch.enable_grad():
        yield sample


def _put(module: nn.Module, name: str, function: Any) -> None:
    module.__dict__[name] = function
    module.__dict__["graft_fused"] = name


def _agree(own: Callable[[], Any], ours: Callable[[], Any], inputs: Sequence[Tensor]) -> bool:
    """Whether both give the same tensors and the same gradients to `inputs`; False if either raises."""
    try:
        found, wanted = (_with_gradients(call, inputs) for call in (ours, own))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a module that cannot be run this way keeps its own code
        return False
    tolerance = 1e-5 if inputs[0].dtype == torch.float32 else 2e-2
    return len(found) == len(wanted) and all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and bool(torch.linalg.vector_norm(a.double() - b.double()) <= tolerance * torch.linalg.vector_norm(b.double()))
        for a, b in zip(found, wanted)
    )


def _with_gradients(call: Callable[[], Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    outputs = call()
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    directions = [torch.arange(y.numel(), device=y.device).mul(0.7).cos().view(y.shape).to(y.dtype) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, inputs, directions)]


def _fuse_norm(module: nn.Module, sample: _Sample) -> bool:
    """A module with nothing but a vector `weight`: y = x / rms(x) * (w or 1 + w)."""
    parameters = dict(module.named_parameters(recurse=False))
    weight = parameters.get("weight")
    if weight is None or weight.ndim != 1 or weight.is_meta or len(parameters) != 1 or any(module.children()):
        return False
    epsilons = {e for name in EPSILONS if isinstance(e := getattr(module, name, None), float)}
    if not epsilons:
        return False
    # Rows of several magnitudes, the last so small that epsilon matters.
    sizes = torch.tensor([1.0, 30.0, 0.1, 1e-3], device=weight.device)[:, None]
    x = (sample(4, len(weight), gradient=False) * sizes).to(sample(0).dtype).requires_grad_()
    trained = weight.requires_grad
    own = module.forward
    weight.requires_grad_()
    try:
        for epsilon in epsilons:
            for offset in (0.0, 1.0):
                forward = partial(_norm_forward, module, own, epsilon, offset)

                def ours(forward: Any = forward) -> Tensor:
                    _put(module, "forward", forward)
                    try:
                        return module(x)  # including hooks on its input and output
                    finally:
                        unfuse(module)

                if _agree(lambda: module(x), ours, (x, weight)):
                    _put(module, "forward", forward)
                    return True
    finally:
        weight.requires_grad_(trained)
    return False


def _norm_forward(
    module: nn.Module, own: Callable[..., Any], epsilon: float, offset: float, x: Tensor, *args: Any, **kwargs: Any
) -> Any:
    if args or kwargs:
        return own(x, *args, **kwargs)
    return rms_norm(x, module.get_parameter("weight"), epsilon, offset)


class _StandIn(nn.Module):
    """Replaces a projection during the test: returns `value`, or its input, and remembers the input."""

    def __init__(self, value: Tensor | None) -> None:
        super().__init__()
        self.__dict__["value"], self.__dict__["seen"] = value, None

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__["seen"] = x
        value = self.__dict__["value"]
        return x if value is None else value


@contextmanager
def _standing_in(module: nn.Module, stand_ins: dict[str, _StandIn]) -> Iterator[None]:
    own = {name: module.get_submodule(name) for name in stand_ins}
    for name, child in stand_ins.items():
        setattr(module, name, child)
    try:
        yield
    finally:
        for name, child in own.items():
            setattr(module, name, child)


def _fuse_mlp(module: nn.Module, sample: _Sample) -> bool:
    """A gated MLP: down(act(gate(x)) * up(x))."""
    children = dict(module.named_children())
    own = module.forward
    x = sample(1, 5, 6, gradient=False)
    for names in (*GATED, *JOINED):
        if not all(name in children for name in names):
            continue
        *first, last = names
        shape = (1, 5, 38 // len(first))
        values = [sample(*shape, scale=4.0) for _ in first]
        stand_ins = {name: _StandIn(value) for name, value in zip(first, values)} | {last: _StandIn(None)}

        def alone(stand_ins: dict[str, _StandIn] = stand_ins) -> Any:
            with _standing_in(module, stand_ins):
                y = own(x)
            given = list(stand_ins.values())
            if any(g.__dict__["seen"] is not x for g in given[:-1]) or y is not given[-1].__dict__["seen"]:
                raise ValueError("the module computes more than a gated activation")
            return y

        for kind in GATES:
            if _agree(alone, partial(_between, values, kind), values):
                _put(module, "forward", partial(_mlp_forward, module, own, names, kind))
                return True
    return False


def _between(values: Sequence[Tensor], kind: Gate) -> Tensor:
    """The activation between the projections: gated(gate, up), or of both halves of one tensor."""
    return gated_halves(values[0], kind) if len(values) == 1 else gated(values[0], values[1], kind)


def _mlp_forward(
    module: nn.Module, own: Callable[..., Any], names: Sequence[str], kind: Gate, x: Tensor, *args: Any, **kwargs: Any
) -> Any:
    if args or kwargs:
        return own(x, *args, **kwargs)
    *first, last = (getattr(module, name) for name in names)
    return last(_between([project(x) for project in first], kind))


def _fuse_experts(module: nn.Module, sample: _Sample) -> bool:
    """A mixture's experts, whose activation between the projections is a method `_apply_gate` of both halves."""
    own = getattr(module, "_apply_gate", None)
    if own is None or not getattr(module, "has_gate", False):
        return False
    h = sample(5, 38, scale=4.0)
    for kind in GATES:
        if _agree(lambda: own(h), partial(gated_halves, h, kind), (h,)):
            _put(module, "_apply_gate", partial(gated_halves, kind=kind))
            return True
    return False


def _fuse_attention(module: nn.Module, sample: _Sample, known: dict[Any, FunctionType | None]) -> bool:
    """Attention whose forward calls `apply_rotary_pos_emb`: a copy of that code calls ours. `known` caches the copies."""
    function = getattr(type(module), "forward", None)
    if not isinstance(function, FunctionType) or "forward" in module.__dict__:
        return False
    innermost = inspect.unwrap(function)
    if not isinstance(innermost, FunctionType):
        return False
    if ROTARY not in innermost.__code__.co_names or ROTARY not in innermost.__globals__:
        return False
    if function not in known:
        known[function] = _with_rotary(function, sample)
    copy = known[function]
    if copy is None:
        return False
    _put(module, "forward", MethodType(copy, module))
    return True


def _with_rotary(function: FunctionType, sample: _Sample) -> FunctionType | None:
    """A copy of the function that calls our rotation, or None if the two differ."""
    own: Any = inspect.unwrap(function).__globals__[ROTARY]

    def agrees(rotary: Rotary, rotary_dim: int, angles: int) -> bool:
        # Laid out as in attention: (batch, tokens, heads, D) in memory, viewed as (batch, heads, tokens, D).
        q, k = (sample(2, 5, heads, 12) for heads in (3, 2))
        c, s = (sample(angles, 5, rotary_dim // 2, gradient=False).repeat(1, 1, 2) for _ in range(2))
        views = [x.transpose(1, 2) for x in (q, k)]
        assert rotary.fits(views[0], views[1], c, s)
        return _agree(partial(own, *views, c, s), partial(rotary, *views, c, s), (q, k))

    rotary = Rotary(own, some=True)
    if not all(agrees(rotary, 12, angles) for angles in (1, 2)):
        return None
    rotary.some = agrees(rotary, 8, 1)
    rotary.alike = None
    return copy_function(function, {ROTARY: rotary})
