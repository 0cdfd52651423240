"""All layers of a decoder in one call (`layers.c`).

A `DecoderStack` describes a model of the Llama family once: pointers to its weights, norms, rotary tables and KV cache. `run`
then runs one forward pass of some rows through all layers. `serving/engine/native_decoder.py` verifies that a model is of
that family.

Letters: T rows, H heads, K key heads, D head width, P positions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftlm.kernels.native.gemm import Matrix, describe
from graftlm.kernels.native.library import address, calls
from graftlm.kernels.stored import Weight

_pointer, _long, _double = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
MOST_RANK = 256  # MOST_RANK of layers.c
MOST_BLOCK = 64  # MOST_BLOCK of layers.c


class _Linear(ctypes.Structure):
    """`struct linear` of layers.c."""

    _fields_ = (("weight", Matrix), ("bias", _pointer), ("out", _long), ("number", _long))


class _Layer(ctypes.Structure):
    """`struct layer` of layers.c."""

    _fields_ = (
        *((name, _pointer) for name in ("norm", "norm_again", "query_norm", "key_norm")),
        *((name, _Linear) for name in LINEARS),
        ("keys", _pointer), ("values", _pointer), ("scale", _double), ("softcap", _double), ("window", _long),
    )  # fmt: skip


class _Stack(ctypes.Structure):
    """`struct stack` of layers.c."""

    _fields_ = (
        *((n, _long) for n in ("layers", "width", "inner", "heads", "key_heads", "head_width", "rotary_dim", "block")),
        ("epsilon", _double), ("offset", _double), ("gelu", _long),
        *((name, _pointer) for name in ("last_norm", "cosine", "sine", "layer")),
    )  # fmt: skip


class _Pass(ctypes.Structure):
    """`struct pass` of layers.c."""

    _fields_ = (
        ("rows", _long), ("threads", _long), ("x", _pointer), ("position", _pointer), ("table", _pointer),
        ("table_stride", _long), ("routes", _long), ("ranges", _pointer), ("factors", _pointer),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DecoderLayer:
    """One layer: its norms' weights, its linear layers by name (`LINEARS`) each with its bias, its attention."""

    norm: Tensor  # (width,)
    norm_again: Tensor  # (width,)
    query_norm: Tensor | None  # (D,)
    key_norm: Tensor | None  # (D,)
    linears: Mapping[str, tuple[Weight, Tensor | None]]
    keys: Tensor  # (P, K, D) float32, in blocks
    values: Tensor  # (P, K, D)
    scale: float
    softcap: float = 0.0
    """0 for none."""
    window: int = 0
    """0 for none."""


class DecoderStack:
    """A model's layers. Linear layer `j` of layer `i` has number `7 i + j`, in the order of `LINEARS`."""

    def __init__(
        self, layers: Sequence[DecoderLayer], *, heads: int, block: int, epsilon: float, offset: float, gelu: bool,
        last_norm: Tensor, cosine: Tensor, sine: Tensor,
    ) -> None:  # fmt: skip
        """cosine and sine (P, rotary_dim); `block` positions of keys and values in a block; norms scale by w + offset."""
        assert block <= MOST_BLOCK
        self._alive: list[Any] = []
        self._layers = (_Layer * len(layers))()
        for i, (to, layer) in enumerate(zip(self._layers, layers)):
            to.norm, to.norm_again = self._values(layer.norm), self._values(layer.norm_again)
            to.query_norm, to.key_norm = self._values(layer.query_norm), self._values(layer.key_norm)
            for j, name in enumerate(LINEARS):
                weight, bias = layer.linears[name]
                linear = getattr(to, name)
                self._alive.append(describe(linear.weight, weight))
                linear.bias, linear.out, linear.number = self._values(bias), weight.shape[0], len(LINEARS) * i + j
            assert layer.keys.dtype == layer.values.dtype == torch.float32
            assert layer.keys.is_contiguous()
            assert layer.values.is_contiguous()
            self._alive += [layer.keys, layer.values]
            to.keys, to.values = address(layer.keys), address(layer.values)
            to.scale, to.softcap, to.window = layer.scale, layer.softcap, layer.window
        first = layers[0]
        self.width, self.positions = len(first.norm), len(cosine)
        self.numbers = len(LINEARS) * len(layers)
        self._stack = _Stack(
            layers=len(layers), width=self.width, inner=first.linears["gate"][0].shape[0], heads=heads,
            key_heads=first.keys.shape[1], head_width=first.keys.shape[2], rotary_dim=cosine.shape[1], block=block,
            epsilon=epsilon, offset=offset, gelu=int(gelu), last_norm=self._values(last_norm),
            cosine=self._values(cosine), sine=self._values(sine), layer=ctypes.addressof(self._layers),
        )  # fmt: skip

    def _values(self, tensor: Tensor | None) -> int | None:
        """The address of a tensor's values as contiguous float32, kept alive."""
        if tensor is None:
            return None
        values = tensor.detach().to(torch.float32).contiguous()
        self._alive.append(values)
        return address(values)

    def run(
        self, x: Tensor, positions: Tensor, table: Tensor, ranges: Sequence[int], factors: Sequence[AdapterTable]
    ) -> None:
        """x (T, width) float32, in place: embeddings -> states after the last norm; keys and values go into the cache.

        Row t is at positions[t] (T,) of the sequence whose blocks are table[t] (T, blocks), both int64. `ranges` are the
        first row, and one past the last, of every adapter in turn, and `factors` its table.
        """
        rows_of, tables = (_long * len(ranges))(*ranges), adapter_table([ctypes.addressof(f) for f in factors])
        given = _Pass(
            rows=len(x), threads=torch.get_num_threads(), x=address(x), position=address(positions),
            table=address(table), table_stride=table.stride(0), routes=len(factors),
            ranges=ctypes.addressof(rows_of), factors=ctypes.addressof(tables),
        )  # fmt: skip
        if calls().graft_layers(ctypes.addressof(self._stack), ctypes.addressof(given)):
            raise MemoryError(f"no memory for the states of {len(x)} rows")


AdapterTable = Any
"""An adapter's factors by linear layer: `(c_void_p * numbers)`, addresses of `Factors.at`, None for layers without it."""


def adapter_table(factors: Sequence[int | None]) -> AdapterTable:
    """An `AdapterTable` from the addresses of every linear layer's factors."""
    return (_pointer * len(factors))(*factors)
