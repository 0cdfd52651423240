"""Real models beside llama.cpp: an adapter trained on a GGUF file answers there, as `--lora` or merged, what it answers here.

llama.cpp quantizes activations to 8 bits before each product with a quantized weight, and Graft does not. So logits differ by
about 1 % of their size, and where the two likeliest tokens are as close as that, answers part. With values in f32 it quantizes
nothing; and with its activations computed here too, what is left is the order of sums.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import real_models
import torch
from beside_llama_cpp import LlamaCpp, behind, compare, prompts, trained
from torch import Tensor

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import attach
from graftlm.adapters.export import export_adapter
from graftlm.base.chat import Encoder
from graftlm.base.loading import load_base
from graftlm.base.modules import StoredLinear, stored_matmul
from graftlm.commands.merge import merge
from graftlm.config import ExportConfig, MergeConfig
from graftlm.gguf.header import read_gguf
from graftlm.kernels import GgufBlocks

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


# ---- with llama.cpp's activations ------------------------------------------------------------------------------------


def in_8_bits(x: Tensor, kind: str) -> Tensor:
    """Activations (T, in) as llama.cpp rounds them before a product with weights of this kind, as float32.

    Q8_0 and Q8_1 (`quantize_row_q8_1`): 32 values have one scale in float16, the largest / 127. Q8_K, for the K types: 256
    values have one in float32.
    """
    size = 256 if kind.endswith("_k") else 32
    blocks = x.reshape(-1, size)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    codes = (blocks / scale.where(scale > 0, torch.ones_like(scale))).round()
    stored = scale if size == 256 else scale.half().float()
    return (codes * stored).view(x.shape)


def forward_in_8_bits(self: StoredLinear, x: Tensor, bias: bool = True) -> Tensor:
    """`StoredLinear.forward` with the base's product over rounded activations; an adapter's is over x itself, as there."""
    rows, value, added = x.reshape(-1, self.in_features), self.value, self.bias if bias else None
    y = stored_matmul(rows, value, added) if self.bank is None else self.bank(rows, self, value, added)
    if isinstance(value, GgufBlocks):
        y = y + stored_matmul(in_8_bits(rows, value.kind) - rows, value)
    return y.view(*x.shape[:-1], self.out_features)


@pytest.mark.prove
def test_with_activations_in_8_bits_the_answers_on_blocks_are_llama_cpps(
    adapter: Path, tmp_path: Path, record_property: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What differs with blocks is explained whole: with llama.cpp's rounding of activations, its tokens are the likeliest."""
    file = real_models.smollm2()
    export_adapter(ExportConfig.build({"version": str(adapter), "out": tmp_path / "a.gguf", "for": "gguf"}))
    llama_cpp = LlamaCpp(file, tmp_path / "a.gguf")
    base = load_base(str(file), precision="gguf", compute_dtype="float32", device="cpu")
    attach(base, adapter_format.load(base, adapter), slot=1)
    encoder = Encoder(base.tokenizer)
    before_parting = likeliest = total = 0
    distances = list[float]()
    for text in prompts(PROMPTS):
        prompt = encoder.prompt_text(text)
        theirs, logits = llama_cpp.greedy(prompt, encoder.stop_ids, TOKENS)
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(StoredLinear, "forward", forward_in_8_bits)
            own = behind(base, prompt, theirs)
        same = own.argmax(1) == torch.tensor(theirs)
        before_parting += int(same.long().cumprod(0).sum())  # a greedy answer goes on as theirs as long as this does
        likeliest += int(same.sum())
        total += len(theirs)
        distances.append(float((own[0] - logits[0]).norm() / logits[0].norm()))
    figures = {"total": total, "before_parting": before_parting, "likeliest": likeliest, "logits": distances}
    for name, value in figures.items():
        record_property(name, value)
    assert max(distances) < 0.005
    assert before_parting >= 0.95 * total
