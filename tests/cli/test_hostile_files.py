"""Files that nobody sane wrote end in a sentence that names the file and the limit, whichever command reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_run
from test_cli import graft, refused
from tiny_gguf import folder

from graftlm.adapters.gguf import write_gguf

DEEP = "[" * 100_000 + "]" * 100_000
LONG = "1" * 50_000
SAID = {
    "deep": "nested too deep, at most 100 levels are read",
    "long": "a number of 50,000 digits, at most 300 are read",
}
JSON_OF_A_MODEL = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.json", "model.safetensors.index.json",
)  # fmt: skip


def spoilt(text: str, kind: str) -> str:
    """A JSON object with one more entry, which is hostile."""
    return '{"more": ' + (DEEP if kind == "deep" else LONG) + ("," if text.strip("{} \n") else "") + text.lstrip()[1:]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model, as a folder of one's own."""
    place = tmp_path / "model"
    shutil.copytree(tiny_run.folder(), place)
    return place


@pytest.fixture(scope="module")
def tiny_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model."""
    place = tmp_path_factory.mktemp("trained")
    return Path(tiny_run.train(place, steps=1)["adapter_folder"])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    return file


@pytest.mark.parametrize("kind", ["deep", "long"])
@pytest.mark.parametrize("name", JSON_OF_A_MODEL)
def test_a_models_json_over_a_limit_is_named_by_check_and_train_and_generate(
    name: str, kind: str, model: Path, data: Path, tmp_path: Path
) -> None:
    file = model / name
    file.write_text(spoilt(file.read_text() if file.is_file() else "{}", kind))
    commands = [
        ("check", data, "--model", model),
        ("train", "--model", model, "--data", data, "--out", tmp_path / "run"),
        ("generate", "--model", model, "--prompt", "x"),
    ]
    for command in commands if name != "model.safetensors.index.json" else commands[1:]:
        found = refused(*command)
        assert str(file) in found
        assert SAID[kind] in found
        assert len(found) < 500


@pytest.mark.parametrize("kind", ["deep", "long"])
def test_plan_names_a_config_over_a_limit(kind: str, model: Path) -> None:
    file = model / "config.json"
    file.write_text(spoilt(file.read_text(), kind))
    found = refused("plan", model)
    assert str(file) in found
    assert SAID[kind] in found


@pytest.mark.parametrize("kind", ["deep", "long"])
@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_rows_over_a_limit_are_named_by_line(kind: str, form: str, tmp_path: Path) -> None:
    row = '{"text": "a", "more": ' + (DEEP if kind == "deep" else LONG) + "}"
    file = tmp_path / f"rows.{form}"
    file.write_text(f'{{"text": "a"}}\n{row}\n' if form == "jsonl" else f'[{{"text": "a"}},\n{row}]')
    for command in (
        ("train", "--model", "demo", "--data", file, "--out", tmp_path / "run"),
        ("plan", "demo", "--data", file, "--ask-base", "no"),
        ("compare", "--model", "demo", "--data", file, "--eval-data", "50%", "--out", tmp_path / "cmp"),
    ):
        found = refused(*command)
        assert f"{file}:2" in found
        assert SAID[kind] in found
        assert len(found) < 700
    checked = graft("check", file, "--model", "demo")
    assert checked.exit_code == 2
    assert SAID[kind] in " ".join(checked.stdout.split())


@pytest.mark.parametrize("kind", ["deep", "long"])
@pytest.mark.parametrize("name", ["adapter_config.json", "graft.json"])
def test_an_adapters_json_over_a_limit_is_named(name: str, kind: str, tmp_path: Path, tiny_adapter: Path) -> None:
    model, adapter = tiny_run.folder(), tmp_path / "adapter"
    shutil.copytree(tiny_adapter, adapter)
    (adapter / name).write_text(spoilt((adapter / name).read_text(), kind))
    for command in (
        ("generate", "--model", model, "--adapter", adapter, "--prompt", "x"),
        ("adapters", "publish", adapter, "--name", "x", "--store", tmp_path / "store"),
        ("merge", "--model", model, "--adapter", adapter, "--out", tmp_path / "merged"),
    ):
        found = refused(*command)
        assert str(adapter / name) in found
        assert SAID[kind] in found
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", ["deep", "long"])
def test_a_stores_own_json_over_a_limit_is_called_damaged(kind: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "store.json").write_text(spoilt("{}", kind))
    assert f"{store / 'store.json'} is damaged" in refused("adapters", "list", "--store", store)


def test_a_gguf_file_that_is_cut_short_is_named_by_every_command_that_takes_a_model(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    write_gguf(folder(tmp_path / "model", "llama"), tmp_path / "cut.gguf", "f32")
    file = tmp_path / "cut.gguf"
    file.write_bytes(file.read_bytes()[:-1000])
    for command in (
        ("plan", file),
        ("check", data, "--model", file),
        ("train", "--model", file, "--data", data, "--out", tmp_path / "run"),
        ("compare", "--model", file, "--data", data, "--out", tmp_path / "compared"),
        ("sweep", "--model", file, "--data", data, "--out", tmp_path / "sweep", "--search", "rank=2..4"),
        ("generate", "--model", file, "--prompt", "x"),
        ("serve", "--model", file, "--port", "0"),
        ("merge", "--model", file, "--out", tmp_path / "merged", "--gguf", tmp_path / "m.gguf"),
    ):
        found = refused(*command)
        assert f"{file} is cut short: tensor" in found, command
        assert len(found) < 500


@pytest.mark.parametrize("text", [f'{{"model": {"[" * 5_000}', f'{{"seed": {LONG}}}', "seed: &a [*a]"])
def test_a_run_file_over_a_limit_is_named_by_train_sweep_and_serve(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    for command in ("train", "sweep", "compare", "serve"):
        found = refused(command, file)
        assert str(file) in found
        assert "nested too deep" in found or "digits" in found


def test_a_damaged_run_folder_is_named(tmp_path: Path) -> None:
    place = tmp_path / "sweep"
    place.mkdir()
    (place / "sweep.json").write_text(spoilt("{}", "deep"))
    assert "nested too deep" in refused("sweep", "show", place)


def test_a_config_that_is_no_models_is_a_sentence(tmp_path: Path) -> None:
    """Values of other kinds than transformers expects."""
    for change in (
        {"model_type": 5}, {"num_hidden_layers": "x"}, {"vocab_size": 10**30}, {"text_config": 7},
        {"quantization_config": "nf4"},
    ):  # fmt: skip
        place = tmp_path / "-".join(change)
        shutil.copytree(tiny_run.folder(), place)
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, **change}))
        found = graft("generate", "--model", place, "--prompt", "x", "--max-tokens", 1)
        assert found.exit_code == 2, (change, found.stderr)
