"""Before a merged model is written it is measured beside the live one; above --max-drift nothing is written."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
import torch
from safetensors.torch import load_file
from tiny_gguf import folder

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import attach
from graftlm.adapters.store import Store
from graftlm.base.chat import Encoder
from graftlm.base.loading import load_base
from graftlm.commands.merge import MergeRefused, merge
from graftlm.config import MergeConfig
from graftlm.data.dataset import load
from graftlm.data.sources import named_source
from graftlm.errors import ConfigError, ModelError, RunError, StoreError

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))

import stores

IDS = torch.tensor([5, 90, 201, 44, 17, 120, 66])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_on_four_bits(tmp_path_factory.mktemp("trained"))


def run_on_four_bits(place: Path) -> Path:
    """The folder of a run of LoRA on an NF4 base, with eval rows."""
    tiny_run.train(place, base_precision="nf4", method="qlora")
    return place / "run"


def asked(trained: Path, out: Path, **options: Any) -> MergeConfig:
    given = {
        "model": str(tiny_run.folder()), "adapter": [str(trained / "adapter")], "out": str(out), "device": "cpu",
        "compute_dtype": "float32", **options,
    }  # fmt: skip
    return MergeConfig.build({name: value for name, value in given.items() if value is not None})


def live_logits(adapter: Path) -> torch.Tensor:
    base = load_base(str(tiny_run.folder()), precision="nf4", compute_dtype="float32", device="cpu")
    attach(base, adapter_format.load(base, adapter))
    return tiny.base_logits(base, IDS)


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative difference as the table has it: each row's mean taken off."""
    a, b = (z - z.mean(1, keepdim=True) for z in (found, expected))
    return float((a - b).norm() / b.norm())


def test_every_target_is_measured_and_the_dequantized_base_is_the_default(trained: Path, tmp_path: Path) -> None:
    done = merge(asked(trained, tmp_path / "out"))
    drift = {d["onto"]: d for d in done["drift"]}
    assert set(drift) == {"original", "dequantized", "requantized"}
    assert done["onto"] == "dequantized"
    assert drift["dequantized"]["relative"] < 1e-4
    assert drift["dequantized"]["agreement"] == 1.0
    assert drift["dequantized"]["loss"] == pytest.approx(done["live"]["loss"], rel=1e-4)
    assert drift["original"]["relative"] > 0.01
    assert drift["requantized"]["relative"] > 0.001
    assert done["live"]["rows"] == 5
    live = live_logits(trained / "adapter")
    assert far(tiny.plain_logits(tiny.plain(tmp_path / "out"), IDS), live) < 1e-4
    manifest = json.loads((tmp_path / "out" / "graft.json").read_text())
    assert manifest["drift"] == done["drift"]
    assert manifest["adapters"][0]["digest"] == adapter_format.inspect_folder(trained / "adapter").digest


def test_what_was_measured_is_what_is_written(trained: Path, tmp_path: Path) -> None:
    """Each target's folder, read back by plain transformers on the eval rows, has the loss that the table had."""
    source = named_source(str(trained.parent / "valid.jsonl"), "valid")
    rows = load([source], Encoder(tiny_run.byte_tokenizer()), max_tokens=256, overlong="truncate").examples
    losses: list[float] = []
    for onto in ("original", "dequantized"):
        done = merge(asked(trained, tmp_path / onto, onto=onto))
        told = next(d["loss"] for d in done["drift"] if d["onto"] == onto)
        losses.append(tiny.mean_loss(tiny.plain(tmp_path / onto), rows).item())
        assert told == pytest.approx(losses[-1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3), "otherwise this test shows nothing"


def test_above_max_drift_nothing_is_written_and_the_way_out_is_named(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(
        MergeRefused, match=r"above --max-drift 0\.001; nothing was written\. Take --onto dequantized"
    ) as e:
        merge(asked(trained, tmp_path / "out", onto="original", max_drift=0.001))
    assert list(tmp_path.iterdir()) == []
    assert {d["onto"] for d in e.value.report["drift"]} == {"original", "dequantized", "requantized"}
    assert merge(asked(trained, tmp_path / "out", max_drift=0.001))["onto"] == "dequantized"
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_where_no_target_is_near_enough_the_other_ways_out_are_named(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(MergeRefused, match="Raise --max-drift, write in another type"):
        merge(asked(trained, tmp_path / "out", max_drift=1e-12, save_precision="bfloat16"))
    assert not (tmp_path / "out").exists()


def test_the_type_that_is_written_is_the_type_that_is_measured(trained: Path, tmp_path: Path) -> None:
    exact = merge(asked(trained, tmp_path / "exact"))
    rounded = merge(asked(trained, tmp_path / "rounded", save_precision="bfloat16"))
    drifts = [next(d for d in done["drift"] if d["onto"] == "dequantized") for done in (exact, rounded)]
    assert drifts[0]["relative"] < 1e-5 < 1e-4 < drifts[1]["relative"] < 0.02
    assert exact["rounding"] == {"lost": 0.0, "unmoved": 0.0}
    assert 0 < rounded["rounding"]["lost"] < 1
    kinds = {t.dtype for t in load_file(tmp_path / "rounded" / "model.safetensors").values()}
    assert kinds == {torch.bfloat16}


def test_without_held_out_rows_a_compressed_base_is_not_merged_onto_unless_it_is_said(
    trained: Path, tmp_path: Path
) -> None:
    alone = Path(shutil.copytree(trained / "adapter", tmp_path / "alone"))
    with pytest.raises(ConfigError, match=r"trained on nf4, where it matters.*--eval-data FILE, or --unmeasured"):
        merge(asked(trained, tmp_path / "out", adapter=[str(alone)]))
    assert not (tmp_path / "out").exists()
    rows = trained.parent / "valid.jsonl"
    assert merge(asked(trained, tmp_path / "a", adapter=[str(alone)], eval_data=str(rows)))["live"]["rows"] == 5
    assert merge(asked(trained, tmp_path / "b", adapter=[str(alone)], unmeasured=True))["drift"] == []


def test_an_output_that_is_there_is_refused_before_anything_is_measured(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="is there already"):
        merge(asked(trained, tmp_path / "out", model="./nowhere"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_disk_that_is_full_leaves_nothing(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("graftlm.adapters.merge_writer.write_tensors", full)
    with pytest.raises(RunError, match="No space left on device; nothing is left of it"):
        merge(asked(trained, tmp_path / "out", unmeasured=True))
    assert list(tmp_path.iterdir()) == []


def test_versions_of_a_store_are_merged_by_name_with_their_runs_held_out_rows(trained: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.publish(trained, "formal")
    store.alias("formal", "prod", 1)
    store.publish(stores.adapter(tmp_path / "other"), "formal")  # on another base: --model says which one is meant
    done = merge(asked(trained, tmp_path / "out", adapter=["formal@prod"], store=str(store.root), max_drift=0.01))
    assert (done["live"]["rows"], done["onto"]) == (5, "dequantized")
    with pytest.raises(StoreError, match=r"no adapters on base '[0-9a-f]{12}' in"):
        merge(
            asked(trained, tmp_path / "x", adapter=["formal@1"], store=str(store.root), model=str(tiny.folder("llama")))
        )


def test_the_note_of_a_merge_that_is_not_measured_denies_no_weights(tmp_path: Path) -> None:
    tiny_run.train(tmp_path)  # a float32 base: nothing has to be measured
    done = merge(asked(tmp_path / "run", tmp_path / "out", compute_dtype=None))
    assert len(done["notes"]) == 1
    assert done["notes"][0].startswith("its canary was not run, since no base is loaded here")
    assert "the base's fingerprint is that of the one it was trained on" in done["notes"][0]
    assert "without" not in done["notes"][0], "the base's weights are there, and they were merged"


def test_several_adapters_are_not_measured_and_say_so(trained: Path, tmp_path: Path) -> None:
    both = [str(trained / "adapter"), f"{shutil.copytree(trained / 'adapter', tmp_path / 'again')}:0.3"]
    with pytest.raises(ConfigError, match="measured beside one adapter with weight 1"):
        merge(asked(trained, tmp_path / "out", adapter=both, max_drift=0.1))
    done = merge(asked(trained, tmp_path / "out", adapter=both))
    assert [a["weight"] for a in done["adapters"]] == [1.0, 0.3]
    assert done["drift"] == []
    assert "the drift was not measured" in done["notes"][-1]
    assert len(set(done["notes"])) == len(done["notes"])


def test_a_gguf_file_is_written_beside_the_folder_and_what_cannot_be_is_said_before_anything_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = folder(tmp_path / "base", "llama")  # with merges, which llama.cpp needs
    tiny_run.train(tmp_path, model=str(base), base_precision="nf4", method="qlora")

    def to(out: str, file: str, **options: Any) -> MergeConfig:
        given = {"model": str(base), "gguf": str(tmp_path / file), "gguf_type": "f32", **options}
        return asked(tmp_path / "run", tmp_path / out, **given)

    done = merge(to("out", "m.gguf"))
    assert (done["gguf"]["tensors"], done["gguf"]["architecture"]) == (21, "llama")
    with pytest.raises(ConfigError, match=r"--gguf .*m\.gguf is there already"):
        merge(to("again", "m.gguf"))

    with pytest.raises(MergeRefused):
        merge(to("never", "c.gguf", onto="original", max_drift=0.001))
    with pytest.raises(ModelError, match="its tokenizer has no merges"):
        merge(to("never", "c.gguf", model=str(tiny_run.folder()), adapter=None))

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("graftlm.adapters.gguf.write_gguf", full)
        with pytest.raises(RunError, match=r"b\.gguf cannot be written: No space left on device; .*whole is whole"):
            merge(to("whole", "b.gguf", unmeasured=True))
    assert tiny.plain(tmp_path / "whole").num_parameters() > 0
    odd = Path(shutil.copytree(base, tmp_path / "odd"))
    told = json.loads((odd / "tokenizer.json").read_text())
    (odd / "tokenizer.json").write_text(json.dumps({**told, "normalizer": {"type": "Lowercase"}}))
    with pytest.raises(ModelError, match="has no name for"):
        merge(to("never", "c.gguf", model=str(odd), adapter=None))
    assert not (tmp_path / "never").exists()
    assert not (tmp_path / "c.gguf").exists()
