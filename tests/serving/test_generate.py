"""Generation writes what transformers' own `generate` writes, and says what it cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from graftlm import demo
from graftlm.base.load import load_base
from graftlm.config import GenerateConfig
from graftlm.errors import AdapterError, ConfigError
from graftlm.serving.generate import choose_format, decode, generate_text, sample


def _greedy(place: Path, prompt: list[int], count: int) -> list[int]:
    base = load_base(str(place), precision="float32")
    return list(decode(base, prompt, 0, count, 0.0, 1.0, torch.Generator()))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "falcon", "bloom", "mixtral"])
def test_greedy_decoding_writes_what_transformers_writes(architecture: str) -> None:
    place = tiny.folder(architecture)
    prompt = tiny.ids(7).tolist()
    model = tiny.plain(place)
    model.generation_config.eos_token_id = None
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, use_cache=True)[0, 7:].tolist()
    assert _greedy(place, prompt, 9) == expected


def test_a_model_that_keeps_its_past_elsewhere_gets_the_whole_text_each_time(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.MambaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, state_size=5, num_hidden_layers=2, intermediate_size=32
    )
    model = transformers.MambaForCausalLM(config).eval()
    tiny.write(tmp_path / "mamba", model)
    prompt = tiny.ids(6).tolist()
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, 6:].tolist()
    assert _greedy(tmp_path / "mamba", prompt, 8)[: len(expected)] == expected


def test_a_prompt_as_long_as_the_model_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match="has 64 tokens, and this model's longest position is 64"):
        _greedy(tiny.folder("llama"), [5] * 64, 3)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="the prompt is empty"):
        _greedy(tiny.folder("llama"), [], 3)


def test_sampling_from_nearly_nothing_takes_the_likeliest() -> None:
    logits = torch.tensor([0.3, 2.1, -0.7, 1.9])
    assert sample(logits, 0.7, 1e-6, torch.Generator().manual_seed(1)) == 1


def test_the_demo_base_is_asked_in_text_because_it_was_trained_on_texts() -> None:
    answer = generate_text(
        GenerateConfig(
            model="demo", prompt="Describe this product.\nname: Velmora\nkind: kettle\nDescription:", max_tokens=40
        )
    )
    assert answer["format"] == "text"
    assert answer["precision"] == "bfloat16"  # the checkpoint's own type
    assert "Velmora" in answer["text"] or "kettle" in answer["text"]


def test_more_tokens_than_fit_are_said_to_be_cut() -> None:
    answer = generate_text(GenerateConfig(model="demo", prompt="a " * 1000, max_tokens=500))
    assert "500 were asked for" in answer["notes"][0]


def test_a_format_that_is_asked_for_wins_over_the_manifest() -> None:
    manifest = {"data": {"train": {"formats": {"chat": 3}}}}
    assert choose_format("text", manifest, None) == "text"  # type: ignore[arg-type]
    assert choose_format("auto", manifest, None) == "chat"  # type: ignore[arg-type]


def test_an_adapter_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    import json
    import shutil

    import tiny_run

    tiny_run.train(tmp_path, steps=1)
    model = tmp_path / "other"
    shutil.copytree(tiny_run.folder(), model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["lstrip"] = not tokenizer["added_tokens"][0]["lstrip"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = GenerateConfig(model=str(model), adapter=tmp_path / "run" / "adapter", prompt="ab")
    with pytest.raises(AdapterError, match="was trained with tokenizer"):
        generate_text(config)


def test_an_adapter_on_another_precision_says_so(tmp_path: Path) -> None:
    import tiny_run

    tiny_run.train(tmp_path, steps=1, precision="float32")
    config = GenerateConfig(
        model=str(tiny_run.folder()), adapter=tmp_path / "run" / "adapter", prompt="ab", precision="nf4", max_tokens=3
    )
    assert "trained on a base in float32 and runs on nf4" in generate_text(config)["notes"][0]


def test_the_bundled_data_are_there_for_both_splits() -> None:
    assert Path(demo.resolve_data("demo", "train")).is_file()
    assert Path(demo.resolve_data("demo", "valid")).is_file()
