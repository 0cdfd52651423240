"""The job `decode` of `gpu.py`: tokens a second of Graft's engine at batch 1, 16 and 64, and how much of a step is the weights.

A token of decode reads every weight once, so bytes of the base over a step's seconds, beside what a copy of memory reaches,
says how far from its bound a step is.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from gpu_jobs import Figures, Where
from gpu_kernels import copy_rate
from gpu_steps import watched, within_memory
from point import base_of, llama

from graftlm.serving.engine.engine import Engine
from graftlm.serving.engine.request import Request
from graftlm.serving.engine.scheduler import EngineLimits

BATCHES = (1, 16, 64)
PROMPT, TOKENS = 128, 24  # of each sequence; the first four steps of decode do not count


def decode(where: Where) -> Figures:
    """A base in bfloat16, and in NF4, with each number of sequences."""
    device = torch.device(where.device)
    yield "copy", {"bytes_per_second": copy_rate(device, where.small)}
    for precision in ("bfloat16",) if where.small else ("bfloat16", "nf4"):
        base = base_of(llama("tiny" if where.small else "7b"), precision, where.device)
        for batch in BATCHES[:1] if where.small else BATCHES:
            yield (
                f"{precision}, batch {batch}",
                within_memory(lambda base=base, batch=batch: _decoded(base, batch, device)),
            )
        del base


def _decoded(base: Any, batch: int, device: torch.device) -> dict[str, Any]:
    blocks = -(-(PROMPT + TOKENS) // 16) + 1
    limits = EngineLimits(max_num_seqs=batch, max_num_batched_tokens=8192, cache_tokens=16 * blocks * batch)
    engine = Engine(base, limits)
    try:
        for i in range(batch):
            prompt = tuple(3 + (7 * i + j) % 200 for j in range(PROMPT))
            engine.add_request(Request(id=str(i), prompt=prompt, max_tokens=TOKENS))
        began = time.perf_counter()
        while engine.num_running < batch or engine.num_waiting:  # until each has its first token
            engine.step()
        prefill = time.perf_counter() - began
        times: list[float] = []
        for _ in range(TOKENS - 6):
            began = time.perf_counter()
            engine.step()  # ends with its tokens on the host
            times.append(time.perf_counter() - began)
        seconds = statistics.median(times[4:])
        return {
            "seconds_per_step": seconds, "tokens_per_second": batch / seconds, "prefill_seconds": prefill,
            "bytes_per_second": base.bytes / seconds, "paged": engine.paged, **watched(engine.step, device),
        }  # fmt: skip
    finally:
        engine.close()
