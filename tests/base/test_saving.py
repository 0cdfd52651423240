"""What is saved is what transformers would save."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from graftlm.base.loading import load_base
from graftlm.base.saving import dense_state_dict, save_model

every = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)


@every
def test_the_dense_state_is_what_transformers_saves_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    base = load_base(str(tiny.folder(architecture)), compute_dtype="float32", device="cpu")
    state = dense_state_dict(base.model, torch.float32)
    model = tiny.plain(base.folder)
    own = model.state_dict()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set[str]()
    assert set(state) == set(own) - tied
    assert all(torch.equal(value, own[name]) for name, value in state.items())
    save_model(base.model, str(tmp_path), torch.float32)
    source, written = load_file(base.folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(written) == set(source)
    assert all(torch.equal(value, source[name]) for name, value in written.items())
    settings = [json.loads((place / "config.json").read_text()) for place in (base.folder, tmp_path)]
    assert settings[0] == settings[1]
