"""Adapters trained on real GGUF files, read by PEFT over the model that transformers itself dequantizes: the same logits.

Neither the reader of the file nor the weights in memory are ours on that side, so this proves names, order of rows, scaling and
dequantization of a real file together.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import real_models
import tiny
import torch
from torch import Tensor

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import attach
from graftlm.base.loading import load_base
from graftlm.commands.train import train
from graftlm.config import TrainConfig

ROWS = [
    {"prompt": f"Write the number {n} as a word.\n", "completion": f"{word}!"}
    for n, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
    )
]
TEXTS = (
    "The capital of France is", "def add(a, b):\n    return a +", "Write the number 7 as a word.\nseven!", "1 2 3 4 5 6 7",
    "Once upon a time, in a small village by the sea, there lived an old man who",
)  # fmt: skip
MODELS: dict[str, Callable[[Path], Path]] = {"smollm2": lambda _: real_models.smollm2(), "gemma": real_models.gemma}


def dequantized(file: Path) -> Any:
    """The model that transformers reads out of a GGUF file, in float32."""
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()


@pytest.mark.prove
@pytest.mark.parametrize("name", MODELS)
def test_peft_over_the_dequantized_model_computes_the_logits_of_the_adapter_on_its_blocks(
    name: str, tmp_path: Path, graft_cache: Path, record_property: Callable[[str, object], None]
) -> None:
    peft = pytest.importorskip("peft")
    file = MODELS[name](tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    options = {
        "model": str(file), "data": [str(tmp_path / "rows.jsonl")], "out": str(tmp_path / "run"), "steps": 6, "batch_size": 3,
        "learning_rate": 2e-3, "rank": 5, "alpha": 7, "device": "cpu", "seed": 3,
    }  # fmt: skip
    summary = train(TrainConfig.build(options))
    assert summary["base_precision"] == "gguf"
    base = load_base(str(file), precision="gguf", compute_dtype="float32", device="cpu")
    prompts = [torch.tensor(base.tokenizer(text)["input_ids"]) for text in TEXTS]
    bare = [tiny.base_logits(base, ids, slot=0) for ids in prompts]
    attach(base, adapter_format.load(base, Path(summary["adapter_folder"])), slot=1)
    ours = [tiny.base_logits(base, ids, slot=1) for ids in prompts]
    del base
    model = dequantized(file)
    plain = [tiny.plain_logits(model, ids) for ids in prompts]
    adapted = peft.PeftModel.from_pretrained(model, summary["adapter_folder"])
    theirs = [tiny.plain_logits(adapted, ids) for ids in prompts]
    apart = max(_apart(a, b) for a, b in zip(ours, theirs))
    record_property("logits_apart", f"{apart:.1e}")
    record_property("bases_apart", f"{max(_apart(a, b) for a, b in zip(bare, plain)):.1e}")
    record_property("adapter_moves_logits", f"{min(_apart(a, b) for a, b in zip(ours, bare)):.3f}")
    assert apart < 1e-4
    assert min(_apart(a, b) for a, b in zip(ours, bare)) > 100 * apart


def _apart(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return float((a - b).norm() / b.norm())
