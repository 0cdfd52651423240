"""The CPU kernels vs bitsandbytes and dense PyTorch: one run, the sides taking turns, medians.

    python bench/operations.py                              # 4096x4096 float32 on all threads PyTorch takes
    python bench/operations.py --instructions AVX2          # ours held back to a narrower instruction set
    python bench/operations.py --fused                      # the fused elementwise operations vs PyTorch's separate ones
    python bench/operations.py --busy                       # where it cannot run alone
    python bench/operations.py --json bench/results/operations.json

Every round times each contender of a row once, so a slow moment of the machine falls on all of them; the median
round counts. Nothing else may run: two PyTorch processes on the same cores slow each other several times. bitsandbytes
chooses its own instruction set and on a CPU cannot write into a given tensor, so its dequantize always pays for one.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fused
import torch

from graftlm import kernels
from graftlm.kernels import native, reference

Contenders = dict[str, Callable[[], Any]]
OURS = "graft"


def milliseconds(contenders: Contenders, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """The median time of each, one call a round, after two calls that do not count."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 2):
        for name, call in contenders.items():
            begin = clock()
            call()
            if round_ >= 2:
                times[name].append(1000 * (clock() - begin))
    return {name: statistics.median(values) for name, values in times.items()}


def rows_of(size: int) -> list[tuple[str, Contenders, dict[str, str]]]:
    """Name, contenders (ours first), and what must and should be reached against each other one."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(size, size, generator=generator)
    x, many = torch.randn(1, size, generator=generator), torch.randn(256, size, generator=generator)
    W16, x16 = W.bfloat16(), x.bfloat16()
    nf4, int8 = kernels.nf4_quantize(W), kernels.int8_quantize(W)
    out, out_too = torch.empty_like(W), torch.empty_like(W)
    eight = many[:8]
    rows: list[tuple[str, Contenders, dict[str, str]]] = [
        ("NF4 dequantize into a tensor", {OURS: lambda: kernels.nf4_dequantize(nf4, out=out)}, {}),
        ("NF4 dequantize into a new tensor", {OURS: lambda: kernels.nf4_dequantize(nf4)}, {}),
        ("NF4 times 1 row", {OURS: lambda: kernels.matmul(x, nf4)}, {}),
        ("NF4 times 8 rows", {OURS: lambda: kernels.matmul(eight, nf4)}, {}),
        ("NF4 times 256 rows", {OURS: lambda: kernels.matmul(many, nf4)}, {}),
        ("NF4, 256 rows, gradient to the input", {OURS: lambda: kernels.matmul_t(many, nf4)}, {}),
        ("NF4 quantize", {OURS: lambda: kernels.nf4_quantize(W)}, {}),
        ("int8 times 1 row", {OURS: lambda: kernels.matmul(x, int8)}, {}),
        ("int8 times 256 rows", {OURS: lambda: kernels.matmul(many, int8)}, {}),
    ]
    into, new, one, some, wide, back, quantize, one8, wide8 = rows
    into[1]["memory copy"] = lambda: out_too.copy_(W)
    into[2]["memory copy"] = "goal 0.8x"
    into[1]["filling it with one number"] = lambda: out_too.fill_(1.0)  # what no way of making its values goes below
    new[1]["memory copy"] = W.clone
    one[1]["dense float32"] = one8[1]["dense float32"] = lambda: torch.mv(W, x[0])
    one[1]["dense bfloat16"] = lambda: torch.mv(W16, x16[0])
    one[2].update({"dense float32": "must 1x, goal 2x", "dense bfloat16": "must 1x"})
    some[1]["dense float32"] = lambda: eight @ W.T
    wide[1]["dense float32"] = wide8[1]["dense float32"] = lambda: many @ W.T
    wide[2]["dense float32"] = "must 0.87x, goal 0.95x"
    back[1]["dense float32"] = lambda: many @ W
    try:
        import bitsandbytes
        import bitsandbytes.functional as peer
    except ImportError:
        return rows
    options = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": True}
    packed, state = peer.quantize_4bit(W, **options)
    into[1]["bitsandbytes"] = new[1]["bitsandbytes"] = lambda: peer.dequantize_4bit(packed, state)
    one[1]["bitsandbytes"] = lambda: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)
    wide[1]["bitsandbytes"] = lambda: bitsandbytes.matmul_4bit(many, packed.t(), quant_state=state)
    quantize[1]["bitsandbytes"] = lambda: peer.quantize_4bit(W, **options)
    into[2]["bitsandbytes"] = new[2]["bitsandbytes"] = "must 10x, goal 14x"
    one[2]["bitsandbytes"] = "must 15x, goal 25x"
    quantize[2]["bitsandbytes"] = "must 8x, goal 20x"
    return rows


def fused_section(options: Any, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """The elementwise operations, forward and backward, on one thread and on all."""
    found: list[dict[str, Any]] = []
    print(
        "| operation, forward and backward | threads | graft, ms | PyTorch, ms | faster by |\n|---|---:|---:|---:|---:|"
    )
    most = torch.get_num_threads()
    # glibc gives freed memory back to the system until it has seen a block of some size: as in training, it has seen one.
    torch.empty(31 << 20, dtype=torch.uint8)
    for threads in sorted({1, most}):
        torch.set_num_threads(threads)
        for name, (ours, theirs) in fused.rows():
            times = milliseconds({OURS: ours, "PyTorch": theirs}, options.rounds, clock)
            mine, its = times[OURS], times["PyTorch"]
            print(f"| {name} | {threads} | {mine:.2f} | {its:.2f} | {its / mine:.2f}x |", flush=True)
            found.append(
                {"operation": name, "threads": threads, "graft_ms": mine, "pytorch_ms": its, "ratio": its / mine}
            )
    torch.set_num_threads(most)
    return found


def check() -> None:
    """A fast wrong answer is worth nothing: the reference's answer on a small weight, before any clock runs."""
    weight = torch.randn(70, 333, generator=torch.Generator().manual_seed(1))
    ours, truth = kernels.nf4_quantize(weight), reference.nf4_quantize(weight)
    assert all(torch.equal(tensor, truth.tensors()[name]) for name, tensor in ours.tensors().items())
    assert torch.equal(kernels.nf4_dequantize(ours), reference.nf4_dequantize(truth))
    for rows in (1, 8, 256):
        x = torch.randn(rows, 333, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(kernels.matmul(x, ours), reference.matmul(x, truth), rtol=1e-5, atol=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds; the median counts")
    parser.add_argument("--threads", type=int, help="threads of both sides (default: PyTorch's own choice)")
    parser.add_argument(
        "--instructions", help="hold our C kernels to this set: " + ", ".join(native.instruction_sets())
    )
    parser.add_argument(
        "--busy", action="store_true", help="for a machine that others use too: one thread, and its processor time"
    )
    parser.add_argument("--fused", action="store_true", help="the elementwise operations only")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if options.threads or options.busy:
        torch.set_num_threads(1 if options.busy else options.threads)
    clock = time.thread_time if options.busy else time.perf_counter
    if options.instructions:
        native.choose(options.instructions)
    check()
    results: list[dict[str, Any]] = []
    elementwise = fused_section(options, clock)
    print()
    if not options.fused:
        results = matmul_section(options, clock)
    if options.json:
        figures = {
            "size": options.size,
            "threads": torch.get_num_threads(),
            "backend": kernels.backend(),
            "pytorch_capability": torch.backends.cpu.get_cpu_capability(),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "rounds": options.rounds,
            "clock": "processor time of one thread" if options.busy else "wall clock",
            "results": results,
            "fused": elementwise,
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def matmul_section(options: Any, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Quantize, dequantize and matmul with stored weights."""
    results: list[dict[str, Any]] = []
    print(f"{options.size}x{options.size} float32, {torch.get_num_threads()} threads, {kernels.backend()}\n")
    print("| operation | graft, ms | compared with | its ms | faster by | wanted |\n|---|---:|---|---:|---:|---|")
    for name, contenders, wanted in rows_of(options.size):
        times = milliseconds(contenders, options.rounds, clock)
        for other in [other for other in times if other != OURS]:
            ratio = times[other] / times[OURS]
            mine, its = times[OURS], times[other]
            print(f"| {name} | {mine:.2f} | {other} | {its:.2f} | {ratio:.2f}x | {wanted.get(other, '')} |", flush=True)
            results.append({"operation": name, "graft_ms": mine, "beside": other, "beside_ms": its, "ratio": ratio})
    return results


if __name__ == "__main__":
    main()
