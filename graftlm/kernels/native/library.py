"""Load the compiled C library with ctypes, and choose its instruction set.

ctypes releases the interpreter lock during calls. The library gets the code tables of `reference.py` when it is loaded, and
runs on PyTorch's own OpenMP threads. If it is missing or does not load, `get().reason` says why, and `self_check.py` warns
once.
"""

from __future__ import annotations

import ctypes
import os
import threading
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from graftlm.kernels import reference
from graftlm.kernels.stored import BLOCK_SIZES

VERSION = 3  # graft_version() of the library this file knows how to call
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum float_type in kernels.h
TWO_TYPES = {torch.float32: 0, torch.bfloat16: 1}  # the same, for operations that know no float16
BLOCK_KINDS = {kind: 4 + i for i, kind in enumerate(BLOCK_SIZES)}  # enum matrix_kind in kernels.h

_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "graft_version": (_int, []),
    "graft_openmp": (None, [_pointer]),
    "graft_name": (ctypes.c_char_p, [_int]),
    "graft_init": (_int, [_pointer, _pointer, _pointer, _pointer, _int]),
    "graft_huge_pages": (None, [_pointer, _long]),
    # weights.py
    "graft_nf4_dequantize": (None, [_pointer] * 4 + [_long] * 4 + [_pointer, _int, _int, _int]),
    "graft_nf4_quantize": (None, [_pointer, _int, _long, _pointer, _pointer, _int]),
    "graft_absmax_quantize": (None, [_pointer, _long, _pointer, _pointer, _pointer, _int]),
    "graft_int8_dequantize": (None, [_pointer, _pointer] + [_long] * 3 + [_pointer, _int, _int, _int]),
    # stored_matmul.py
    "graft_nf4_matvec": (_int, [_pointer] * 4 + [_long] * 3 + [_pointer, _long, _long, _pointer, _int]),
    "graft_int8_matvec": (None, [_pointer, _pointer, _long, _long, _pointer, _long, _long, _pointer, _int]),
    # blocks.py
    "graft_blocks_dequantize": (None, [_pointer, _int] + [_long] * 4 + [_pointer, _int, _int]),
    "graft_blocks_matvec": (None, [_pointer, _int] + [_long] * 2 + [_pointer] + [_long] * 2 + [_pointer, _int]),
    # gemm.py
    "graft_gemm_level": (_int, []),
    "graft_gemm_choose": (_int, [_int]),
    "graft_gemm_narrow": (_int, []),
    "graft_gemm": (_int, [_long] * 2 + [_pointer, _int] + [_pointer] * 3 + [_long, _float, _int, _int]),
    # attention.py
    "graft_attention": (_int, [_pointer, _int]),
    # rows.py
    "graft_dense_rows": (None, [_pointer, _int, _long, _long, _pointer, _long, _long, _pointer, _int]),
    "graft_routed_rows": (_int, [_pointer, _pointer] + [_long] * 3 + [_pointer, _long, _pointer, _int]),
    "graft_attend_rows": (_int, [_pointer] * 5 + [_int]),
    # layers.py
    "graft_layers": (_int, [_pointer, _pointer]),
    # fused.py
    "graft_norm": (None, [_pointer, _pointer, _float, _float, _long, _long, _pointer, _pointer, _int, _int]),
    "graft_norm_back": (None, [_pointer] * 3 + [_float, _pointer, _long, _long] + [_pointer] * 3 + [_int, _int]),
    "graft_gate": (None, [_pointer] * 2 + [_long] * 3 + [_pointer, _int, _int, _int]),
    "graft_gate_back": (None, [_pointer] * 3 + [_long] * 3 + [_pointer] * 2 + [_long, _int, _int, _int]),
    "graft_rotary": (None, [_pointer] + [_long] * 4 + [_pointer] * 2 + [_long, _int, _int, _int]),
    "graft_cross_entropy": (_int, [_pointer, _long, _long] + [_pointer] * 3 + [_int, _int]),
    # adamw.py
    "graft_adamw": (None, [_pointer, _int, _int]),
    "graft_sum_parts": (_long, [_long]),
    "graft_sum_of_squares": (ctypes.c_double, [_pointer, _int, _long, _pointer, _int, _int]),
}

_HELD = {"default": 0, "avx2": 1}
"""Values of ATEN_CPU_CAPABILITY, by which PyTorch is held to narrower instructions than the processor has: so are we."""


def address(tensor: Tensor) -> int:
    """Where C finds a tensor's values. ValueError for one whose values are not in this process's memory: a DTensor, of which
    each rank has a part, a parameter that is gathered for a pass alone, a tensor on the meta device."""
    place = tensor.data_ptr()
    if not place and tensor.numel():
        raise ValueError(
            f"a {type(tensor).__name__} of shape {tuple(tensor.shape)} on {tensor.device} has no values here that C could read"
        )
    return place


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


class Library:
    """The loaded library and its chosen instruction set, or the reason why there is none."""

    def __init__(self) -> None:
        self.calls: ctypes.CDLL | None = None
        self.reason = ""
        self.instructions = ""
        self.has_fast_matmul = False  # whether our matmul is faster than PyTorch's here
        self.has_bf16_matmul = False  # whether it has instructions for bfloat16
        self.widest = -1  # the choice that stands for the widest
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
        self.widest = _HELD.get(os.environ.get("ATEN_CPU_CAPABILITY", ""), -1)
        calls.graft_gemm_choose(self.widest)
        self.choose(-1)

    def choose(self, choice: int) -> None:
        """Use instruction set `choice`; -1 for the widest one that this machine has and PyTorch is allowed."""
        assert self.calls is not None
        choice = self.widest if choice < 0 else choice
        tables = (reference.NF4_CODE, reference.NF4_MIDPOINTS, reference.DYNAMIC_CODE, reference.DYNAMIC_BINS)
        chosen = self.calls.graft_init(*(address(table) for table in tables), choice)
        self.instructions = self.calls.graft_name(chosen).decode()
        self.has_bf16_matmul = self.instructions == "AVX-512" and bool(self.calls.graft_gemm_narrow())
        pays = {2: "AVX-512", 3: "AVX2"}  # by level: see gemm.c
        level = self.calls.graft_gemm_level()
        self.has_fast_matmul = pays.get(3 if level == 2 and self.widest == 1 else level) == self.instructions


_library: Library | None = None
_loading = threading.Lock()


def get() -> Library:
    """The library of this process, loaded at the first call."""
    global _library
    if _library is None:
        with _loading:
            if _library is None:
                _library = Library()
    return _library


def calls() -> ctypes.CDLL:
    """The library's functions, for an operation that `native.usable` has allowed."""
    calls = get().calls
    assert calls is not None, "usable() is asked first"
    return calls


def instruction_sets() -> list[str]:
    """The sets this machine can run, from plain to wide; the last one is used."""
    calls = get().calls
    names = [calls.graft_name(choice) for choice in range(3)] if calls is not None else []
    return [name.decode() for name in names if name is not None]


def choose(name: str | None) -> None:
    """Use the instruction set `name` of `instruction_sets()`, or None for the widest again (tests and benchmarks)."""
    get().choose(-1 if name is None else instruction_sets().index(name))
