"""Adapters come and go: what is held stays, what was used longest ago goes, loading happens in its own thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import tiny
import tiny_engine
import torch

from graftlm.adapters.attach import Adapter
from graftlm.serving.engine.adapter_cache import AdapterCache, pack_for_decoding


def residents_of(
    slots: int = 2, limit: int = 1 << 30, load: Callable[[Path], Adapter] | None = None, count: int = 5
) -> AdapterCache:
    base = tiny_engine.base_of()
    known = {f"{i}": tiny_engine.adapter_of(base, 2 + i) for i in range(count)}
    return AdapterCache(base, slots=slots, bytes=limit, load=load or (lambda folder: known[folder.name]))


def loaded(adapter_cache: AdapterCache, digest: str) -> None:
    adapter_cache.acquire(digest, Path(digest))
    until(lambda: (adapter_cache.collect_loaded(), not adapter_cache.loading)[1])


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def slots(adapter_cache: AdapterCache) -> dict[str, bool]:
    return {held.digest: bool(held.slot) for held in adapter_cache.versions()}


def test_the_adapter_unused_longest_gives_its_slot() -> None:
    adapter_cache = residents_of()
    for digest in ("0", "1", "0", "2"):
        loaded(adapter_cache, digest)
        assert adapter_cache.acquire_slot(digest)
        adapter_cache.release_slot(digest)
        adapter_cache.release(digest)
    assert slots(adapter_cache) == {"0": True, "1": False, "2": True}
    table = {held.digest: held for held in adapter_cache.versions()}
    assert (table["0"].hits, table["0"].loads, table["1"].evictions) == (1, 1, 1)


def test_what_runs_is_never_evicted() -> None:
    adapter_cache = residents_of()
    for digest in ("0", "1", "2"):
        loaded(adapter_cache, digest)
    first = adapter_cache.acquire_slot("0")
    assert adapter_cache.acquire_slot("1") not in (None, first)
    assert adapter_cache.acquire_slot("2") is None
    adapter_cache.release_slot("1")
    assert adapter_cache.acquire_slot("2") is not None
    assert slots(adapter_cache) == {"0": True, "1": False, "2": True}


def test_who_waits_too_long_for_a_slot_gets_one_though_others_keep_coming() -> None:
    adapter_cache = residents_of()
    for digest in ("0", "1", "2"):
        loaded(adapter_cache, digest)
    for digest in ("0", "0", "1"):
        assert adapter_cache.acquire_slot(digest)
    assert adapter_cache.acquire_slot("2", times_skipped=10_000) is None
    assert adapter_cache.acquire_slot("1") is None, "it takes nobody any more"
    assert adapter_cache.acquire_slot("0")
    adapter_cache.release_slot("1")
    assert adapter_cache.acquire_slot("2", times_skipped=10_001)


def test_memory_is_bounded_and_nothing_that_is_held_is_forgotten() -> None:
    size = pack_for_decoding(tiny_engine.adapter_of(tiny_engine.base_of(), 4)).bytes
    adapter_cache = residents_of(limit=int(2.7 * size), count=3)
    for digest in ("0", "1"):  # ranks 2 and 3
        loaded(adapter_cache, digest)
    adapter_cache.release("0")
    loaded(adapter_cache, "2")
    assert {h.digest for h in adapter_cache.versions() if h.adapter} == {"0", "1", "2"}
    adapter_cache.acquire("3", Path("3"))
    assert not adapter_cache.error("3") or "takes" in adapter_cache.error("3")


def test_a_request_for_a_version_that_is_too_large_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "adapter_model.safetensors").write_bytes(b"0" * 5_000_000)
    adapter_cache = residents_of(limit=1_000_000)
    adapter_cache.acquire("big", tmp_path / "big")
    assert adapter_cache.error("big") == (
        "the adapter takes 5.0 MB, and 1.0 MB are there for all adapters; give more with --adapter-memory-gb"
    )
    adapter_cache.release("big")
    assert adapter_cache.versions() == []


def test_loading_is_done_by_another_thread_while_the_engine_goes_on() -> None:
    base = tiny_engine.base_of()
    known = {"slow": tiny_engine.adapter_of(base, 3), "quick": tiny_engine.adapter_of(base, 2)}
    loaders: list[str] = []
    may_end = threading.Event()

    def load(folder: Path) -> Adapter:
        loaders.append(threading.current_thread().name)
        if folder.name == "slow":
            assert may_end.wait(20)
        return known[folder.name]

    engine = tiny_engine.engine_of(base)
    engine.adapter_cache._load = load
    engine.add_request(tiny_engine.request(tiny.ids(5).tolist(), 5, "slow", id="slow"), Path("slow"))
    engine.add_request(tiny_engine.request(tiny.ids(5).tolist(), 5, id="base"))
    finished: list[str] = []
    until(lambda: (finished.extend(p.id for p in engine.step() if p.finish_reason), finished == ["base"])[1])
    may_end.set()
    until(lambda: (finished.extend(p.id for p in engine.step() if p.finish_reason), finished == ["base", "slow"])[1])
    assert loaders == ["graft-adapters"]
    engine.close()
    assert all(module.bank is None for module in base.stored().values())


def test_an_adapter_takes_its_own_bytes_and_none_for_padding() -> None:
    base = tiny_engine.base_of()
    for rank in (1, 3, 33):
        adapter = tiny_engine.adapter_of(base, rank)
        assert pack_for_decoding(adapter).bytes == adapter.bytes
        halves = tiny_engine.adapter_of(base, rank)
        with torch.no_grad():
            for parameter in halves.parameters().values():
                parameter.copy_(parameter.bfloat16())
        assert pack_for_decoding(halves).bytes == adapter.bytes // 2, (
            "values that 16 bits hold exactly are kept in 16 bits"
        )


def test_an_adapter_in_memory_keeps_nothing_of_the_file_that_it_was_read_from() -> None:
    base = tiny_engine.base_of()
    adapter = tiny_engine.adapter_of(base, 5)
    file = torch.zeros(10 * adapter.count)
    with torch.no_grad():
        for parameter in adapter.parameters().values():  # as safetensors gives them: views of the whole file
            view = file[7 : 7 + parameter.numel()].view(parameter.shape)
            parameter.set_(view.copy_(parameter.clone()))
    found = pack_for_decoding(adapter)
    stores = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in found.parameters().values()}
    (size,) = stores.values()
    assert adapter.bytes <= size < adapter.bytes + 64 * len(adapter.parameters())
    first = next(iter(adapter.parameters()))
    assert torch.equal(found.parameters()[first], adapter.parameters()[first])


def test_dropping_a_version_frees_it_unless_somebody_holds_it() -> None:
    adapter_cache = residents_of()
    loaded(adapter_cache, "0")
    assert not adapter_cache.evict_if_idle("0")
    adapter_cache.release("0")
    assert adapter_cache.evict_if_idle("0")
    assert adapter_cache.versions() == []
    assert adapter_cache.evict_if_idle("never there")
