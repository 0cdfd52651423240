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
from graftlm.adapters.layer_adapter import LowRank
from graftlm.base.context import ForwardContext
from graftlm.base.decode_inputs import DecodeInputs, DecodeStepAttention
from graftlm.base.kv_cache import PagedAttention, PagedKVCache, check_kv_cache
from graftlm.base.loading import Base, load_base
from graftlm.segments import Segments
from graftlm.serving.engine.adapter_cache import pack_for_decoding
from graftlm.serving.engine.engine import Engine
from graftlm.serving.engine.graph_decoder import MOST_ROWS, CapturedStep, GraphDecoder, graph_decoder_of, row_counts
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
@pytest.mark.parametrize("fails", ["capture", "first run"])
def test_where_a_step_fails_the_models_own_code_goes_on_and_the_reason_is_known(
    fails: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was captured before is replayed as before. Not all errors are RuntimeErrors: Triton has its own."""
    base = tiny_engine.base_of("llama")
    store, ours = stores_of(base)
    graphs = RunsAgain()
    decoder = GraphDecoder(base, ours, SEQUENCES, graphs)
    error = AssertionError("operation not permitted when stream is capturing\nmore")

    def step(n: int, past: int) -> Tensor | None:
        ids = tiny.ids(n, seed=past)
        expected = own_code(base, store, ids, [past] * n, list(range(n)), [0] * n)
        found = decoder.hidden(ids, [1] * n, [past] * n, list(range(n)), [0] * n)
        if found is None:  # as the runner does
            found = own_code(base, ours, ids, [past] * n, list(range(n)), [0] * n)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            return None
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        return found

    assert step(1, 0) is not None
    assert step(1, 1) is not None
    if fails == "capture":
        assert step(2, 0) is not None
        graphs.error = error
    else:

        def attend(*args: object) -> Tensor:
            raise error

        monkeypatch.setattr(DecodeStepAttention, "attend", attend)
    assert step(2, 1 if fails == "capture" else 0) is None
    what = "captured" if fails == "capture" else "run"
    assert decoder.why_eager == f"a step could not be {what} (operation not permitted when stream is capturing)"
    assert [record.getMessage() for record in caplog.records] == [
        f"decoding goes on without CUDA graphs: {decoder.why_eager}"
    ]
    graphs.error = None
    monkeypatch.undo()
    assert step(2, 2 if fails == "capture" else 1) is None
    assert step(4, 0) is None
    assert step(1, 2 if fails == "first run" else 4) is not None
    assert len(caplog.records) == 1


@torch.no_grad()
def test_decoding_is_left_to_the_models_own_code_where_steps_cannot_be_captured_before_the_first_request() -> None:
    base = tiny_engine.base_of("llama")
    graphs = RunsAgain()
    graphs.error = torch.OutOfMemoryError("CUDA out of memory")
    decoder = GraphDecoder(base, stores_of(base)[1], SEQUENCES, graphs)
    decoder.capture_all()
    assert decoder.why_eager == "a step could not be captured (CUDA out of memory)"
    assert decoder.hidden(tiny.ids(2), [1] * 2, [0] * 2, [0, 1], [0] * 2) is None


@torch.no_grad()
def test_a_layer_that_is_given_float32_reads_its_factors_in_their_own_dtype() -> None:
    base = load_base(str(tiny.folder("llama")), precision="bfloat16", compute_dtype="bfloat16")
    adapter = tiny_engine.adapter_of(base, 3)
    for part in adapter.layers.values():
        for tensor in part.named().values():
            tensor.data.copy_(tensor.data.bfloat16())  # then it is packed in bfloat16
    adapter = pack_for_decoding(adapter)
    attach(base, adapter, slot=2)
    try:
        tables = FactorTables(base, entries=2)
        found = tables.entries_of({2})
        assert found == ({0: 0, 2: 1}, 3)
        inputs = DecodeInputs(stores_of(base)[1], torch.zeros(3, 5, dtype=torch.int64), rows=3, tiles=3)
        inputs.tiles[:, 0] = torch.tensor([1, 0, 3])
        step = CapturedStep(inputs, 16, tables)
        name, part = next((n, p) for n, p in adapter.layers.items() if isinstance(p, LowRank))
        wide = torch.randn(part.A.shape[1], 3, generator=torch.Generator().manual_seed(2))
        y = torch.zeros(3, len(part.B))
        step.add_adapters(base.stored()[name], y, wide.T)  # float32, and its rows are not end to end
        expected = part.scale * (wide.T @ part.A.float().T) @ part.B.float().T
        assert float((y - expected).norm() / expected.norm()) < 0.02
    finally:
        detach(base, 2)


@torch.no_grad()
def test_queries_in_float32_attend_to_a_cache_in_bfloat16() -> None:
    base = load_base(str(tiny.folder("llama")), precision="bfloat16", compute_dtype="bfloat16")
    store = stores_of(base)[1]
    layer, keys = next(iter(store.keys.items()))
    inputs = DecodeInputs(store, torch.zeros(2, 5, dtype=torch.int64), rows=2, tiles=1)
    inputs.fill(torch.tensor([3, 4]), [0, 0], [0, 1], ())
    k, v = torch.randn(2, 2, *keys.shape[1:], generator=torch.Generator().manual_seed(1)).unbind()
    out = inputs.attention().attend(layer, torch.cat([k, k], 1), k, v, None, None, None)
    assert out.dtype == torch.float32
    shared = out.shape[1] // v.shape[1]
    torch.testing.assert_close(out, v.bfloat16().float().repeat_interleave(shared, 1))  # each sees itself alone


@torch.no_grad()
def test_steps_whose_rows_all_have_adapters_of_their_own_are_captured_too() -> None:
    base = tiny_engine.base_of("llama")
    rows = 24  # more than 16, and than 16 and one for each 16 of them
    cache = PagedKVCache(
        check_kv_cache(base)[0], blocks=rows, block=4, batch_slots=rows, max_blocks=1, dtype=base.activation_dtype,
        device=base.device, spare=True,
    )  # fmt: skip
    cache.tables[:] = torch.arange(rows)[:, None]
    graphs = RunsAgain()
    decoder = GraphDecoder(base, cache, rows, graphs)
    adapter = pack_for_decoding(tiny_engine.adapter_of(base, 3))
    slots = list(range(1, rows + 1))
    try:
        for slot in slots:
            attach(base, adapter, slot=slot)
        states: list[Tensor] = []
        for own in (slots, [1] * rows):
            for past in range(3):
                found = decoder.hidden(tiny.ids(rows, seed=past), [1] * rows, [past] * rows, list(range(rows)), own)
                assert found is not None
                states.append(found.clone())
        torch.testing.assert_close(states[2], states[5], rtol=1e-5, atol=1e-5)  # the same adapter in all slots
    finally:
        for slot in slots:
            detach(base, slot)
    assert graphs.captured == 2
    assert not decoder.why_eager


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8])
def test_what_kernels_read_begins_at_multiples_of_16_bytes(rows: int) -> None:
    """Triton compiles a program anew for addresses that are not, and in a capture that fails."""
    base = tiny_engine.base_of("llama")
    inputs = DecodeInputs(stores_of(base)[1], torch.zeros(rows, 5, dtype=torch.int64), rows=rows, tiles=rows)
    read = [tensor for tensor in vars(inputs).values() if isinstance(tensor, Tensor)]
    assert len(read) > 5
    assert all(tensor.data_ptr() % 16 == 0 for tensor in read)
    tables = FactorTables(base, entries=rows + 1)
    found = [tables.of(module) for module in base.stored().values()]
    known = [table for table in found if table is not None]
    assert len(known) > 5
    for table in known:
        for field in (table.A, table.B, table.ranks, table.scale):
            assert field.data_ptr() % 16 == 0


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


def test_a_change_of_one_slot_leaves_the_others_entries_and_makes_its_own_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tiny_engine.base_of("llama")
    tables = FactorTables(base, entries=4)
    read: list[int] = []
    rows = FactorTables._rows  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(FactorTables, "_rows", lambda self, slot, entry: read.append(slot) or rows(self, slot, entry))

    def fields() -> dict[str, list[Tensor]]:
        layers = [tables.of(module) for module in base.stored().values()]
        known = [layer for layer in layers if layer is not None]
        return {name: [getattr(layer, name) for layer in known] for name in ("A", "B", "ranks", "scale")}

    def entry(number: int) -> list[float]:
        return [float(tensor[number]) for parts in fields().values() for tensor in parts]

    try:
        for slot, rank in ((5, 3), (6, 4), (7, 5)):
            attach(base, pack_for_decoding(tiny_engine.adapter_of(base, rank)), slot=slot)
        first = tables.entries_of({5, 6, 7})
        assert first is not None
        assert first[1] == 5
        before = {slot: entry(number) for slot, number in first[0].items()}
        lies = [tensor.data_ptr() for parts in fields().values() for tensor in parts]
        detach(base, 7)
        attach(base, pack_for_decoding(tiny_engine.adapter_of(base, 2, targets=("attention",))), slot=7)
        read.clear()
        again = tables.entries_of({5, 6, 7})
        assert again is not None
        assert again[1] == 4
        assert read == [7]
        assert all(entry(again[0][slot]) == before[slot] for slot in (0, 5, 6))
        assert entry(again[0][7]) != before[7]
        assert lies == [tensor.data_ptr() for parts in fields().values() for tensor in parts]
        anew = FactorTables(base, entries=4)
        fresh = anew.entries_of({5, 6, 7})
        assert fresh is not None
        for module in base.stored().values():
            one, other = tables.of(module), anew.of(module)
            if one is None or other is None:
                continue
            for slot in (0, 5, 6, 7):
                for name in ("A", "B", "ranks", "scale"):
                    assert getattr(one, name)[again[0][slot]] == getattr(other, name)[fresh[0][slot]]
        detach(base, 6)
        read.clear()
        assert tables.entries_of({5, 7}) is not None
        assert not read
        kept = [e for e in tables._known.values() if e.kept]  # pyright: ignore[reportPrivateUsage]
        assert len(kept) == 2, "what is detached is not kept"
    finally:
        for slot in (5, 6, 7):
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
