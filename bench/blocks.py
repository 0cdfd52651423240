"""Products with the quantized blocks of GGUF files beside NF4, int8 and dense float32.

    python bench/blocks.py                           # 4096x4096, on all threads PyTorch takes
    python bench/blocks.py --busy                    # where it cannot run alone: one thread, and its processor time
    python bench/blocks.py --json bench/results/blocks.json

One row reads the weight once, as decoding does: GB/s of stored bytes. 512 rows multiply it as training does: GFLOP/s.
Each weight's contenders take turns; the median round counts.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from operations import milliseconds

from graftlm import kernels
from graftlm.kernels import native
from graftlm.kernels.reference_blocks import sample_blocks

MANY = 512


def weights_of(size: int, kinds: list[str]) -> dict[str, kernels.Weight]:
    dense = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    found: dict[str, kernels.Weight] = {
        "float32": dense, "nf4": kernels.nf4_quantize(dense), "int8": kernels.int8_quantize(dense),
    }  # fmt: skip
    return found | {kind: sample_blocks(kind, size, size) for kind in kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight, a multiple of 256")
    parser.add_argument("--kinds", nargs="+", default=["q4_1", "q4_k", "q6_k", "q8_0"], choices=kernels.BLOCK_SIZES)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds; the median counts")
    parser.add_argument("--threads", type=int, help="threads (default: PyTorch's own choice)")
    parser.add_argument(
        "--instructions", help="hold our C kernels to this set: " + ", ".join(native.instruction_sets())
    )
    parser.add_argument("--busy", action="store_true", help="one thread, and its processor time")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if options.threads or options.busy:
        torch.set_num_threads(1 if options.busy else options.threads)
    if options.instructions:
        native.choose(options.instructions)
    clock = time.thread_time if options.busy else time.perf_counter
    x = torch.randn(MANY, options.size, generator=torch.Generator().manual_seed(1))
    results: list[dict[str, object]] = []
    print(f"{options.size}x{options.size}, {torch.get_num_threads()} threads, {kernels.backend()}\n")
    print(
        f"| weight | bits a value | 1 row, ms | GB/s | 8 rows, ms | {MANY} rows, GFLOP/s |\n|---|---:|---:|---:|---:|---:|"
    )
    for name, weight in weights_of(options.size, options.kinds).items():
        times = milliseconds(
            {str(rows): lambda rows=rows, weight=weight: kernels.matmul(x[:rows], weight) for rows in (1, 8, MANY)},
            options.rounds, clock,
        )  # fmt: skip
        bits = 8 * weight.nbytes / options.size**2
        speed, work = weight.nbytes / times["1"] / 1e6, 2 * MANY * options.size**2 / times[str(MANY)] / 1e6
        print(f"| {name} | {bits:.2f} | {times['1']:.2f} | {speed:.1f} | {times['8']:.2f} | {work:.0f} |", flush=True)
        results.append({"weight": name, "bits": bits, "ms_by_rows": times, "gb_s": speed, "gflop_s": work})
    if options.json:
        figures = {
            "size": options.size, "threads": torch.get_num_threads(), "backend": kernels.backend(), "torch": torch.__version__,
            "clock": "processor time of one thread" if options.busy else "wall clock", "results": results,
        }  # fmt: skip
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
