"""What a request gets from the engine depends on nothing but the request."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_engine
import torch

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import attach, detach
from graftlm.errors import AdapterError, RequestError
from graftlm.serving.engine.request import SamplingParams


def prompt(length: int, seed: int) -> list[int]:
    return tiny.ids(length, seed=seed).tolist()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mistral", "mixtral", "falcon", "bloom"])
def test_greedy_answers_are_those_of_transformers(architecture: str) -> None:
    place = tiny.folder(architecture)
    model = tiny.plain(place)
    model.generation_config.eos_token_id = None
    engine = tiny_engine.engine_of(tiny_engine.base_of(architecture), max_num_batched_tokens=13)
    requests = [tiny_engine.request(prompt(4 + 3 * i, i), 9) for i in range(7)]
    found = tiny_engine.ask(engine, requests)
    for one in requests:
        ids = torch.tensor([one.prompt])
        expected = model.generate(ids, max_new_tokens=9, do_sample=False)[0, len(one.prompt) :].tolist()
        assert found[one.id] == expected


def test_a_model_that_keeps_its_past_elsewhere_gets_the_whole_text_each_time(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.MambaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, state_size=5, num_hidden_layers=2, intermediate_size=32
    )
    model = transformers.MambaForCausalLM(config).eval()
    tiny.write(tmp_path / "mamba", model)
    from graftlm.base.loading import load_base

    engine = tiny_engine.engine_of(load_base(str(tmp_path / "mamba"), precision="float32"))
    requests = [tiny_engine.request(prompt(n, n), 8) for n in (6, 9, 6)]
    found = tiny_engine.ask(engine, requests)
    for one in requests:
        ids = torch.tensor([one.prompt])
        expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, len(one.prompt) :].tolist()
        assert found[one.id][: len(expected)] == expected


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon"])
def test_a_request_in_any_mix_gets_the_tokens_it_gets_alone(architecture: str) -> None:
    base = tiny_engine.base_of(architecture)
    adapters = {str(rank): tiny_engine.adapter_of(base, rank) for rank in tiny_engine.RANKS}
    pick = random.Random(7)
    alone = tiny_engine.engine_of(base, adapters)
    rounds = 50 if architecture == "llama" else 6
    for mix in range(rounds):
        asks = [prompt(pick.randint(1, 24), pick.randrange(10**6)) for _ in range(pick.randint(2, 7))]
        requests = [tiny_engine.request(ids, pick.randint(1, 12), pick.choice(["", *adapters])) for ids in asks]
        engine = tiny_engine.engine_of(
            base,
            adapters,
            max_num_seqs=pick.randint(2, 8),
            max_num_batched_tokens=pick.choice([9, 17, 64]),
            max_loras=pick.randint(2, 8),
        )
        late = pick.random()
        found = tiny_engine.ask(engine, requests, join=lambda i, late=late: pick.random() > late)
        for one in requests:
            assert found[one.id] == tiny_engine.tokens(alone, replace(one, id=f"alone {mix} {one.id}")), (mix, one)


@pytest.mark.parametrize("precision", ["bfloat16", "nf4", "int8"])
def test_other_precisions_give_the_same_logits_in_a_mix_within_a_millionth(precision: str) -> None:
    base = tiny_engine.base_of("qwen3", precision)
    adapters = {str(rank): tiny_engine.adapter_of(base, rank) for rank in tiny_engine.RANKS}
    pick = random.Random(3)
    requests = [
        tiny_engine.request(prompt(5 + i, i), 6, name, logprobs=0)
        for i, name in enumerate(["", *adapters, "", "8", "64"])
    ]
    engine = tiny_engine.engine_of(base, adapters, max_num_seqs=10)
    together: dict[str, list[float]] = {r.id: [] for r in requests}
    for one in requests:
        engine.add_request(one, Path(one.adapter))
    for output in tiny_engine.drain(engine):
        together[output.id] += [c.logprob for c in output.logprobs]
    for one in pick.sample(requests, 6):
        engine.add_request(replace(one, id="alone"), Path(one.adapter))
        found = [c.logprob for output in tiny_engine.drain(engine) for c in output.logprobs]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(together[one.id]), rtol=1e-4, atol=1e-5)


def test_each_row_of_a_mixed_batch_says_what_peft_says(tmp_path: Path) -> None:
    place = tiny.folder("llama")
    from peft import PeftModel

    base = tiny_engine.base_of("llama")
    peft = None
    for rank in (3, 16, 33):
        model = tiny.with_peft(
            tiny.plain(place), tiny.peft_config(r=rank, lora_alpha=2 * rank, target_modules="all-linear"), rank
        )
        model.save_pretrained(tmp_path / str(rank))
    loaded = {str(rank): replace(adapter_format.load(base, tmp_path / str(rank)), origin=None) for rank in (3, 16, 33)}
    engine = tiny_engine.engine_of(base, loaded)
    requests = [tiny_engine.request(prompt(6 + i, i), 8, name) for i, name in enumerate(["3", "", "33", "16", "3"])]
    found = tiny_engine.ask(engine, requests)
    for rank in (3, 16, 33):
        peft = PeftModel.from_pretrained(tiny.plain(place), str(tmp_path / str(rank))).eval()
        peft.generation_config.eos_token_id = None
        for one in requests:
            if one.adapter == str(rank):
                ids = torch.tensor([one.prompt])
                expected = peft.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[
                    0, len(one.prompt) :
                ].tolist()
                assert found[one.id] == expected


@pytest.mark.parametrize("kind", ["dora", "whole", "rows", "experts"])
def test_every_kind_of_adapter_is_served_beside_others(kind: str) -> None:
    base = tiny_engine.base_of("mixtral" if kind == "experts" else "llama")
    plan = {
        "dora": {"dora": True},
        "whole": {"modules_to_save": ("head", "embeddings")},
        "rows": {"trainable_tokens": (7, 9, 30)},
        "experts": {},
    }
    targets = ("attention",) if kind == "dora" else ("all-linear",)
    special = tiny.adapted(base, rank=3, alpha=5.0, slot=900, seed=5, targets=targets, **plan[kind])
    with torch.no_grad():
        for name, parameter in special.parameters().items():
            if "lora" not in name or "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.sin(torch.arange(parameter.numel()).float()).view(parameter.shape))
    asks = prompt(9, 4)
    ids = list(asks)
    for _ in range(6):
        ids.append(int(tiny.base_logits(base, torch.tensor(ids), slot=900)[-1].argmax()))
    detach(base, 900)
    adapters = {"special": special, "plain": tiny_engine.adapter_of(base, 16)}
    engine = tiny_engine.engine_of(base, adapters)
    requests = [tiny_engine.request(asks, 6, name) for name in ("plain", "special", "", "special")]
    found = tiny_engine.ask(engine, requests)
    assert found[requests[1].id] == found[requests[3].id] == ids[9:]
    assert found[requests[0].id] != ids[9:]


def test_sampled_answers_are_the_same_alone_in_company_and_after_an_interruption() -> None:
    base = tiny_engine.base_of()
    sampling = SamplingParams(temperature=1.3, top_p=0.9, top_k=40, min_p=0.01, repetition_penalty=1.1, seed=5)
    one = tiny_engine.request(prompt(9, 1), 20, sampling=sampling)
    alone = tiny_engine.tokens(tiny_engine.engine_of(base), one)
    others = [
        tiny_engine.request(prompt(12, 9 + i), 20, sampling=SamplingParams(temperature=1.0, seed=i)) for i in range(5)
    ]
    assert tiny_engine.ask(tiny_engine.engine_of(base), [*others, replace(one, id="again")])["again"] == alone
    short = tiny_engine.engine_of(base, cache_tokens=96)  # six blocks: the sequences do not all fit to their end
    assert tiny_engine.ask(short, [*others, replace(one, id="again")])["again"] == alone
    assert short.scheduler.num_preempted > 0
    assert (
        tiny_engine.tokens(tiny_engine.engine_of(base), replace(one, id="x", sampling=replace(sampling, seed=6)))
        != alone
    )


def test_what_is_kept_of_a_prompt_is_used_again_under_the_same_adapter_only() -> None:
    base = tiny_engine.base_of()
    adapters = {name: tiny_engine.adapter_of(base, 8, seed) for seed, name in enumerate(("a", "b"))}
    engine = tiny_engine.engine_of(base, adapters)
    long = prompt(40, 1)
    cached: list[int] = []
    answers: list[list[int]] = []
    for name in ("a", "a", "b", "", "", "b"):
        one = tiny_engine.request(long, 5, name)
        engine.add_request(one, Path(name))
        outputs = tiny_engine.drain(engine)
        cached.append(outputs[-1].cached_tokens)
        answers.append([t for p in outputs for t in p.tokens])
    assert cached == [0, 32, 0, 0, 32, 32]
    assert answers[0] == answers[1]
    assert answers[2] == answers[5] != answers[0]
    fresh = tiny_engine.engine_of(base, adapters)
    assert answers[1] == tiny_engine.tokens(fresh, tiny_engine.request(long, 5, "a"))


def test_a_conversation_that_goes_on_reads_only_what_is_new() -> None:
    engine = tiny_engine.engine_of(tiny_engine.base_of())
    first = tiny_engine.request(prompt(20, 1), 20)
    answer = tiny_engine.tokens(engine, first)
    engine.add_request(tiny_engine.request([*first.prompt, *answer, 5, 6, 7], 4))
    assert tiny_engine.drain(engine)[-1].cached_tokens == 32  # two of the blocks that the first answer filled


def test_several_answers_to_one_prompt_read_it_once_and_differ() -> None:
    engine = tiny_engine.engine_of(tiny_engine.base_of())
    long = prompt(36, 2)
    engine.add_request(tiny_engine.request(long, 6, n=4, sampling=SamplingParams(temperature=2.0, seed=3)))
    outputs = tiny_engine.drain(engine)
    found = {i: [t for p in outputs if p.index == i for t in p.tokens] for i in range(4)}
    assert len({tuple(answer) for answer in found.values()}) == 4
    ends = {p.index: p for p in outputs if p.finish_reason}
    assert [ends[i].cached_tokens for i in range(4)] == [0, 32, 32, 32]
    again = tiny_engine.tokens(engine, tiny_engine.request(long, 6, sampling=SamplingParams(temperature=2.0, seed=3)))
    assert again == found[0]


def test_stop_tokens_and_stop_strings_end_an_answer_and_are_no_part_of_its_text() -> None:
    base = tiny_engine.base_of()
    engine = tiny_engine.engine_of(base)
    whole = tiny_engine.tokens(engine, tiny_engine.request(prompt(6, 3), 12))
    engine.add_request(tiny_engine.request(prompt(6, 3), 12, stop_ids=frozenset({whole[4]})))
    outputs = tiny_engine.drain(engine)
    first = whole.index(whole[4])
    assert (outputs[-1].finish_reason, outputs[-1].completion_tokens) == ("stop", first + 1)
    text = "".join(p.text for p in outputs)
    assert text == base.tokenizer.decode(whole[:first])
    words = base.tokenizer.decode(whole).split()
    engine.add_request(tiny_engine.request(prompt(6, 3), 12, stop=(f"{words[5]} {words[6]}",)))
    outputs = tiny_engine.drain(engine)
    text = "".join(p.text for p in outputs)
    assert outputs[-1].finish_reason == "stop"
    assert text == base.tokenizer.decode(whole).split(f"{words[5]} {words[6]}")[0]


def test_reported_log_probabilities_are_those_of_the_model() -> None:
    base = tiny_engine.base_of()
    engine = tiny_engine.engine_of(base)
    asks = prompt(7, 3)
    engine.add_request(tiny_engine.request(asks, 5, logprobs=3))
    outputs = tiny_engine.drain(engine)
    tokens = [t for p in outputs for t in p.tokens]
    logits = tiny.plain_logits(tiny.plain(tiny.folder("llama")), torch.tensor([*asks, *tokens]))
    expected = torch.log_softmax(logits, -1)[len(asks) - 1 : -1]
    said = [c for p in outputs for c in p.logprobs]
    torch.testing.assert_close(torch.tensor([c.logprob for c in said]), expected.max(-1).values, rtol=1e-4, atol=1e-5)
    assert [[t for t, _ in c.top] for c in said] == expected.topk(3).indices.tolist()


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_an_embedding_is_the_mean_of_the_states_before_the_head(architecture: str) -> None:
    base = tiny_engine.base_of(architecture)
    engine = tiny_engine.engine_of(base, max_num_batched_tokens=8)
    asks = prompt(19, 3)
    engine.add_request(tiny_engine.request(asks, 0, embed=True))
    (output,) = tiny_engine.drain(engine)
    model = tiny.plain(tiny.folder(architecture))
    expected = model.base_model(torch.tensor([asks])).last_hidden_state[0].mean(0)
    torch.testing.assert_close(torch.tensor(output.embedding), expected.detach(), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_answered_is_refused_with_the_numbers() -> None:
    engine = tiny_engine.engine_of(tiny_engine.base_of(), queue=3)
    refused = [
        (tiny_engine.request([], 3), "the prompt is empty"),
        (tiny_engine.request([5] * 64, 3), "the prompt has 64 tokens, and 64 fit with the answer"),
        (
            tiny_engine.request([5] * 60, 9),
            "60 tokens and max_tokens is 9; together at most 64 fit, so ask for at most 4",
        ),
        (
            tiny_engine.request([5, 99], 3),
            "prompt has the token id 99, and this model's vocabulary has ids from 0 to 82",
        ),
        (tiny_engine.request([5], 3, n=9), "n is 9, and at most 3 answers may wait"),
    ]
    for one, message in refused:
        with pytest.raises(RequestError, match=message) as caught:
            engine.add_request(one)
        assert not caught.value.full
    for i in range(3):
        engine.add_request(tiny_engine.request(prompt(4, i), 3))
    with pytest.raises(RequestError, match="the queue is full: 3 answers wait, the limit is 3") as caught:
        engine.add_request(tiny_engine.request([5], 3))
    assert caught.value.full
    tiny_engine.drain(engine)
    engine.add_request(tiny_engine.request([5], 3))


def test_one_tenant_cannot_fill_a_shared_queue() -> None:
    engine = tiny_engine.engine_of(tiny_engine.base_of(), queue=8, shared=True)
    for _ in range(4):
        engine.add_request(tiny_engine.request([5], 3, tenant="loud"))
    with pytest.raises(
        RequestError, match="your part of the queue is full: 4 answers wait, the limit for one key is 4"
    ):
        engine.add_request(tiny_engine.request([5], 3, tenant="loud"))
    engine.add_request(tiny_engine.request([5], 3, tenant="quiet"))


def test_a_cancelled_request_ends_at_once_and_gives_everything_back() -> None:
    engine = tiny_engine.engine_of(tiny_engine.base_of(), max_num_seqs=2)
    for name in ("a", "b", "c"):
        engine.add_request(tiny_engine.request(prompt(9, 1), 30, id=name))
    engine.step()
    for name in ("a", "c", "nobody"):
        engine.abort_request(name)
    ended = {p.id: p.finish_reason for p in tiny_engine.drain(engine) if p.finish_reason}
    assert ended == {"a": "cancelled", "b": "length", "c": "cancelled"}
    assert (engine.num_running, engine.num_waiting, engine.runner.kv_cache_usage) == (0, 0, 0.0)


def test_a_request_is_given_up_when_its_time_is_over() -> None:
    engine = tiny_engine.engine_of(tiny_engine.base_of())
    engine.add_request(tiny_engine.request(prompt(9, 1), 30, deadline=time.monotonic() - 1))
    (output,) = tiny_engine.drain(engine)
    assert output.finish_reason == "timeout"


def test_an_adapter_that_cannot_be_loaded_fails_its_requests_and_no_others() -> None:
    base = tiny_engine.base_of()

    def load(folder: Path) -> object:
        if folder.name == "odd":
            raise ValueError("out of cheese")
        raise AdapterError("tensor 'x' holds values that are not finite")

    engine = tiny_engine.engine_of(base)
    engine.adapter_cache._load = load  # type: ignore[assignment]
    for name in ("", "broken", "odd", ""):
        engine.add_request(tiny_engine.request(prompt(5, 1), 4, name), Path(name))
    ends = [p for p in tiny_engine.drain(engine) if p.finish_reason]
    assert sorted(p.finish_reason or "" for p in ends) == ["error", "error", "length", "length"]
    assert {p.error for p in ends if p.error} == {
        "tensor 'x' holds values that are not finite",
        "ValueError: out of cheese",
    }
    assert engine.adapter_cache.versions() == []


def test_more_adapters_than_slots_all_get_their_turn() -> None:
    base = tiny_engine.base_of()
    adapters = {f"{i}": tiny_engine.adapter_of(base, 1 + i) for i in range(7)}
    alone: dict[str, list[int]] = {}
    for name in adapters:
        alone[name] = tiny_engine.tokens(
            tiny_engine.engine_of(base, adapters), tiny_engine.request(prompt(5, 1), 5, name)
        )
    engine = tiny_engine.engine_of(base, adapters, max_loras=2, max_num_seqs=4)
    requests = [tiny_engine.request(prompt(5, 1), 5, f"{i % 7}") for i in range(21)]
    found = tiny_engine.ask(engine, requests)
    assert all(found[one.id] == alone[one.adapter] for one in requests)
    assert engine.adapter_cache.counters.evictions >= 5


def test_attaching_by_hand_and_by_the_engine_give_the_same() -> None:
    base = tiny_engine.base_of()
    adapter = tiny_engine.adapter_of(base, 8)
    attach(base, adapter, slot=2)
    asks = torch.tensor(prompt(6, 1))
    expected = int(tiny.base_logits(base, asks, slot=2)[-1].argmax())
    detach(base, 2)
    assert tiny_engine.tokens(
        tiny_engine.engine_of(base, {"x": adapter}), tiny_engine.request(asks.tolist(), 1, "x")
    ) == [expected]
