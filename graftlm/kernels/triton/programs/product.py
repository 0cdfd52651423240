# pyright: basic
# (What `triton.jit` compiles looks like Python and is not: its values have no Python types.)
"""A product of two tiles, as every program here takes it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(left, right, total, WIDEN: tl.constexpr):
    """total + left @ right, summed in float32. Triton's interpreter knows no bfloat16 product: WIDEN for it."""
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")
