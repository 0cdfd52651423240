# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# (What `triton.jit` compiles looks like Python and is not: its values have no Python types.)
"""Cross entropy of a row of logits, which become their own gradient where they lie: read twice, written once, never copied."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def in_place(logits, stride, labels, weights, losses, columns, GRADIENT: tl.constexpr, TILE: tl.constexpr):
    """losses (rows,) = -log softmax(logits)[label]; logits (rows, columns) = weight * (softmax - onehot) where GRADIENT.

    The maximum and the sum of exponentials are found in one pass (Milakov and Gimelshein 2018).
    """
    row = tl.program_id(0).to(tl.int64)
    begin = logits + row * stride
    label = tl.load(labels + row)
    most, total = -3.4028234e38, 0.0
    for first in range(0, columns, TILE):
        at = first + tl.arange(0, TILE)
        x = tl.load(begin + at, mask=at < columns, other=float("-inf")).to(tl.float32)
        new = tl.maximum(most, tl.max(x, 0))
        total = total * tl.exp(most - new) + tl.sum(tl.exp(x - new), 0)
        most = new
    tl.store(losses + row, most + tl.log(total) - tl.load(begin + label).to(tl.float32))
    if GRADIENT:
        weight = tl.load(weights + row)
        tl.debug_barrier()  # the label's logit is read before it is overwritten
        for first in range(0, columns, TILE):
            at = first + tl.arange(0, TILE)
            x = tl.load(begin + at, mask=at < columns, other=0.0).to(tl.float32)
            slope = tl.exp(x - most) / total - tl.where(at == label, 1.0, 0.0)
            tl.store(begin + at, slope * weight, mask=at < columns)
