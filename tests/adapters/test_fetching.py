"""An adapter of somebody else's is put on its base once, with every check, and kept with a manifest from then on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
import torch
from hubs import Hub, talking_to
from merging import saved
from safetensors.torch import load_file, save_file

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import attach
from graftlm.adapters.fetching import import_adapter
from graftlm.adapters.store import Store, Version
from graftlm.base.loading import Base, load_base
from graftlm.config import ImportConfig
from graftlm.errors import AdapterError, ConfigError, ModelError, StoreError

BASE = tiny_run.folder()
IDS = torch.tensor([5, 90, 201, 44, 17, 120, 66])


def loaded(precision: Any = "float32") -> Base:
    return load_base(str(BASE), precision=precision, compute_dtype="float32", device="cpu")


def theirs(place: Path, **lora: Any) -> torch.Tensor:
    """A folder of PEFT's, and the logits that PEFT gives with it."""
    peft = tiny.with_peft(tiny.plain(BASE), tiny.peft_config(**{"target_modules": ["q_proj", "up_proj"], **lora}))
    peft.save_pretrained(place)
    return tiny.plain_logits(peft, IDS)


def brought(source: Path | str, tmp_path: Path, **options: Any) -> tuple[Version, bool, list[str]]:
    values = {"source": str(source), "name": "theirs", "store": tmp_path / "store", "device": "cpu", **options}
    return import_adapter(ImportConfig.build(values))


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_pefts_folder_becomes_a_version_with_a_manifest_and_pefts_logits(tmp_path: Path, lora: dict[str, Any]) -> None:
    expected = theirs(tmp_path / "a", **lora)
    version, new, notes = brought(tmp_path / "a", tmp_path, note="found it", base_precision="float32")
    assert (version.label, new, version.event["note"]) == ("theirs@1", True, "found it")
    assert version.base == loaded().fingerprint
    assert "no graft.json (PEFT's own)" in notes[0]
    manifest = json.loads((version.folder / "graft.json").read_text())
    digest = adapter_format.inspect_folder(tmp_path / "a").digest
    assert manifest["imported"]["digest"] == digest
    assert manifest["method"] == "lora"
    base = loaded()
    adapter = adapter_format.load(base, version.folder)
    assert adapter.origin is not None
    assert adapter.origin.notes == (), "from now on everything is checked"
    attach(base, adapter)
    tiny.close(tiny.base_logits(base, IDS), expected)
    assert Store(tmp_path / "store").verify().faults == []


def test_the_same_again_is_the_same_version(tmp_path: Path) -> None:
    theirs(tmp_path / "a")
    first, _, _ = brought(tmp_path / "a", tmp_path)
    again, new, _ = brought(tmp_path / "a", tmp_path)
    assert (again.digest, new) == (first.digest, False)


def test_the_base_and_the_precision_may_be_given(tmp_path: Path) -> None:
    theirs(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="does not say on which base it was trained; name it with --model"):
        brought(tmp_path / "a", tmp_path)
    version, _, _ = brought(tmp_path / "a", tmp_path, model=str(BASE), base_precision="nf4")
    manifest = json.loads((version.folder / "graft.json").read_text())
    assert (manifest["base"]["precision"], manifest["method"]) == ("nf4", "qlora")


def test_an_adapter_of_ours_is_published_as_it_is(tmp_path: Path) -> None:
    base = loaded("nf4")
    folder = saved(base, tmp_path / "a", targets=("q_proj",))
    version, _, notes = brought(folder, tmp_path)
    assert version.digest == adapter_format.inspect_folder(folder).digest
    assert notes == ["it has a graft.json, so it was published as it is"]


def nan(place: Path) -> None:
    named = load_file(place / "adapter_model.safetensors")
    next(iter(named.values()))[0, 0] = float("nan")
    save_file(named, place / "adapter_model.safetensors")


def half(place: Path) -> None:
    named = load_file(place / "adapter_model.safetensors")
    save_file({n: named[n] for n in sorted(named)[1:]}, place / "adapter_model.safetensors")


def bias(place: Path) -> None:
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**config, "bias": "all"}))


def pickled(place: Path) -> None:
    torch.save(load_file(place / "adapter_model.safetensors"), place / "adapter_model.bin")
    (place / "adapter_model.safetensors").unlink()


def zero(place: Path) -> None:
    named = load_file(place / "adapter_model.safetensors")
    save_file({n: t * ("lora_B" not in n) for n, t in named.items()}, place / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nan, "values that are not finite"),
        (half, "has no lora_A; the adapter is incomplete"),
        (bias, 'bias = "all" is a formula that Graft does not compute'),
        (pickled, "adapter_model.bin is a pickle, which is never read"),
        (zero, "B is zero in all of its"),
    ],
)
def test_what_does_not_pass_the_loader_is_not_published(tmp_path: Path, spoil: Any, message: str) -> None:
    theirs(tmp_path / "a")
    spoil(tmp_path / "a")
    with pytest.raises(AdapterError, match=message):
        brought(tmp_path / "a", tmp_path)
    assert not Store(tmp_path / "store").exists


def test_another_architectures_adapter_is_refused(tmp_path: Path) -> None:
    tiny.with_peft(tiny.plain(tiny.folder("gpt2")), tiny.peft_config()).save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match="name no layer of this base"):
        brought(tmp_path / "a", tmp_path, model=str(BASE))


def test_what_is_neither_a_folder_nor_a_hub_id_and_a_base_that_is_gone_are_errors(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="neither a directory nor a hub id"):
        brought(tmp_path / "gone", tmp_path)
    theirs(tmp_path / "a")
    with pytest.raises(ModelError, match="nowhere"):
        brought(tmp_path / "a", tmp_path, model="./nowhere")
    with pytest.raises(StoreError, match="is not allowed"):
        brought(tmp_path / "a", tmp_path, name="../up")


def test_an_adapter_of_the_hub_is_fetched_without_its_pickles_and_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs(tmp_path / "served")
    (tmp_path / "served" / "training_args.bin").write_bytes(b"\x80\x04not to be read.")
    with Hub({"someone/lora": tmp_path / "served"}) as hub, monkeypatch.context() as patch:
        talking_to(hub, tmp_path / "hub", patch)
        version, _, _ = brought("someone/lora", tmp_path)
        assert version.event["source"] == "someone/lora"
        assert not [path for path in hub.asked if path.endswith(".bin")]
        with pytest.raises(AdapterError, match="no adapter 'someone/gone' on the hub"):
            brought("someone/gone", tmp_path)
        hub.breaks = lambda method, path: path.endswith("adapter_model.safetensors")
        shutil.rmtree(tmp_path / "hub")
        with pytest.raises(AdapterError, match="could not be downloaded from the hub"):
            brought("someone/lora", tmp_path, name="again")
    assert [v.label for v in Store(tmp_path / "store").versions()] == ["theirs@1"]
