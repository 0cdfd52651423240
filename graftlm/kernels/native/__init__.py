"""The C kernels behind the reference's functions: loading them, checking them once, calling them without a copy.

The library is plain C reached through ctypes, which releases the interpreter lock while it runs. It takes the tables
of `reference.py` when it is loaded, so there is one truth about the codes; it runs on PyTorch's own OpenMP threads, as
many as `torch.get_num_threads()` says.

Products come in three kinds. For a few rows of x the codes are decoded in registers and never written down. For more,
our own matrix product (`gemm.py`) decodes them as it packs, where it pays; elsewhere a panel of W is made dense in a
scratch that stays in the cache and goes to PyTorch's product at once, so that the whole of dense W never exists.

Each operation is compared with the reference on a small odd shape before its first use (`trust.py`). `usable` is false,
with one warning for the process, when the library is missing, does not load, or gives another answer.

Letters: x (rows, in), W (out, in), y (rows, out), dy (rows, out), dx (rows, in).
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from graftlm.kernels import reference, reference_adamw
from graftlm.kernels.moments import Moments
from graftlm.kernels.native import adamw, fused, gemm
from graftlm.kernels.native import attention as segment_attention
from graftlm.kernels.native import rows as few_rows
from graftlm.kernels.stored import BLOCK, GROUP, Int8, Nf4, Stored, Weight
from graftlm.kernels.trust import Trust

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum float_type in kernels.h
FEW_ROWS = 16  # up to here the codes are decoded once for every 8 rows; beyond, panels are faster
PANEL_BYTES, PANEL_BYTES_FOR_MANY = 8 << 20, 16 << 20  # of dense W at once, for fewer than MANY_ROWS and for more
MANY_ROWS = 512
LARGE_BYTES = 16 << 20  # results from here on will not be found in a cache, and deserve large pages

VERSION = 2  # graft_version() of the library this file knows how to call

_pointer, _long, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "graft_version": (_int, []),
    "graft_openmp": (None, [_pointer]),
    "graft_name": (ctypes.c_char_p, [_int]),
    "graft_init": (_int, [_pointer, _pointer, _pointer, _pointer, _int]),
    "graft_nf4_dequantize": (None, [_pointer] * 4 + [_long] * 4 + [_pointer, _int, _int, _int]),
    "graft_nf4_quantize": (None, [_pointer, _int, _long, _pointer, _pointer, _int]),
    "graft_absmax_quantize": (None, [_pointer, _long, _pointer, _pointer, _pointer, _int]),
    "graft_nf4_matvec": (_int, [_pointer] * 4 + [_long] * 3 + [_pointer, _long, _long, _pointer, _int]),
    "graft_int8_dequantize": (None, [_pointer, _pointer] + [_long] * 3 + [_pointer, _int, _int, _int]),
    "graft_int8_matvec": (None, [_pointer, _pointer, _long, _long, _pointer, _long, _long, _pointer, _int]),
    "graft_huge_pages": (None, [_pointer, _long]),
    **gemm.SIGNATURES,
    **segment_attention.SIGNATURES,
    **adamw.SIGNATURES,
    **fused.SIGNATURES,
    **few_rows.SIGNATURES,
}


def _openmp_of_torch() -> int:
    """The address of GOMP_parallel in the OpenMP library that PyTorch has loaded, or 0."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return 0
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "libgomp" in line}
    for path in sorted(paths, key=lambda path: "torch" not in path):
        try:
            function = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, _pointer).value or 0
    return 0


class _Library:
    """The loaded library and its chosen instruction set, or the reason why there is none."""

    def __init__(self) -> None:
        self.calls: ctypes.CDLL | None = None
        self.reason = ""
        self.instructions = ""
        self.multiplies = False  # whether our matrix product beats PyTorch's here
        self.narrows = False  # whether it has instructions for bfloat16
        try:
            names = [Path(__file__).with_name(f"_kernels{suffix}") for suffix in EXTENSION_SUFFIXES]
            found = [path for path in names if path.exists()]
            if not found:
                raise OSError("they were not compiled when this package was installed (was there a C compiler?)")
            calls = ctypes.CDLL(str(found[0]))
            if calls.graft_version() != VERSION:
                raise OSError(f"{found[0].name} was compiled from other sources (install the package again)")
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(calls, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            self.reason = str(error)
            return
        self.calls = calls
        calls.graft_openmp(_openmp_of_torch() or None)
        self.choose(-1)

    def choose(self, choice: int) -> None:
        """Use instruction set `choice`; -1 for the widest one this machine has."""
        assert self.calls is not None
        tables = (reference.NF4_CODE, reference.NF4_MIDPOINTS, reference.DYNAMIC_CODE, reference.DYNAMIC_BINS)
        chosen = self.calls.graft_init(*(table.data_ptr() for table in tables), choice)
        self.instructions = self.calls.graft_name(chosen).decode()
        self.narrows = self.instructions == "AVX-512" and bool(self.calls.graft_gemm_narrow())
        self.multiplies = self.instructions == "AVX-512" and self.calls.graft_gemm_level() > 1


_library: _Library | None = None
_loading = threading.Lock()


def _get() -> _Library:
    global _library
    if _library is None:
        with _loading:
            if _library is None:
                _library = _Library()
    return _library


def status() -> str:
    """Which instruction set is used, or why none is."""
    library = _get()
    reason = library.reason or trust.reason
    return f"PyTorch without C kernels: {reason}" if reason else f"C kernels ({library.instructions})"


def instruction_sets() -> list[str]:
    """The sets this machine can run, from plain to wide; the last one is used."""
    calls = _get().calls
    names = [calls.graft_name(choice) for choice in range(3)] if calls is not None else []
    return [name.decode() for name in names if name is not None]


def choose(name: str | None) -> None:
    """Use the instruction set `name` of `instruction_sets()`, or None for the widest again (tests and benchmarks)."""
    _get().choose(-1 if name is None else instruction_sets().index(name))


def usable(operation: str, tensor: Tensor) -> bool:
    """Whether `operation` may run here on `tensor`: on a CPU, in a float type we know, compiled, and checked."""
    if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype not in TYPES):
        return False
    return trust.allows(operation, tensor.device)


def _calls() -> ctypes.CDLL:
    calls = _get().calls
    assert calls is not None, "usable() is asked first"
    return calls


def calls() -> ctypes.CDLL:
    """The library itself, for what `usable` has allowed."""
    return _calls()


def _result(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, bool]:
    """Where to write a dense weight, and whether to write past the caches.

    A large result of our own asks the system for large pages, and is written normally: the system has just filled those
    pages with zeros, in the caches. One that was given to us has its pages already.
    """
    if out is None:
        out = torch.empty(shape, dtype=dtype)
        if out.nbytes >= LARGE_BYTES:
            _calls().graft_huge_pages(out.data_ptr(), out.nbytes)
        return out, False
    if tuple(out.shape) != shape or not out.is_contiguous():
        raise ValueError(f"out must be contiguous and of shape {shape}; it has shape {tuple(out.shape)}")
    return out, out.nbytes >= LARGE_BYTES


def multiplies(x: Tensor, narrow: bool = False) -> bool:
    """Whether products of these rows, x (rows, in), are taken with our own `gemm.c` rather than PyTorch's.

    Those in float32 where that is faster, `narrow` ones wherever the processor has instructions for them.
    """
    if x.dtype != torch.float32 or x.ndim != 2 or len(x) <= FEW_ROWS or x.device.type != "cpu":
        return False
    library = _get()
    return (library.multiplies or (narrow and library.narrows)) and trust.allows("gemm", x.device)


def narrows() -> bool:
    """Whether this processor multiplies in bfloat16 and sums in float32, about twice as fast as in float32."""
    return _get().narrows and trust.allows("gemm", torch.device("cpu"))


def attends(q: Tensor) -> bool:
    """Whether attention over these heads, q (T, H, D), runs in C."""
    return segment_attention.fits(q) and trust.allows("attention", q.device)


def attention(q: Tensor, k: Tensor, v: Tensor, ends: Sequence[int], scale: float, window: int) -> tuple[Tensor, Tensor]:
    return segment_attention.attention(_calls(), q, k, v, ends, scale, window)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    ends: Sequence[int],
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return segment_attention.attention_backward(_calls(), dout, q, k, v, out, sums, ends, scale, window)


# ---- quantize and dequantize --------------------------------------------------------------------------------------


def nf4_quantize(weight: Tensor) -> Nf4:
    flat = weight.detach().reshape(-1).contiguous()  # (n,)
    n = flat.numel()
    blocks = -(-n // BLOCK)
    packed = torch.empty(-(-n // 2), dtype=torch.uint8)
    largest = torch.empty(blocks, dtype=torch.float32)
    calls, threads = _calls(), torch.get_num_threads()
    calls.graft_nf4_quantize(flat.data_ptr(), TYPES[flat.dtype], n, packed.data_ptr(), largest.data_ptr(), threads)
    offset = largest.mean() if blocks else torch.zeros(())
    absmax = torch.empty(blocks, dtype=torch.uint8)
    scale = torch.empty(-(-blocks // GROUP), dtype=torch.float32)
    calls.graft_absmax_quantize(
        largest.data_ptr(), blocks, offset.data_ptr(), absmax.data_ptr(), scale.data_ptr(), threads
    )
    return Nf4(packed, absmax, scale, offset, tuple(weight.shape))


def _nf4_pointers(weight: Nf4) -> tuple[int, int, int, int]:
    return (
        weight.packed.data_ptr(),
        weight.absmax.data_ptr(),
        weight.absmax_scale.data_ptr(),
        weight.offset.data_ptr(),
    )


def _dequantize_into(out: Tensor, weight: Stored, row: int = 0, column: int = 0, stream: bool = False) -> None:
    """W[row : row + rows, column : column + columns] into the contiguous `out` (rows, columns)."""
    rows, columns = out.shape
    inner = weight.shape[-1]
    first = row * inner + column
    to = (out.data_ptr(), TYPES[out.dtype], int(stream), torch.get_num_threads())
    if isinstance(weight, Nf4):
        _calls().graft_nf4_dequantize(*_nf4_pointers(weight), weight.start + first, rows, inner, columns, *to)
    else:
        values, scale = weight.values.data_ptr() + first, weight.scale.data_ptr() + 4 * row
        _calls().graft_int8_dequantize(values, scale, rows, inner, columns, *to)


def nf4_dequantize(weight: Nf4, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    out, stream = _result(out, weight.shape, dtype)
    _dequantize_into(out.view(1, -1), weight.view(1, weight.numel), stream=stream)
    return out


def int8_dequantize(weight: Int8, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    out, stream = _result(out, weight.shape, dtype)
    if weight.numel:
        rows = Int8(weight.values.flatten(0, -2).contiguous(), weight.scale.flatten().contiguous())
        _dequantize_into(out.flatten(0, -2), rows, stream=stream)
    return out


# ---- products -----------------------------------------------------------------------------------------------------


def _product_type(dtype: torch.dtype) -> torch.dtype:
    """The type products are taken in: most CPUs multiply 16-bit matrices more slowly than float32 ones (measured)."""
    return dtype if dtype == torch.bfloat16 and _has_bfloat16_tiles() else torch.float32


def _has_bfloat16_tiles() -> bool:
    check: Callable[[], bool] = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return bool(check())


def _contiguous(weight: Stored) -> Stored:
    return weight if isinstance(weight, Nf4) else Int8(weight.values.contiguous(), weight.scale.contiguous())


def _panel(length: int, other: int, rows: int, dtype: torch.dtype) -> int:
    """How much of the dimension that is summed over, `length`, one panel covers: equal panels, in whole blocks."""
    size = PANEL_BYTES if rows < MANY_ROWS else PANEL_BYTES_FOR_MANY
    most = max(size // (max(other, 1) * dtype.itemsize), BLOCK)
    panels = max(math.ceil(length / most), 1)
    return max(math.ceil(length / panels / BLOCK), 1) * BLOCK


def matmul(x: Tensor, weight: Weight, narrow: bool = False) -> Tensor:
    """x (..., in) -> x @ W.T (..., out)."""
    outer, inner = weight.shape
    rows = x.reshape(-1, inner)  # (rows, in)
    if not rows.numel() or not outer:
        return x.new_zeros(*x.shape[:-1], outer)
    if multiplies(rows, narrow):
        y = gemm.multiply(_calls(), [(rows, weight, True)], narrow=narrow)  # (rows, out)
    elif isinstance(weight, Tensor) and few_rows.fits(rows, weight) and trust.allows("rows", x.device):
        y = few_rows.dense(_calls(), rows, weight)
    elif isinstance(weight, Tensor):
        y = reference.matmul(rows, weight)
    else:
        weight = _contiguous(weight)
        y = _matvec(rows, weight) if len(rows) <= FEW_ROWS else _matmul_panels(rows, weight)
    # A view made inside an autograd function may not be added to in place, and some models do.
    return y if x.ndim == 2 else y.view(*x.shape[:-1], outer)


def _matvec(x: Tensor, weight: Stored) -> Tensor:
    outer, inner = weight.shape
    dtype, x = x.dtype, x.float()  # (rows, in)
    if x.stride(1) != 1:
        x = x.contiguous()
    y = torch.empty(len(x), outer)  # (rows, out) float32
    of_x = (x.data_ptr(), x.stride(0), len(x), y.data_ptr(), torch.get_num_threads())
    if isinstance(weight, Nf4):
        if _calls().graft_nf4_matvec(*_nf4_pointers(weight), weight.start, outer, inner, *of_x):
            raise MemoryError(f"no memory for a copy of x {tuple(x.shape)}")
    else:
        _calls().graft_int8_matvec(weight.values.data_ptr(), weight.scale.data_ptr(), outer, inner, *of_x)
    return y.to(dtype)


def _matmul_panels(x: Tensor, weight: Stored) -> Tensor:
    outer, inner = weight.shape
    dtype = _product_type(x.dtype)
    dense_x = x.to(dtype)  # (rows, in)
    step = _panel(inner, outer, len(x), dtype)
    scratch = torch.empty(outer * min(step, inner), dtype=dtype)
    y = torch.empty(len(x), outer, dtype=dtype)
    for first in range(0, inner, step):
        count = min(step, inner - first)
        panel = scratch[: outer * count].view(outer, count)
        _dequantize_into(panel, weight, 0, first)
        y.addmm_(dense_x[:, first : first + count], panel.T, beta=1.0 if first else 0.0)
    return y.to(x.dtype)


def matmul_t(dy: Tensor, weight: Weight, narrow: bool = False) -> Tensor:
    """dy (..., out) -> dy @ W (..., in)."""
    outer, inner = weight.shape
    rows = dy.reshape(-1, outer)  # (rows, out)
    if not rows.numel() or not inner:
        return dy.new_zeros(*dy.shape[:-1], inner)
    if multiplies(rows, narrow):
        dx = gemm.multiply(_calls(), [(rows, weight, False)], narrow=narrow)  # (rows, in)
    elif isinstance(weight, Tensor):
        dx = reference.matmul_t(rows, weight)
    else:
        dx = _matmul_t_panels(rows, _contiguous(weight))
    return dx if dy.ndim == 2 else dx.view(*dy.shape[:-1], inner)


def _matmul_t_panels(dy: Tensor, weight: Stored) -> Tensor:
    outer, inner = weight.shape
    dtype = _product_type(dy.dtype)
    rows = dy.to(dtype)  # (rows, out)
    step = _panel(outer, inner, len(rows), dtype)
    scratch = torch.empty(min(step, outer), inner, dtype=dtype)
    dx = torch.empty(len(rows), inner, dtype=dtype)
    for first in range(0, outer, step):
        count = min(step, outer - first)
        _dequantize_into(scratch[:count], weight, first, 0)
        dx.addmm_(rows[:, first : first + count], scratch[:count], beta=1.0 if first else 0.0)
    return dx.to(dy.dtype)


def weight_gradient(dy: Tensor, x: Tensor, narrow: bool = False) -> Tensor:
    """dy (rows, out), x (rows, in) -> dy^T x (out, in)."""
    return gemm.multiply(_calls(), [(dy.T, x, False)], narrow=narrow)


def low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y (tokens, out) += scale * (x A^T) B^T in place; returns scale * x A^T (tokens, r) for the backward."""
    h = gemm.multiply(_calls(), [(x, A, True)], alpha=scale)
    gemm.multiply(_calls(), [(h, B, True)], out=y, add=True)
    return h


def low_rank_backward(
    dy: Tensor, x: Tensor, h: Tensor, A: Tensor, B: Tensor, scale: float, dx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of `low_rank` to A (r, in) and B (out, r); the one to x is added to `dx`."""
    calls = _calls()
    dh = gemm.multiply(calls, [(dy, B, False)], alpha=scale)  # (tokens, r)
    if dx is not None:
        gemm.multiply(calls, [(dh, A, False)], out=dx, add=True)
    return gemm.multiply(calls, [(dh.T, x, False)]), gemm.multiply(calls, [(dy.T, h, False)])


def adapted(
    x: Tensor, weight: Weight, A: Tensor, B: Tensor, scale: float, narrow: bool = False
) -> tuple[Tensor, Tensor]:
    """x W^T + scale * (x A^T) B^T (rows, out) in one pass over the result, and scale * x A^T for the backward."""
    h = gemm.multiply(_calls(), [(x, A, True)], alpha=scale)  # (rows, r)
    return gemm.multiply(_calls(), [(x, weight, True), (h, B, True)], narrow=narrow), h


def adapted_backward(
    dy: Tensor,
    x: Tensor,
    weight: Weight,
    h: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    wants_dx: bool,
    narrow: bool = False,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients of `adapted` to x (rows, in), A (r, in) and B (out, r)."""
    calls = _calls()
    dh = gemm.multiply(calls, [(dy, B, False)], alpha=scale)  # (rows, r)
    dx = gemm.multiply(calls, [(dy, weight, False), (dh, A, False)], narrow=narrow) if wants_dx else None
    return dx, gemm.multiply(calls, [(dh.T, x, False)]), gemm.multiply(calls, [(dy.T, h, False)])


# ---- what decoding runs on ----------------------------------------------------------------------------------------


def few(x: Tensor) -> bool:
    """Whether x (rows, in) has so few rows that `rows.c` multiplies them with a dense weight fastest."""
    return (
        len(x) <= few_rows.MOST_ROWS
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and trust.allows("rows", x.device)
    )


def add_routed(y: Tensor, x: Tensor, routes: few_rows.Routes) -> bool:
    """y (rows, out) += each range's low-rank product, if C can take them; returns whether it did."""
    if x.dtype != torch.float32 or x.stride(1) != 1 or not trust.allows("rows", x.device):
        return False
    routes.add(_calls(), y, x)
    return True


def attend_rows(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    of: few_rows.Attention,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    of.answer(_calls(), q, keys, values, out, scale, window, softcap)


# ---- the optimizer ------------------------------------------------------------------------------------------------


def adamw_step(parameter: Tensor, gradient: Tensor, moments: Moments, update: reference_adamw.Update) -> None:
    adamw.step(_calls(), parameter, gradient, moments, update)


def sum_of_squares(tensor: Tensor) -> Tensor:
    return adamw.sum_of_squares(_calls(), tensor)


# ---- the check before first use -----------------------------------------------------------------------------------


def _sample(*shape: int) -> Tensor:
    """Fixed values of both signs and many sizes, without touching any generator's state."""
    n = math.prod(shape)
    return (torch.arange(n, dtype=torch.float32).mul_(0.7).sin_() * torch.arange(n).remainder(97).add(1)).view(shape)


def _same(a: Nf4, b: Nf4) -> bool:
    return all(torch.equal(tensor, b.tensors()[name]) for name, tensor in a.tensors().items())


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).norm() <= 1e-5 * b.norm()).item())


def _check_nf4_quantize(_: torch.device) -> bool:
    weight = _sample(37, 1001)
    return all(_same(nf4_quantize(w), reference.nf4_quantize(w)) for w in (weight, weight.bfloat16(), weight.half()))


def _check_nf4_dequantize(_: torch.device) -> bool:
    weight = reference.nf4_quantize(_sample(37, 1001))
    parts = (weight, weight.narrow(3, 7))
    return all(
        torch.equal(nf4_dequantize(part, dtype), reference.nf4_dequantize(part, dtype))
        for part in parts
        for dtype in TYPES
    )


def _check_int8_dequantize(_: torch.device) -> bool:
    weight = reference.int8_quantize(_sample(13, 77))
    return all(torch.equal(int8_dequantize(weight, t), reference.int8_dequantize(weight, t)) for t in TYPES)


def _check_matmul(_: torch.device) -> bool:
    dense = _sample(13, 331)
    weights = (
        reference.nf4_quantize(dense),
        reference.nf4_quantize(dense).narrow(3, 5),
        reference.int8_quantize(dense),
    )
    xs = (_sample(1, 331), _sample(FEW_ROWS - 1, 331), _sample(FEW_ROWS + 1, 331))
    return all(_close(matmul(x, w), reference.matmul(x, w)) for x in xs for w in weights)


def _check_matmul_t(_: torch.device) -> bool:
    dense = _sample(13, 331)
    weights = (reference.nf4_quantize(dense), reference.int8_quantize(dense))
    return all(_close(matmul_t(_sample(5, 13), w), reference.matmul_t(_sample(5, 13), w)) for w in weights)


def _check_gemm(_: torch.device) -> bool:
    """Edges of every panel, each kind of weight in both orientations, two terms, and narrow operands."""
    calls, x = _calls(), _sample(53, 331)
    dense = _sample(77, 331)
    weights: tuple[Weight, ...] = (
        dense,
        dense.bfloat16(),
        reference.nf4_quantize(dense),
        reference.nf4_quantize(dense).narrow(3, 50),
        reference.int8_quantize(dense),
    )
    good = all(
        _close(gemm.multiply(calls, [(x, w, True)]), reference.matmul(x, w))
        and _close(gemm.multiply(calls, [(_sample(53, w.shape[0]), w, False)]), _sample(53, w.shape[0]) @ _wide(w))
        for w in weights
    )
    narrow = gemm.multiply(calls, [(x, dense, True), (x[:, :5], dense[:, :5], True)], alpha=0.5)
    turned = gemm.multiply(calls, [(x.T, dense[:53], False)], out=torch.ones(331, 331), add=True)
    return (
        good
        and _close(narrow, 0.5 * (x @ dense.T + x[:, :5] @ dense[:, :5].T))
        and _close(turned, 1 + x.T @ dense[:53])
    )


def _check_attention(_: torch.device) -> bool:
    """Lengths around the lanes of a register, shared heads, strides, a window."""
    ends, scale = (0, 1, 18, 53), 0.2
    q, k, v, dout = (_sample(heads, 53, 32).transpose(0, 1) / 97 for heads in (4, 2, 2, 4))
    for window in (0, 5):
        out, sums = attention(q, k, v, ends, scale, window)
        truth, kept = reference.attention(q, k, v, ends, scale, window)
        found = attention_backward(dout, q, k, v, out, sums, ends, scale, window)
        wanted = reference.attention_backward(dout, q, k, v, truth, kept, ends, scale, window)
        if not (_close(out, truth) and _close(sums, kept) and all(_close(a, b) for a, b in zip(found, wanted))):
            return False
    return True


def _wide(weight: Weight) -> Tensor:
    return weight.float() if isinstance(weight, Tensor) else reference.dequantize(weight)


def new_trust() -> Trust:
    """A record of checks in which none has run yet."""
    return Trust(
        "C kernels",
        lambda: _get().reason,
        {
            "nf4_quantize": _check_nf4_quantize,
            "nf4_dequantize": _check_nf4_dequantize,
            "int8_dequantize": _check_int8_dequantize,
            "matmul": _check_matmul,
            "matmul_t": _check_matmul_t,
            "gemm": _check_gemm,
            "attention": _check_attention,
            "fused": lambda _: fused.check(_calls()),
            "adamw_step": lambda _: adamw.agrees(_calls()),
            "sum_of_squares": lambda _: adamw.sums_agree(_calls()),
            "rows": lambda _: few_rows.check(_calls()),
        },
    )


trust = new_trust()
