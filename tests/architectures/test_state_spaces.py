"""State space models: PEFT refuses an adapter on their out_proj, so the usual targets leave it out; who names it is told."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import coverage, notes_for_peft, select_layers
from graftlm.adapters.export import export_adapter
from graftlm.adapters.patterns import refused_by_peft
from graftlm.base.loading import Base, load_base
from graftlm.config import ExportConfig
from graftlm.errors import AdapterError
from graftlm.planning.instantiate import instantiate
from graftlm.planning.method import adapter_shape
from graftlm.training.view import View

_ATTENTION: dict[str, Any] = {
    "intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 6},
    "falcon_h1": {**_ATTENTION, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1,
                  "mamba_d_state": 6},
    "nemotron_h": {**_ATTENTION, "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8,
                   "ssm_state_size": 6, "n_groups": 1},
}  # fmt: skip


def loaded(kind: str, place: Path) -> Base:
    config = AutoConfig.for_model(
        kind, vocab_size=tiny.VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
        hidden_size=32, num_hidden_layers=2, **KINDS[kind],
    )  # fmt: skip
    torch.manual_seed(0)
    tiny.write(place, AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    return load_base(str(place), precision="float32", compute_dtype="float32", device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_the_usual_adapter_is_one_that_peft_reads(kind: str, tmp_path: Path) -> None:
    base = loaded(kind, tmp_path / "base")
    adapter = tiny.adapted(base)
    assert adapter.slots
    assert not [name for name in adapter.slots if name.endswith("out_proj")]
    folder = tmp_path / "adapter"
    folder.mkdir()
    adapter_format.save(base, adapter, folder, {})
    peft = tiny.read_peft(tiny.plain(base.folder), folder)
    tiny.close(tiny.base_logits(base, tiny.ids()), tiny.plain_logits(peft, tiny.ids()))
    (note,) = notes_for_peft(base, adapter.slots)
    view = View(Console(file=io.StringIO(), width=200))
    view.coverage(coverage(base, adapter), adapter, [note])
    assert "left out: " in view.console.file.getvalue()  # type: ignore[attr-defined]
    planned = adapter_shape(instantiate(base.model.config), ("all-linear",), 3)
    assert sum(planned.layers.values()) == len(adapter.slots)
    assert not [name for name in select_layers(base, ("mlp",)) if name.endswith("out_proj")]


def test_who_names_such_a_layer_is_told_that_peft_will_not_read_it(tmp_path: Path) -> None:
    base = loaded("mamba2", tmp_path / "base")
    adapter = tiny.adapted(base, targets=("in_proj", "out_proj"))
    (note,) = notes_for_peft(base, adapter.slots)
    assert "PEFT will refuse its files" in note
    folder = tmp_path / "adapter"
    folder.mkdir()
    adapter_format.save(base, adapter, folder, {"base": {"architecture": type(base.model).__name__}})
    assert set(adapter_format.load(base, folder).slots) == set(adapter.slots), "it is read here"
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        tiny.read_peft(tiny.plain(base.folder), folder)
    with pytest.raises(AdapterError, match="PEFT refuses adapters on out_proj of a Mamba2ForCausalLM"):
        export_adapter(ExportConfig.build({"version": str(folder), "out": tmp_path / "out"}))
    assert not (tmp_path / "out").exists()


def test_other_models_have_nothing_that_peft_refuses() -> None:
    base = load_base(str(tiny.folder("opt")), device="cpu")
    adapter = tiny.adapted(base)
    assert [name for name in adapter.slots if name.endswith("out_proj")]
    assert notes_for_peft(base, adapter.slots) == []


def test_the_models_are_those_that_peft_has() -> None:
    for kind, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for name in ("out_proj", "in_proj"):
            model = SimpleNamespace(config=SimpleNamespace(model_type=kind))
            try:
                _check_lora_target_modules_mamba(SimpleNamespace(peft_type="LORA"), model, name)  # type: ignore[arg-type]
            except ValueError:
                assert refused_by_peft(architecture, f"layers.0.mixer.{name}"), kind
            else:
                assert not refused_by_peft(architecture, f"layers.0.mixer.{name}"), kind
