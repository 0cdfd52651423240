"""Which adapters are in memory: resident ones in slots, copies on the host beyond them, the rest on disk.

    on disk  --loader's thread-->  host copy  --engine, between steps-->  slot

A request acquires its version, by digest, from its arrival to its end: that is not evicted, and a name that points
elsewhere in the meantime does not change what it gets. Adapters are read, checked and packed in the loader's thread; the engine
only puts the tensors into the banks. Where memory is needed, the least recently used version that no request holds is evicted.

Slots take adapters of any rank; what bounds them is their number and the bytes of all that is in memory, since an
adapter of rank 64 takes four times the memory of one of rank 16.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from graftlm.adapters.attach import Adapter, AdapterPlan, attach, detach
from graftlm.adapters.bank import LayerAdapter, LowRank
from graftlm.base.loading import Base
from graftlm.errors import AdapterError, GraftError

MAX_SKIPS = 32  # how often a request is skipped for want of a slot before another adapter is drained for it


@dataclass(eq=False)
class CachedAdapter:
    """One version: its folder, where it is now, and how many requests hold it."""

    digest: str
    folder: Path
    bytes: int
    """Bytes it takes: those of its files, and once it is loaded those of its tensors."""
    adapter: Adapter | None = None
    slot: int = 0
    loading: bool = False
    num_requests: int = 0
    """Requests that hold it, waiting and running."""
    num_running: int = 0
    last_used: int = 0
    error: str = ""
    hits: int = 0
    loads: int = 0
    evictions: int = 0
    notes: tuple[str, ...] = ()


Load = Callable[[Path], Adapter]


@dataclass
class _Counters:
    hits: int = 0
    loads: int = 0
    evictions: int = 0
    swaps: int = 0
    failures: int = 0
    seconds: list[float] = field(default_factory=list[float])


class AdapterCache:
    """The adapters of one base. All but `_load_adapters` is called by the engine's thread, or before it starts."""

    def __init__(
        self, base: Base, *, slots: int, bytes: int, load: Load, on_loaded: Callable[[], None] = lambda: None
    ) -> None:
        self.base, self.slots, self.limit = base, slots, bytes
        self._load, self.on_loaded = load, on_loaded
        """`on_loaded` is called, from the loader's thread, when an adapter was loaded or failed to."""
        self._adapters: dict[str, CachedAdapter] = {}
        # Numbers that no other engine on this base uses.
        numbers: Iterator[int] = base.model.__dict__.setdefault("graft_slots", itertools.count(1))
        self._free = [next(numbers) for _ in range(slots)]
        self._clock = itertools.count(1)
        self._to_load: deque[CachedAdapter] = deque()  # requested, and not given to the loader yet
        self._loaded: deque[tuple[CachedAdapter, Adapter | None, str]] = deque()  # from the loader
        self._jobs: deque[CachedAdapter] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._draining: CachedAdapter | None = None  # takes no new requests, so that its slot comes free
        self.counters = _Counters()

    # ---- what the engine calls --------------------------------------------------------------------------------------

    def acquire(self, digest: str, folder: Path) -> None:
        """A request needs this version: keep it, and begin to load it if it is not in memory."""
        cached = self._adapters.get(digest)
        if cached is None or (cached.error and cached.num_requests == 0):
            cached = self._adapters[digest] = CachedAdapter(digest, folder, _bytes_of(folder))
        cached.num_requests += 1
        cached.last_used = next(self._clock)
        if cached.adapter is not None:
            cached.hits += 1
            self.counters.hits += 1
        elif not cached.loading and not cached.error:
            cached.loading = True
            self._to_load.append(cached)
            self._start_loading()

    def pin(self, name: str, slot: int) -> None:
        """Register for good what the caller has attached in a slot; requests name it `name`."""
        self._adapters[name] = CachedAdapter(
            name,
            Path(),
            0,
            adapter=Adapter(AdapterPlan(rank=1, alpha=1.0), {}),
            slot=slot,
            num_requests=1,
            num_running=1,
        )
        self._free = [number for number in self._free if number != slot]

    def release(self, digest: str) -> None:
        """A request has ended."""
        cached = self._adapters[digest]
        cached.num_requests -= 1
        if cached.num_requests == 0 and (cached.error or (cached.adapter is None and not cached.loading)):
            del self._adapters[digest]

    def load_state(self, digest: str) -> tuple[bool, str]:
        """Whether a version that a request holds is in memory, and why it cannot be."""
        cached = self._adapters[digest]
        return cached.adapter is not None, cached.error

    def error(self, digest: str) -> str:
        """Why a version could not be loaded, or an empty string."""
        return self._adapters[digest].error

    def notes(self, digest: str) -> tuple[str, ...]:
        """What the user should know of a version on this base; nothing for what was never loaded here."""
        cached = self._adapters.get(digest)
        return () if cached is None else cached.notes

    def acquire_slot(self, digest: str, num_slot_misses: int = 0) -> int | None:
        """The slot for one more running sequence of a version; None while it is loaded or no slot is free."""
        cached = self._adapters[digest]
        if cached.adapter is None or cached is self._draining:
            return None
        if not cached.slot and not self._put_into_slot(cached, num_slot_misses):
            return None
        cached.num_running += 1
        cached.last_used = next(self._clock)
        return cached.slot

    def release_slot(self, digest: str) -> None:
        """A running sequence ended or was preempted."""
        cached = self._adapters[digest]
        cached.num_running -= 1
        if cached.num_running == 0 and cached is self._draining:
            self._draining = None
            self._evict(cached)

    def collect_loaded(self) -> None:
        """Take over what the loader has finished."""
        while self._loaded:
            cached, adapter, error = self._loaded.popleft()
            cached.loading = False
            if adapter is None:
                cached.error = error
                self.counters.failures += 1
            else:
                cached.adapter, cached.bytes = adapter, adapter.bytes
                cached.notes = adapter.origin.notes if adapter.origin is not None else ()
                cached.loads += 1
                self.counters.loads += 1
            if cached.num_requests == 0 and cached.error:
                self._adapters.pop(cached.digest, None)
        self._start_loading()

    @property
    def loading(self) -> bool:
        """Whether a version that was requested is not in memory yet."""
        return any(cached.loading for cached in self._adapters.values())

    def versions(self) -> list[CachedAdapter]:
        """Every version that is known, for metrics."""
        return list(self._adapters.values())

    def evict_if_idle(self, digest: str) -> bool:
        """Free the memory of a version that no request holds; False while one does."""
        cached = self._adapters.get(digest)
        if cached is None:
            return True
        if cached.num_requests or cached.loading:
            return False
        if cached.slot:
            self._evict(cached)
        del self._adapters[digest]
        return True

    def close(self) -> None:
        """End the loader, after the adapter it works on, and take all adapters off the base."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        for cached in self._adapters.values():
            if cached.slot and cached.folder != Path():
                detach(self.base, slot=cached.slot)
                cached.slot = 0

    # ---- slots ------------------------------------------------------------------------------------------------------

    def _put_into_slot(self, cached: CachedAdapter, num_slot_misses: int) -> bool:
        """Put an adapter that is in memory into a slot; False when all slots are busy."""
        if not self._free:
            idle = [other for other in self._adapters.values() if other.slot and not other.num_running]
            if idle:
                self._evict(min(idle, key=lambda other: other.last_used))
            elif num_slot_misses > MAX_SKIPS and self._draining is None:
                busy = [other for other in self._adapters.values() if other.slot]
                self._draining = min(busy, key=lambda other: (other.num_running, other.last_used))
        if not self._free:
            return False
        assert cached.adapter is not None
        cached.slot = self._free.pop()
        attach(self.base, cached.adapter, slot=cached.slot)
        self.counters.swaps += 1
        return True

    def _evict(self, cached: CachedAdapter) -> None:
        detach(self.base, slot=cached.slot)
        self._free.append(cached.slot)
        cached.slot = 0
        cached.evictions += 1
        self.counters.evictions += 1

    # ---- loading ----------------------------------------------------------------------------------------------------

    def _start_loading(self) -> None:
        """Give the loader what fits into memory, in the order in which it was requested."""
        while self._to_load:
            cached = self._to_load[0]
            if cached.bytes > self.limit:
                self._to_load.popleft()
                cached.loading = False
                cached.error = (
                    f"the adapter takes {cached.bytes / 1e6:.1f} MB, and {self.limit / 1e6:.1f} MB are there for all adapters; "
                    "give more with --adapter-memory-gb"
                )
                continue
            if not self._make_room(cached.bytes):
                return
            self._to_load.popleft()
            with self._wake:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._load_adapters, name="graft-adapters", daemon=True)
                    self._thread.start()
                self._jobs.append(cached)
                self._wake.notify()

    def _make_room(self, needed: int) -> bool:
        """Evict versions that no request holds, least recently used first, until `needed` bytes more fit."""
        given = sum(
            h.bytes for h in self._adapters.values() if h.adapter is not None or (h.loading and h not in self._to_load)
        )
        idle = sorted(
            (h for h in self._adapters.values() if h.adapter is not None and not h.num_requests),
            key=lambda h: h.last_used,
        )
        for cached in idle:
            if given + needed <= self.limit:
                break
            if cached.slot:
                self._evict(cached)
            given -= cached.bytes
            del self._adapters[cached.digest]
        return given + needed <= self.limit

    def _load_adapters(self) -> None:
        """The loader's thread: files to tensors that only have to be put into a slot."""
        while True:
            with self._wake:
                while not self._jobs and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return
                cached = self._jobs.popleft()
            adapter: Adapter | None = None
            error = ""
            try:
                with torch.inference_mode():
                    adapter = pack_for_decoding(self._load(cached.folder), self.base.activation_dtype)
            except GraftError as problem:
                error = str(problem)
            except Exception as problem:  # whatever is wrong with a file must not end the loader
                error = f"{type(problem).__name__}: {problem}"
            if adapter is not None and adapter.origin is not None and adapter.origin.digest != cached.digest:
                error = (
                    f"{cached.folder} holds adapter {adapter.origin.digest[:12]}, and {cached.digest[:12]} is wanted"
                )
                adapter = None
            self._loaded.append((cached, adapter, error))
            self.on_loaded()


def pack_for_decoding(adapter: Adapter, gpu_dtype: torch.dtype | None = None) -> Adapter:
    """An adapter whose low-rank parts lie in memory as decoding reads them, and all of it in one arena.

    On a GPU they get the dtype of its matmuls, `gpu_dtype`: a cast at each use would be a launch.
    What was read from a file is a view of the whole of it, so a tensor that is kept would keep the file in memory too.
    """
    layers = {
        name: part.for_decoding(gpu_dtype) if isinstance(part, LowRank) else part
        for name, part in adapter.layers.items()
    }
    arena = _Arena([p for part in layers.values() for p in part.named().values()])
    return replace(adapter, layers={name: _copied_into(part, arena) for name, part in layers.items()})


class _Arena:
    """One allocation for copies of tensors; each begins at a cache line."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        places: dict[int, int] = {}
        at = 0
        for tensor in tensors:
            if id(tensor) not in places:
                places[id(tensor)] = at
                at += -(-tensor.nbytes // 64) * 64
        self._offsets, self._memory = places, torch.empty(at, dtype=torch.uint8, device=tensors[0].device)

    def copy(self, tensor: Tensor) -> Tensor:
        """The tensor's copy, with the same layout: contiguous, or contiguous when it is transposed."""
        transposed = tensor.ndim == 2 and not tensor.is_contiguous() and tensor.T.is_contiguous()
        source = tensor.T if transposed else tensor
        at = self._offsets[id(tensor)]
        copy = self._memory[at : at + tensor.nbytes].view(tensor.dtype).view(source.shape).copy_(source)
        return copy.T if transposed else copy


def _copied_into(part: LayerAdapter, arena: _Arena) -> LayerAdapter:
    given = {f.name: getattr(part, f.name) for f in fields(part)}
    moved = {
        name: nn.Parameter(arena.copy(value), requires_grad=False)
        for name, value in given.items() if isinstance(value, nn.Parameter)
    }  # fmt: skip
    return replace(part, **moved)


def _bytes_of(folder: Path) -> int:
    """Bytes of an adapter's tensors on disk."""
    try:
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    except OSError as error:
        raise AdapterError(f"{folder} cannot be read: {error.strerror}") from None
