"""A model's shape: counted without storage, equal to the real model, found by name, directory or hub id."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from graftlm.base.loading import load_base
from graftlm.errors import ModelError
from graftlm.planning import models
from graftlm.planning.instantiate import instantiate
from graftlm.planning.models import built_in, digest, find
from graftlm.planning.shapes import ModelShape

sys.path.insert(0, str(Path(__file__).parents[1] / "base"))

# As the models' own pages give them.
PARAMETERS = {
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496, "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824, "qwen2.5-0.5b": 494_032_768, "qwen2.5-7b": 7_615_616_512, "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360, "qwen3-32b": 32_762_123_264, "mistral-7b": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704, "gemma-2-2b": 2_614_341_888, "gemma-3-1b": 999_885_952, "phi-4": 14_659_507_200,
    "gpt2": 124_439_808, "smollm2-135m": 134_515_008, "tinyllama-1.1b": 1_100_048_384,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_built_in_shape_has_the_parameters_that_the_model_has(name: str) -> None:
    assert find(name).shape.parameters == PARAMETERS[name]


@pytest.mark.parametrize(
    "name", ["llama-2-70b", "qwen3-0.6b", "gemma-3-1b", "mixtral-8x7b", "phi-4", "gpt2", "falcon-7b", "gpt-oss-20b"]
)
def test_a_built_in_shape_is_what_transformers_makes_of_its_config(name: str) -> None:
    assert models.build(built_in()[name], name) == find(name).shape


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_architecture_has_as_many_values_empty_as_it_has_trained(architecture: str) -> None:
    shape = instantiate(tiny.config(architecture))
    base = load_base(str(tiny.folder(architecture)), precision="float32", compute_dtype="float32", device="cpu")
    assert shape.parameters == base.parameters
    assert shape.packs == base.packs
    stored = [m for m in base.stored().values() if m is not base.structure.head]
    assert sum(w.count for w in shape.weights) == len(stored)
    assert shape.layers == len(base.structure.layers)
    assert shape.plain_head == base.structure.plain_head


def test_a_shape_survives_json() -> None:
    shape = find("mixtral-8x7b").shape
    assert ModelShape.from_json(json.loads(json.dumps(shape.to_json()))) == shape


def test_the_heads_of_a_query_norm_count() -> None:
    widths = {(n.width, n.count) for n in find("qwen3-8b").shape.norms}
    assert (4096, 2 * 36 + 36) in widths  # two norms of a layer, as wide as its 32 query heads of 128 together
    assert (8 * 128, 36) in widths


def test_a_built_in_model_needs_no_torch() -> None:
    code = (
        "import sys; from graftlm.commands.plan import plan; from graftlm.config import PlanConfig; "
        "plan(PlanConfig(models=('llama-2-70b',), gpu='h100')); "
        "print(*(m in sys.modules for m in ('torch', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False", "False"]


def test_a_hub_id_of_a_built_in_model_asks_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_fetched", lambda name: pytest.fail("asked the hub"))
    assert find("meta-llama/Llama-2-7b-hf").name == "llama-2-7b"


def test_a_directory_is_counted_once_and_then_remembered(
    graft_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**tiny.config("llama").to_dict()}))
    first = find(str(folder)).shape
    monkeypatch.setattr(models, "build", lambda *args: pytest.fail("built again"))
    assert find(str(folder)).shape == first
    assert list((graft_cache / "shapes").iterdir())


def test_a_damaged_memory_of_a_shape_is_made_anew(graft_cache: Path) -> None:
    folder = tiny.folder("llama")
    first = find(str(folder)).shape
    for file in (graft_cache / "shapes").iterdir():
        file.write_text("{")
    assert find(str(folder)).shape == first


def test_what_does_not_change_the_shape_does_not_change_its_name() -> None:
    config = tiny.config("llama").to_dict()
    assert digest(config) == digest({**config, "torch_dtype": "bfloat16", "_name_or_path": "x", "eos_token_id": 7})
    assert digest(config) != digest({**config, "hidden_size": 32})


def test_of_a_hub_model_config_json_alone_is_fetched(tmp_path: Path, graft_cache: Path) -> None:
    from stub_hub import Hub

    code = "import sys; from graftlm.planning.models import find; print(find('someone/small').shape.parameters)"
    with Hub({"someone/small": tiny.folder("qwen2")}) as hub:
        environment = {
            **dict(__import__("os").environ), "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hub"),
            "GRAFT_CACHE": str(graft_cache), "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        environment.pop("HF_HUB_OFFLINE", None)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) == instantiate(tiny.config("qwen2")).parameters
        assert {path.rpartition("/")[2] for path in hub.asked} == {"config.json"}


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_an_unknown_model_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(ModelError, match=r"unknown model 'lama-2-7b', did you mean 'llama-2-7b'\?"):
        find("lama-2-7b")


@pytest.mark.parametrize(
    ("missing", "said"),
    [("hidden_size", "a width"), ("num_hidden_layers", "a number of layers"), ("vocab_size", "a vocabulary size")],
)
def test_a_config_without_a_needed_field_is_refused_by_its_name(tmp_path: Path, missing: str, said: str) -> None:
    config: dict[str, Any] = tiny.config("llama").to_dict()
    del config[missing]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"gives {said} under none of the names"):
        find(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list, expected an object"),
        ('{"hidden_size": 4}', "no 'model_type'"),
        (None, "has no config.json"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=said):
        find(str(tmp_path))


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "nosuch", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 9})
    )
    with pytest.raises(ModelError, match="not understood"):
        find(str(tmp_path))


def test_sizes_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    config = {**tiny.config("llama").to_dict(), "hidden_size": 0, "num_attention_heads": 0}
    config.pop("head_dim")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        find(str(tmp_path))
