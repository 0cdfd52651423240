"""One tensor of a GGUF file under its checkpoint name: blocks as they are, or a dense tensor in the file's own type.

llama.cpp's own order of rows is undone on whole rows of blocks (`gguf/layout.py`), which changes no value.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from graftlm.gguf.folder import BLOCKS
from graftlm.gguf.header import GgufFile
from graftlm.gguf.layout import GgufLayout
from graftlm.kernels import GgufBlocks

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def read_tensor(file: GgufFile, layout: GgufLayout, name: str, place: str) -> Tensor | GgufBlocks:
    """The tensor at `place` under its checkpoint `name`, with the checkpoint's order of rows and the checkpoint's values.

    Block types give GgufBlocks (out, in), the others a dense tensor of the file's type. The values are this process's own.
    """
    tensor, data = file.tensors[place], file.bytes_of(place)
    kind, rows = tensor.type.name, tensor.shape[0]
    stored = torch.from_numpy(np.array(layout.rows_from_gguf(name, data.reshape(rows, -1))))
    if kind in BLOCKS:
        return GgufBlocks(stored.view(*tensor.shape[:-1], -1), kind)
    dense = stored.view(_DTYPES[kind]).view(tensor.shape)
    offset = layout.norm_offset(name)
    return dense - offset if offset else dense
