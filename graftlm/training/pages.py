"""Pages of their own for large tensors, so that memory that is freed is free.

glibc keeps freed memory in a heap and cuts it up for what comes next; small objects settle in the gaps, and a gap of just a
tensor's size does not take the same tensor again, since its address has to be a multiple of 64. Where tensors are freed and
made again many times between others that stay, as when layers are run again in the backward pass, the heap grows to several
times what lives in it (measured: 577 MB where 231 MB lived). Tensors with pages of their own give them back at once; the
system fills each new page with zeros for that, which costs time, so it is done where memory was asked for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LARGE_BYTES = 1 << 20
_HEAP_AGAIN = 32 << 20  # what glibc itself raises its limit to, once large blocks have been freed
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # malloc.h


def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's function of that name; None with another C library."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  (only glibc has it)
        return library.mallopt
    except (OSError, AttributeError):
        return None


@contextmanager
def own_pages(wanted: bool) -> Iterator[bool]:
    """While open and `wanted`, blocks of LARGE_BYTES and more get pages of their own; yields whether they do."""
    set_option = _mallopt() if wanted else None
    if set_option is None or not set_option(_MMAP_THRESHOLD, LARGE_BYTES):
        yield False
        return
    try:
        yield True
    finally:
        set_option(_MMAP_THRESHOLD, _HEAP_AGAIN)
        set_option(_TRIM_THRESHOLD, 2 * _HEAP_AGAIN)
