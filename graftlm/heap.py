"""How memory that is freed goes back to the system, where the C library is glibc.

    mmap_allocations(...)   large tensors in mappings of their own, so that freed memory goes back at once
    trim_heap()             what the heap holds free, the gaps between living tensors too
    release_memory()        the same, and objects that only refer to each other

**mmap-backed allocations.** glibc keeps freed memory in a heap and cuts it up for what comes next; small objects settle
in the gaps, and a gap of just a tensor's size does not take the same tensor again, since its address has to be a
multiple of 64. Where tensors are freed and made again many times between others that stay, as when activations are
recomputed in the backward pass, the heap grows to several times what lives in it (measured: 577 MB where 231 MB lived).
It also keeps up to 64 MB at its end. Gradients that are freed one by one as the optimizer steps inside the backward
pass leave the same gaps. A tensor with a mapping of its own gives its pages back at once; the system fills each new
page with zeros for that, which costs time (a third more for a step of a 30M model), so it is done where memory was
asked for: with `--activation-checkpointing`, `--optimizer-in-backward`, and where micro-batches are made small
(`planning/activations.py`); and while weights are read, each of which is wide for a moment before it is stored (SmolLM2 in nf4:
412 MB on the heap, 153 MB in mappings).

LARGE_BYTES is small because weights of half a megabyte are not: with a limit of 1 MB the heap grew by 26 MB over four steps of
a 30M model that steps inside its backward pass, with 128 kB by 9 MB, with 64 or 32 kB not at all, at the same speed.

Reading a tokenizer of 262,144 tokens leaves 330 MB of freed memory in the heap, so loading a base trims it.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LARGE_BYTES = 1 << 16
_KEPT_AT_THE_END = 1 << 20  # free bytes that the heap may keep behind its last block
_HEAP_AGAIN = 32 << 20  # what glibc itself raises its limit to, once large blocks have been freed
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # malloc.h


def glibc(name: str) -> Callable[..., int] | None:
    """One of glibc's own functions; None with another C library."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  (only glibc has it)
        return library[name]
    except (OSError, AttributeError):
        return None


def trim_heap() -> None:
    """Give what the heap holds free back to the system, the gaps between living tensors too."""
    trim = glibc("malloc_trim")
    if trim is not None:
        trim(0)


def release_memory() -> None:
    """Give what nobody uses any more back to the system, objects that only refer to each other included."""
    gc.collect()
    trim_heap()


_open = 0  # uses of `mmap_allocations` at this moment


@contextmanager
def mmap_allocations(wanted: bool) -> Iterator[bool]:
    """While open and `wanted`, blocks of LARGE_BYTES and more are mmap-backed; yields whether they are. Uses may nest."""
    global _open
    set_option = glibc("mallopt") if wanted else None
    if set_option is None or not set_option(_MMAP_THRESHOLD, LARGE_BYTES):
        yield False
        return
    set_option(_TRIM_THRESHOLD, _KEPT_AT_THE_END)
    _open += 1
    try:
        yield True
    finally:
        _open -= 1
        if not _open:
            set_option(_MMAP_THRESHOLD, _HEAP_AGAIN)
            set_option(_TRIM_THRESHOLD, 2 * _HEAP_AGAIN)
