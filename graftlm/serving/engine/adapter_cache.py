"""Which adapters are in memory: resident ones in slots, copies on the host beyond them, the rest on disk.

    on disk  --loader thread-->  host copy  --engine, between steps-->  slot

A request holds its version, by digest, from its arrival to its end: nothing it holds is evicted, and a name that points
elsewhere in the meantime does not change what it gets. Reading, checking and preparing an adapter happens in a thread of
its own; the engine only puts ready tensors into the banks. Where memory is wanted, the version that was used longest ago
and that nobody holds goes first.

Slots take adapters of any rank; what bounds them is their number and the bytes of all that is held in memory, since an
adapter of rank 64 takes four times the place of one of rank 16.
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
from graftlm.adapters.bank import LowRank, Slot
from graftlm.base.loading import Base
from graftlm.errors import AdapterError, GraftError

PATIENCE = 32  # how often a request is passed over for want of a slot before room is made for it


@dataclass(eq=False)
class CachedAdapter:
    """One version: where it comes from, where it is, who holds it."""

    digest: str
    folder: Path
    bytes: int
    """Bytes it takes: as its files say, and once it is there its own."""
    adapter: Adapter | None = None
    slot: int = 0
    loading: bool = False
    requests: int = 0
    """Requests that hold it, waiting and running."""
    running: int = 0
    used: int = 0
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
    """The adapters of one base. All but `_work` is called by the engine's thread, or before it starts."""

    def __init__(
        self, base: Base, *, slots: int, bytes: int, load: Load, arrived: Callable[[], None] = lambda: None
    ) -> None:
        self.base, self.slots, self.limit = base, slots, bytes
        self._load, self._arrived = load, arrived
        self._held: dict[str, CachedAdapter] = {}
        # Numbers that no other engine on this base uses.
        numbers: Iterator[int] = base.model.__dict__.setdefault("graft_slots", itertools.count(1))
        self._free = [next(numbers) for _ in range(slots)]
        self._clock = itertools.count(1)
        self._waiting: deque[CachedAdapter] = deque()  # wanted, and not given to the loader yet
        self._ready: deque[tuple[CachedAdapter, Adapter | None, str]] = deque()  # from the loader
        self._jobs: deque[CachedAdapter] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._making_room: CachedAdapter | None = None  # takes no new requests, so that its slot comes free
        self.counters = _Counters()

    # ---- what the engine asks ---------------------------------------------------------------------------------------

    def hold(self, digest: str, folder: Path) -> None:
        """A request wants this version: keep it, and begin to load it if it is not in memory."""
        held = self._held.get(digest)
        if held is None or (held.error and held.requests == 0):
            held = self._held[digest] = CachedAdapter(digest, folder, _bytes_of(folder))
        held.requests += 1
        held.used = next(self._clock)
        if held.adapter is not None:
            held.hits += 1
            self.counters.hits += 1
        elif not held.loading and not held.error:
            held.loading = True
            self._waiting.append(held)
            self._start_loads()

    def adopt(self, name: str, slot: int) -> None:
        """Take in, for good, what somebody else has attached in a slot; requests name it `name`."""
        self._held[name] = CachedAdapter(
            name, Path(), 0, adapter=Adapter(AdapterPlan(rank=1, alpha=1.0), {}), slot=slot, requests=1, running=1
        )
        self._free = [number for number in self._free if number != slot]

    def leave(self, digest: str) -> None:
        """A request is over."""
        held = self._held[digest]
        held.requests -= 1
        if held.requests == 0 and (held.error or (held.adapter is None and not held.loading)):
            del self._held[digest]

    def state(self, digest: str) -> tuple[bool, str]:
        """Whether a held version is in memory, and why it cannot be."""
        held = self._held[digest]
        return held.adapter is not None, held.error

    def error(self, digest: str) -> str:
        """Why a version could not be loaded, or an empty string."""
        return self._held[digest].error

    def run(self, digest: str, passed_over: int = 0) -> int | None:
        """The slot for one more running sequence of a held version; None while it is being loaded or no slot is free."""
        held = self._held[digest]
        if held.adapter is None or held is self._making_room:
            return None
        if not held.slot and not self._settle_in(held, passed_over):
            return None
        held.running += 1
        held.used = next(self._clock)
        return held.slot

    def stop(self, digest: str) -> None:
        """A running sequence ended or was preempted."""
        held = self._held[digest]
        held.running -= 1
        if held.running == 0 and held is self._making_room:
            self._making_room = None
            self._evict(held)

    def settle(self) -> None:
        """Take what the loader has finished."""
        while self._ready:
            held, adapter, error = self._ready.popleft()
            held.loading = False
            if adapter is None:
                held.error = error
                self.counters.failures += 1
            else:
                held.adapter, held.bytes = adapter, adapter.bytes
                held.notes = adapter.origin.notes if adapter.origin is not None else ()
                held.loads += 1
                self.counters.loads += 1
            if held.requests == 0 and held.error:
                self._held.pop(held.digest, None)
        self._start_loads()

    @property
    def loading(self) -> bool:
        """Whether anything is wanted that is not there yet."""
        return any(held.loading for held in self._held.values())

    def table(self) -> list[CachedAdapter]:
        """Every version that is known, for the reports."""
        return list(self._held.values())

    def drop(self, digest: str) -> bool:
        """Free the memory of a version that nobody holds; False while somebody does."""
        held = self._held.get(digest)
        if held is None:
            return True
        if held.requests or held.loading:
            return False
        if held.slot:
            self._evict(held)
        del self._held[digest]
        return True

    def on_arrival(self, call: Callable[[], None]) -> None:
        """Whom to tell, from the loader's thread, that something was loaded or failed to."""
        self._arrived = call

    def close(self) -> None:
        """End the loader, what it is at is finished first, and leave the base without adapters."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        for held in self._held.values():
            if held.slot and held.folder != Path():
                detach(self.base, slot=held.slot)
                held.slot = 0

    # ---- slots ------------------------------------------------------------------------------------------------------

    def _settle_in(self, held: CachedAdapter, passed_over: int) -> bool:
        """Put an adapter that is in memory into a slot; False when all slots are at work."""
        if not self._free:
            idle = [other for other in self._held.values() if other.slot and not other.running]
            if idle:
                self._evict(min(idle, key=lambda other: other.used))
            elif passed_over > PATIENCE and self._making_room is None:
                busy = [other for other in self._held.values() if other.slot]
                self._making_room = min(busy, key=lambda other: (other.running, other.used))
        if not self._free:
            return False
        assert held.adapter is not None
        held.slot = self._free.pop()
        attach(self.base, held.adapter, slot=held.slot)
        self.counters.swaps += 1
        return True

    def _evict(self, held: CachedAdapter) -> None:
        detach(self.base, slot=held.slot)
        self._free.append(held.slot)
        held.slot = 0
        held.evictions += 1
        self.counters.evictions += 1

    # ---- loading ----------------------------------------------------------------------------------------------------

    def _start_loads(self) -> None:
        """Give the loader what fits into memory, in the order in which it was wanted."""
        while self._waiting:
            held = self._waiting[0]
            if held.bytes > self.limit:
                self._waiting.popleft()
                held.loading = False
                held.error = (
                    f"the adapter takes {held.bytes / 1e6:.1f} MB, and {self.limit / 1e6:.1f} MB are there for all adapters; "
                    "give more with --adapter-memory-gb"
                )
                continue
            if not self._make_memory(held.bytes):
                return
            self._waiting.popleft()
            with self._wake:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, name="graft-adapters", daemon=True)
                    self._thread.start()
                self._jobs.append(held)
                self._wake.notify()

    def _make_memory(self, wanted: int) -> bool:
        """Forget versions that nobody holds, the longest unused first, until `wanted` bytes more fit."""
        given = sum(
            h.bytes for h in self._held.values() if h.adapter is not None or (h.loading and h not in self._waiting)
        )
        idle = sorted(
            (h for h in self._held.values() if h.adapter is not None and not h.requests), key=lambda h: h.used
        )
        for held in idle:
            if given + wanted <= self.limit:
                break
            if held.slot:
                self._evict(held)
            given -= held.bytes
            del self._held[held.digest]
        return given + wanted <= self.limit

    def _work(self) -> None:
        """The loader thread: files to tensors that only have to be put into place."""
        while True:
            with self._wake:
                while not self._jobs and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return
                held = self._jobs.popleft()
            adapter: Adapter | None = None
            error = ""
            try:
                with torch.inference_mode():
                    adapter = ready(self._load(held.folder))
            except GraftError as problem:
                error = str(problem)
            except Exception as problem:  # whatever is wrong with a file must not end the loader
                error = f"{type(problem).__name__}: {problem}"
            if adapter is not None and adapter.origin is not None and adapter.origin.digest != held.digest:
                error = f"{held.folder} holds adapter {adapter.origin.digest[:12]}, and {held.digest[:12]} is wanted"
                adapter = None
            self._ready.append((held, adapter, error))
            self._arrived()


def ready(adapter: Adapter) -> Adapter:
    """An adapter whose low-rank parts lie in memory as decoding reads them, and all of it in one stretch.

    What was read from a file is a view of the whole of it, so a tensor that is kept would keep the file in memory too.
    """
    slots = {name: part.for_decoding() if isinstance(part, LowRank) else part for name, part in adapter.slots.items()}
    memory = _Stretch([p for part in slots.values() for p in part.named().values()])
    return replace(adapter, slots={name: _moved(part, memory) for name, part in slots.items()})


class _Stretch:
    """One stretch of memory for copies of tensors; each begins at a line of the cache."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        places: dict[int, int] = {}
        at = 0
        for tensor in tensors:
            if id(tensor) not in places:
                places[id(tensor)] = at
                at += -(-tensor.nbytes // 64) * 64
        self._places, self._memory = places, torch.empty(at, dtype=torch.uint8, device=tensors[0].device)

    def copy(self, tensor: Tensor) -> Tensor:
        """The tensor's copy, laid out as it is itself: end to end, or end to end when it is transposed."""
        transposed = tensor.ndim == 2 and not tensor.is_contiguous() and tensor.T.is_contiguous()
        source = tensor.T if transposed else tensor
        at = self._places[id(tensor)]
        copy = self._memory[at : at + tensor.nbytes].view(tensor.dtype).view(source.shape).copy_(source)
        return copy.T if transposed else copy


def _moved(part: Slot, memory: _Stretch) -> Slot:
    given = {f.name: getattr(part, f.name) for f in fields(part)}
    moved = {
        name: nn.Parameter(memory.copy(value), requires_grad=False)
        for name, value in given.items() if isinstance(value, nn.Parameter)
    }  # fmt: skip
    return replace(part, **moved)


def _bytes_of(folder: Path) -> int:
    """Bytes of an adapter's tensors on disk."""
    try:
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    except OSError as error:
        raise AdapterError(f"{folder} cannot be read: {error.strerror}") from None
