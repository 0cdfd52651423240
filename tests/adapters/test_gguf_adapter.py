"""An adapter as a GGUF file: its pairs are the adapter's own in the base file's order, and llama.cpp computes with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stores
import tiny
import tiny_run
import torch
from merging import saved
from tiny_gguf import merging_tokenizer
from torch import Tensor
from typer.testing import CliRunner

from graftlm.adapters import gguf_adapter
from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import attach
from graftlm.adapters.export import export_adapter
from graftlm.adapters.gguf import write_gguf
from graftlm.adapters.layer_adapter import LowRank
from graftlm.adapters.store import Store
from graftlm.base.loading import Base, load_base
from graftlm.base.meta_base import load_meta_base
from graftlm.cli import app
from graftlm.config import ExportConfig
from graftlm.errors import AdapterError, ConfigError, ModelError, RunError
from graftlm.gguf.layout import layout_for

gguf = pytest.importorskip("gguf")

SIX = ["sliding_attention"] * 5 + ["full_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 10},
    "gemma3": {"num_hidden_layers": 6, "query_pre_attn_scalar": 10, "layer_types": SIX},
}
PLACES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
PLANS: dict[str, dict[str, Any]] = {
    "one scale": {"rank": 3, "alpha": 5.0},
    "rank-stabilized": {"rank": 3, "alpha": 5.0, "rank_stabilized": True},
    "ranks and scales of their own": {
        "targets": ("q_proj", "k_proj", "down_proj"), "ranks": {"k_proj": 9}, "alphas": {"down_proj": 11.0},
    },
    "ranks of their own, rank-stabilized": {
        "targets": ("q_proj", "o_proj"), "ranks": {"q_proj": 7}, "rank_stabilized": True,
    },
}  # fmt: skip


def loaded(architecture: str) -> Base:
    return load_base(str(tiny.folder(architecture)), precision="float32", compute_dtype="float32", device="cpu")


def exported(version: Path | str, out: Path, **options: Any) -> dict[str, Any]:
    return export_adapter(ExportConfig.build({"version": str(version), "out": out, "for": "gguf", **options}))


def updates(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    """alpha / r B A of each tensor of the base, (out, in), as llama.cpp adds it."""
    reader = gguf.GGUFReader(str(file))
    alpha = reader.fields["adapter.lora.alpha"].contents()
    found = {t.name: np.asarray(t.data, dtype=np.float32) for t in reader.tensors}
    pairs = {name.removesuffix(".lora_a") for name in found if name.endswith(".lora_a")}
    assert found.keys() == {f"{name}.lora_{letter}" for name in pairs for letter in "ab"}
    return {n: alpha / len(found[f"{n}.lora_a"]) * (found[f"{n}.lora_b"] @ found[f"{n}.lora_a"]) for n in pairs}


def in_halves(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's order of q's and k's rows undone: rows 2j and 2j + 1 of a head are rows j and j + D/2 of the checkpoint."""
    width = len(rows) // heads
    places = [h * width + 2 * (i % (width // 2)) + i // (width // 2) for h in range(heads) for i in range(width)]
    return rows[places]


def expected(base: Base, folder: Path) -> dict[str, Tensor]:
    """s B A of each adapted layer, under its name in a GGUF file."""
    found: dict[str, Tensor] = {}
    for layer, part in adapter_format.load(base, folder).layers.items():
        assert isinstance(part, LowRank)
        parts = layer.split(".")  # model.layers.0.self_attn.q_proj, or lm_head
        place = f"blk.{parts[2]}.{PLACES[parts[-1]]}.weight" if len(parts) > 1 else "output.weight"
        found[place] = (part.scale * part.B @ part.A).detach()
    return found


def compare(base: Base, folder: Path, file: Path, rtol: float = 1e-5) -> None:
    wanted, found = expected(base, folder), updates(file)
    assert found.keys() == wanted.keys()
    reordered = base.model.config.model_type in ("llama", "mistral")
    for place, update in wanted.items():
        heads = {"attn_q": 4, "attn_k": 2}.get(place.split(".")[-2]) if reordered else None
        rows = found[place] if heads is None else in_halves(found[place], heads)
        tiny.close(torch.from_numpy(rows), update, rtol=rtol)


@pytest.mark.parametrize(
    ("architecture", "which"),
    [*(("llama", plan) for plan in PLANS), *((a, "ranks and scales of their own") for a in MODELS if a != "llama")],
)
def test_one_alpha_and_the_pairs_give_the_update_of_every_layer(architecture: str, which: str, tmp_path: Path) -> None:
    base = loaded(architecture)
    folder = saved(base, tmp_path / "a", **PLANS[which])
    done = exported(folder, tmp_path / "a.gguf")
    compare(base, folder, tmp_path / "a.gguf")
    fields = gguf.GGUFReader(str(tmp_path / "a.gguf")).fields
    told = {
        key: fields[key].contents()
        for key in ("general.type", "adapter.type", "general.architecture", "general.base_model.0.name")
    }
    name = {"mistral": "llama"}.get(architecture, architecture)
    assert told == {
        "general.type": "adapter", "adapter.type": "lora", "general.architecture": name,
        "general.base_model.0.name": architecture,
    }  # fmt: skip
    assert done["architecture"] == name
    assert done["tensors"] == 2 * len(updates(tmp_path / "a.gguf"))
    assert done["bytes"] == (tmp_path / "a.gguf").stat().st_size
    assert bool(done["rescaled_layers"]) == ("of their own" in which)


def test_the_head_of_its_own_is_adapted_as_output(tmp_path: Path) -> None:
    base = loaded("llama")
    folder = tmp_path / "a"
    peft = tiny.with_peft(tiny.plain(tiny.folder("llama")), tiny.peft_config(target_modules=["lm_head", "v_proj"]))
    peft.save_pretrained(folder)
    exported(folder, tmp_path / "a.gguf", model=str(tiny.folder("llama")))
    compare(base, folder, tmp_path / "a.gguf")
    assert "output.weight" in updates(tmp_path / "a.gguf")


def test_pefts_own_adapter_is_written_for_the_base_that_it_names(tmp_path: Path) -> None:
    lora = tiny.peft_config(target_modules=["q_proj", "o_proj"], use_rslora=True, rank_pattern={"o_proj": 5})
    peft = tiny.with_peft(tiny.plain(tiny.folder("qwen2")), lora)
    peft.save_pretrained(tmp_path / "a")
    exported(tmp_path / "a", tmp_path / "a.gguf", model=str(tiny.folder("qwen2")))
    compare(loaded("qwen2"), tmp_path / "a", tmp_path / "a.gguf")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tiny.folder("qwen2"))})
    )
    exported(tmp_path / "a", tmp_path / "b.gguf")
    assert updates(tmp_path / "b.gguf").keys() == updates(tmp_path / "a.gguf").keys()


def test_a_version_of_the_store_is_written_by_its_alias(tmp_path: Path) -> None:
    run = tiny_run.train(tmp_path)
    store = Store(tmp_path / "store")
    store.publish(tmp_path / "run", "formal")
    store.alias("formal", "prod", 1)
    done = exported("formal@prod", tmp_path / "a.gguf", store=store.root)
    compare(
        load_base(str(tiny_run.folder()), precision="float32", compute_dtype="float32", device="cpu"),
        Path(run["adapter_folder"]), tmp_path / "a.gguf",
    )  # fmt: skip
    assert (done["rank"], done["alpha"], done["type"], done["for"]) == (3, 7.0, "f32", "gguf")
    assert any("llama.cpp compares only architecture and shapes" in note for note in done["notes"])


def test_f16_rounds_each_value_once_and_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    base = loaded("llama")
    folder = saved(base, tmp_path / "a", targets=("q_proj", "down_proj"))
    exported(folder, tmp_path / "a.gguf", gguf_type="f16")
    compare(base, folder, tmp_path / "a.gguf", rtol=2e-3)
    assert {t.tensor_type.name for t in gguf.GGUFReader(str(tmp_path / "a.gguf")).tensors} == {"F16"}
    adapter = adapter_format.load(base, folder)
    layout = layout_for(load_meta_base(str(tiny.folder("llama"))).plain.config, AdapterError, "")
    for factor in (1e6, 1e-13):
        parts = {n: s for n, s in adapter.layers.items() if isinstance(s, LowRank)}
        with torch.no_grad():
            parts["model.layers.1.mlp.down_proj"].B.mul_(factor)
        with pytest.raises(AdapterError, match=r"lora_B of 'model.layers.1.mlp.down_proj' .* take --gguf-type f32"):
            gguf_adapter.for_llama_cpp(layout, parts, "f16")
        gguf_adapter.for_llama_cpp(layout, parts, "f32")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "DoRA": ("llama", {"dora": True}, "served by llama.cpp: it is a DoRA adapter"),
    "a whole head": ("llama", {"modules_to_save": ("head",)}, "'lm_head' is trained in full or by token rows"),
    "token rows": ("qwen3", {"trainable_tokens": (5, 11)}, "'model.embed_tokens' is trained in full or by token rows"),
    "stacks of experts": ("mixtral", {"targets": ("down_proj",)}, "this is a mixtral; export a PEFT folder"),
    "another architecture": ("gpt2", {"targets": ("c_attn",)}, "this is a gpt2; export a PEFT folder"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_llama_cpp_has_no_place_for_is_refused_with_the_way_out(which: str, tmp_path: Path) -> None:
    architecture, plan, message = REFUSED[which]
    folder = saved(loaded(architecture), tmp_path / "a", **{"targets": ("q_proj",), **plan})
    with pytest.raises(AdapterError, match=message) as raised:
        exported(folder, tmp_path / "a.gguf")
    assert "merged --gguf merged.gguf" in str(raised.value) or "convert_lora_to_gguf.py" in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_head_tied_to_the_embedding_is_refused(tmp_path: Path) -> None:
    peft = tiny.with_peft(tiny.plain(tiny.folder("qwen3")), tiny.peft_config(target_modules=["lm_head", "v_proj"]))
    peft.save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match="a head that is tied to the embedding, and a GGUF file then has no tensor"):
        exported(tmp_path / "a", tmp_path / "a.gguf", model=str(tiny.folder("qwen3")))


def test_pefts_biases_are_refused(tmp_path: Path) -> None:
    peft = tiny.with_peft(
        tiny.plain(tiny.folder("qwen2")), tiny.peft_config(target_modules=["q_proj"], bias="lora_only")
    )
    peft.save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match="bias"):
        exported(tmp_path / "a", tmp_path / "a.gguf", model=str(tiny.folder("qwen2")))


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    folder = stores.adapter(tmp_path / "a")
    (tmp_path / "a.gguf").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"a\.gguf is there already; name a new file"):
        exported(folder, tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == b"mine"


@pytest.mark.parametrize("harm", ["a value", "a row", "the alpha"])
def test_a_file_that_differs_from_what_was_meant_never_gets_its_name(
    harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(loaded("llama"), tmp_path / "a", targets=("q_proj",))
    writer = gguf.GGUFWriter
    tensor, number = writer.add_tensor, writer.add_float32

    def add_tensor(self: Any, name: str, value: Any) -> None:
        changed = value + 1 if harm == "a value" else value[1:] if harm == "a row" and name.endswith("_a") else value
        tensor(self, name, changed)

    monkeypatch.setattr(writer, "add_tensor", add_tensor)
    monkeypatch.setattr(writer, "add_float32", lambda self, key, v: number(self, key, v + (harm == "the alpha")))
    with pytest.raises(AdapterError, match=r"in a\.gguf differs from what was written; the file was removed"):
        exported(folder, tmp_path / "a.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(loaded("llama"), tmp_path / "a", targets=("q_proj",))

    def full(self: Any, *args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(RunError, match=r"a\.gguf cannot be written: No space left on device; nothing is left of it"):
        exported(folder, tmp_path / "a.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"for": "gguf", "out": "a"}, "--for gguf writes one file, whose name ends in .gguf, found 'a'"),
        ({"out": "a.gguf"}, "--for peft writes a folder, and 'a.gguf' names a GGUF file; add --for gguf"),
        ({"for": "vllm", "out": "a", "gguf_type": "f16"}, "--gguf-type is for --for gguf; leave it out"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExportConfig.build({"version": "formal", **options})


@pytest.mark.parametrize("flags", [["formal@1", "--gguf", "a.gguf"], ["formal@1", "a.gguf", "--for", "gguf"]])
def test_both_words_for_the_format_lead_there(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read, found = ExportConfig.read, list[ExportConfig]()

    def keep(path: Any, given: dict[str, Any]) -> ExportConfig:
        found.append(read(path, given))
        raise ConfigError("enough")

    monkeypatch.setattr(ExportConfig, "read", keep)
    CliRunner().invoke(app, ["adapters", "export", *flags])
    assert [(config.version, str(config.out), config.for_) for config in found] == [("formal@1", "a.gguf", "gguf")]


def test_without_the_gguf_package_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(loaded("llama"), tmp_path / "a", targets=("q_proj",))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'graftlm\[gguf\]'"):
        exported(folder, tmp_path / "a.gguf")


# ---- beside llama.cpp ------------------------------------------------------------------------------------------------


def base_file(architecture: str, place: Path) -> Path:
    """A tiny model as a GGUF file that llama.cpp loads."""
    # transformers adds a token of its own to this tokenizer for qwen2
    words = len(merging_tokenizer()) + (architecture == "qwen2")
    tiny.random_model(architecture, vocab_size=words, **MODELS[architecture]).save_pretrained(place / "model")
    merging_tokenizer().save_pretrained(place / "model")
    write_gguf(place / "model", place / "base.gguf", "f32")
    return place / "base.gguf"


def llama_cpp_logits(base: Path, ids: Tensor, adapter: Path | None = None) -> Tensor:
    """Logits (T, vocabulary) of llama.cpp with a KV cache in float32."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = llama_cpp.Llama(
        model_path=str(base), lora_path=None if adapter is None else str(adapter), n_ctx=256, n_threads=1, logits_all=True,
        type_k=0, type_v=0, flash_attn=False, verbose=False,
    )  # fmt: skip
    try:
        model.eval(ids.tolist())
        return torch.from_numpy(np.array(model.scores[: len(ids)]))
    finally:
        model.close()


@pytest.mark.parametrize("architecture", [a for a in MODELS if a != "mistral"])  # a mistral is a llama in GGUF
def test_llama_cpp_computes_with_base_and_adapter_what_graft_computes(architecture: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    file = base_file(architecture, tmp_path)
    base = load_base(str(file), precision="gguf", compute_dtype="float32", device="cpu")
    folder = saved(
        base, tmp_path / "a", rank_stabilized=True, ranks={"k_proj": 5, "down_proj": 2}, alphas={"q_proj": 9.0}
    )
    done = exported(folder, tmp_path / "a.gguf")
    assert done["notes"] == [f"use it with: llama-cli -m {file} --lora {tmp_path / 'a.gguf'}"]
    ids = tiny.ids(20)
    plain = tiny.base_logits(base, ids, slot=0)
    attach(base, adapter_format.load(base, folder), slot=1)
    ours = tiny.base_logits(base, ids, slot=1)
    theirs = llama_cpp_logits(file, ids, tmp_path / "a.gguf")
    assert (theirs - llama_cpp_logits(file, ids)).norm() > 0.1 * plain.norm()
    rounding = 2e-3 if architecture.startswith("gemma") else 1e-5  # llama.cpp's GELU is a table in float16
    assert (theirs - ours).norm() < rounding * ours.norm()
