"""Memory that is freed goes back to the system; each case in a process of its own, for a heap has a past."""

from __future__ import annotations

import subprocess
import sys

import pytest

from graftlm.heap import glibc

CASE = """
import sys
import torch
from graftlm.planning.peak_memory import process_memory
from graftlm.heap import mmap_allocations, release_memory

torch.ones(3 << 20)  # freed: glibc has seen a block of 12 MB, and smaller ones share a heap from now on
before = process_memory()
with mmap_allocations(sys.argv[1] in ("own", "nested")):
    if sys.argv[1] == "nested":
        with mmap_allocations(True):
            pass
    tensors = [torch.ones(350_000) for _ in range(120)]  # 1.4 MB each
    full = process_memory() - before
    kept = tensors[1::8]
    del tensors
    if sys.argv[1] == "given back":
        release_memory()
    print(full, process_memory() - before)
"""
ALL, KEPT = 120 * 1.4e6, 15 * 1.4e6


def used_memory(how: str) -> tuple[int, int]:
    """Bytes with all tensors alive, and with every eighth."""
    done = subprocess.run([sys.executable, "-c", CASE, how], capture_output=True, text=True, check=True)
    full, rest = done.stdout.split()
    return int(full), int(rest)


@pytest.mark.skipif(glibc("mallopt") is None, reason="another C library than glibc")
@pytest.mark.parametrize("how", ["own", "nested", "given back"])
def test_memory_of_freed_tensors_is_free(how: str) -> None:
    full, rest = used_memory(how)
    assert full == pytest.approx(ALL, rel=0.1)
    assert rest == pytest.approx(KEPT, rel=0.25)


@pytest.mark.skipif(glibc("mallopt") is None, reason="another C library than glibc")
def test_without_asking_the_heap_keeps_the_gaps() -> None:
    _, rest = used_memory("not")
    assert rest > 0.7 * ALL
