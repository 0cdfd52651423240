# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# (What `triton.jit` compiles looks like Python and is not: its values have no Python types.)
"""LoRA's dropout in one pass over memory; `counter_rng.py` has the hash that decides what is kept."""

from __future__ import annotations

import triton
import triton.language as tl

from graftlm.kernels.triton.programs.adamw import mix


@triton.jit(do_not_specialize=["module_key", "threshold"])
def dropped(x, row_stride, keys, out, features, module_key, threshold, scale, TILE: tl.constexpr):
    """out (rows, features) = x (rows, features) times `scale` where it is kept, times 0 elsewhere; keys (rows,) int32."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < features
    key = tl.load(keys + row).to(tl.uint32, bitcast=True)
    columns = mix(column.to(tl.uint32)) ^ module_key.to(tl.uint32)
    words = mix(mix(key) ^ mix(columns))
    factor = tl.where(words.to(tl.int32, bitcast=True) >= threshold, scale, 0.0)
    value = tl.load(x + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * features + column, value * factor, mask=inside)
