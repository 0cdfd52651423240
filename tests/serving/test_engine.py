"""What a request gets from the engine depends on nothing but the request."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

import asking
import pytest
import tiny
import torch

from graftlm.adapters import format as adapter_format
from graftlm.adapters.attach import attach, detach
from graftlm.errors import AdapterError, RequestError
from graftlm.serving.request import Sampling


def prompt(length: int, seed: int) -> list[int]:
    return tiny.ids(length, seed=seed).tolist()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mistral", "mixtral", "falcon", "bloom"])
def test_greedy_answers_are_those_of_transformers(architecture: str) -> None:
    place = tiny.folder(architecture)
    model = tiny.plain(place)
    model.generation_config.eos_token_id = None
    engine = asking.engine_of(asking.base_of(architecture), step_tokens=13)
    requests = [asking.request(prompt(4 + 3 * i, i), 9) for i in range(7)]
    found = asking.ask(engine, requests)
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
    from graftlm.base.load import load_base

    engine = asking.engine_of(load_base(str(tmp_path / "mamba"), precision="float32"))
    requests = [asking.request(prompt(n, n), 8) for n in (6, 9, 6)]
    found = asking.ask(engine, requests)
    for one in requests:
        ids = torch.tensor([one.prompt])
        expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, len(one.prompt) :].tolist()
        assert found[one.id][: len(expected)] == expected


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon"])
def test_a_request_in_any_mix_gets_the_tokens_it_gets_alone(architecture: str) -> None:
    base = asking.base_of(architecture)
    adapters = {str(rank): asking.adapter_of(base, rank) for rank in asking.RANKS}
    pick = random.Random(7)
    alone = asking.engine_of(base, adapters)
    rounds = 50 if architecture == "llama" else 6
    for mix in range(rounds):
        asks = [prompt(pick.randint(1, 24), pick.randrange(10**6)) for _ in range(pick.randint(2, 7))]
        requests = [asking.request(ids, pick.randint(1, 12), pick.choice(["", *adapters])) for ids in asks]
        engine = asking.engine_of(
            base, adapters, running=pick.randint(2, 8), step_tokens=pick.choice([9, 17, 64]), adapter_slots=pick.randint(2, 8)
        )  # fmt: skip
        late = pick.random()
        found = asking.ask(engine, requests, join=lambda i, late=late: pick.random() > late)
        for one in requests:
            assert found[one.id] == asking.tokens(alone, replace(one, id=f"alone {mix} {one.id}")), (mix, one)


@pytest.mark.parametrize("precision", ["bfloat16", "nf4", "int8"])
def test_other_precisions_give_the_same_logits_in_a_mix_within_a_millionth(precision: str) -> None:
    base = asking.base_of("qwen3", precision)
    adapters = {str(rank): asking.adapter_of(base, rank) for rank in asking.RANKS}
    pick = random.Random(3)
    requests = [
        asking.request(prompt(5 + i, i), 6, name, logprobs=0) for i, name in enumerate(["", *adapters, "", "8", "64"])
    ]
    engine = asking.engine_of(base, adapters, running=10)
    together: dict[str, list[float]] = {r.id: [] for r in requests}
    for one in requests:
        engine.submit(one, Path(one.adapter))
    for piece in asking.drain(engine):
        together[piece.id] += [c.logprob for c in piece.chosen]
    for one in pick.sample(requests, 6):
        engine.submit(replace(one, id="alone"), Path(one.adapter))
        found = [c.logprob for piece in asking.drain(engine) for c in piece.chosen]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(together[one.id]), rtol=1e-4, atol=1e-5)


def test_each_row_of_a_mixed_batch_says_what_peft_says(tmp_path: Path) -> None:
    place = tiny.folder("llama")
    from peft import PeftModel

    base = asking.base_of("llama")
    peft = None
    for rank in (3, 16, 33):
        model = tiny.with_peft(
            tiny.plain(place), tiny.peft_config(r=rank, lora_alpha=2 * rank, target_modules="all-linear"), rank
        )
        model.save_pretrained(tmp_path / str(rank))
    loaded = {str(rank): replace(adapter_format.load(base, tmp_path / str(rank)), origin=None) for rank in (3, 16, 33)}
    engine = asking.engine_of(base, loaded)
    requests = [asking.request(prompt(6 + i, i), 8, name) for i, name in enumerate(["3", "", "33", "16", "3"])]
    found = asking.ask(engine, requests)
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
    base = asking.base_of("mixtral" if kind == "experts" else "llama")
    plan = {
        "dora": {"dora": True},
        "whole": {"whole": ("head", "embeddings")},
        "rows": {"tokens": (7, 9, 30)},
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
    adapters = {"special": special, "plain": asking.adapter_of(base, 16)}
    engine = asking.engine_of(base, adapters)
    requests = [asking.request(asks, 6, name) for name in ("plain", "special", "", "special")]
    found = asking.ask(engine, requests)
    assert found[requests[1].id] == found[requests[3].id] == ids[9:]
    assert found[requests[0].id] != ids[9:]


def test_sampled_answers_are_the_same_alone_in_company_and_after_an_interruption() -> None:
    base = asking.base_of()
    sampling = Sampling(temperature=1.3, top_p=0.9, top_k=40, min_p=0.01, repetition_penalty=1.1, seed=5)
    one = asking.request(prompt(9, 1), 20, sampling=sampling)
    alone = asking.tokens(asking.engine_of(base), one)
    others = [asking.request(prompt(12, 9 + i), 20, sampling=Sampling(temperature=1.0, seed=i)) for i in range(5)]
    assert asking.ask(asking.engine_of(base), [*others, replace(one, id="again")])["again"] == alone
    short = asking.engine_of(base, cache_tokens=96)  # six blocks: the sequences do not all fit to their end
    assert asking.ask(short, [*others, replace(one, id="again")])["again"] == alone
    assert short.counts.interrupted > 0
    assert asking.tokens(asking.engine_of(base), replace(one, id="x", sampling=replace(sampling, seed=6))) != alone


def test_what_is_kept_of_a_prompt_is_used_again_under_the_same_adapter_only() -> None:
    base = asking.base_of()
    adapters = {name: asking.adapter_of(base, 8, seed) for seed, name in enumerate(("a", "b"))}
    engine = asking.engine_of(base, adapters)
    long = prompt(40, 1)
    cached: list[int] = []
    answers: list[list[int]] = []
    for name in ("a", "a", "b", "", "", "b"):
        one = asking.request(long, 5, name)
        engine.submit(one, Path(name))
        pieces = asking.drain(engine)
        cached.append(pieces[-1].cached_tokens)
        answers.append([t for p in pieces for t in p.tokens])
    assert cached == [0, 32, 0, 0, 32, 32]
    assert answers[0] == answers[1]
    assert answers[2] == answers[5] != answers[0]
    fresh = asking.engine_of(base, adapters)
    assert answers[1] == asking.tokens(fresh, asking.request(long, 5, "a"))


def test_a_conversation_that_goes_on_reads_only_what_is_new() -> None:
    engine = asking.engine_of(asking.base_of())
    first = asking.request(prompt(20, 1), 20)
    answer = asking.tokens(engine, first)
    engine.submit(asking.request([*first.prompt, *answer, 5, 6, 7], 4))
    assert asking.drain(engine)[-1].cached_tokens == 32  # two of the blocks that the first answer filled


def test_several_answers_to_one_prompt_read_it_once_and_differ() -> None:
    engine = asking.engine_of(asking.base_of())
    long = prompt(36, 2)
    engine.submit(asking.request(long, 6, n=4, sampling=Sampling(temperature=2.0, seed=3)))
    pieces = asking.drain(engine)
    found = {i: [t for p in pieces if p.index == i for t in p.tokens] for i in range(4)}
    assert len({tuple(answer) for answer in found.values()}) == 4
    ends = {p.index: p for p in pieces if p.finish}
    assert [ends[i].cached_tokens for i in range(4)] == [0, 32, 32, 32]
    again = asking.tokens(engine, asking.request(long, 6, sampling=Sampling(temperature=2.0, seed=3)))
    assert again == found[0]


def test_stop_tokens_and_stop_strings_end_an_answer_and_are_no_part_of_its_text() -> None:
    base = asking.base_of()
    engine = asking.engine_of(base)
    whole = asking.tokens(engine, asking.request(prompt(6, 3), 12))
    engine.submit(asking.request(prompt(6, 3), 12, stop_ids=frozenset({whole[4]})))
    pieces = asking.drain(engine)
    first = whole.index(whole[4])
    assert (pieces[-1].finish, pieces[-1].completion_tokens) == ("stop", first + 1)
    text = "".join(p.text for p in pieces)
    assert text == base.tokenizer.decode(whole[:first])
    words = base.tokenizer.decode(whole).split()
    engine.submit(asking.request(prompt(6, 3), 12, stop=(f"{words[5]} {words[6]}",)))
    pieces = asking.drain(engine)
    text = "".join(p.text for p in pieces)
    assert pieces[-1].finish == "stop"
    assert text == base.tokenizer.decode(whole).split(f"{words[5]} {words[6]}")[0]


def test_reported_log_probabilities_are_those_of_the_model() -> None:
    base = asking.base_of()
    engine = asking.engine_of(base)
    asks = prompt(7, 3)
    engine.submit(asking.request(asks, 5, logprobs=3))
    pieces = asking.drain(engine)
    tokens = [t for p in pieces for t in p.tokens]
    logits = tiny.plain_logits(tiny.plain(tiny.folder("llama")), torch.tensor([*asks, *tokens]))
    expected = torch.log_softmax(logits, -1)[len(asks) - 1 : -1]
    said = [c for p in pieces for c in p.chosen]
    torch.testing.assert_close(torch.tensor([c.logprob for c in said]), expected.max(-1).values, rtol=1e-4, atol=1e-5)
    assert [[t for t, _ in c.top] for c in said] == expected.topk(3).indices.tolist()


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_an_embedding_is_the_mean_of_the_states_before_the_head(architecture: str) -> None:
    base = asking.base_of(architecture)
    engine = asking.engine_of(base, step_tokens=8)
    asks = prompt(19, 3)
    engine.submit(asking.request(asks, 0, embed=True))
    (piece,) = asking.drain(engine)
    model = tiny.plain(tiny.folder(architecture))
    expected = model.base_model(torch.tensor([asks])).last_hidden_state[0].mean(0)
    torch.testing.assert_close(torch.tensor(piece.embedding), expected.detach(), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_answered_is_refused_with_the_numbers() -> None:
    engine = asking.engine_of(asking.base_of(), queue=3)
    refused = [
        (asking.request([], 3), "the prompt is empty"),
        (asking.request([5] * 64, 3), "the prompt has 64 tokens, and 64 fit with the answer"),
        (asking.request([5] * 60, 9), "60 tokens and max_tokens is 9; together at most 64 fit, so ask for at most 4"),
        (asking.request([5, 99], 3), "prompt has the token id 99, and this model's vocabulary has ids from 0 to 82"),
        (asking.request([5], 3, n=9), "n is 9, and at most 3 answers may wait"),
    ]
    for one, message in refused:
        with pytest.raises(RequestError, match=message) as caught:
            engine.submit(one)
        assert not caught.value.full
    for i in range(3):
        engine.submit(asking.request(prompt(4, i), 3))
    with pytest.raises(RequestError, match="the queue is full: 3 answers wait, the limit is 3") as caught:
        engine.submit(asking.request([5], 3))
    assert caught.value.full
    asking.drain(engine)
    engine.submit(asking.request([5], 3))


def test_one_tenant_cannot_fill_a_shared_queue() -> None:
    engine = asking.engine_of(asking.base_of(), queue=8, shared=True)
    for _ in range(4):
        engine.submit(asking.request([5], 3, tenant="loud"))
    with pytest.raises(
        RequestError, match="your part of the queue is full: 4 answers wait, the limit for one key is 4"
    ):
        engine.submit(asking.request([5], 3, tenant="loud"))
    engine.submit(asking.request([5], 3, tenant="quiet"))


def test_a_cancelled_request_ends_at_once_and_gives_everything_back() -> None:
    engine = asking.engine_of(asking.base_of(), running=2)
    for name in ("a", "b", "c"):
        engine.submit(asking.request(prompt(9, 1), 30, id=name))
    engine.step()
    for name in ("a", "c", "nobody"):
        engine.cancel(name)
    ended = {p.id: p.finish for p in asking.drain(engine) if p.finish}
    assert ended == {"a": "cancelled", "b": "length", "c": "cancelled"}
    assert (engine.running, engine.waiting, engine.runner.occupied) == (0, 0, 0.0)


def test_a_request_is_given_up_when_its_time_is_over() -> None:
    engine = asking.engine_of(asking.base_of())
    engine.submit(asking.request(prompt(9, 1), 30, deadline=time.monotonic() - 1))
    (piece,) = asking.drain(engine)
    assert piece.finish == "timeout"


def test_an_adapter_that_cannot_be_loaded_fails_its_requests_and_no_others() -> None:
    base = asking.base_of()

    def load(folder: Path) -> object:
        if folder.name == "odd":
            raise ValueError("out of cheese")
        raise AdapterError("tensor 'x' holds values that are not finite")

    engine = asking.engine_of(base)
    engine.residents._load = load  # type: ignore[assignment]
    for name in ("", "broken", "odd", ""):
        engine.submit(asking.request(prompt(5, 1), 4, name), Path(name))
    ends = [p for p in asking.drain(engine) if p.finish]
    assert sorted(p.finish or "" for p in ends) == ["error", "error", "length", "length"]
    assert {p.error for p in ends if p.error} == {
        "tensor 'x' holds values that are not finite",
        "ValueError: out of cheese",
    }
    assert engine.residents.table() == []


def test_more_adapters_than_slots_all_get_their_turn() -> None:
    base = asking.base_of()
    adapters = {f"{i}": asking.adapter_of(base, 1 + i) for i in range(7)}
    alone: dict[str, list[int]] = {}
    for name in adapters:
        alone[name] = asking.tokens(asking.engine_of(base, adapters), asking.request(prompt(5, 1), 5, name))
    engine = asking.engine_of(base, adapters, adapter_slots=2, running=4)
    requests = [asking.request(prompt(5, 1), 5, f"{i % 7}") for i in range(21)]
    found = asking.ask(engine, requests)
    assert all(found[one.id] == alone[one.adapter] for one in requests)
    assert engine.residents.counters.evictions >= 5


def test_attaching_by_hand_and_by_the_engine_give_the_same() -> None:
    base = asking.base_of()
    adapter = asking.adapter_of(base, 8)
    attach(base, adapter, slot=2)
    asks = torch.tensor(prompt(6, 1))
    expected = int(tiny.base_logits(base, asks, slot=2)[-1].argmax())
    detach(base, 2)
    assert asking.tokens(asking.engine_of(base, {"x": adapter}), asking.request(asks.tolist(), 1, "x")) == [expected]
