"""Counter-based random numbers, without the state of a generator.

A number is a hash of its use: (trial seed, draw, position, module, feature). So resuming needs no saved state, and the order of
computation, the split into micro-batches and other trials do not matter. `mix` is Wellons'
`lowbias32` (https://nullprogram.com/blog/2018/07/31/), a bijection of 32-bit words with an avalanche bias of 0.17.
"""

from __future__ import annotations

import hashlib

import torch

_M1, _M2 = 0x7FEB352D, 0x846CA68B - (1 << 32)  # the second one as a signed 32-bit word


def hash_words(*words: int | str) -> int:
    """A 31-bit number from any integers and strings; stable over versions and machines."""
    text = "\x1f".join(str(word) for word in words).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little") >> 1


def mix(words: torch.Tensor) -> torch.Tensor:
    """Hash every 32-bit word of an int32 tensor of any shape; torch's int32 product wraps, its shift is arithmetic."""
    words = words ^ ((words >> 16) & 0xFFFF)
    words = words * _M1
    words = words ^ ((words >> 15) & 0x1FFFF)
    words = words * _M2
    return words ^ ((words >> 16) & 0xFFFF)


_WORDS = 1 << 15  # of a mask at once on a processor: 128 kB, which its caches hold


def keep_mask(token_keys: torch.Tensor, module_key: int, features: int, dropout: float) -> torch.Tensor:
    """The dropout mask, boolean (tokens, features); each feature is kept with probability 1 - dropout.

    `token_keys` (tokens,) int32 identify the tokens, `module_key` the layer.
    """
    # Hashed before the layer's key is combined: if it were added first, layers with close keys would share columns.
    columns = mix(torch.arange(features, dtype=torch.int32, device=token_keys.device)) ^ (module_key & 0x7FFFFFFF)
    words = mix(mix(token_keys)[:, None] ^ mix(columns)[None, :])  # (tokens, features)
    return words >= threshold(dropout)


def threshold(dropout: float) -> int:
    """The least signed 32-bit word that is kept."""
    return int(dropout * (1 << 32)) - (1 << 31)


def dropped(x: torch.Tensor, token_keys: torch.Tensor, module_key: int, dropout: float) -> torch.Tensor:
    """x (tokens, in) -> drop(x) (tokens, in): what `keep_mask` keeps times 1 / (1 - dropout), the rest 0."""
    out = torch.empty_like(x)
    # A few tokens at a time: whole, the mask's words are larger than x, and leave gaps in the heap between what stays.
    few = max(1, _WORDS // max(1, x.shape[1])) if x.device.type == "cpu" else max(1, len(x))
    for keys, part, to in zip(token_keys.split(few), x.split(few), out.split(few)):
        mask = keep_mask(keys, module_key, x.shape[1], dropout)
        torch.mul(part, mask.to(x.dtype) * (1.0 / (1.0 - dropout)), out=to)
    return out


def uniform_words(count: int, *key: int | str, first: int = 0, device: torch.device | None = None) -> torch.Tensor:
    """`count` 32-bit words for a key, from number `first` on, (count,) int32."""
    start, turn = word_keys(*key)
    index = torch.arange(first, first + count, dtype=torch.int64, device=device)
    return mix(mix((index + start).to(torch.int32)) ^ turn)


def word_keys(*key: int | str) -> tuple[int, int]:
    """The number that `uniform_words` adds to a word's index (modulo 2^32), and the one that it XORs with its hash."""
    return hash_words(*key) * 0x9E3779B1, hash_words("words", *key)


def uniform(shape: tuple[int, ...], *key: int | str) -> torch.Tensor:
    """Numbers in [0, 1) for a key, float32 of `shape`, 24 random bits each."""
    count = 1
    for n in shape:
        count *= n
    words = uniform_words(count, *key)
    return (((words >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24).reshape(shape)
