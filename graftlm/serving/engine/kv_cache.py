"""Which sequence holds which block of the KV cache, which full blocks can be used again (prefix caching), and its size.

A full block is known by a hash over everything that its keys and values depend on: the adapter's digest and every token
from the text's beginning to the block's end. Never the adapter's name, which may mean another version tomorrow. A block
that no sequence holds keeps its hash and content until the memory is needed, least recently used first; a new text that begins
with the same tokens under the same adapter uses it again. The tensors are `base/kv_cache.py`'s.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from graftlm.base.kv_cache import LayerKVSpec, bytes_per_token
from graftlm.base.loading import Base
from graftlm.errors import ConfigError
from graftlm.planning.hardware import free_machine_memory

BLOCK_TOKENS = 16
USUAL_TOKENS = 1024
"""Tokens of a usual text, prompt and answer: a processor's KV cache has room for one in every batch slot by default."""
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


CacheLimit = Literal["given", "longest", "usual", "free"]


@dataclass(frozen=True)
class CacheSize:
    """How many tokens the KV cache holds, and what decided that."""

    tokens: int
    longest: int
    """Tokens of the longest text that may be in it."""
    limit: CacheLimit
    """`given`: by an option. `longest`: all sequences at their longest. `usual`: texts of usual length. `free`: memory."""

    def __str__(self) -> str:
        texts = self.tokens // self.longest
        room = f"{self.tokens:,} tokens, {texts} {'text' if texts == 1 else 'texts'} of the longest, {self.longest:,}"
        if self.limit == "longest":
            return f"{self.tokens:,} tokens, all of them at their longest"
        if self.limit == "given":
            return room
        return f"{room}{', a quarter of the free memory' if self.limit == 'free' else ''}; --kv-cache-gb gives it more or less"


def cache_size(
    base: Base, layers: dict[int, LayerKVSpec], max_num_seqs: int, *, gigabytes: float | None = None,
    usual_tokens: int | None = None,
) -> CacheSize:  # fmt: skip
    """The size of the KV cache: what fits into `gigabytes` (10^9), else what `max_num_seqs` texts of `usual_tokens` take.

    One text of the model's longest has room at least; without `usual_tokens`, all have. The default takes a quarter of the
    memory that is free now at most. `layers` are those of the base that have a paged KV cache; where there are none, the
    bytes of a token are not known. Raises ConfigError for less than two blocks.
    """
    token_bytes = bytes_per_token(layers, base.activation_dtype) if layers else 0
    longest = base.structure.max_positions or 4096
    tokens = min(max_num_seqs * longest, _MAX_CACHE_TOKENS)
    if usual_tokens is not None:
        tokens = min(tokens, max(longest, max_num_seqs * usual_tokens))
    limit: CacheLimit = "longest" if tokens == max_num_seqs * longest else "usual"
    if token_bytes:
        room = int(gigabytes * 1e9 if gigabytes else free_memory(base.device) // 4) // token_bytes
        if gigabytes or room < tokens:
            tokens, limit = room, "given" if gigabytes else "free"
    tokens = tokens // BLOCK_TOKENS * BLOCK_TOKENS
    if tokens < 2 * BLOCK_TOKENS:
        raise ConfigError(
            f"the KV cache has room for {tokens} tokens of {token_bytes:,} bytes each, and {2 * BLOCK_TOKENS} are the least; "
            "give more with --kv-cache-gb, or free memory"
        )
    return CacheSize(tokens, min(longest, tokens), limit)


def free_memory(device: torch.device) -> int:
    """Bytes that nobody uses now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_machine_memory()
