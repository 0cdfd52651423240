"""Peak memory while merging, measured in a process of its own: at most the largest shard twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import AdapterPlan, new_adapter, select_layers
from graftlm.base.meta_base import load_meta_base

MB = 1_000_000

# 95M values, 190 MB in bfloat16, in shards of at most 60 MB; the embedding alone is 50 MB of its shard.
SIZES: dict[str, Any] = {
    "vocab_size": 30_000, "hidden_size": 832, "intermediate_size": 2304, "num_hidden_layers": 5,
    "num_attention_heads": 13, "num_key_value_heads": 13, "tie_word_embeddings": False,
}  # fmt: skip

MERGE = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.merge import Merger, WeightedAdapter
from graftlm.adapters.merge_writer import write_merged_model
from graftlm.base.meta_base import load_meta_base
from graftlm.planning.peak_memory import PeakMemory

def merge(place, adapter, out, onto, precision):
    base = load_meta_base(place, precision=precision)
    return write_merged_model(Merger(base, [WeightedAdapter(adapter_format.load(base, Path(adapter)))], onto=onto),
    Path(out), {})

def measure(place, adapter, out, onto, precision):
    merge(small, small_adapter, out + "-small", onto, precision)  # every library that merging needs is there
    with PeakMemory(torch.device("cpu"), 0.002) as memory:
        written = merge(place, adapter, out, onto, precision)
    return {"before": memory.start, "peak": memory.bytes, "bytes": written.bytes}

small, small_adapter, place, adapter, out, *cases = sys.argv[1:]
for case in cases:  # each in a fork of its own: what they import is imported once
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, case
        continue
    print(json.dumps({"case": case, **measure(place, adapter, f"{out}-{case}", *case.split("-"))}), flush=True)
    os._exit(0)
"""
CASES = ("original-float32", "dequantized-nf4", "requantized-nf4")


def plain_adapter(model: Path, place: Path) -> Path:
    """A PEFT folder of an adapter of rank 8 on every linear layer, made without the model's weights."""
    base = load_meta_base(str(model))
    adapter = new_adapter(base, select_layers(base, ("all-linear",)), AdapterPlan(rank=8, alpha=12.0), 0)
    named = {
        f"base_model.model.{layer}.{name}": torch.full(tensor.shape, 0.01)
        for layer, slot in adapter.layers.items()
        for name, tensor in slot.named().items()
    }
    place.mkdir()
    save_file(named, place / "adapter_model.safetensors")
    (place / "adapter_config.json").write_text(json.dumps(adapter_format.peft_config(base, adapter)))
    return place


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, Path]:
    """(small base, its adapter, large base in shards, its adapter)."""
    root = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=torch.bfloat16)
    place = tiny.write(root / "base", model, max_shard_size="60MB")
    small = tiny.folder("llama")
    return small, plain_adapter(small, root / "small"), place, plain_adapter(place, root / "adapter")


@pytest.fixture(scope="module")
def merged(large: tuple[Path, Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Bytes before, at the peak and written, of each case."""
    arguments = [sys.executable, "-c", MERGE, *map(str, large), str(tmp_path_factory.mktemp("merged") / "out"), *CASES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    return {found.pop("case"): found for found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.measured
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("case", CASES)
def test_merging_takes_no_more_than_the_largest_shard_twice(
    large: tuple[Path, Path, Path, Path], merged: dict[str, dict[str, int]], case: str, record_property: Any
) -> None:
    shards = [f.stat().st_size for f in large[2].glob("*.safetensors")]
    assert len(shards) >= 4
    found = merged[case]
    taken, limit = found["peak"] - found["before"], 2 * max(shards)
    record_property("peak MB above the idle process", round(taken / MB))
    record_property("twice the largest shard, MB", round(limit / MB))
    record_property("written MB", round(found["bytes"] / MB))
    assert taken <= limit
