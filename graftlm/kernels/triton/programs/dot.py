# pyright: basic
# (What `triton.jit` compiles looks like Python and is not: its values have no Python types.)
"""The matmul of two tiles, for all programs here."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(left, right, total, UPCAST: tl.constexpr):
    """total + left @ right, accumulated in float32. UPCAST is for Triton's interpreter, which has no bfloat16 matmul."""
    if UPCAST:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")
