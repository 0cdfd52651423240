"""The job `kernels` of `gpu.py`: each kernel of Graft's beside what PyTorch does, in microseconds and bytes a second.

Sizes are those of a 7B layer: a weight of 4096 x 4096, 8,192 tokens, rank 16. The median of several calls counts; the time of a
call is that of the GPU from the first to the last of its launches, and of the host where that is longer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_jobs import Figures, Where

CALLS = 12
Rows = Iterator[tuple[str, Callable[[], Any], int]]
"""What is called, the call, and the bytes that it reads and writes at least; 0 where that says nothing."""


def seconds_of(call: Callable[[], Any], device: torch.device, calls: int = CALLS) -> float:
    """The median time of a call, the device's work included, after three that do not count."""
    times: list[float] = []
    for _ in range(calls + 3):
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[3:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device) -> dict[str, Any]:
    """Operations a second of a large matmul: in bfloat16 on a GPU."""
    gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if gpu else (256, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return {"flops": 2 * size**3 / seconds_of(lambda: a @ b, device), "matrix": f"{size}x{size} {str(dtype)[6:]}"}


def copy_rate(device: torch.device, small: bool) -> float:
    """Bytes a second that the device's memory gives: read and written."""
    x = torch.zeros((1 << 12) if small else (1 << 28), device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / seconds_of(lambda: y.copy_(x), device)


def kernels_job(where: Where) -> Figures:
    """The rows of each group, in one figure a group."""
    device = torch.device(where.device)
    groups: dict[str, Callable[[torch.device, bool], Rows]] = {
        "memory": _memory, "stored weights": _stored, "few rows": _few_rows, "low rank": _low_rank, "optimizer": _optimizer,
        "weight gradient": _weight_gradient, "loss chunks": _loss_chunks,
    }  # fmt: skip
    for name, rows in groups.items():
        found: dict[str, Any] = {}
        try:
            for what, call, nbytes in rows(device, where.small):
                seconds = seconds_of(call, device, 2 if where.small else CALLS)
                rate = {"gb_per_second": nbytes / seconds / 1e9} if nbytes else {}
                found[what] = {"microseconds": 1e6 * seconds, **rate}
        except Exception as error:  # the other groups are still to be measured
            found["error"] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"
        yield name, found


def _weights(device: torch.device, small: bool) -> tuple[torch.Tensor, Any, Any, torch.dtype]:
    from graftlm import kernels

    size, dtype = (192, torch.float32) if small else (4096, torch.bfloat16)
    dense = torch.randn(size, size, device=device)
    return dense.to(dtype), kernels.nf4_quantize(dense), kernels.int8_quantize(dense), dtype


def _memory(device: torch.device, small: bool) -> Rows:
    """The bound of everything that follows."""
    x = torch.zeros((1 << 12) if small else (1 << 28), device=device)
    y = torch.empty_like(x)
    yield "copy", lambda: y.copy_(x), 2 * x.nbytes


def _stored(device: torch.device, small: bool) -> Rows:
    from graftlm import kernels

    dense, nf4, int8, dtype = _weights(device, small)
    yield "nf4 dequantize", lambda: kernels.nf4_dequantize(nf4, dtype), dense.nbytes + dense.numel() // 2
    yield "int8 dequantize", lambda: kernels.int8_dequantize(int8, dtype), dense.nbytes + dense.numel()
    x = torch.randn(64 if small else 8192, dense.shape[1], device=device, dtype=dtype)
    yield "8192 rows by bfloat16", lambda: x @ dense.T, 0
    yield "8192 rows by nf4", lambda: kernels.matmul(x, nf4), 0
    yield "8192 rows by int8", lambda: kernels.matmul(x, int8), 0


def _few_rows(device: torch.device, small: bool) -> Rows:
    """Our matmul that reads a stored weight as it is, beside dequantizing it first, and beside a dense one."""
    from graftlm import kernels

    dense, nf4, _, dtype = _weights(device, small)
    for rows in (1, 4, 16):
        x = torch.randn(rows, dense.shape[1], device=device, dtype=dtype)
        yield f"{rows} rows by nf4", lambda x=x: kernels.matmul(x, nf4), dense.numel() // 2
        yield f"{rows} rows, dequantized first", lambda x=x: x @ kernels.nf4_dequantize(nf4, dtype).T, 0
        yield f"{rows} rows by bfloat16", lambda x=x: x @ dense.T, dense.nbytes


def _low_rank(device: torch.device, small: bool) -> Rows:
    from graftlm import kernels

    tokens, width, rank = (96, 128, 8) if small else (8192, 4096, 16)
    dtype = torch.float32 if small else torch.bfloat16
    x, y = (torch.randn(tokens, width, device=device, dtype=dtype) for _ in range(2))
    A, B = torch.randn(rank, width, device=device), torch.randn(width, rank, device=device)
    one = kernels.Routing([(0, 0, tokens)], [A], [B], [2.0])
    four = kernels.Routing([(i, tokens * i // 4, tokens * (i + 1) // 4) for i in range(4)], [A] * 4, [B] * 4, [2.0] * 4)
    least = x.nbytes + 2 * y.nbytes
    yield "one adapter", lambda: kernels.low_rank_routed(y, x, one), least
    yield "four adapters", lambda: kernels.low_rank_routed(y, x, four), least
    small_a, small_b = A.to(dtype), B.to(dtype)
    yield "one adapter, two matmuls and an addition", lambda: y.add_((x @ small_a.T) @ small_b.T, alpha=2.0), least
    hidden = kernels.low_rank_routed(y, x, one)
    dx = torch.zeros_like(x)
    yield (
        "one adapter, backward",
        lambda: kernels.low_rank_routed_backward(y, x, hidden, one, dx),
        2 * x.nbytes + y.nbytes,
    )


def _optimizer(device: torch.device, small: bool) -> Rows:
    from graftlm import kernels
    from graftlm.kernels import update_of, zero_moments

    count = 5000 if small else 11008 * 4096
    update = update_of(3, 1e-4, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0, key=(0, "w", 3))
    for dtype in (torch.float32, torch.bfloat16):
        p, g = (torch.randn(count, device=device).to(dtype) for _ in range(2))
        for eight in (False, True):
            moments = zero_moments(count, eight_bit=eight, device=device)
            words = f"AdamW of {str(dtype)[6:]}, states in {8 if eight else 32} bits"
            least = 2 * moments.nbytes + 2 * p.nbytes + g.nbytes
            yield words, lambda p=p, g=g, m=moments: kernels.adamw_step(p, g, m, update), least
    many = [torch.randn(16, 4096, device=device) for _ in range(4 if small else 448)]
    yield "norms of 448 gradients", lambda: kernels.sums_of_squares(many), sum(t.nbytes for t in many)


def _weight_gradient(device: torch.device, small: bool) -> Rows:
    """A float32 gradient of 16-bit inputs: at once, in panels of rows, and rounded to 16 bits."""
    from graftlm import kernels

    tokens, width = (64, 96) if small else (8192, 4096)
    dy, x = (torch.randn(tokens, width, device=device).bfloat16() for _ in range(2))
    result = torch.empty(width, width, device=device)

    def panels() -> None:
        for first in range(0, width, 64):
            result[first : first + 64] = dy[:, first : first + 64].T @ x

    yield "float32 by our function", lambda: kernels.weight_gradient(dy, x, dtype=torch.float32), 0
    yield "float32 in panels of 64 rows", panels, 0
    yield "bfloat16", lambda: dy.T @ x, 0
    if device.type == "cuda":
        yield "float32 by out_dtype", lambda: torch.mm(dy.T, x, out_dtype=torch.float32), 0


def _loss_chunks(device: torch.device, small: bool) -> Rows:
    """The head's logits and their gradient, 8,192 tokens in chunks of at most 2^23 to 2^28 values."""
    from graftlm import kernels

    tokens, width, dtype = (64, 32, torch.float32) if small else (8192, 4096, torch.bfloat16)
    for vocabulary in (320,) if small else (32000, 128256):
        hidden = torch.randn(tokens, width, device=device, dtype=dtype)
        head = torch.randn(vocabulary, width, device=device, dtype=dtype)
        labels = torch.randint(0, vocabulary, (tokens,), device=device)
        weights = torch.ones(tokens, device=device)

        def loss(rows: int, hidden: torch.Tensor = hidden, head: torch.Tensor = head, labels: torch.Tensor = labels,
                 weights: torch.Tensor = weights) -> None:  # fmt: skip
            for first in range(0, tokens, rows):
                last = first + rows
                logits = hidden[first:last] @ head.T
                kernels.cross_entropy_in_place(logits, labels[first:last], weights[first:last])
                hidden_gradient = logits @ head
                del logits, hidden_gradient

        for power in range(23, 24 if small else 29):
            yield (
                f"vocabulary {vocabulary}, chunks of 2^{power}",
                lambda p=power, v=vocabulary, f=loss: f((1 << p) // v),
                0,
            )
