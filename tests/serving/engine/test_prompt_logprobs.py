"""The log probabilities of a prompt's tokens are those of the model's own forward pass, however the prompt is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_engine
import torch
from torch import Tensor

from graftlm.adapters.attach import attach, detach
from graftlm.serving.engine.request import RequestOutput


def reported(engine: Any, requests: list[Any]) -> dict[str, RequestOutput]:
    """What each request got, its outputs as one."""
    found: dict[str, RequestOutput] = {}
    for one in requests:
        engine.add_request(one, Path(one.adapter) if one.adapter else None)
    for output in tiny_engine.drain(engine):
        if output.index == 0:
            found[output.id] = found[output.id].then(output) if output.id in found else output
    return found


def expected(logits: Tensor, ids: list[int], count: int) -> tuple[list[float], list[list[int]]]:
    """Of (L, V) logits: each next token's log probability, and the likeliest tokens."""
    logprobs = torch.log_softmax(logits[:-1].float(), dim=-1)
    own = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return own.tolist(), logprobs.topk(count).indices.tolist()


@pytest.mark.parametrize("architecture", ["llama", "bloom", "falcon"])
def test_they_are_transformers_own_also_in_chunks_behind_a_cached_prefix_and_with_an_adapter(architecture: str) -> None:
    base = tiny_engine.base_of(architecture)
    adapter = tiny_engine.adapter_of(base, rank=3)
    engine = tiny_engine.engine_of(base, {"a": adapter}, max_num_batched_tokens=9)
    prompts = [tiny.ids(length, seed=length).tolist() for length in (37, 21, 1)]
    plain = tiny.plain(tiny.folder(architecture))
    logits = {"": [tiny.plain_logits(plain, torch.tensor(ids)) for ids in prompts]}
    attach(base, adapter, slot=7)
    logits["a"] = [tiny.base_logits(base, torch.tensor(ids), slot=7) for ids in prompts]
    detach(base, 7)
    for max_tokens in (3, 0, 1):  # the second and the third time the prefix cache has the prompts
        wanted = {
            f"{name}{i}": tiny_engine.request(ids, max_tokens, name, id=f"{name}{i}", prompt_logprobs=2, logprobs=0)
            for name in ("", "a")
            for i, ids in enumerate(prompts)
        }
        found = reported(engine, list(wanted.values()))
        for name in ("", "a"):
            for i, ids in enumerate(prompts):
                output = found[f"{name}{i}"]
                reports = output.prompt_logprobs
                assert reports is not None
                assert [one.token for one in reports] == ids[1:]
                values, top = expected(logits[name][i], ids, 2)
                assert [one.logprob for one in reports] == pytest.approx(values, abs=2e-5)
                assert [[token for token, _ in one.top] for one in reports] == top
                assert len(output.tokens) == len(output.logprobs) == max_tokens
                assert output.finish_reason == "length"
                assert (output.prompt_tokens, output.completion_tokens) == (len(ids), max_tokens)
    engine.close()


def test_they_are_told_once_also_where_the_sequence_was_preempted() -> None:
    base = tiny_engine.base_of()
    engine = tiny_engine.engine_of(base, max_num_seqs=4, cache_tokens=96, max_num_batched_tokens=16)
    prompts = [tiny.ids(30, seed=seed).tolist() for seed in range(4)]
    requests = [tiny_engine.request(ids, 20, id=f"{i}", prompt_logprobs=0) for i, ids in enumerate(prompts)]
    for request in requests:
        engine.add_request(request)
    told: dict[str, list[Any]] = {}
    for output in tiny_engine.drain(engine):
        if output.prompt_logprobs is not None:
            told.setdefault(output.id, []).append(output.prompt_logprobs)
    assert engine.scheduler.num_preempted > 0
    plain = tiny.plain(tiny.folder("llama"))
    for i, ids in enumerate(prompts):
        (reports,) = told[f"{i}"]
        values, _ = expected(tiny.plain_logits(plain, torch.tensor(ids)), ids, 1)
        assert [one.logprob for one in reports] == pytest.approx(values, abs=2e-5)
    engine.close()


def test_a_prompt_as_long_as_the_cache_is_answered_with_no_token() -> None:
    base = tiny_engine.base_of()
    engine = tiny_engine.engine_of(base, max_num_seqs=1, cache_tokens=32)
    ids = tiny.ids(engine.runner.max_model_len).tolist()
    found = reported(engine, [tiny_engine.request(ids, 0, id="long", prompt_logprobs=0)])
    assert len(found["long"].prompt_logprobs or ()) == len(ids) - 1
    engine.close()
