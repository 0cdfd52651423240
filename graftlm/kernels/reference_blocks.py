"""The quantized blocks of GGUF files in readable PyTorch, on any device: what `reference.py` is for the other forms.

Each kind is a scale d (float16), whole numbers q of 4 to 8 bits and, in some kinds, a lowest value m or dmin (float16):

    q4_0  q5_0  q8_0    d q                       32 values; q is signed
    q4_1  q5_1          d q + m                   32 values
    q4_k  q5_k          (d s) q - (dmin t)        256 values; s and t have 6 bits for each 32 values
    q6_k                (d s) q                   256 values; s has 8 bits for each 16 values, q is signed

The layouts are those of ggml's `ggml-common.h`. Every operation rounds once to float32, in the order in which
`gguf.quants` of the package gguf takes them, so the values are the same bits.

Letters: n blocks. A part is 32 values of a block: the whole of a small one, an eighth of a large one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graftlm.kernels.stored import BLOCK_SIZES, GgufBlocks

SLAB = 1 << 18  # values worked on at once: bounds temporaries to a few MiB whatever the weight's size


def blocks_dequantize(weight: GgufBlocks, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight as a dense tensor (..., out, in): each value computed in float32, then rounded once to `dtype`."""
    values, size = BLOCK_SIZES[weight.kind]
    out = torch.empty(weight.numel // values, values, dtype=dtype, device=weight.device)
    blocks = weight.data.reshape(-1, size)  # (n, bytes)
    step = SLAB // values
    for first in range(0, len(blocks), step):
        part = blocks[first : first + step]
        out[first : first + step] = _FORMULAS[weight.kind](part).view(len(part), values).to(dtype)
    return out.view(weight.shape)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block, as float32 (n, 1). Blocks have odd places in memory: no view would do."""
    bits = blocks[:, at].int() | blocks[:, at + 1].int() << 8
    return bits.to(torch.int16).view(torch.float16).float()[:, None]


def _nibbles(quants: Tensor, group: int) -> Tensor:
    """(n, bytes) -> (n, 2 bytes): of each `group` bytes first the low halves, then the high ones."""
    groups = quants.reshape(len(quants), -1, 1, group)
    return torch.cat([groups & 15, groups >> 4], dim=2).flatten(1)


def _fifth_bits(quants: Tensor) -> Tensor:
    """The bits of 4 bytes (n, 4), lowest first, each as 0 or 16 (n, 32)."""
    places = torch.arange(8, dtype=torch.uint8, device=quants.device)
    return ((quants[:, :, None] >> places & 1) << 4).flatten(1)


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:], 16).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:], 16).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * ((_nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])).float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * codes.float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].to(torch.int8).float()


def _scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """d s and dmin t of the 8 parts of q4_k and q5_k (n, 8, 1) each, from bytes 0 .. 16.

    Parts 0 to 3 have their 6 bits in one byte; of parts 4 to 7 the upper two are the upper two of those bytes.
    """
    low, high, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]  # (n, 4)
    s = torch.cat([low & 63, rest & 15 | low >> 2 & 48], dim=1)
    t = torch.cat([high & 63, rest >> 4 | high >> 2 & 48], dim=1)
    return (_half(blocks, 0) * s.float())[..., None], (_half(blocks, 2) * t.float())[..., None]


def _q4_k(blocks: Tensor) -> Tensor:
    scale, lowest = _scales(blocks)
    return scale * _nibbles(blocks[:, 16:], 32).view(-1, 8, 32).float() - lowest


def _q5_k(blocks: Tensor) -> Tensor:
    scale, lowest = _scales(blocks)
    places = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    fifth = (blocks[:, None, 16:48] >> places & 1) << 4  # (n, 8, 32): bit p of byte i belongs to value i of part p
    return scale * (_nibbles(blocks[:, 48:], 32).view(-1, 8, 32) | fifth).float() - lowest


def _q6_k(blocks: Tensor) -> Tensor:
    scale = (_half(blocks, 208) * blocks[:, 192:208].to(torch.int8).float())[..., None]  # (n, 16, 1)
    low = _nibbles(blocks[:, :128], 64).view(-1, 8, 32)
    places = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device)[:, None]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> places & 3  # (n, 2, 4, 32)
    codes = low | high.reshape(-1, 8, 32) << 4  # (n, 8, 32)
    return scale * (codes.float() - 32).view(-1, 16, 16)


_FORMULAS = {
    "q4_0": _q4_0, "q4_1": _q4_1, "q5_0": _q5_0, "q5_1": _q5_1, "q8_0": _q8_0, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k,
}  # fmt: skip


def sample_blocks(kind: str, *shape: int, device: torch.device | None = None) -> GgufBlocks:
    """Fixed blocks of every code, with scales of both signs, for checks: a weight of `shape`, its values below 40."""
    values, size = BLOCK_SIZES[kind]
    n = torch.Size(shape).numel() // values
    data = (torch.arange(n * size) * 2654435761 >> 13).to(torch.uint8).view(n, size)
    places = {"q4_0": (0,), "q5_0": (0,), "q8_0": (0,), "q6_k": (208,)}.get(kind, (0, 2))
    least = (2 if values == 32 else 64) * (16 if kind in ("q8_0", "q6_k") else 1)  # the codes' and the parts' sizes
    for i, at in enumerate(places):
        scale = torch.sin(torch.arange(n) * 0.7 + i) / least
        data[:, at : at + 2] = scale.half().view(torch.uint8).view(n, 2)
    return GgufBlocks(data.view(*shape[:-1], -1), kind).to(device or "cpu")
