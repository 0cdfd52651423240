"""Nothing is ever unpickled: a file that acts when it is unpickled is given to every entry point, and nothing happens."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
import torch

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import detach
from graftlm.adapters.export import export_adapter
from graftlm.adapters.fetching import import_adapter
from graftlm.adapters.store import Store
from graftlm.adapters.store.lineage import lineage
from graftlm.adapters.store.remote import Remote
from graftlm.base.loading import load_base
from graftlm.commands.generate import generate
from graftlm.commands.merge import merge
from graftlm.commands.push_pull import pull, push
from graftlm.commands.train import train
from graftlm.config import (
    ExportConfig,
    GenerateConfig,
    ImportConfig,
    MergeConfig,
    PullConfig,
    PushConfig,
    TrainConfig,
)
from graftlm.errors import AdapterError, DataError, GraftError, ModelError, RunError, Stopped
from graftlm.files import sha256
from graftlm.training.logging import Recorder
from graftlm.training.view import View

PACKAGE = Path(__file__).parents[1] / "graftlm"


class Acting:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it-was-unpickled"


@pytest.fixture
def acting(mark: Path) -> bytes:
    return pickle.dumps(Acting(mark))


def test_the_file_acts_on_whoever_unpickles_it(acting: bytes, mark: Path, tmp_path: Path) -> None:
    pickle.loads(acting)
    assert mark.is_dir()
    mark.rmdir()
    torch.save(Acting(mark), tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert mark.is_dir()


def adapter(place: Path) -> Path:
    """A good adapter of the tiny base."""
    place.mkdir()
    base = load_base(str(tiny_run.folder()), device="cpu")
    made = tiny.adapted(base)
    detach(base)
    adapter_format.save(base, made, place, {})
    return place


def in_place_of(name: str, instead: str, *, manifest: bool) -> Callable[[Path, bytes], None]:
    """Put the file under `instead`, where `name` was."""

    def act(place: Path, content: bytes) -> None:
        (place / name).unlink()
        (place / instead).write_bytes(content)
        if not manifest:
            (place / "graft.json").unlink()

    return act


ADAPTERS: dict[str, Callable[[Path, bytes], None]] = {
    "adapter_model.bin": in_place_of("adapter_model.safetensors", "adapter_model.bin", manifest=False),
    "adapter_model.bin beside our manifest": in_place_of("adapter_model.safetensors", "adapter_model.bin", manifest=True),
    "a pickle called safetensors": in_place_of("adapter_model.safetensors", "adapter_model.safetensors", manifest=False),
    "a pickle called config": in_place_of("adapter_config.json", "adapter_config.json", manifest=False),
    "a pickle called manifest": in_place_of("graft.json", "graft.json", manifest=True),
}  # fmt: skip


@pytest.mark.parametrize("which", ADAPTERS)
def test_an_adapter_folder(tmp_path: Path, acting: bytes, mark: Path, which: str) -> None:
    place = adapter(tmp_path / "adapter")
    ADAPTERS[which](place, acting)
    model = str(tiny_run.folder())
    ways: list[Callable[[], Any]] = [
        lambda: adapter_format.inspect_folder(place),
        lambda: adapter_format.load(load_base(model, device="cpu"), place),
        lambda: generate(GenerateConfig(model=model, adapter=place, prompt="a")),
        lambda: tiny_run.train(tmp_path, from_adapter=str(place), rank=None, alpha=None),
        lambda: Store(tmp_path / "store").publish(place, "x"),
        lambda: import_adapter(
            ImportConfig(source=str(place), name="x", model=model, store=tmp_path / "store", device="cpu")
        ),
        lambda: export_adapter(ExportConfig(version=str(place), out=tmp_path / "a")),
        lambda: export_adapter(ExportConfig.build({"version": str(place), "out": tmp_path / "b", "for": "vllm"})),
        lambda: merge(MergeConfig(model=model, adapter=(str(place),), out=tmp_path / "c", unmeasured=True)),
    ]
    for way in ways:
        with pytest.raises(AdapterError):
            way()
    assert not mark.exists()


STORES = ("store.json", "bases/*/journal.jsonl", "bases/*/versions/*/adapter_model.safetensors",
          "bases/*/versions/*/graft.json", "bases/*/versions/*/run.json")  # fmt: skip


@pytest.mark.parametrize("which", STORES)
def test_a_store_and_a_place_that_is_pulled_from(tmp_path: Path, acting: bytes, mark: Path, which: str) -> None:
    store = Store(tmp_path / "store")
    tiny_run.train(tmp_path, steps=1)
    version, _ = store.publish(tmp_path / "run", "x")
    Remote(str(tmp_path / "shared")).push(version)
    (file,) = store.root.glob(which)
    file.chmod(0o644)
    file.write_bytes(acting)
    ways: list[Callable[[], Any]] = [
        lambda: lineage(store, store.find("x@1")),
        lambda: push(PushConfig(place=str(tmp_path / "other"), store=store.root)),
        lambda: export_adapter(ExportConfig(version="x@1", out=tmp_path / "out", store=store.root)),
    ]
    for way in ways:
        with pytest.raises(GraftError):
            way()
    if file.name != "store.json":
        assert store.verify().faults
    for there in (tmp_path / "shared").rglob("*"):
        if there.is_file():
            good = there.read_bytes()
            there.write_bytes(acting)
            with contextlib.suppress(GraftError):
                pull(PullConfig(place=str(tmp_path / "shared"), store=tmp_path / there.name))
            there.write_bytes(good)
    assert not mark.exists()


def test_a_pickle_beside_a_good_adapter_is_not_looked_at(tmp_path: Path, acting: bytes, mark: Path) -> None:
    place = adapter(tmp_path / "adapter")
    for name in ("adapter_model.bin", "optimizer.pt", "training_args.bin", "scheduler.pt", "rng_state.pth"):
        (place / name).write_bytes(acting)
    adapter_format.load(load_base(str(tiny_run.folder()), device="cpu"), place)
    assert not mark.exists()


def index_of(name: str) -> str:
    return json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}})


def pickle_alone(place: Path, content: bytes) -> None:
    (place / "model.safetensors").unlink()
    (place / "pytorch_model.bin").write_bytes(content)


def pickle_as_safetensors(place: Path, content: bytes) -> None:
    (place / "model.safetensors").write_bytes(content)


def pickle_in_the_index(place: Path, content: bytes) -> None:
    pickle_alone(place, content)
    (place / "model.safetensors.index.json").write_text(index_of("pytorch_model.bin"))


def pickle_elsewhere_in_the_index(place: Path, content: bytes) -> None:
    pickle_in_the_index(place, content)
    (place.parent / "x.safetensors").write_bytes(content)
    (place / "model.safetensors.index.json").write_text(index_of("../x.safetensors"))


def index_of_pickles(place: Path, content: bytes) -> None:
    pickle_alone(place, content)
    (place / "pytorch_model.bin.index.json").write_text(index_of("pytorch_model.bin"))


MODELS = [pickle_alone, pickle_as_safetensors, pickle_in_the_index, pickle_elsewhere_in_the_index, index_of_pickles]


@pytest.mark.parametrize("spoil", MODELS, ids=lambda f: f.__name__)
def test_a_model_folder(tmp_path: Path, acting: bytes, mark: Path, spoil: Callable[[Path, bytes], None]) -> None:
    place = Path(shutil.copytree(tiny_run.folder(), tmp_path / "model"))
    spoil(place, acting)
    ways: list[Callable[[], Any]] = [
        lambda: load_base(str(place), device="cpu"),
        lambda: tiny_run.train(tmp_path, model=str(place)),
        lambda: tiny_run.train(tmp_path, model=str(place), method="full", out=str(tmp_path / "full")),
        lambda: generate(GenerateConfig(model=str(place), prompt="a")),
        lambda: merge(MergeConfig(model=str(place), out=tmp_path / "merged", gguf=tmp_path / "m.gguf")),
    ]
    for way in ways:
        with pytest.raises(ModelError):
            way()
    assert not mark.exists()


def test_the_code_that_comes_with_a_model_does_not_run_unless_it_is_asked_for(tmp_path: Path, mark: Path) -> None:
    place = Path(shutil.copytree(tiny_run.folder(), tmp_path / "model"))
    config = json.loads((place / "config.json").read_text())
    config.update(model_type="mine", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    (place / "config.json").write_text(json.dumps(config))
    (place / "code.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    with pytest.raises(ModelError, match="trust-remote-code"):
        load_base(str(place), device="cpu")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["train.pkl", "train.pt", "train.jsonl", "train.json", "train.csv", "train.parquet"])
def test_a_data_file(tmp_path: Path, acting: bytes, mark: Path, name: str) -> None:
    tiny_run.options(tmp_path)
    (tmp_path / name).write_bytes(acting)
    with pytest.raises(DataError):
        tiny_run.train(tmp_path, data=[str(tmp_path / name)])
    with pytest.raises(GraftError):
        tiny_run.train(tmp_path, eval_data=str(tmp_path / name))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_checkpoint(tmp_path: Path, acting: bytes, mark: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    on_iteration_end = Recorder.on_iteration_end

    def stopping(self: Recorder, trials: Any) -> bool:
        self.stopped = 15
        return on_iteration_end(self, trials)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_iteration_end", stopping)
        with pytest.raises(Stopped):
            tiny_run.train(tmp_path, eval_data=None)
    place = tmp_path / "run" / "checkpoints" / "000001"
    (place / name).write_bytes(acting)
    if name != "manifest.json":  # as somebody would who can write checksums too
        files = [p for p in place.iterdir() if p.name != "manifest.json"]
        entries = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
        (place / "manifest.json").write_text(json.dumps({"files": entries}))
    with pytest.raises(RunError, match="000001"):
        tiny_run.train(tmp_path, eval_data=None, resume=True)
    assert not mark.exists()


def test_a_config_file_of_options(tmp_path: Path, acting: bytes, mark: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(acting)
    with pytest.raises(GraftError):
        train(TrainConfig.read(tmp_path / "run.yaml", {}), View(quiet=True))
    (tmp_path / "run.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{mark}']\n")
    with pytest.raises(GraftError):
        train(TrainConfig.read(tmp_path / "run.yaml", {}), View(quiet=True))
    assert not mark.exists()


def test_no_line_of_the_package_unpickles() -> None:
    """`torch.load`, `numpy.load`, pickle and what is built on it are not even named."""
    forbidden = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert forbidden.isdisjoint(alias.name.split(".")[0] for alias in node.names), file
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden, file
            elif isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name):
                assert node.value.id not in ("torch", "np", "numpy", "yaml"), file
