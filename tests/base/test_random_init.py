"""Random weights: of the size and the parts of the real model, no weight twice, the same for the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from graftlm.base.loading import load_base, random_base
from graftlm.base.modules import Stored
from graftlm.base.precision import nbytes
from graftlm.base.random_init import random_model
from graftlm.base.saving import dense_state_dict
from graftlm.config import Precision


def _made(architecture: str, precision: Precision, **more: Any) -> Any:
    return random_base(
        tiny.config(architecture), tiny.tokenizer(), precision=precision, compute_dtype="float32", device="cpu", **more
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "gpt2", "falcon", "qwen3_moe"])
def test_a_random_base_has_every_value_and_buffer_of_a_model_built_the_plain_way(architecture: str) -> None:
    base, plain = _made(architecture, "nf4"), random_model(tiny.config(architecture), 0, False)
    assert base.parameters == sum(p.numel() for p in plain.parameters())
    found = dict(base.model.named_buffers())
    for name, buffer in plain.named_buffers():
        assert torch.equal(found[name].float(), buffer.float()), name
    tensors = [*base.model.parameters(), *base.model.buffers()]
    assert not any(t.is_meta for t in tensors)
    assert all(bool(t.isfinite().all()) for t in tensors)


def test_a_random_base_stores_what_its_precision_says_and_ties_what_the_config_ties() -> None:
    base = _made("qwen3", "nf4")
    stored = [m for m in base.stored().values() if m is not base.structure.head]
    assert stored
    assert all(m.dense is None and nbytes(m.compressed) < m.compressed.numel for m in stored)
    assert base.structure.head.weight is base.structure.embedding.weight
    assert base.random
    assert base.fingerprint == "random"


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    first, again, other = (_made("llama", "bfloat16", seed=seed) for seed in (3, 3, 4))
    states = [dense_state_dict(base.model, torch.float32) for base in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["model.embed_tokens.weight"], states[2]["model.embed_tokens.weight"])
    weight = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(states[0][weight], states[2][weight])
    assert states[0][weight].std() == pytest.approx(0.02, rel=0.1)


def test_random_weights_depend_on_the_seed_alone() -> None:
    config = tiny.config("qwen2")
    torch.manual_seed(5)
    first = random_model(config, 3, False).state_dict()
    torch.manual_seed(6)
    again, other = random_model(config, 3, False).state_dict(), random_model(config, 4, False).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_random_weights_are_never_taken_for_the_folders(tmp_path: Path) -> None:
    tiny.config("llama").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    base = load_base(str(tmp_path), init="random", seed=2, device="cpu")
    assert base.random
    assert base.fingerprint == "random"
    assert all(isinstance(m, Stored) for m in base.stored().values())
