"""Steps that are captured once give what the model's own code gives, whatever changes from one replay to the next.

On a CPU a stand-in replays: it runs the region again, which reads its inputs from where they lay when it was captured.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny
import tiny_engine
import torch
from torch import Tensor

from graftlm.adapters.attach import attach, detach
from graftlm.adapters.factor_tables import FactorTables
from graftlm.base.context import ForwardContext
from graftlm.base.kv_cache import PagedAttention, PagedKVCache, check_kv_cache
from graftlm.base.loading import Base
from graftlm.segments import Segments
from graftlm.serving.engine.adapter_cache import pack_for_decoding
from graftlm.serving.engine.engine import Engine
from graftlm.serving.engine.graph_decoder import MOST_ROWS, GraphDecoder, graph_decoder_of, row_counts
from graftlm.serving.engine.runner import PagedRunner

SEQUENCES = 7


class RunsAgain:
    """In place of CUDA graphs: a replay is the region once more, into the tensor that its capture gave."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0
        self.error: Exception | None = None

    def capture(self, region: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if self.error is not None:
            raise self.error
        self.captured += 1
        out = region()

        def replay() -> None:
            self.replayed += 1
            out.copy_(region())

        return replay, out.fill_(float("nan"))


def stores_of(base: Base) -> list[PagedKVCache]:
    """Two caches of the same contents, the second with a spare block."""
    layers, why = check_kv_cache(base)
    assert layers, why
    made: list[PagedKVCache] = []
    for spare in (False, True):
        store = PagedKVCache(
            layers, blocks=5 * SEQUENCES, block=4, batch_slots=SEQUENCES, max_blocks=5, dtype=base.activation_dtype,
            device=base.device, spare=spare,
        )  # fmt: skip
        store.tables[:] = torch.randperm(5 * SEQUENCES, generator=torch.Generator().manual_seed(1)).view(-1, 5)
        made.append(store)
    return made


def own_code(
    base: Base, store: PagedKVCache, ids: Tensor, pasts: list[int], rows: list[int], slots: list[int]
) -> Tensor:
    lengths = (1,) * len(ids)
    kv_cache = PagedAttention(store, lengths, pasts, rows)
    return base.hidden(
        ids, ForwardContext(Segments(lengths=lengths, slots=tuple(slots), cached=tuple(pasts), kv_cache=kv_cache))
    )


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_replayed_steps_give_the_states_of_the_models_own_code(architecture: str) -> None:
    """Sequences come and go, grow over blocks, and change their adapters, which come and go too."""
    base = tiny_engine.base_of(architecture)
    store, ours = stores_of(base)
    graphs = RunsAgain()
    decoder = GraphDecoder(base, ours, SEQUENCES, graphs)
    attach(base, pack_for_decoding(tiny_engine.adapter_of(base, 33, targets=("attention",))), slot=4)
    attach(base, pack_for_decoding(tiny_engine.adapter_of(base, 3)), slot=7)
    steps = [
        ([0, 1, 2], [0, 4, 7]),
        ([0, 1, 2, 3, 4], [0, 0, 4, 7, 7]),
        ([0, 2, 3, 4], [0, 0, 0, 0]),
        ([5, 2, 6, 4, 0, 1], [7] * 6),
    ]
    done = [0] * SEQUENCES
    try:
        for number in range(14):
            rows, slots = steps[number % 4]
            if number == 9:
                detach(base, 7)
                attach(base, pack_for_decoding(tiny_engine.adapter_of(base, 16, seed=5)), slot=7)
            ids, pasts = tiny.ids(len(rows), seed=number), [done[row] for row in rows]
            expected = own_code(base, store, ids, pasts, rows, slots)
            found = decoder.hidden(ids, [1] * len(rows), pasts, rows, slots)
            assert found is not None
            assert float((found - expected).norm() / expected.norm()) < 3e-5, number
            for row in rows:
                done[row] += 1
    finally:
        detach(base, 4)
        detach(base, 7)
    assert max(done) > 9  # more than two blocks
    assert graphs.captured >= 3
    assert graphs.replayed >= 5


def test_an_engine_says_the_same_with_steps_that_are_replayed() -> None:
    base = tiny_engine.base_of("llama")
    adapters = {f"a{rank}": tiny_engine.adapter_of(base, rank) for rank in (3, 33)}
    answers: list[dict[str, list[int]]] = []
    for captured in (False, True):
        engine = tiny_engine.engine_of(base, adapters)
        runner = engine.runner
        assert isinstance(runner, PagedRunner)
        runner.decoder = with_graphs(engine) if captured else None
        requests = [
            tiny_engine.request(tiny.ids(5 + i, seed=i).tolist(), 6 + i, ("", "a3", "a33")[i % 3], id=str(i))
            for i in range(8)
        ]
        answers.append(tiny_engine.ask(engine, requests, join=lambda i: i % 2 == 0))
        engine.close()
        if captured:
            assert isinstance(runner.decoder, GraphDecoder)
            assert isinstance(runner.decoder.graphs, RunsAgain)
            assert runner.decoder.graphs.replayed > 3
    assert answers[0] == answers[1]


def with_graphs(engine: Engine) -> GraphDecoder:
    runner = engine.runner
    assert isinstance(runner, PagedRunner)
    runner.kv_cache = PagedKVCache(
        runner.kv_cache.layers, blocks=runner.kv_cache.blocks, block=runner.kv_cache.block,
        batch_slots=len(runner.kv_cache.tables), max_blocks=runner.kv_cache.tables.shape[1], dtype=torch.float32,
        device=engine.base.device, spare=True,
    )  # fmt: skip
    return GraphDecoder(engine.base, runner.kv_cache, engine.limits.max_num_seqs, RunsAgain())


@torch.no_grad()
def test_where_a_capture_fails_steps_go_on_and_the_reason_is_known() -> None:
    base = tiny_engine.base_of("llama")
    store, ours = stores_of(base)
    graphs = RunsAgain()
    graphs.error = RuntimeError("operation not permitted when stream is capturing\nmore")
    decoder = GraphDecoder(base, ours, SEQUENCES, graphs)
    for past in range(4):
        ids = tiny.ids(2, seed=past)
        expected = own_code(base, store, ids, [past, past], [0, 1], [0, 0])
        found = decoder.hidden(ids, [1, 1], [past, past], [0, 1], [0, 0])
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert decoder.why_eager == "a step could not be captured (operation not permitted when stream is capturing)"


@torch.no_grad()
def test_steps_of_every_size_can_be_captured_before_the_first_request() -> None:
    base = tiny_engine.base_of("llama")
    store, ours = stores_of(base)
    graphs = RunsAgain()
    decoder = GraphDecoder(base, ours, SEQUENCES, graphs)
    decoder.capture_all()
    assert graphs.captured == len(row_counts(SEQUENCES)) == 4
    ids = tiny.ids(3)
    found = decoder.hidden(ids, [1] * 3, [0] * 3, [4, 0, 2], [0] * 3)
    assert found is not None
    torch.testing.assert_close(found, own_code(base, store, ids, [0] * 3, [4, 0, 2], [0] * 3), rtol=1e-5, atol=1e-5)
    assert graphs.captured == 4


@torch.no_grad()
def test_what_is_not_decoding_or_not_in_tables_is_left_to_the_models_own_code() -> None:
    base = tiny_engine.base_of("llama")
    decoder = GraphDecoder(base, stores_of(base)[1], 2, RunsAgain())
    dora = pack_for_decoding(tiny_engine.adapter_of(base, 4, dora=True))
    rows = pack_for_decoding(tiny_engine.adapter_of(base, 4, trainable_tokens=(5, 9)))
    attach(base, dora, slot=1)
    attach(base, rows, slot=2)
    try:
        assert decoder.hidden(tiny.ids(2), [2], [0], [0], [0]) is None
        assert decoder.hidden(tiny.ids(3), [1] * 3, [0] * 3, [0, 1, 2], [0] * 3) is None
        assert decoder.hidden(tiny.ids(1), [1], [0], [0], [1]) is None
        assert decoder.hidden(tiny.ids(1), [1], [0], [0], [2]) is None
        assert decoder.hidden(tiny.ids(1), [1], [0], [0], [0]) is not None
    finally:
        detach(base, 1)
        detach(base, 2)


def test_tables_have_room_for_the_adapters_of_a_step_however_many_there_were_before() -> None:
    base = tiny_engine.base_of("llama")
    tables = FactorTables(base, entries=3)
    adapter = pack_for_decoding(tiny_engine.adapter_of(base, 3))
    try:
        for slot in range(1, 6):
            attach(base, adapter, slot=slot)
        for slots in ([1], [2], [1, 3], [5, 4], [0, 5]):
            found = tables.entries_of(slots)
            assert found is not None
            entries, largest = found
            assert largest == 3
            used = [entries[slot] for slot in slots if slot]
            assert len({*used, 0}) == len(used) + 1
            assert max(used) < 3
        assert tables.entries_of([0]) == ({0: 0}, 0)
    finally:
        for slot in range(1, 6):
            detach(base, slot)


@pytest.mark.parametrize("most", [1, 2, 3, 8, 17, 64, 100, 128, 500, 4096])
def test_steps_are_captured_for_row_counts_of_which_one_is_near_above_each_number(most: int) -> None:
    counts = row_counts(most)
    assert counts == sorted(set(counts))
    assert counts[-1] == min(most, MOST_ROWS)
    for n in range(1, counts[-1] + 1):
        rows = next(count for count in counts if count >= n)
        assert rows <= max(2 * n, n + 15)


def test_on_a_cpu_there_are_no_graphs() -> None:
    base = tiny_engine.base_of("llama")
    decoder, why = graph_decoder_of(base, stores_of(base)[1], 4)
    assert decoder is None
    assert why == "CUDA graphs are for GPUs; this is cpu"
