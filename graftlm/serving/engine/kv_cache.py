"""Who holds which block of the key-value store, and which full blocks can be used again.

A full block is named by a hash over everything that its keys and values depend on: the adapter's digest and every token
from the text's beginning to the block's end. Never the adapter's name, which may mean another version tomorrow. A block
whose last holder has left keeps its name and content until the memory is wanted, least recently used first; a new text
that begins with the same tokens under the same adapter takes it up again.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def chain(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a block from the name of the one before it (or of its adapter) and its tokens."""
    return hashlib.blake2b(array("q", tokens).tobytes(), key=before, digest_size=16).digest()


def root(adapter: str) -> bytes:
    """Where the names of an adapter's blocks begin; `adapter` is a digest, empty for the base."""
    return hashlib.blake2b(adapter.encode(), digest_size=16).digest()


class BlockPool:
    """Counts the holders of each of `count` blocks of `size` tokens."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._named: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # named, held by nobody, least recently used first

    @property
    def available(self) -> int:
        """Blocks that can be taken now."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self.count - self.available

    def find(self, names: Iterable[bytes]) -> list[int]:
        """Hold the blocks of the longest known beginning of a chain of names."""
        found: list[int] = []
        for name in names:
            block = self._named.get(name)
            if block is None:
                break
            if self._holders[block] == 0:
                del self._idle[block]
            self._holders[block] += 1
            found.append(block)
        return found

    def take(self) -> int | None:
        """Hold a block without a name, or None when all are held."""
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            del self._named[self._names.pop(block)]
        else:
            return None
        self._holders[block] = 1
        return block

    def name(self, block: int, name: bytes) -> None:
        """Say what a full block holds; another block may be known for the same already, then this one stays without."""
        if name not in self._named and block not in self._names:
            self._named[name] = block
            self._names[block] = name

    def leave(self, blocks: Iterable[int]) -> None:
        """Give up blocks; the last tokens' blocks are forgotten before the first ones'."""
        for block in reversed(list(blocks)):
            self._holders[block] -= 1
            assert self._holders[block] >= 0
            if self._holders[block] == 0:
                if block in self._names:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def forget(self) -> None:
        """Forget the content of every block that nobody holds."""
        for block in self._idle:
            del self._named[self._names.pop(block)]
            self._free.append(block)
        self._idle.clear()
