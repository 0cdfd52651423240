"""Attention within segments in C (`attention.c`), forward and backward, for float32 heads whose width is a multiple of 16.

Letters: T tokens, H heads, K key-value heads, D head width, n segments.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from graftlm.kernels import reference
from graftlm.kernels.native.library import address, calls
from graftlm.kernels.self_check import close, sample

_LONGS = (
    "q_token", "q_head", "k_token", "k_head", "v_token", "v_head", "dout_token", "dout_head", "heads", "kv_heads", "width",
    "segments", "window",
)  # fmt: skip


class Job(ctypes.Structure):
    """`struct graft_attention_call` of kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "dout")),
        *((name, ctypes.c_int64) for name in _LONGS),
        *((name, ctypes.c_void_p) for name in ("ends", "out", "log_sums", "dq", "dk", "dv")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int),
    )


def fits(q: Tensor) -> bool:
    """Whether the C code supports these heads, q (T, H, D)."""
    return q.dtype == torch.float32 and q.device.type == "cpu" and q.shape[-1] % 16 == 0


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _job(
    q: Tensor, k: Tensor, v: Tensor, ends: Sequence[int], scale: float, window: int
) -> tuple[Job, Sequence[object]]:
    """The part of the call that forward and backward share, and the tensors that must stay alive until it returns."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    places = (ctypes.c_int64 * len(ends))(*ends)
    job = Job(
        q=address(q), k=address(k), v=address(v), heads=q.shape[1], kv_heads=k.shape[1], width=q.shape[2],
        q_token=q.stride(0), q_head=q.stride(1), k_token=k.stride(0), k_head=k.stride(1), v_token=v.stride(0),
        v_head=v.stride(1), ends=ctypes.addressof(places), segments=len(ends) - 1, scale=scale, window=window,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    return job, (q, k, v, places)


def _run(job: Job, back: bool) -> None:
    if calls().graft_attention(ctypes.addressof(job), int(back)):
        raise MemoryError(f"no memory for the attention of {job.segments} segments")


def attention(q: Tensor, k: Tensor, v: Tensor, ends: Sequence[int], scale: float, window: int) -> tuple[Tensor, Tensor]:
    """q (T, H, D), k and v (T, K, D) -> out (T, H, D), and of each query the logarithm of its sum (T, H)."""
    job, alive = _job(q, k, v, ends, scale, window)
    out, sums = q.new_empty(q.shape), q.new_empty(q.shape[:2])
    job.out, job.log_sums = address(out), address(sums)
    _run(job, False)
    del alive
    return out, sums


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, ends: Sequence[int],
    scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients to q (T, H, D), k and v (T, K, D)."""
    job, alive = _job(q, k, v, ends, scale, window)
    dout = _rows(dout)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    job.dout, job.dout_token, job.dout_head = address(dout), dout.stride(0), dout.stride(1)
    job.out, job.log_sums = address(out), address(sums)
    job.dq, job.dk, job.dv = address(dq), address(dk), address(dv)
    _run(job, True)
    del alive
    return dq, dk, dv


# ---- the check before first use -----------------------------------------------------------------------------------


def check() -> bool:
    """Lengths around the lanes of a register, shared heads, strides, a window."""
    ends, scale = (0, 1, 18, 53), 0.2
    q, k, v, dout = (sample(heads, 53, 32).transpose(0, 1) for heads in (4, 2, 2, 4))
    for window in (0, 5):
        out, sums = attention(q, k, v, ends, scale, window)
        truth, kept = reference.attention(q, k, v, ends, scale, window)
        found = attention_backward(dout, q, k, v, out, sums, ends, scale, window)
        wanted = reference.attention_backward(dout, q, k, v, truth, kept, ends, scale, window)
        if not (close(out, truth) and close(sums, kept) and all(close(a, b) for a, b in zip(found, wanted))):
            return False
    return True
