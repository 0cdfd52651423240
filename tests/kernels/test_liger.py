"""liger-kernel as we call it: its functions' parameters, and our side of the calls run in Triton's interpreter on the CPU.

The interpreter knows no functions of NVIDIA's library: the two that liger takes from it are replaced by their definitions.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed (pip install graftlm[gpu])"
)

# What we give by place, in this order, and how many further parameters must have defaults.
CALLS = {
    "rms_norm": {
        "rms_norm_forward": ["X", "W", "eps", "offset", "casting_mode", "row_mode"],
        "rms_norm_backward": [
            "dY", "X", "W", "RSTD", "offset", "casting_mode", "BLOCK_SIZE", "num_warps", "in_place", "row_mode", "needs_dw",
        ],
    },
    "swiglu": {"swiglu_forward": ["a", "b"], "swiglu_backward": ["a", "b", "dc"]},
    "geglu": {"geglu_forward": ["a", "b"], "geglu_backward": ["a", "b", "dc"]},
    "rope": {"rope_forward": ["q", "k", "cos", "sin"], "rope_backward": ["dq", "dk", "cos", "sin"]},
    "utils": {"calculate_settings": ["n"]},
}  # fmt: skip


@pytest.mark.parametrize("module", CALLS)
def test_ligers_functions_take_what_we_give_them_by_place(module: str) -> None:
    found = importlib.import_module(f"liger_kernel.ops.{module}")
    for name, given in CALLS[module].items():
        parameters = list(inspect.signature(getattr(found, name)).parameters.values())
        assert [p.name for p in parameters[: len(given)]] == given
        assert all(p.default is not p.empty for p in parameters[len(given) :]), name
    if module == "rms_norm":
        assert {"llama", "gemma"} <= set(found._str_to_casting_mode)


def test_every_operation_through_liger_gives_the_references_answer_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "all agree" in done.stdout


def interpret() -> None:
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import geglu, rms_norm
    from triton.runtime import interpreter

    converted = interpreter._implicit_cvt

    def convert(argument: object) -> object:
        """A program's argument; a float is a float32 of the GPU, which the interpreter leaves a float of Python's."""
        if not isinstance(argument, float):
            return converted(argument)
        return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)

    def rsqrt(x: object) -> object:
        return tl.rsqrt(x)

    def tanh(x: object) -> object:
        return 2 * tl.sigmoid(2 * x) - 1  # type: ignore[operator]

    rms_norm.rsqrt, geglu.tanh, interpreter._implicit_cvt = rsqrt, tanh, convert
    import torch

    from graftlm.kernels import liger

    cpu = torch.device("cpu")
    assert liger.self_check.allows("fused", cpu), liger.self_check.reason
    print("all agree")


if __name__ == "__main__":
    interpret()
