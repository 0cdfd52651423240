"""A checkpoint streamed into its stored form: the same values however it is cut, and what is wrong with it by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from checkpoint_folders import change, loaded, refused, set_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from graftlm.base.loading import load_base
from graftlm.base.saving import dense_state_dict, save_model


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mixtral", "phi3"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "nf4"])
def test_a_sharded_checkpoint_is_the_single_file(architecture: str, precision: str, tmp_path: Path) -> None:
    single = tiny.folder(architecture)
    sharded = tiny.write(tmp_path, tiny.plain(single), max_shard_size="25KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    one, many = loaded(single, precision), loaded(sharded, precision)
    first, second = (dense_state_dict(base.model, torch.float32) for base in (one, many))
    assert set(first) == set(second)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert one.bytes == many.bytes
    assert one.fingerprint == many.fingerprint


def test_a_16_bit_checkpoint_is_read_bit_for_bit(tmp_path: Path) -> None:
    model = tiny.random_model("gpt2").to(torch.bfloat16)
    base = loaded(tiny.write(tmp_path, model), "bfloat16")
    found = dense_state_dict(base.model, torch.bfloat16)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.items())


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_stored_does_not_depend_on_the_compute_dtype(
    dtype: torch.dtype, precision: str, tmp_path: Path
) -> None:
    folder = tiny.write(tmp_path, tiny.random_model("llama").to(dtype))
    given: Any = {"precision": precision, "device": "cpu"}
    in_float = load_base(str(folder), **given, compute_dtype="float32")
    in_half = load_base(str(folder), **given, compute_dtype="bfloat16")
    assert in_half.activation_dtype == torch.bfloat16
    for name, module in in_float.stored().items():
        other = in_half.stored()[name]
        mine, theirs = (
            {"dense": m.dense} if m.compressed is None else m.compressed.tensors() for m in (module, other)
        )  # fmt: skip
        assert all(torch.equal(value, theirs[part]) for part, value in mine.items()), name


# ---- damaged weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "nf4"])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"]
)
def test_a_missing_tensor_is_refused_by_name(copy: Path, name: str, precision: str) -> None:
    change(copy, lambda named: named.pop(name))
    refused(copy, "1 tensors are missing", f"'{name}'", precision=precision)


@pytest.mark.parametrize("precision", ["float32", "nf4"])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"]
)
def test_a_tensor_of_another_shape_is_refused_by_name_and_shapes(copy: Path, name: str, precision: str) -> None:
    def widen(named: dict[str, Tensor]) -> None:
        named[name] = torch.ones(*(n + 2 for n in named[name].shape))

    shape = tuple(load_file(copy / "model.safetensors")[name].shape)
    change(copy, widen)
    refused(copy, name, str(shape), str(tuple(n + 2 for n in shape)), precision=precision)


def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.folder("mixtral"), tmp_path / "mixtral"))
    gone = next(n for n in load_file(folder / "model.safetensors") if ".experts.1." in n)
    change(folder, lambda named: named.pop(gone))
    refused(folder, "experts")


@pytest.mark.parametrize("kept", [0, 5, 500, -9])
def test_a_file_cut_short_is_refused(copy: Path, kept: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(copy, str(copy))


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path, tiny.plain(tiny.folder("llama")), max_shard_size="50KB")
    gone = sorted(folder.glob("model-*.safetensors"))[1]
    gone.unlink()
    refused(folder, "weight files are missing", gone.name)


def test_tensors_that_the_architecture_does_not_have_are_named(copy: Path) -> None:
    change(copy, lambda named: named.update({"model.layers.0.mlp.extra.weight": torch.ones(3, 5)}))
    assert any("model.layers.0.mlp.extra.weight" in note for note in loaded(copy).notes)


# ---- checkpoints that are already quantized --------------------------------------------------------------------------


def quantized(tmp_path: Path, architecture: str = "llama") -> Path:
    """A bitsandbytes 4-bit checkpoint."""
    bnb_nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    source = tiny.write(tmp_path / "source", tiny.random_model(architecture, **sizes))
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=bnb_nf4, device_map="cpu", dtype=torch.float32
    )
    return tiny.write(tmp_path / "four", model)


@pytest.mark.parametrize("precision", ["float32", "nf4"])
def test_a_bitsandbytes_checkpoint_is_brought_to_the_asked_precision(tmp_path: Path, precision: str) -> None:
    place = quantized(tmp_path)
    base, source = loaded(place, precision), loaded(tmp_path / "source", "nf4")
    found, expected = (dense_state_dict(b.model, torch.float32) for b in (base, source))
    for name, value in expected.items():
        if name.endswith("proj.weight"):
            tiny.close(found[name], value, rtol=1e-6 if precision == "float32" else 2e-2)
    assert base.precision == precision
    assert "quantization_config" not in base.model.config.to_dict()


def test_a_full_model_from_a_quantized_checkpoint_is_written_plain(tmp_path: Path) -> None:
    base = loaded(quantized(tmp_path), "float32")
    out = tmp_path / "out"
    save_model(base.model, str(out), torch.float32)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    tiny.close(tiny.plain_logits(tiny.plain(out), tiny.ids()), tiny.base_logits(base, tiny.ids(), slot=0))


def test_an_fp8_checkpoint_is_brought_to_the_asked_precision(tmp_path: Path) -> None:
    model = tiny.random_model("llama", hidden_size=128, intermediate_size=256, head_dim=32)
    folder = tiny.write(tmp_path, model)
    named = load_file(folder / "model.safetensors")
    expected: dict[str, Tensor] = {}
    for name in [n for n in named if n.endswith("proj.weight")]:
        weight = named[name]
        rows, columns = (-(-n // 128) for n in weight.shape)
        scale = torch.empty(rows, columns)
        for i in range(rows):
            for j in range(columns):
                block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
                scale[i, j] = weight[block].abs().max() / 448.0
                weight[block] /= scale[i, j]
        codes = weight.to(torch.float8_e4m3fn)
        spread = scale.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)[:, : weight.shape[1]]
        named[name], named[f"{name}_scale_inv"] = codes, scale
        expected[name] = codes.float() * spread
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    form = {"weight_block_size": [128, 128], "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
    set_config(folder, quantization_config={"quant_method": "fp8", **form})
    base = loaded(folder, "float32")
    found = dense_state_dict(base.model, torch.float32)
    for name, value in expected.items():
        tiny.close(found[name], value, rtol=1e-2)
    loaded(folder, "nf4")
    save_model(base.model, str(tmp_path / "out"), torch.float32)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(found)


@pytest.mark.parametrize("precision", ["float32", "nf4"])
def test_an_mxfp4_checkpoint_is_brought_to_the_asked_precision(tmp_path: Path, precision: str) -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}
    config = AutoConfig.for_model(
        "gpt_oss", vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=64, num_local_experts=3,
        num_experts_per_tok=2, sliding_window=5, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes,
    )  # fmt: skip
    folder = tiny.write(tmp_path / "mxfp4", AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    named = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    expected: dict[str, Tensor] = {}
    for name in [n for n in named if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inner, outer = named.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outer, inner // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(122, 127, (experts, outer, inner // 32), generator=generator, dtype=torch.uint8)
        named[f"{name}_blocks"], named[f"{name}_scales"] = blocks, scales
        pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], -1).flatten(-2)
        weight = pairs * (2.0 ** (scales.float() - 127))[..., None]  # (experts, outer, inner / 32, 32)
        expected[name] = weight.flatten(-2).transpose(1, 2)
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    set_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    base = loaded(folder, precision)
    found = dense_state_dict(base.model, torch.float32)
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm()
        assert error == 0 if precision == "float32" else error < 0.12
    save_model(base.model, str(tmp_path / "out"), torch.float32)
    tiny.close(tiny.plain_logits(tiny.plain(tmp_path / "out"), tiny.ids()), tiny.base_logits(base, tiny.ids(), slot=0))


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "of_tomorrow"])
def test_other_quantizations_are_refused_by_name(copy: Path, method: str) -> None:
    set_config(copy, quantization_config={"quant_method": method, "bits": 4})
    refused(copy, f"already quantized with '{method}'", "16-bit original")
