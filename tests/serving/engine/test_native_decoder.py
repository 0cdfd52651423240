"""Layers in one call give what the model's own code gives, and run only where they do."""

from __future__ import annotations

import pytest
import tiny
import tiny_engine
import torch
from torch import Tensor, nn

from graftlm.adapters.attach import attach, detach
from graftlm.adapters.bank import LowRank
from graftlm.base.context import ForwardContext
from graftlm.base.kv_cache import PagedAttention, PagedKVCache, check_kv_cache
from graftlm.base.loading import Base
from graftlm.segments import Segments
from graftlm.serving.engine.adapter_cache import pack_for_decoding
from graftlm.serving.engine.native_decoder import NativeDecoder, native_decoder_of

STEPS = ((6, 3, 9), (1, 1, 1), (4, 1, 1), (1, 7, 2), (1, 1, 1))
SLOTS = (0, 4, 7)


def store_of(base: Base) -> PagedKVCache:
    layers, why = check_kv_cache(base)
    assert layers, why
    store = PagedKVCache(
        layers, blocks=15, block=4, batch_slots=3, max_blocks=5, dtype=base.activation_dtype, device=base.device
    )
    store.tables[:] = torch.tensor([[7, 2, 5, 0, 14], [1, 8, 3, 6, 13], [4, 9, 12, 10, 11]])
    return store


def decoder(base: Base) -> NativeDecoder:
    found, why = native_decoder_of(base, store_of(base), 20)
    assert found is not None, why
    return found


def own_code(base: Base, store: PagedKVCache, ids: Tensor, step: tuple[int, ...], done: list[int]) -> Tensor:
    kv_cache = PagedAttention(store, step, done, (0, 1, 2))
    segments = Segments(lengths=step, slots=SLOTS, cached=tuple(done), kv_cache=kv_cache)
    return base.hidden(ids, ForwardContext(segments))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_models_of_the_family_run_in_one_call(architecture: str) -> None:
    assert tiny_engine.engine_of(tiny_engine.base_of(architecture)).runner.decoder is not None


@pytest.mark.parametrize(
    ("architecture", "why"),
    [("gpt2", "has no"), ("gemma2", "has also"), ("mixtral", "gated product"), ("olmo2", "has no"), ("phi3", "has no")],
)
def test_other_models_keep_their_own_code_and_the_reason_is_known(architecture: str, why: str) -> None:
    runner = tiny_engine.engine_of(tiny_engine.base_of(architecture)).runner
    assert runner.decoder is None
    assert why in runner.why_no_decoder


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "nf4"])
def test_states_are_those_of_the_models_own_code_under_adapters_of_any_rank(architecture: str, precision: str) -> None:
    base = tiny_engine.base_of(architecture, precision)
    ours, store = decoder(base), store_of(base)
    attach(base, pack_for_decoding(tiny_engine.adapter_of(base, 33, targets=("attention",))), slot=4)
    attach(base, pack_for_decoding(tiny_engine.adapter_of(base, 3)), slot=7)
    done = [0, 0, 0]
    try:
        for number, step in enumerate(STEPS):
            ids = tiny.ids(sum(step), seed=number)
            expected = own_code(base, store, ids, step, done)
            found = ours.hidden(ids, step, done, (0, 1, 2), SLOTS)
            assert found is not None
            assert float((found - expected).norm() / expected.norm()) < 3e-5
            done = [a + n for a, n in zip(done, step)]
    finally:
        detach(base, 4)
        detach(base, 7)


@torch.no_grad()
def test_an_adapter_in_16_bits_is_read_as_it_lies() -> None:
    base = tiny_engine.base_of()
    ours, store = decoder(base), store_of(base)
    adapter = tiny_engine.adapter_of(base, 8)
    for part in adapter.slots.values():
        assert isinstance(part, LowRank)
        part.A, part.B = (nn.Parameter(t.detach().bfloat16().float(), requires_grad=False) for t in (part.A, part.B))
    adapter = pack_for_decoding(adapter)
    assert {p.dtype for p in adapter.parameters().values()} == {torch.bfloat16}
    attach(base, adapter, slot=4)
    try:
        ids = tiny.ids(18)
        found = ours.hidden(ids, STEPS[0], [0, 0, 0], (0, 1, 2), SLOTS)
        torch.testing.assert_close(found, own_code(base, store, ids, STEPS[0], [0, 0, 0]), rtol=1e-4, atol=1e-4)
    finally:
        detach(base, 4)


@torch.no_grad()
def test_a_row_gives_the_same_bits_whoever_shares_its_pass() -> None:
    base = tiny_engine.base_of()
    attach(base, pack_for_decoding(tiny_engine.adapter_of(base, 16)), slot=4)
    attach(base, pack_for_decoding(tiny_engine.adapter_of(base, 64)), slot=7)
    try:
        ids = tiny.ids(22)
        together = decoder(base).hidden(ids, (9, 7, 6), (0, 0, 0), (0, 1, 2), SLOTS)
        alone = decoder(base).hidden(ids[9:16], (7,), (0,), (1,), (4,))
        assert together is not None
        assert alone is not None
        assert torch.equal(together[9:16], alone)
    finally:
        detach(base, 4)
        detach(base, 7)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dora", "rank 300", "trained now"])
def test_adapters_that_are_more_than_low_rank_products_are_left_to_the_models_own_code(kind: str) -> None:
    base = tiny_engine.base_of()
    ours = decoder(base)
    plan = {"dora": kind == "dora"}
    adapter = tiny_engine.adapter_of(base, 300 if kind == "rank 300" else 3, **plan)
    attach(base, adapter if kind == "trained now" else pack_for_decoding(adapter), slot=4)
    try:
        ids = tiny.ids(5)
        assert ours.hidden(ids, (5,), (0,), (0,), (4,)) is None
        assert ours.hidden(ids, (5,), (0,), (0,), (0,)) is not None
    finally:
        detach(base, 4)


@torch.no_grad()
def test_another_adapter_in_a_slot_is_seen_at_once() -> None:
    base = tiny_engine.base_of()
    ours = decoder(base)
    ids = tiny.ids(5)
    states: list[Tensor] = []
    for rank in (3, 8, 3):
        attach(base, pack_for_decoding(tiny_engine.adapter_of(base, rank)), slot=4)
        found = ours.hidden(ids, (5,), (0,), (0,), (4,))
        assert found is not None
        states.append(found)
        detach(base, 4)
    bare = ours.hidden(ids, (5,), (0,), (0,), (4,))
    assert bare is not None
    assert torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[1])
    assert not torch.equal(states[0], bare)


def test_a_model_that_computes_something_else_fails_its_proof() -> None:
    base = tiny_engine.base_of("llama")
    layer = base.structure.layers[1]
    own = layer.forward
    layer.forward = lambda x, *args, **kwargs: own(x * 1.001, *args, **kwargs)  # as a residual factor would
    try:
        found, why = native_decoder_of(base, store_of(base), 20)
        assert found is None
        assert "change" in why
    finally:
        del layer.forward
