"""Which sequence holds which block of the KV cache, which full blocks can be used again (prefix caching), and its size.

A full block is known by a hash over everything that its keys and values depend on: the adapter's digest and every token
from the text's beginning to the block's end. Never the adapter's name, which may mean another version tomorrow. A block
that no sequence holds keeps its hash and content until the memory is needed, least recently used first; a new text that begins
with the same tokens under the same adapter uses it again. The tensors are `base/kv_cache.py`'s.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from graftlm.base.kv_cache import LayerKVSpec, bytes_per_token
from graftlm.base.loading import Base
from graftlm.errors import ConfigError

BLOCK_TOKENS = 16
_MAX_CACHE_TOKENS = 1 << 20


def hash_block(before: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of a block from that of the one before it (or `hash_root`) and its tokens."""
    return hashlib.blake2b(array("q", tokens).tobytes(), key=before, digest_size=16).digest()


def hash_root(adapter: str) -> bytes:
    """What the hash of an adapter's first block begins with; `adapter` is a digest, empty for the base."""
    return hashlib.blake2b(adapter.encode(), digest_size=16).digest()


class BlockPool:
    """Counts the holders of each of `count` blocks of `size` tokens."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # registered, held by nobody, least recently used first

    @property
    def available(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self.count - self.available

    def find_cached_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """Hold the blocks of the longest cached beginning of a chain of hashes."""
        found: list[int] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            if self._holders[block] == 0:
                del self._idle[block]
            self._holders[block] += 1
            found.append(block)
        return found

    def allocate(self) -> int | None:
        """Hold a block without content, or None when all are held."""
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        else:
            return None
        self._holders[block] = 1
        return block

    def register(self, block: int, block_hash: bytes) -> None:
        """Make a full block findable; where another block has the same content already, this one stays unregistered."""
        if block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def free(self, blocks: Iterable[int]) -> None:
        """Give up blocks; a text's last blocks are evicted before its first ones."""
        for block in reversed(list(blocks)):
            self._holders[block] -= 1
            assert self._holders[block] >= 0
            if self._holders[block] == 0:
                if block in self._hash_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def reset_prefix_cache(self) -> None:
        """Evict every block that nobody holds."""
        for block in self._idle:
            del self._block_of[self._hash_of.pop(block)]
            self._free.append(block)
        self._idle.clear()


# ---- size --------------------------------------------------------------------------------------------------------------


def cache_tokens(base: Base, layers: dict[int, LayerKVSpec], max_num_seqs: int, gigabytes: float | None = None) -> int:
    """Tokens that the KV cache holds: as many as fit into `gigabytes` (10^9), or as `max_num_seqs` answers can need at
    their longest.

    The latter takes at most a quarter of the memory that is free now. `layers` are those of the base that have a paged KV
    cache; where there are none, the bytes of a token are not known. Raises ConfigError for less than two blocks.
    """
    token_bytes = bytes_per_token(layers, base.activation_dtype) if layers else 0
    tokens = min(max_num_seqs * (base.structure.max_positions or 4096), _MAX_CACHE_TOKENS)
    if token_bytes:
        limit = int(gigabytes * 1e9) if gigabytes else free_memory(base.device) // 4
        tokens = limit // token_bytes if gigabytes else min(tokens, limit // token_bytes)
    tokens = tokens // BLOCK_TOKENS * BLOCK_TOKENS
    if tokens < 2 * BLOCK_TOKENS:
        raise ConfigError(
            f"the KV cache has room for {tokens} tokens of {token_bytes:,} bytes each, and {2 * BLOCK_TOKENS} are the least; "
            "give more with --kv-cache-gb, or free memory"
        )
    return tokens


def free_memory(device: torch.device) -> int:
    """Bytes that nobody uses now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (ValueError, OSError):
        return 4 << 30
