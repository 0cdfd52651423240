"""Finding, checking and loading a base: what is read, what is refused and with which words."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from checkpoint_folders import loaded, refused, set_config
from torch.cuda._utils import _get_device_index

from graftlm import kernels
from graftlm.base.context import ForwardContext
from graftlm.base.loading import default_device, load_base, load_tokenizer, resolve
from graftlm.base.modules import Stored
from graftlm.base.precision import default_compute_dtype
from graftlm.errors import ModelError
from graftlm.segments import Segments


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


def test_a_plain_cuda_is_the_current_device_and_a_numbered_one_becomes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    # What the real one does first; it raises ValueError for a device without a number.
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(_get_device_index(device)))
    assert default_device("cuda") == torch.device("cuda")
    assert default_device("cuda:1") == torch.device("cuda:1")
    assert chosen == [1]


def test_bf16_mixed_is_refused_if_the_processor_has_no_bfloat16_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftlm.kernels.has_bf16_matmul", lambda: False)
    with pytest.raises(ModelError, match="compute-dtype bf16-mixed needs a CPU that multiplies bfloat16"):
        load_base(str(tiny.folder("llama")), compute_dtype="bf16-mixed", device="cpu")


@pytest.mark.parametrize(("flags", "has_bf16_matmul", "training", "elsewhere"), [
    ("amx_bf16", True, "bfloat16", "bfloat16"), ("avx512_bf16", True, "bf16-mixed", "float32"),
    ("avx2", False, "float32", "float32"),
])  # fmt: skip
def test_training_uses_the_compute_dtype_that_is_fastest_on_this_processor(
    flags: str, has_bf16_matmul: bool, training: str, elsewhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftlm.kernels.has_bf16_matmul", lambda: has_bf16_matmul)
    monkeypatch.setattr("graftlm.base.precision._cpu_multiplies_bfloat16_faster", lambda: flags == "amx_bf16")
    assert default_compute_dtype(torch.device("cpu"), training=True) == training
    assert default_compute_dtype(torch.device("cpu")) == elsewhere


def test_bf16_mixed_uses_bfloat16_in_every_stored_matmul_and_keeps_the_states_in_float32() -> None:
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
