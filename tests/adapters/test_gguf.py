"""A GGUF file holds what the plain folder holds: read back by the gguf package, and by transformers with the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny_gguf import MODELS, folder, merging_tokenizer
from transformers import AutoModelForCausalLM

from graftlm.adapters.gguf import check_gguf, write_gguf
from graftlm.errors import ModelError
from graftlm.gguf.layout import interleaved

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("architecture", MODELS)
def test_transformers_reads_the_file_with_the_same_logits(architecture: str, tmp_path: Path) -> None:
    place = folder(tmp_path / "model", architecture, **MODELS[architecture])
    write_gguf(place, tmp_path / "model.gguf", "f32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    plain = tiny.plain(place)
    ours, theirs = plain.state_dict(), again.state_dict()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_every_tensor_is_there_in_its_type_and_close_to_its_value(kind: str, tmp_path: Path) -> None:
    place = folder(tmp_path / "model", "llama", hidden_size=64, intermediate_size=96, head_dim=16)
    done = write_gguf(place, tmp_path / "m.gguf", kind)
    found = {t.name: t for t in gguf.GGUFReader(str(tmp_path / "m.gguf")).tensors}
    plain = tiny.plain(place).state_dict()
    assert done["tensors"] == len(found) == len(plain)
    limit = {"f32": 0.0, "f16": 1e-3, "bf16": 8e-3, "q8_0": 2e-2}[kind]
    for ours, theirs in (
        ("mlp.down_proj", "ffn_down"),
        ("self_attn.v_proj", "attn_v"),
        ("input_layernorm", "attn_norm"),
    ):
        tensor = found[f"blk.1.{theirs}.weight"]
        wanted = plain[f"model.layers.1.{ours}.weight"].numpy()
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(wanted.shape)
        assert np.abs(value - wanted).max() <= limit * np.abs(wanted).max()
        expected = "F32" if wanted.ndim == 1 else {"bf16": "BF16", "q8_0": "Q8_0"}.get(kind, kind.upper())
        assert tensor.tensor_type.name == expected


def test_the_rows_of_q_and_k_are_reordered_as_llama_cpp_rotates() -> None:
    rows = torch.arange(24)[:, None]  # 2 heads of 12
    found = interleaved(rows, 2)[:, 0].tolist()
    assert found[:4] == [0, 6, 1, 7]
    assert found[12:16] == [12, 18, 13, 19]
    assert sorted(found) == list(range(24))


def test_a_matrix_whose_rows_do_not_fill_blocks_is_written_in_f16(tmp_path: Path) -> None:
    place = folder(tmp_path / "model", "llama")
    write_gguf(place, tmp_path / "m.gguf", "q8_0")
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(str(tmp_path / "m.gguf")).tensors}
    assert found["blk.0.ffn_up.weight"] == "F16"


def test_tokenizer_template_and_stop_tokens_are_in_the_file(tmp_path: Path) -> None:
    place = folder(tmp_path / "model", "llama")
    (place / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    write_gguf(place, tmp_path / "m.gguf", "f16")
    fields = gguf.GGUFReader(str(tmp_path / "m.gguf")).fields
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.chat_template"].contents() == (place / "chat_template.jinja").read_text()
    tokenizer = merging_tokenizer()
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens == [t for t, _ in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.token_type"].contents()[:4] == [3, 3, 3, 1]
    assert 'PARAMETER stop "</s>"' in (tmp_path / "m.Modelfile").read_text()


def test_llama_3s_rotation_is_written_as_factors(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}  # fmt: skip
    place = folder(tmp_path / "model", "llama", rope_parameters=rope)
    write_gguf(place, tmp_path / "m.gguf", "f32")
    found = {t.name: t for t in gguf.GGUFReader(str(tmp_path / "m.gguf")).tensors}["rope_freqs.weight"]
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](tiny.plain(place).config, "cpu")
    bare = 1.0 / 1000.0 ** (torch.arange(0, 10, 2).float() / 10)
    np.testing.assert_allclose(found.data, (bare / scaled).numpy(), rtol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "phi3", "falcon"])
def test_other_architectures_are_refused_by_name(architecture: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"and this is a {architecture}"):
        write_gguf(folder(tmp_path / "model", architecture), tmp_path / "m.gguf", "f32")
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "llama.cpp has no name for"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
            "has no name for",
        ),
        ({"normalizer": {"type": "Lowercase"}}, "has no name for"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    place = folder(tmp_path / "model", "llama")
    told = json.loads((place / "tokenizer.json").read_text())
    (place / "tokenizer.json").write_text(json.dumps({**told, **change}))
    with pytest.raises(ModelError, match=message):
        check_gguf(place)
    with pytest.raises(ModelError, match=message):
        write_gguf(place, tmp_path / "m.gguf", "f32")
    assert not list(tmp_path.glob("*.gguf*"))


def test_numbers_that_llama_cpp_has_in_its_code_are_refused_where_they_differ(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="query_pre_attn_scalar is 7"):
        write_gguf(folder(tmp_path / "a", "gemma2"), tmp_path / "a.gguf", "f32")
    with pytest.raises(ModelError, match="every 6th layer"):
        write_gguf(folder(tmp_path / "b", "gemma3", query_pre_attn_scalar=10), tmp_path / "b.gguf", "f32")
