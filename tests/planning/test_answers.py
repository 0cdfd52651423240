"""What answers take between the steps of a training: equal to what the engine that gives them allocates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run

from graftlm.base.chat import Encoder
from graftlm.base.loading import load_base
from graftlm.planning.activations import Workload
from graftlm.planning.answers import BLOCK_TOKENS, SEQUENCES, STEP_TOKENS, AnswerLoad, kv_cache_bytes
from graftlm.planning.instantiate import instantiate
from graftlm.planning.memory import requirement
from graftlm.planning.method import METHODS, NO_ADAPTER, TrainingSetting
from graftlm.planning.models import find
from graftlm.serving.engine import generate, kv_cache
from graftlm.serving.engine.scheduler import EngineLimits

LOAD = Workload(tokens=512, target_tokens=400, longest=256, examples=2)


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_the_kv_cache_that_is_planned_is_the_engines(architecture: str, count: int) -> None:
    base = load_base(str(tiny.folder(architecture)), precision="float32", compute_dtype="float32", device="cpu")
    encoder = Encoder(base.tokenizer)
    prompts = [generate.AdapterPrompt([3] * (5 + i % 4), encoder) for i in range(count)]
    engine = generate._engine_for(base, prompts, [21] * count, None)
    try:
        load = AnswerLoad(prompts=count, longest=8 + 21 if count > 3 else 7 + 21)
        assert engine.limits.cache_tokens // BLOCK_TOKENS * BLOCK_TOKENS == load.cache_tokens
        assert engine.runner.bytes == kv_cache_bytes(instantiate(base.model.config), load.cache_tokens, 4)
    finally:
        engine.close()


def test_the_plans_sizes_of_the_engine_are_the_engines() -> None:
    assert (SEQUENCES, BLOCK_TOKENS) == (generate._MAX_NUM_SEQS, kv_cache.BLOCK_TOKENS)
    assert EngineLimits().max_num_batched_tokens == STEP_TOKENS


@pytest.mark.parametrize("setting", METHODS, ids=lambda s: s.key)
def test_answers_stand_beside_weights_and_optimizer_without_gradients(setting: TrainingSetting) -> None:
    shape = find("smollm2-135m").shape
    few, many = (AnswerLoad(prompts=32, longest=length) for length in (40, 8000))
    plain = requirement(shape, setting, NO_ADAPTER, LOAD, "cpu", fused=True)
    short = requirement(shape, setting, NO_ADAPTER, LOAD, "cpu", fused=True, answers=few)
    long = requirement(shape, setting, NO_ADAPTER, LOAD, "cpu", fused=True, answers=many)
    assert short.training == plain.training, "a few short answers take less than a step"
    assert (long.moment, long.parts.gradients, long.parts.activations) == ("answers", 0, 0)
    # Keys and values of 30 layers, 3 heads of 64, 2 bytes each, for 16 answers.
    assert long.parts.kv_cache == 2 * 30 * 3 * 64 * 2 * 16 * 8016
    assert (long.parts.weights, long.parts.optimizer) == (plain.parts.weights, plain.parts.optimizer)
    assert long.training == sum(v for k, v in long.parts.to_json().items() if k != "total")


def test_a_run_that_is_scored_expects_the_memory_of_its_answers(tmp_path: Path) -> None:
    scored = {"score": "exact-match", "score_prompts": 8}
    runs = {"plain": {}, "short": {**scored, "score_max_tokens": 4}, "long": {**scored, "score_max_tokens": 200}}
    expected: dict[str, Any] = {}
    for name, options in runs.items():
        place = tmp_path / name
        place.mkdir()
        tiny_run.train(place, eval_data="70%", micro_batch_tokens=40, steps=1, **options)
        expected[name] = json.loads((place / "run" / "plan.json").read_text())["predicted"]
    answers = json.loads((tmp_path / "long" / "run" / "plan.json").read_text())["answers"]
    assert answers["prompts"] == 8
    assert 200 < answers["longest"] < 240
    assert expected["long"]["highest_at"] == "answers"
    assert expected["long"]["parts"]["kv_cache"] > 0
    assert expected["plain"]["parts"]["kv_cache"] == 0
    assert expected["plain"]["peak_bytes"] <= expected["short"]["peak_bytes"] < expected["long"]["peak_bytes"]
    assert expected["long"]["dry_run_bytes"] == expected["plain"]["dry_run_bytes"], "it generates no answers"
