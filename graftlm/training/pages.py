"""Pages of their own for large tensors, so that memory that is freed is free.

glibc keeps freed memory in a heap and cuts it up for what comes next; small objects settle in the gaps, and a gap of just a
tensor's size does not take the same tensor again, since its address has to be a multiple of 64. Where tensors are freed and
made again many times between others that stay, as when layers are run again in the backward pass, the heap grows to several
times what lives in it (measured: 577 MB where 231 MB lived). It also keeps up to 64 MB at its end. Gradients that are freed
one by one as the optimizer steps inside the backward pass leave the same gaps. Tensors with pages of their own give them back
at once; the system fills each new page with zeros for that, which costs time (a third more for a step of a 30M model), so it is
done where memory was asked for: with `--activation-checkpointing`, `--optimizer-in-backward`, and where a step's passes are
made small (`planning.activations.Load.mmap_allocations`).

LARGE_BYTES is small because weights of half a megabyte are not: with a limit of 1 MB the heap grew by 26 MB over four steps of
a 30M model that steps inside its backward pass, with 128 kB by 9 MB, with 64 or 32 kB not at all, at the same speed.
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


def release_memory() -> None:
    """Give what nobody uses any more back to the system: objects that refer to each other alone, and what the heap holds
    free, the gaps between living tensors too."""
    gc.collect()
    trim = glibc("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def mmap_allocations(wanted: bool) -> Iterator[bool]:
    """While open and `wanted`, blocks of LARGE_BYTES and more get pages of their own; yields whether they do."""
    set_option = glibc("mallopt") if wanted else None
    if set_option is None or not set_option(_MMAP_THRESHOLD, LARGE_BYTES):
        yield False
        return
    set_option(_TRIM_THRESHOLD, _KEPT_AT_THE_END)
    try:
        yield True
    finally:
        set_option(_MMAP_THRESHOLD, _HEAP_AGAIN)
        set_option(_TRIM_THRESHOLD, 2 * _HEAP_AGAIN)
