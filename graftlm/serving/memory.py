"""Memory planned before anything is asked: for how many tokens keys and values are kept, and how much is free for adapters."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from graftlm.base.kv_cache import LayerKVSpec, bytes_per_token
from graftlm.base.loading import Base
from graftlm.errors import ConfigError
from graftlm.serving.engine.engine import BLOCK

_MOST_TOKENS = 1 << 20


def cache_tokens(base: Base, kept: dict[int, LayerKVSpec], max_num_seqs: int, gigabytes: float | None = None) -> int:
    """Tokens whose keys and values there is room for: `gigabytes` (10^9), or what `max_num_seqs` answers can need at
    their longest.

    The latter takes at most a quarter of the memory that is free now. `kept` is what the layers of the base keep in blocks;
    where it is empty, what a token takes is not known. Raises ConfigError for less than two blocks.
    """
    a_token = bytes_per_token(kept, base.activation_dtype) if kept else 0
    tokens = min(max_num_seqs * (base.structure.max_positions or 4096), _MOST_TOKENS)
    if a_token:
        tokens = int(gigabytes * 1e9) // a_token if gigabytes else min(tokens, free_memory(base.device) // 4 // a_token)
    tokens = tokens // BLOCK * BLOCK
    if tokens < 2 * BLOCK:
        raise ConfigError(
            f"there is room for the keys and values of {tokens} tokens, each of which takes {a_token:,} bytes; "
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
