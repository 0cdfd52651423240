"""What the installed transformers lacks is said with the release that has it, and what it leaves out is put right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from checkpoint_folders import loaded, refused, set_config
from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

from graftlm.base import transformers_versions
from graftlm.base.transformers_versions import BELOW, INSTALLED, missing_class


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table in which types come with releases that nobody has yet."""
    first = {"late": "5.99", "later": "6.1", "llama": "5.1", "vit": "5.98"}
    (tmp_path / "first.json").write_text(json.dumps({"surveyed": "6.1", "first_release": first}))
    monkeypatch.setattr(transformers_versions, "FIRST_RELEASES", tmp_path / "first.json")


def test_a_type_of_a_later_release_is_refused_with_how_to_get_that(copy: Path, table: None) -> None:
    set_config(copy, model_type="late")
    missing = f"transformers {INSTALLED} has no causal language model of type 'late'"
    refused(copy, "config.json is not understood", missing, f'5.99 has one: pip install "transformers>=5.99,<{BELOW}"')


def test_a_type_whose_release_graft_does_not_take_needs_a_newer_graft(copy: Path, table: None) -> None:
    set_config(copy, model_type="later")
    refused(copy, "transformers 6.1 has one: this Graft takes transformers >=5.17,<6, so a newer Graft is needed")


def test_a_known_type_that_gets_its_causal_model_later_is_refused_with_the_release(copy: Path, table: None) -> None:
    set_config(copy, model_type="vit", architectures=["ViTModel"])
    refused(copy, "of type 'vit'; transformers 5.98 has one: pip install")


def test_an_unknown_type_of_a_model_that_a_newer_release_saved_names_that_release(copy: Path, table: None) -> None:
    set_config(copy, model_type="from_the_future", transformers_version="5.97.0.dev0")
    refused(copy, 'saved with transformers 5.97.0, which is newer: pip install "transformers>=5.97.0,<6"')
    set_config(copy, transformers_version="7.0.1")
    refused(
        copy, "saved with transformers 7.0.1, which is newer: this Graft takes transformers >=5.17,<6, so a newer Graft"
    )


@pytest.mark.parametrize("version", ["4.40.0", "none", "", 7, None, ["5.99"], "9" * 5000])
def test_a_version_that_is_older_or_none_is_no_hint(version: Any, table: None) -> None:
    found = missing_class({"model_type": "lama", "transformers_version": version})
    assert found == (
        f"transformers {INSTALLED} has no causal language model of type 'lama', did you mean 'llama'? "
        "No release up to 6.1 has one; model_type in config.json names the architecture"
    )


def test_the_way_out_of_a_models_own_code_is_given_where_it_has_some(copy: Path) -> None:
    set_config(copy, model_type="from_the_future")
    with pytest.raises(Exception) as error:
        loaded(copy)
    assert "--trust-remote-code" not in str(error.value)
    set_config(copy, auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    refused(copy, "--trust-remote-code")


def test_gemma2s_attention_scores_are_capped_where_transformers_chooses_one_without_the_cap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = tiny.plain_logits(tiny.plain(tiny.folder("gemma2")), tiny.ids(13))
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)  # as before 5.21
    base = loaded(tiny.folder("gemma2"))
    assert base.packs
    assert base.original_attention == "eager"
    assert [note for note in base.notes if "cannot cap attention scores" in note]
    with torch.no_grad():
        tiny.close(tiny.base_logits(base, tiny.ids(13), slot=0), plain)


def test_a_model_without_a_cap_keeps_its_attention_and_gets_no_note() -> None:
    base = loaded(tiny.folder("llama"))
    assert base.original_attention == "sdpa"
    assert not base.notes
