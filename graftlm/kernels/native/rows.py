"""Decoding in C (`rows.c`): matmul of few rows with a dense weight, routed adapters, attention of single tokens.

A row's result does not depend on the other rows of the batch, since the order of summation is fixed for each row.

Letters: x (rows, in), W (out, in), y (rows, out), A (r, in), B (out, r); n tokens, H heads, K key-value heads, D head width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graftlm.kernels import reference
from graftlm.kernels.native.library import TWO_TYPES, address, calls
from graftlm.kernels.routing import Routing
from graftlm.kernels.self_check import close, sample

_pointer, _long, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
MOST_ROWS = 16  # up to here reading the weight once is faster than a blocked matmul (measured)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `dense` supports x (rows, in) and W (out, in): few float32 rows, W contiguous in 32 or 16 bits."""
    return (
        len(x) <= MOST_ROWS
        and x.dtype == torch.float32
        and weight.dtype in TWO_TYPES
        and weight.is_contiguous()
        and x.stride(1) == 1
    )


def dense(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, in) float32 times W (out, in) in 32 or 16 bits, transposed -> (rows, out) float32."""
    rows, inner = x.shape
    y = torch.empty(rows, len(weight))
    calls().graft_dense_rows(
        address(weight), TWO_TYPES[weight.dtype], len(weight), inner, address(x), x.stride(0), rows, address(y),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


class _Factors(ctypes.Structure):
    """`struct factors` of rows.c."""

    _fields_ = (
        ("A", _pointer), ("B", _pointer), ("rank", _long), ("scale", ctypes.c_double), ("a_type", _long), ("b_type", _long),
    )  # fmt: skip


class Factors:
    """One adapter's A (r, in), B (out, r) and scale on one layer, in C's form.

    `ready` says whether C supports them: on a CPU, in 32 or 16 bits, with B transposed in memory, (r, out).
    """

    def __init__(self, A: Tensor, B: Tensor, scale: float) -> None:
        self.A, self.B, self.scale = A, B, scale  # kept alive
        known = A.dtype in TWO_TYPES and B.dtype in TWO_TYPES and A.device.type == "cpu"
        self.ready = known and A.is_contiguous() and B.T.is_contiguous()
        if self.ready:
            self._struct = _Factors(address(A), address(B), len(A), scale, TWO_TYPES[A.dtype], TWO_TYPES[B.dtype])
            self.at = ctypes.addressof(self._struct)


class DecodeRouting:
    """Ranges of rows (first, one past the last), each with its factors; all of them `ready`."""

    def __init__(self, ranges: Sequence[tuple[int, int]], factors: Sequence[Factors]) -> None:
        self.ranges, self.factors = ranges, factors
        count = len(ranges)
        self._ranges = (_long * (2 * count))(*(row for both in ranges for row in both))
        self._factors = (_pointer * count)(*(f.at for f in factors))

    @property
    def routing(self) -> Routing:
        """The same for the routed kernels of training."""
        ranges = [(i, first, last) for i, (first, last) in enumerate(self.ranges)]
        return Routing(
            ranges, [f.A for f in self.factors], [f.B for f in self.factors], [f.scale for f in self.factors]
        )

    def add(self, y: Tensor, x: Tensor) -> None:
        """y (rows, out) += scale (x A^T) B^T in each range; both float32, y's rows end to end."""
        if calls().graft_routed_rows(
            self._ranges, self._factors, len(self.ranges), x.shape[1], y.shape[1], address(x), x.stride(0), address(y),
            torch.get_num_threads(),
        ):  # fmt: skip
            raise MemoryError(f"no memory for the low-rank states of {len(x)} rows")


class _AttentionStruct(ctypes.Structure):
    """`struct attention` of rows.c."""

    _fields_ = (
        ("tokens", _long), ("row", _pointer), ("visible", _pointer), ("table", _pointer), ("table_stride", _long),
        ("block", _long), ("heads", _long), ("key_heads", _long), ("width", _long), ("value_width", _long),
        ("query_row", _long), ("query_head", _long), ("scale", ctypes.c_double), ("softcap", ctypes.c_double),
        ("window", _long),
    )  # fmt: skip


class DecodeAttention:
    """The single tokens of a step: their rows of q, the number of tokens each attends to, their blocks; int64.

    `rows` (n,), `visible` (n,) with the token itself, `table` (n, most blocks), `block` positions in each block; `lengths` are
    the numbers in `visible`, for code that must not read them from a GPU.
    """

    def __init__(self, rows: Tensor, visible: Tensor, table: Tensor, block: int, lengths: Sequence[int] = ()) -> None:
        self.rows, self.visible, self.table, self.block = rows, visible, table.contiguous(), block  # kept alive
        self.lengths = lengths
        self.kept: dict[Any, Any] = {}  # what `gpu_attention` made for one layer and needs for the next
        self._struct: Any = _AttentionStruct(
            tokens=len(rows), row=address(rows), visible=address(visible), table=address(self.table),
            table_stride=self.table.shape[1], block=block,
        )  # fmt: skip
        self._at = ctypes.addressof(self._struct)

    def answer(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        scale: float,
        window: int,
        softcap: float,
    ) -> None:
        """out[rows] (T, H, V) = attention of q[rows] (T, H, D) over keys (positions, K, D) and values (positions, K, V).

        All float32, `out`, keys and values end to end. `window` 0 and `softcap` 0 mean none.
        """
        struct = self._struct
        struct.heads, struct.width, struct.query_row, struct.query_head = (
            q.shape[1],
            q.shape[2],
            q.stride(0),
            q.stride(1),
        )
        struct.key_heads, struct.value_width = keys.shape[1], values.shape[2]
        struct.scale, struct.window, struct.softcap = scale, window, softcap
        if calls().graft_attend_rows(
            self._at, address(q), address(keys), address(values), address(out), torch.get_num_threads()
        ):
            raise MemoryError(f"no memory for the scores of {len(self.rows)} tokens")


# ---- the check before first use -----------------------------------------------------------------------------------


def check() -> bool:
    """Whether all three give the reference's results here, on odd shapes and both dtypes."""

    W, x = sample(13, 331), sample(11, 331)
    good = all(close(dense(x[:n], w), x[:n] @ w.float().T) for n in (1, 11) for w in (W, W.bfloat16()))
    y, expected = sample(11, 29), sample(11, 29)
    uses = [(a, b, sample(r, 331).to(t), sample(r, 29).to(t).T, 0.3) for a, b, r, t in
            ((0, 1, 5, torch.float32), (2, 11, 35, torch.bfloat16))]  # fmt: skip
    DecodeRouting([use[:2] for use in uses], [Factors(*use[2:]) for use in uses]).add(y, x)
    for first, last, A, B, scale in uses:
        expected[first:last] += scale * (x[first:last] @ A.float().T @ B.float().T)
    good = good and close(y, expected)
    q, keys, values = sample(4, 6, 21), sample(5 * 7, 3, 21), sample(5 * 7, 3, 19)
    rows, visible, table = torch.tensor([3, 0]), torch.tensor([17, 4]), torch.tensor([[2, 0, 3], [4, 1, 1]])
    for window, softcap in ((0, 0.0), (9, 0.0), (0, 1.5)):
        out, expected = torch.zeros(4, 6, 19), torch.zeros(4, 6, 19)
        DecodeAttention(rows, visible, table, 7).answer(q, keys, values, out, 0.4, window, softcap)
        reference.attend_rows(
            q, keys, values, expected, rows=rows, visible=visible, table=table, block=7, scale=0.4, window=window,
            softcap=softcap,
        )  # fmt: skip
        good = good and close(out, expected)
    return good
