"""One stored weight, in any precision, optionally with a bank of adapters.

    StoredLinear      y = x W^T + b      W (out, in): nn.Linear, Conv1D (transposed), a router's weight, the head
    StoredStack       y = x W[e]^T       W (experts, out, in): the stacked weights of a mixture

These replace modules of the original model; its modelling code stays. `weight` is a Parameter if dense (trained if
`requires_grad`), and plain codes and scales if compressed. A matmul has the dtype of its input. The stored weight is upcast for
one matmul at a time, and again in backward, so that only its stored form stays in memory. `adapters.attach` sets `bank`, which
knows the adapter of each token.

Letters: T tokens, `in`, `out` features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm import kernels
from graftlm.base import context
from graftlm.base.precision import Weight, dequantize, nbytes, quantize
from graftlm.base.shared_input import SharedInput
from graftlm.config import Precision
from graftlm.distributed.group import Ranks
from graftlm.distributed.shard import Piece, gathered_on, is_split, whole
from graftlm.kernels import GgufBlocks


class LinearBank(Protocol):
    """The adapters on a stored module (`adapters.bank` implements it)."""

    def __call__(
        self,
        x: Tensor,
        module: Any,
        weight: Weight,
        bias: Tensor | None,
        expert: int | None = None,
        token_indices: Tensor | None = None,
    ) -> Tensor: ...

    def together(self, x: Tensor, modules: Sequence[Any]) -> list[Tensor] | None:
        """The outputs (T, out) of modules with the same x (T, in), without biases; None where each must run alone."""
        ...

    def groups(self, x: Tensor) -> bool: ...

    def of_all(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor: ...


class _StoredMatmul(torch.autograd.Function):
    """x W^T for x (T, in) and W (out, in); gradients to x, and to W if it is dense and trained.

    Saves the stored form for backward, while autograd would save the upcast copy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dense: Tensor | None, compressed: Any, bf16_matmul: bool) -> Tensor:  # (T, out)
        ctx.save_for_backward(*((x, dense) if dense is not None and dense.requires_grad else (None, dense)))
        ctx.compressed, ctx.bf16_matmul = compressed, bf16_matmul
        return kernels.matmul(x, compressed if dense is None else dense, bf16_matmul)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        (dy,) = grads  # (T, out)
        x, dense = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = kernels.matmul_t(dy, ctx.compressed if dense is None else dense, ctx.bf16_matmul)
        if ctx.needs_input_grad[1]:
            assert dense is not None
            dw = kernels.weight_gradient(dy, x, ctx.bf16_matmul, dense.dtype)
        return dx, dw, None, None


class _GroupedMatmul(torch.autograd.Function):
    """Each expert's rows of x (S, in) times its W[e]^T, W (E, out, in); gradients to x, and to W where it is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:  # (S, out)
        ctx.save_for_backward(x if weight.requires_grad else None, weight, ends)
        return kernels.grouped_matmul(x, weight, ends)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None]:
        dy = grads[0].contiguous()  # (S, out)
        x, weight, ends = ctx.saved_tensors
        dx = kernels.grouped_matmul_t(dy, weight, ends) if ctx.needs_input_grad[0] else None
        dw = kernels.grouped_weight_gradient(dy, x, ends) if ctx.needs_input_grad[1] else None
        return dx, dw, None


def grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (S, in), W (E, out, in) -> (S, out): each expert's rows, which end at `ends` (E,) int32, times its W^T.

    Differentiable; only where `kernels.has_grouped_matmul`.
    """
    y = _GroupedMatmul.apply(x.contiguous(), weight, ends)
    assert isinstance(y, Tensor)
    return y


def stored_matmul(x: Tensor, weight: Weight, bias: Tensor | None = None, bf16_matmul: bool = False) -> Tensor:
    """x W^T + bias: x (T, in) and W (out, in) in any stored form -> (T, out) in x's dtype; gradients to x and a trained W.

    `bf16_matmul`: bfloat16 inputs and float32 accumulation, on processors that have it (`kernels.has_bf16_matmul`).
    """
    if not torch.is_grad_enabled() and (not isinstance(weight, Tensor) or kernels.is_few_rows(x)):
        y = kernels.matmul(x, weight, bf16_matmul)
        return y if bias is None else y + bias.to(y.dtype)
    if isinstance(weight, Tensor):
        if weight.dtype == x.dtype and not kernels.has_fast_matmul(x, bf16_matmul):
            return F.linear(x, weight, bias)
        y = _StoredMatmul.apply(x, weight, None, bf16_matmul)
    else:
        y = _StoredMatmul.apply(x, None, weight, bf16_matmul)
    assert isinstance(y, Tensor)
    return y if bias is None else y + bias.to(y.dtype)


class Stored(nn.Module):
    """A weight in its stored form: the Parameter `weight` if dense, `compressed` if not."""

    weight: nn.Parameter | None

    def __init__(self, shape: tuple[int, ...], precision: Precision, *, transposed: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.precision: Precision = precision
        self.transposed = transposed  # the original module has this weight transposed
        self._form: Any = None
        self._split: tuple[str, ...] = ()  # tensors of the form that are parameters, split over ranks
        self.pieces: list[Piece] = []
        """This rank's rows of the weight, where it is split."""
        self.bf16_mixed = False  # the compute dtype is bf16-mixed
        self.bank: LinearBank | None = None
        self.register_parameter("weight", None)

    @property
    def dense(self) -> nn.Parameter | None:
        """The dense weight, or None; `weight` may be a handle that the model's own code reads."""
        return self._parameters["weight"]

    @property
    def compressed(self) -> Any:
        """The weight in a compressed form, or None."""
        return (
            replace(self._form, **{name: self._parameters[name] for name in self._split}) if self._split else self._form
        )

    @compressed.setter
    def compressed(self, value: Any) -> None:
        self._form = value

    @property
    def bf16_matmul(self) -> bool:
        """Whether the matmul is in bfloat16 in the current context."""
        if not self.bf16_mixed:
            return False
        active = context.active()
        return active is None or active.bf16_matmul

    @property
    def original_shape(self) -> tuple[int, ...]:
        """The weight's shape in the original module."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape

    def set_weight(self, original: Tensor | GgufBlocks) -> None:
        """Convert a weight in the original module's layout to the stored form; `gguf` stores what it is given.

        Replaces the old value; the largest temporary is one copy of the tensor. Raises ValueError for a wrong shape.
        """
        if isinstance(original, GgufBlocks):
            if self.transposed or original.shape != self.shape:
                raise ValueError(f"blocks of shape {original.shape}, expected {self.original_shape}")
            self.compressed = original
            return
        weight = original.detach()
        weight = weight.transpose(-1, -2) if self.transposed else weight
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, expected {self.shape}")
        if self.precision in ("int8", "nf4"):
            self.compressed = quantize(weight, self.precision)
        else:
            dense = quantize(weight, self.precision)
            assert isinstance(dense, Tensor)
            self.register_parameter("weight", nn.Parameter(dense.contiguous(), requires_grad=False))

    def split(self, ranks: Ranks, *, on_host: bool = False) -> None:
        """Keep this rank's rows of each stored tensor, or have them wait `on_host`; until `SplitWeights` gathers them, the
        weight has no values here."""
        if self.pieces:
            return
        value = self.value
        parts = {"weight": value} if isinstance(value, Tensor) else value.tensors()
        self.pieces = [
            Piece.of([self], name, part, ranks, on_host=on_host) for name, part in parts.items() if part.ndim
        ]
        if not isinstance(value, Tensor):
            self._form = replace(value, **{piece.name: piece.parameter.detach() for piece in self.pieces})
            self._split = tuple(piece.name for piece in self.pieces)

    @property
    def whole(self) -> Weight:
        """The weight as it is stored, of all ranks that share it: each of them asks for it."""
        value = self.value
        if isinstance(value, Tensor):
            return whole(value)
        return replace(value, **{name: whole(part) for name, part in value.tensors().items() if is_split(part)})

    def tie(self, other: Stored) -> None:
        """Share the weight of another module: these layers are tied."""
        self.compressed = other.compressed
        self.register_parameter("weight", other.dense)

    @property
    def value(self) -> Weight:
        """The weight as it is stored."""
        if self.dense is not None:
            return self.dense
        assert self.compressed is not None, "this weight was never loaded"
        return self.compressed

    def original(self, dtype: torch.dtype) -> Tensor:
        """The weight as a dense tensor in the original module's layout; of ranks that share it, each asks for it."""
        weight = dequantize(self.whole, dtype).detach()
        return weight.transpose(-1, -2).contiguous() if self.transposed else weight

    @property
    def device(self) -> torch.device:
        """Where its matmul runs."""
        value = self.value
        return gathered_on(value if isinstance(value, Tensor) else next(iter(value.tensors().values())))

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weight."""
        return nbytes(self.value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Stored:
        """Move compressed tensors with the module; their dtypes are part of the format and do not change."""
        super()._apply(fn, recurse)
        if self.compressed is not None and not self._split:
            probe = next(iter(self.compressed.tensors().values()))
            device = fn(probe.new_empty(0)).device
            if device != probe.device:
                self.compressed = self.compressed.to(device)
        return self


class StoredLinear(Stored):
    """y = x W^T + b with W (out, in) stored in any precision."""

    bias: nn.Parameter | None

    def __init__(
        self,
        shape: tuple[int, int],
        precision: Precision,
        bias: nn.Parameter | None = None,
        *,
        transposed: bool = False,
    ) -> None:
        super().__init__(shape, precision, transposed=transposed)
        self.out_features, self.in_features = shape
        self.shared_input: SharedInput | None = None
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor, bias: bool = True) -> Tensor:
        bank = self.bank  # another thread may detach it meanwhile
        value, added = self.value, self.bias if bias else None
        if (
            self.shared_input is not None
            and bank is not None
            and torch.is_grad_enabled()
            and kernels.groups_lora(x.device)
        ):
            y = self.shared_input.output_of(self, x)  # (T, out)
            if y is not None:
                y = y if added is None else y + added.to(y.dtype)
                return y.view(*x.shape[:-1], self.out_features)
        rows = x.reshape(-1, self.in_features)  # (T, in)
        y = stored_matmul(rows, value, added, self.bf16_matmul) if bank is None else bank(rows, self, value, added)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, {self.precision}"


class StoredStack(Stored):
    """The same linear layer of every expert of a mixture, W (experts, out, in)."""

    def __init__(self, shape: tuple[int, int, int], precision: Precision, *, transposed: bool = False) -> None:
        super().__init__(shape, precision, transposed=transposed)
        self.experts, self.out_features, self.in_features = shape

    def of_expert(self, expert: int, x: Tensor, token_indices: Tensor) -> Tensor:
        """x (t, in), the tokens of one expert, at the ascending `token_indices` (t,) of the micro-batch -> (t, out)."""
        weight = self.value[expert]
        bank = self.bank
        if bank is not None:
            return bank(x, self, weight, None, expert, token_indices)
        return stored_matmul(x, weight, None, self.bf16_matmul)

    def groups(self, x: Tensor) -> bool:
        """Whether `of_all` takes rows of x's dtype and device with this weight and the current adapters."""
        if self.dense is None or self.dense.dtype != x.dtype:
            return False
        fits = kernels.has_grouped_matmul(x, self.in_features, self.out_features)
        return fits and (self.bank is None or self.bank.groups(x))

    def of_all(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (S, in), rows of all experts sorted by expert, which end at `ends` (experts,) int32 -> (S, out)."""
        assert self.dense is not None
        bank = self.bank
        if bank is not None:
            return bank.of_all(x, self.dense, ends)
        return grouped_matmul(x, self.dense, ends)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, in={self.in_features}, out={self.out_features}, {self.precision}"


class WeightHandle:
    """Replaces a stored weight that a model's own code reads, and acts like a dense weight in the activation dtype.

    `F.linear(x, weight)` and `weight @ x` become calls of the stored linear, with its adapters and its gradient: routers
    multiply like that in their own forward, and Mamba's mixers with the weight of `dt_proj`. Any other operation gets the
    upcast weight without adapters. `dtype` is the activation dtype, since the model's code may cast its input to it.
    """

    def __init__(self, linear: StoredLinear, dtype: torch.dtype) -> None:
        self.linear, self.dtype = linear, dtype

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.linear.original_shape)

    @property
    def device(self) -> torch.device:
        return self.linear.device

    @property
    def tensor(self) -> Tensor:
        """The dense weight in the original module's layout; gradients flow to a trained weight."""
        weight = dequantize(self.linear.value, self.dtype)
        return weight.transpose(-1, -2) if self.linear.transposed else weight

    def to(self, *args: Any, **kwargs: Any) -> WeightHandle:
        """Returns the handle: casts happen in the matmul."""
        return self

    type = to

    def float(self) -> WeightHandle:
        return self

    def __matmul__(self, x: Tensor) -> Tensor:
        """W (out, in) with x (..., in, T) -> (..., out, T)."""
        if self.linear.transposed or x.ndim < 2:
            return self.tensor @ x
        return self.linear(x.transpose(-1, -2), bias=False).transpose(-1, -2)

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "linear":
            raise AttributeError(name)
        if name.endswith("_") and self.tensor is not self.linear.dense:
            raise TypeError(f"its code changes a stored weight in place ({name})")
        return getattr(self.tensor, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and len(args) >= 2 and isinstance(args[1], WeightHandle) and not args[1].linear.transposed:
            y = args[1].linear(args[0], bias=False)
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return y if bias is None else y + bias
        return func(*(_as_tensor(a) for a in args), **{key: _as_tensor(value) for key, value in kwargs.items()})


def _as_tensor(value: Any) -> Any:
    return value.tensor if isinstance(value, WeightHandle) else value
