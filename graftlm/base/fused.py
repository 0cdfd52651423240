"""A model's norms, gated products and rotary positions as one pass each, where they are proven to be just that.

    fuse(model, compute)     swap in, for each module that passes its proof
    unfuse(model)            the modules' own code again

Modelling code writes RMSNorm, SwiGLU and rotary positions as five to ten operations, and autograd keeps what each of them
made. Ours (`kernels/fused.py`) read their inputs once and keep little: a norm its input and one number a row, a gated
product its two inputs, a rotation nothing but the angles that all layers share.

What a module computes is found by trying, not by its class's name: its own code and ours get the same random values, and
results and gradients must agree. A norm runs with its actual weight; that shows whether it scales by w or by 1 + w. A gated
MLP runs with stand-ins for its projections, which shows what happens between them, whatever their size and however they
are stored or adapted. A rotation is a function that the attention's code calls by name; the attention gets a copy of its
code that finds ours under that name, so no other model sees a change. What differs keeps its own code.
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
from graftlm.kernels.reference_fused import GATES, Gate

EPSILONS = ("variance_epsilon", "eps", "epsilon", "norm_eps")  # what norms call theirs
GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))  # gate, up, down
JOINED = (("gate_up_proj", "down_proj"),)  # gate and up as one
ROTARY = "apply_rotary_pos_emb"


# ---- with gradients --------------------------------------------------------------------------------------------------


class _Norm(torch.autograd.Function):
    """x (rows, n) -> x / rms(x) * (w + offset)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, offset: float) -> Tensor:
        y, r = kernels.rms_norm(x, weight, epsilon, offset)
        ctx.save_for_backward(x, weight, r)
        ctx.offset = offset
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, r = ctx.saved_tensors
        (dy,) = grads
        dx, dw = kernels.rms_norm_backward(dy, x, weight, r, ctx.offset, ctx.needs_input_grad[1])
        return dx, None if dw is None else dw.to(weight.dtype), None, None


class _Gated(torch.autograd.Function):
    """act(gate) * up, all (rows, n)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: Gate) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return kernels.gated(gate, up, kind)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        (dy,), (gate, up) = grads, ctx.saved_tensors
        return *kernels.gated_backward(dy, gate, up, ctx.kind), None


class _GatedHalves(torch.autograd.Function):
    """act(first half) * second half of h (rows, 2 n), whose gradient is one tensor too."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, kind: Gate) -> Tensor:
        ctx.save_for_backward(h)
        ctx.kind = kind
        gate, up = h.chunk(2, dim=1)
        return kernels.gated(gate, up, kind)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (dy,), (h,) = grads, ctx.saved_tensors
        gate, up = h.chunk(2, dim=1)
        dg, du = kernels.gated_backward(dy, gate, up, ctx.kind)
        whole = dg._base
        alike = whole is not None and whole is du._base and whole.shape == h.shape
        return whole if alike and whole is not None else torch.cat((dg, du), dim=1), None


class _Rotary(torch.autograd.Function):
    """Queries and keys (tokens, heads, D), rotated by cos and sin (period, rotary_dim)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        return tuple(kernels.rotary((q, k), cos, sin))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *kernels.rotary_backward(grads, cos, sin), None, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float = 0.0) -> Tensor:
    """x (..., n) / rms(x) * (w + offset), in x's type."""
    rows = x.reshape(-1, x.shape[-1])
    y: Any = _Norm.apply(rows, weight, epsilon, offset)
    return y.view(x.shape)


def gated(gate: Tensor, up: Tensor, kind: Gate = "silu") -> Tensor:
    """act(gate) * up, all (..., n)."""
    n = gate.shape[-1]
    y: Any = _Gated.apply(gate.reshape(-1, n), up.reshape(-1, n), kind)
    return y.view(gate.shape)


def gated_halves(h: Tensor, kind: Gate = "silu") -> Tensor:
    """act(first half) * second half of h (..., 2 n) -> (..., n)."""
    y: Any = _GatedHalves.apply(h.reshape(-1, h.shape[-1]), kind)
    return y.view(*h.shape[:-1], h.shape[-1] // 2)


class Rotary:
    """Stands where a model's own `apply_rotary_pos_emb` did, and calls that for anything it was not proven for."""

    def __init__(self, own: Callable[..., Any], some: bool) -> None:
        self.own = own
        self.some = some  # it also turns a part of each head, when the angles are fewer
        self.alike: bool | None = None  # on a GPU: whether both halves of the angles are the same

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """q (batch, H, T, D), k (batch, K, T, D), cos and sin (batch or 1, T, rotary_dim) -> both rotated.

        Any other arguments are the model's own function's: Qwen4's indexer turns queries alone.
        """
        if kwargs or len(args) != 4 or not self.fits(*args):
            return self.own(*args, **kwargs)
        q, k, cos, sin = args
        batch, _, tokens, width = q.shape
        rows = (x.transpose(1, 2).reshape(batch * tokens, x.shape[1], width) for x in (q, k))
        rotated: Any = _Rotary.apply(*rows, cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1]))
        return tuple(x.view(batch, tokens, x.shape[1], width).transpose(1, 2) for x in rotated)

    def fits(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
        if q.ndim != 4 or k.ndim != 4 or cos.ndim != 3 or cos.shape != sin.shape or cos.requires_grad:
            return False
        batch, _, tokens, width = q.shape
        rotary_dim = cos.shape[-1]
        good = (
            (k.shape[0], k.shape[2], k.shape[3]) == (batch, tokens, width)
            and (rotary_dim == width or (self.some and rotary_dim < width))
            and rotary_dim % 2 == 0
            and cos.shape[0] in (1, batch)
            and cos.shape[1] == tokens
            and q.dtype == k.dtype == cos.dtype == sin.dtype
        )
        return good and (q.device.type == "cpu" or self._halves_alike(cos))

    def _halves_alike(self, cos: Tensor) -> bool:
        if self.alike is None:  # asked once: it waits for the device
            first, second = cos.chunk(2, dim=-1)
            self.alike = bool(torch.equal(first, second))
        return self.alike


# ---- proofs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FusedCounts:
    """How many modules of each kind run fused."""

    norms: int = 0
    gates: int = 0
    rotary: int = 0


def fuse(model: nn.Module, activation_dtype: torch.dtype) -> FusedCounts:
    """Let every module that passes its proof compute fused; `activation_dtype` is the type of the residual stream.

    Only where that is faster than what PyTorch composes; elsewhere nothing is changed.
    """
    norms = gates = rotary = 0
    rotations: dict[Any, FunctionType | None] = {}
    for module in model.modules():
        parameter = next(module.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        if "graft_fused" in module.__dict__ or not kernels.has_fused_ops(device, activation_dtype):
            continue
        with _random(device, activation_dtype) as sample:
            norms += _fuse_norm(module, sample)
            gates += _fuse_mlp(module, sample) or _fuse_experts(module, sample)
            rotary += _fuse_attention(module, sample, rotations)
    return FusedCounts(norms, gates, rotary)


def norm_of(module: nn.Module) -> tuple[float, float] | None:
    """(epsilon, offset) of a module that was proven to be x / rms(x) * (w + offset), else None."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, partial) and forward.func is _norm_forward:
        return forward.args[2], forward.args[3]
    return None


def gate_of(module: nn.Module) -> tuple[Sequence[str], Gate] | None:
    """The names of the projections, and the activation, of a module that was proven to be a gated MLP, else None."""
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
    """Random values that ask for gradients, with no global generator's state touched."""
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
    """Whether both give the same tensors and the same gradients to `inputs`; whatever fails does not agree."""
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
    # Rows of every size, the last so small that epsilon counts.
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
                        return module(x)  # with what hooks do to its input and output
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
    """Takes a projection's place for a proof: returns `value`, or what it is given, and remembers what that was."""

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
    """A module that projects its input to gate and up, and the gated product back: down(act(gate(x)) * up(x))."""
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
                raise ValueError("more happens here than a gated product")
            return y

        for kind in GATES:
            if _agree(alone, partial(_between, values, kind), values):
                _put(module, "forward", partial(_mlp_forward, module, own, names, kind))
                return True
    return False


def _between(values: Sequence[Tensor], kind: Gate) -> Tensor:
    """What stands between the projections: gated(gate, up), or of both as one."""
    return gated_halves(values[0], kind) if len(values) == 1 else gated(values[0], values[1], kind)


def _mlp_forward(
    module: nn.Module, own: Callable[..., Any], names: Sequence[str], kind: Gate, x: Tensor, *args: Any, **kwargs: Any
) -> Any:
    if args or kwargs:
        return own(x, *args, **kwargs)
    *first, last = (getattr(module, name) for name in names)
    return last(_between([project(x) for project in first], kind))


def _fuse_experts(module: nn.Module, sample: _Sample) -> bool:
    """A mixture's experts, whose code between the projections is a method of its own: both halves -> their gated product."""
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
    """An attention whose forward calls `apply_rotary_pos_emb`: a copy of that code calls ours. `known` has the copies made."""
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
    """The same code with our rotation under the name of its own, or None where the two differ."""
    own: Any = inspect.unwrap(function).__globals__[ROTARY]

    def turns_like_ours(rotary: Rotary, rotary_dim: int, angles: int) -> bool:
        # As attention has them: heads beside each other in memory, (batch, tokens, heads, D) seen as (batch, heads, tokens, D).
        q, k = (sample(2, 5, heads, 12) for heads in (3, 2))
        c, s = (sample(angles, 5, rotary_dim // 2, gradient=False).repeat(1, 1, 2) for _ in range(2))
        views = [x.transpose(1, 2) for x in (q, k)]
        assert rotary.fits(views[0], views[1], c, s)
        return _agree(partial(own, *views, c, s), partial(rotary, *views, c, s), (q, k))

    rotary = Rotary(own, some=True)
    if not all(turns_like_ours(rotary, 12, angles) for angles in (1, 2)):
        return None
    rotary.some = turns_like_ours(rotary, 8, 1)
    rotary.alike = None
    return copy_function(function, {ROTARY: rotary})
