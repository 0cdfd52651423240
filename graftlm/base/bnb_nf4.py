"""An NF4 weight in bitsandbytes' file format, which plain transformers loads bit-identically.

    X.weight                                     (ceil(n / 2), 1) uint8      two values a byte, the first in the high nibble
    X.weight.absmax                              (b,) uint8                  block scales, quantized again
    X.weight.nested_absmax                       (g,) float32                their scales
    X.weight.quant_map, .nested_quant_map        (16,), (256,) float32       the two codes
    X.weight.quant_state.bitsandbytes__nf4       (256,) uint8                JSON: shape, type, block sizes, offset

Letters: n values, b blocks of 64, g groups of 256 blocks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graftlm.base.safetensors_writer import TensorSpec
from graftlm.kernels import Nf4
from graftlm.kernels.reference import DYNAMIC_CODE, NF4_CODE
from graftlm.kernels.stored import BLOCK, GROUP

_STATE = 256  # bytes of the JSON, padded with spaces: a file's header has the sizes before the values are computed


def specs(name: str, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
    """Dtypes and shapes of the tensors that a file has for the weight `name` of (out, in)."""
    n = math.prod(shape)
    blocks = -(-n // BLOCK)
    return {
        name: TensorSpec(torch.uint8, (-(-n // 2), 1)),
        f"{name}.absmax": TensorSpec(torch.uint8, (blocks,)),
        f"{name}.nested_absmax": TensorSpec(torch.float32, (-(-blocks // GROUP),)),
        f"{name}.quant_map": TensorSpec(torch.float32, (16,)),
        f"{name}.nested_quant_map": TensorSpec(torch.float32, (256,)),
        f"{name}.quant_state.bitsandbytes__nf4": TensorSpec(torch.uint8, (_STATE,)),
    }


def tensors(name: str, weight: Nf4, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of `specs`; `dtype` is the dtype that transformers dequantizes the weight to."""
    state: dict[str, Any] = {
        "quant_type": "nf4", "blocksize": BLOCK, "dtype": str(dtype).removeprefix("torch."), "shape": list(weight.shape),
        "nested_blocksize": GROUP, "nested_dtype": "float32", "nested_offset": float(weight.offset),
    }  # fmt: skip
    text = json.dumps(state).encode().ljust(_STATE)
    assert len(text) == _STATE
    return {
        name: weight.packed[:, None],
        f"{name}.absmax": weight.absmax,
        f"{name}.nested_absmax": weight.absmax_scale,
        f"{name}.quant_map": NF4_CODE.float(),
        f"{name}.nested_quant_map": DYNAMIC_CODE.float(),
        f"{name}.quant_state.bitsandbytes__nf4": torch.frombuffer(bytearray(text), dtype=torch.uint8),
    }


def config(not_converted: list[str], compute_dtype: torch.dtype) -> Mapping[str, Any]:
    """The `quantization_config` for transformers; `not_converted` are the modules that are not in 4 bits."""
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": sorted(not_converted),
    }  # fmt: skip
