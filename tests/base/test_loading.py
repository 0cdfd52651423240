"""Finding, checking and loading a base: what is read, what is refused and with which words."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.cuda._utils import _get_device_index
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from graftlm import kernels
from graftlm.base.context import ForwardContext
from graftlm.base.loading import Base, default_device, load_base, load_tokenizer, resolve
from graftlm.base.modules import Stored
from graftlm.base.precision import default_compute_dtype
from graftlm.base.saving import dense_state_dict, save_model
from graftlm.errors import ModelError
from graftlm.segments import Segments


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A llama's folder that a test may change."""
    return Path(shutil.copytree(tiny.folder("llama"), tmp_path / "llama"))


def loaded(place: Path, precision: Any = "float32") -> Base:
    return load_base(str(place), precision=precision, compute_dtype="float32", device="cpu")


def refused(place: Path | str, *words: str, **options: Any) -> None:
    with pytest.raises(ModelError) as error:
        load_base(str(place), device="cpu", **options)
    for word in words:
        assert word in str(error.value), str(error.value)


def change(folder: Path, act: Callable[[dict[str, Tensor]], Any]) -> None:
    named = load_file(folder / "model.safetensors")
    act(named)
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(values)
    (folder / "config.json").write_text(json.dumps(config))


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


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "nf4"])
def test_tied_embeddings_stay_one_tensor_and_are_counted_once(precision: str) -> None:
    base = loaded(tiny.folder("qwen3"), precision)
    embedding: Any = base.structure.embedding
    assert base.structure.head.weight is embedding.weight
    plain = tiny.plain(base.folder)
    assert base.parameters == sum(p.numel() for p in plain.parameters())
    if precision != "nf4":
        narrow = sum(p.numel() for p in plain.parameters() if p.ndim > 1)
        norms = base.parameters - narrow
        assert base.bytes == narrow * (4 if precision == "float32" else 2) + norms * 4


def test_bytes_are_those_of_every_stored_form() -> None:
    base = loaded(tiny.folder("llama"), "nf4")
    expected = 0
    for name, parameter in tiny.plain(base.folder).named_parameters():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            expected += 2 * parameter.numel()
        elif parameter.ndim == 1:
            expected += 4 * parameter.numel()
        else:
            blocks = -(-parameter.numel() // 64)
            expected += -(-parameter.numel() // 2) + blocks + 4 * -(-blocks // 256) + 4
    assert base.bytes == expected


def test_a_16_bit_checkpoint_is_read_bit_for_bit(tmp_path: Path) -> None:
    model = tiny.random_model("gpt2").to(torch.bfloat16)
    base = loaded(tiny.write(tmp_path, model), "bfloat16")
    found = dense_state_dict(base.model, torch.bfloat16)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.items())


# ---- names and folders -----------------------------------------------------------------------------------------------


def test_a_name_that_is_nothing_is_refused(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "./nowhere", "nowhere", "a/b/c"):
        refused(name, "neither a directory nor a hub id", name)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "no config.json")


def test_a_folder_without_weights_is_refused_unless_the_weights_are_random(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    refused(copy, "has no weights", "--init random")
    assert load_base(str(copy), init="random", device="cpu").random


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_folder_with_pickles_alone_is_refused_with_how_to_convert_it(copy: Path, name: str) -> None:
    (copy / "model.safetensors").unlink()
    (copy / name).write_bytes(b"\x80\x04not to be read.")
    refused(copy, "only pickle weights", name, "save_pretrained")


def test_pickles_beside_safetensors_are_left_alone(copy: Path) -> None:
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04not to be read.")
    loaded(copy)


def test_a_folder_without_tokenizer_is_refused(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    refused(copy, "no tokenizer")
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(copy)


def test_an_unknown_architecture_is_refused(copy: Path) -> None:
    set_config(copy, model_type="from_the_future")
    refused(copy, "config.json is not understood", "from_the_future")


def test_a_broken_config_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    refused(copy, "config.json")


def test_a_model_that_is_no_causal_language_model_is_refused(copy: Path) -> None:
    set_config(copy, model_type="vit", architectures=["ViTModel"])
    refused(copy, "vit")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ModelError, match="unknown device 'gpu'"):
        default_device("gpu")


# ---- damaged weights -------------------------------------------------------------------------------------------------


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


# ---- code and the network --------------------------------------------------------------------------------------------


def test_a_models_own_code_does_not_run_unless_it_is_asked_for(copy: Path, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    (copy / "modeling_own.py").write_text(
        f"open({str(proof)!r}, 'w').write('ran')\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    set_config(
        copy, model_type="own",
        auto_map={"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"},
    )  # fmt: skip
    refused(copy, "--trust-remote-code")
    assert not proof.exists()


HUB = """
import sys
from graftlm.base.loading import load_base
from graftlm.errors import ModelError
try:
    base = load_base(sys.argv[1], device="cpu")
    print("loaded", base.parameters, base.fingerprint)
except ModelError as error:
    print("refused", error)
"""


@pytest.fixture
def hub(tmp_path: Path) -> Any:
    """A stub of the hub on this machine that has one model, `someone/tiny`, and a pickle that nobody may fetch."""
    from stub_hub import Hub

    folder = Path(shutil.copytree(tiny.folder("llama"), tmp_path / "served"))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04not to be read.")
    with Hub({"someone/tiny": folder}) as running:
        yield running


def ask_hub(name: str, endpoint: str, tmp_path: Path, **environment: str) -> str:
    import os

    settings = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        **environment,
    }  # fmt: skip
    found = subprocess.run([sys.executable, "-c", HUB, name], capture_output=True, text=True, env=settings, timeout=120)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip().splitlines()[-1]


def test_a_model_is_fetched_from_the_hub_by_its_id_without_its_pickles(hub: Any, tmp_path: Path) -> None:
    base = loaded(tiny.folder("llama"))
    assert ask_hub("someone/tiny", hub.endpoint, tmp_path) == f"loaded {base.parameters} {base.fingerprint}"
    assert not [path for path in hub.asked if path.endswith(".bin")]
    hub.asked.clear()
    assert ask_hub("someone/tiny", hub.endpoint, tmp_path, HF_HUB_OFFLINE="1").startswith("loaded")
    assert not hub.asked


def test_an_id_that_the_hub_does_not_know_is_refused(hub: Any, tmp_path: Path) -> None:
    found = ask_hub("someone/else", hub.endpoint, tmp_path)
    assert "no model 'someone/else' on the hub" in found


def test_a_hub_that_cannot_be_reached_is_an_error_with_the_models_name(tmp_path: Path) -> None:
    found = ask_hub("someone/tiny", "http://127.0.0.1:9", tmp_path)
    assert found.startswith("refused")
    assert "'someone/tiny' is not a directory here and the hub did not give it" in found


def test_resolving_a_folder_gives_the_folder() -> None:
    assert resolve(str(tiny.folder("llama"))) == tiny.folder("llama")


def test_the_linear_layers_are_replaced_and_nothing_else_is() -> None:
    base = loaded(tiny.folder("llama"))
    plain = {name: type(m).__name__ for name, m in tiny.plain(base.folder).named_modules()}
    found = {name: type(m).__name__ for name, m in base.model.named_modules()}
    assert set(found) == set(plain)
    assert {found[name] for name, kind in plain.items() if kind == nn.Linear.__name__} == {"StoredLinear"}
    assert found["model.embed_tokens"] == "StoredEmbedding"
    assert {name: kind for name, kind in found.items() if not kind.startswith("Stored")} == {
        name: kind for name, kind in plain.items() if kind not in ("Linear", "Embedding")
    }


def test_a_plain_cuda_is_the_current_device_and_a_numbered_one_becomes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    # What the real one does first; it raises ValueError for a device without a number.
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(_get_device_index(device)))
    assert default_device("cuda") == torch.device("cuda")
    assert default_device("cuda:1") == torch.device("cuda:1")
    assert chosen == [1]


def test_mixed_compute_is_refused_where_the_processor_has_no_bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftlm.kernels.has_bf16_matmul", lambda: False)
    with pytest.raises(ModelError, match="compute-dtype bf16-mixed needs a CPU that multiplies bfloat16"):
        load_base(str(tiny.folder("llama")), compute_dtype="bf16-mixed", device="cpu")


@pytest.mark.parametrize(("flags", "has_bf16_matmul", "training", "elsewhere"), [
    ("amx_bf16", True, "bfloat16", "bfloat16"), ("avx512_bf16", True, "bf16-mixed", "float32"),
    ("avx2", False, "float32", "float32"),
])  # fmt: skip
def test_training_takes_the_products_that_are_fastest_on_this_processor(
    flags: str, has_bf16_matmul: bool, training: str, elsewhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftlm.kernels.has_bf16_matmul", lambda: has_bf16_matmul)
    monkeypatch.setattr("graftlm.base.precision._cpu_multiplies_bfloat16_faster", lambda: flags == "amx_bf16")
    assert default_compute_dtype(torch.device("cpu"), training=True) == training
    assert default_compute_dtype(torch.device("cpu")) == elsewhere


def test_mixed_compute_narrows_every_stored_product_and_keeps_the_states_in_float32() -> None:
    if not kernels.has_bf16_matmul():
        pytest.skip("this processor has no bfloat16 instructions")
    base = load_base(str(tiny.folder("llama")), compute_dtype="bf16-mixed", device="cpu")
    stored = [module for module in base.model.modules() if isinstance(module, Stored)]
    assert stored
    assert all(module.bf16_matmul for module in stored)
    assert base.activation_dtype == torch.float32
    with ForwardContext(Segments(lengths=(1,), slots=(0,)), bf16_matmul=False):
        assert not any(module.bf16_matmul for module in stored)
    assert all(module.bf16_matmul for module in stored)
