"""`graft generate` runs through the engine, says what it cannot do, and asks as the adapter was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from graftlm import demo
from graftlm.base.chat import Encoder
from graftlm.base.loading import load_base
from graftlm.commands.generate import generate
from graftlm.config import GenerateConfig
from graftlm.errors import AdapterError, ConfigError
from graftlm.serving.engine.generate import complete, complete_all
from graftlm.serving.engine.prompts import choose_format


def test_a_prompt_as_long_as_the_model_is_refused_with_both_numbers() -> None:
    base = load_base(str(tiny.folder("llama")), precision="float32")
    with pytest.raises(ConfigError, match="has 64 tokens, and this model's longest position is 64"):
        complete(base, Encoder(base.tokenizer), [5] * 64)


def test_an_empty_prompt_is_refused() -> None:
    base = load_base(str(tiny.folder("llama")), precision="float32")
    with pytest.raises(ConfigError, match="the prompt is empty"):
        complete(base, Encoder(base.tokenizer), [])


def test_many_prompts_at_once_are_answered_as_each_alone_through_what_is_attached() -> None:
    base = load_base(str(tiny.folder("qwen3")), precision="float32")
    tiny.adapted(base, slot=3)
    encoder = Encoder(base.tokenizer)
    prompts = [tiny.ids(3 + i, seed=i).tolist() for i in range(20)]
    for slot in (0, 3):
        together = complete_all(base, encoder, prompts, slot=slot, max_tokens=7)
        assert together == [complete(base, encoder, prompt, slot=slot, max_tokens=7) for prompt in prompts]


def test_the_text_that_is_shown_is_the_text_that_is_returned() -> None:
    base = load_base("demo", precision="float32")
    encoder = Encoder(base.tokenizer)
    shown: list[str] = []
    prompt = encoder.prompt_text("Describe this product.\nname: Velmora\nkind: kettle\nDescription:")
    done = complete(base, encoder, prompt, max_tokens=30, show=shown.append)
    assert "".join(shown) == done.text
    assert len(shown) > 10


def test_the_demo_base_is_asked_in_text_because_it_was_trained_on_texts() -> None:
    answer = generate(
        GenerateConfig(
            model="demo", prompt="Describe this product.\nname: Velmora\nkind: kettle\nDescription:", max_tokens=40
        )
    )
    assert answer["format"] == "text"
    assert answer["precision"] == "bfloat16"  # the checkpoint's own type
    assert "Velmora" in answer["text"] or "kettle" in answer["text"]


def test_more_tokens_than_fit_are_said_to_be_cut() -> None:
    answer = generate(GenerateConfig(model="demo", prompt="a " * 1000, max_tokens=500))
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
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = GenerateConfig(model=str(model), adapter=tmp_path / "run" / "adapter", prompt="ab")
    with pytest.raises(AdapterError, match="was trained with another tokenizer"):
        generate(config)


def test_an_adapter_on_another_precision_says_so(tmp_path: Path) -> None:
    import tiny_run

    tiny_run.train(tmp_path, steps=1, base_precision="float32")
    config = GenerateConfig(
        model=str(tiny_run.folder()),
        adapter=tmp_path / "run" / "adapter",
        prompt="ab",
        base_precision="nf4",
        max_tokens=3,
    )
    assert "trained on a base in float32 and runs on nf4" in generate(config)["notes"][0]


def test_sampling_from_nearly_nothing_takes_the_likeliest() -> None:
    def asked(**sampling: float) -> str:
        return generate(GenerateConfig(model="demo", prompt="Describe", max_tokens=12, **sampling))["text"]

    assert asked(temperature=0.7, top_p=1e-6) == asked()
    assert asked(temperature=1e-40) == asked(temperature=1e-300) == asked()
    assert asked(temperature=9.0, seed=1) != asked(temperature=9.0, seed=2)


def test_the_bundled_data_are_there_for_both_splits() -> None:
    assert Path(demo.resolve_data("demo", "train")).is_file()
    assert Path(demo.resolve_data("demo", "valid")).is_file()
    assert torch.get_num_threads() >= 1
