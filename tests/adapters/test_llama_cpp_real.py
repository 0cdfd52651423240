"""Real models beside llama.cpp: an adapter trained on a GGUF file answers there, as `--lora` or merged, what it answers here.

llama.cpp quantizes activations to 8 bits before each product with a quantized weight, and Graft does not. So logits differ by
about 1 % of their size, and where the two likeliest tokens are as close as that, answers part. With values in f32 it quantizes
nothing.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import real_models
from beside_llama_cpp import LlamaCpp, compare, prompts, trained

from graftlm.adapters.export import export_adapter
from graftlm.base.loading import load_base
from graftlm.commands.merge import merge
from graftlm.config import ExportConfig, MergeConfig
from graftlm.gguf.header import read_gguf

PROMPTS, TOKENS = 20, 64


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of 30 steps on SmolLM2's own blocks."""
    return trained(real_models.smollm2(), tmp_path_factory.mktemp("real"), steps=30)


@pytest.mark.prove
@pytest.mark.parametrize("kind", ["its own blocks", "f32"])
def test_an_exported_adapter_answers_in_llama_cpp_as_it_does_here(
    kind: str, adapter: Path, tmp_path: Path, record_property: Any
) -> None:
    """With the base's values in f32 llama.cpp quantizes nothing: what differs with blocks is that, and not the adapter."""
    file = real_models.smollm2()
    export_adapter(ExportConfig.build({"version": str(adapter), "out": tmp_path / "a.gguf", "for": "gguf"}))
    if kind == "f32":
        merge(MergeConfig.build({
            "model": str(file), "out": tmp_path / "plain", "gguf": tmp_path / "f32.gguf", "gguf_type": "f32",
        }))  # fmt: skip
    llama_cpp = LlamaCpp(file if kind != "f32" else tmp_path / "f32.gguf", tmp_path / "a.gguf")
    base = load_base(str(file), precision="gguf", compute_dtype="float32", device="cpu")
    found = compare(llama_cpp, base, adapter, PROMPTS, TOKENS)
    for name, value in asdict(found).items():
        record_property(name, value)
    assert len(found.logits) == PROMPTS
    if kind == "f32":
        assert max(found.logits) < 1e-3
        assert found.before_parting >= 0.95 * found.total
    else:
        assert max(found.logits) < 0.03
        assert found.likeliest >= 0.95 * found.answered
        assert max(found.partings, default=0.0) < 3, "a pair of tokens that is no near-tie"


@pytest.mark.prove
def test_a_merged_gemma_answers_in_llama_cpp_as_base_and_adapter_do_here(tmp_path: Path, record_property: Any) -> None:
    """Its SentencePiece tokenizer is the base file's own, and the merged values are in f32."""
    file = real_models.gemma(tmp_path)
    adapter = trained(file, tmp_path, steps=6)
    merged = tmp_path / "merged.gguf"
    merge(MergeConfig.build({
        "model": str(file), "adapter": [str(adapter)], "out": tmp_path / "plain", "gguf": merged, "gguf_type": "f32",
    }))  # fmt: skip
    for key, value in read_gguf(merged).metadata.items():
        if key.startswith("tokenizer."):
            assert value == read_gguf(file).metadata[key], key
    llama_cpp = LlamaCpp(merged)
    base = load_base(str(file), precision="gguf", compute_dtype="float32", device="cpu")
    texts = prompts(5)
    assert [llama_cpp.model.tokenize(text.encode()) for text in texts] == [
        base.tokenizer(t)["input_ids"] for t in texts
    ]
    found = compare(llama_cpp, base, adapter, count=5, most=32)
    for name, value in asdict(found).items():
        record_property(name, value)
    assert max(found.logits) < 0.01  # llama.cpp's GELU is a table in float16
    assert found.before_parting >= 0.95 * found.total
