"""A CUDA card without a GPU: what the package would launch, wait for, copy and hold, counted on PyTorch's CPU build.

    install()                       once in a process, before `graftlm` is imported
    with FakeCard() as card:        tensors on `cuda` are fake in here: shape, dtype and device, no values
        ...
    card.trace                      what was launched, waited for and copied, where, and the most bytes that were held

Tensors on the CPU stay real. An operation between devices that CUDA would refuse is refused here too. Where a value of the card
is read, it is 0, or True: so comparisons of the package's own checks pass, and every read is a synchronisation that is
written down with its line. Triton's programs are counted and not run.

What it cannot know: values that decide shapes. `unique` finds `distinct` values (0, 1, ...), `nonzero` that share of the rows,
`searchsorted` as many of each of these values.
It also says nothing about time, CUDA's context, the allocator's gaps, or whether a kernel is right.

A launch is a dispatched operation that is not a view and not an allocation; some take more than one kernel. A multi-tensor
operation takes one for as many tensors as PyTorch gives a kernel.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_card_guard  # first: it registers a CUDA device before PyTorch looks for one
import torch
from fake_trace import Trace
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

GIB = 1 << 30
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H200", total_memory=141 * GIB, multi_processor_count=132, major=9, minor=0, warp_size=32
)
_PACKAGES = ("graftlm", "transformers")  # whose lines are named
_ALLOCATIONS = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_", "lift_fresh", "detach",
    "alias", "record_stream", "_pin_memory",
}  # fmt: skip
_READS = {"_local_scalar_dense", "item", "equal", "allclose", "is_nonzero"}
_SHAPED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "_unique", "unique_dim", "unique_consecutive", "bincount"}
_WRITTEN = 1 << 20  # bytes of pinned memory that a fill does write
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class FakeCard(TorchDispatchMode):
    """Tensors on `cuda` are fake and what is done with them is written to `trace`; see the file's first paragraph."""

    def __init__(self, *, distinct: int = 1) -> None:
        super().__init__()
        self.trace = Trace()
        self.distinct = distinct
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._held: dict[int, int] = {}
        self.bytes = 0
        self.capturing = False
        self._numbers: dict[int, int] = {}  # of storages, in the order in which they were allocated
        self._allocated = 0
        self._record: list[str] | None = None
        self._before_record = 0

    def record(self, region: Callable[[], Any]) -> list[str]:
        """What a region launches, each with its numbers, and its tensors' shapes and places: those that are there before are
        known by when they were allocated, those of the region by their order in it."""
        self._record, self._before_record = [], self._allocated
        try:
            region()
            return self._record
        finally:
            self._record = None

    def note(self, name: str, *given: Any) -> None:
        """A launch, if one records."""
        if self._record is not None:
            self._record.append(f"{name} {tree_map(self._described, given)}")

    def _described(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value if isinstance(value, int | float | str | bool | None) else str(value)
        number = self._numbers.get(value.untyped_storage()._cdata, -1)
        place = f"new {number - self._before_record}" if number > self._before_record else f"at {number}"
        return f"{place}+{value.storage_offset()} {tuple(value.shape)} {value.stride()} {value.dtype}"

    def reset(self) -> None:
        """Count from here on; what is held stays."""
        self.trace = Trace(peak_bytes=self.bytes)

    def __enter__(self) -> FakeCard:
        _entered.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _entered.remove(self)

    # ---- every operation ----

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        kwargs = dict(kwargs or {})
        name = func._schema.name.split("::")[1]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        asked = kwargs.get("device")
        to = None if asked is None else torch.device(asked).type
        if kwargs.pop("pin_memory", None):
            if func is torch.ops.aten.zeros.default:  # nobody reads them, and memory that is not written to takes none
                func = torch.ops.aten.empty.memory_format
            return _pinned(func(*args, **kwargs))
        if name in ("fill_", "zero_") and _is_pinned(tensors[0]) and tensors[0].nbytes > _WRITTEN:
            return args[0]
        if name in ("_pin_memory", "pin_memory", "is_pinned"):
            return _is_pinned(tensors[0]) if name == "is_pinned" else _pinned(tensors[0].clone())
        if not any(isinstance(x, FakeTensor) for x in tensors) and to != "cuda":
            with _disable_current_modes():
                return func(*args, **kwargs)
        on_card = [x for x in tensors if x.device.type == "cuda"]
        if on_card and name in _READS:
            return self._read(name, tensors)
        if on_card and name in _SHAPED_BY_VALUES:
            return self._shaped_by_values(name, on_card[0])
        self._note_copy(name, tensors, to, kwargs)
        self._note_indices(name, args, tensors)
        if name == "copy_" and tensors[0].device.type == "cpu":
            return args[0]
        args, kwargs = tree_map_only(torch.Tensor, self._as_fake, (args, kwargs))
        with self._fake:
            out = func(*args, **kwargs)
        if name == "searchsorted":
            out.known = [len(args[0]) * min(i, self.distinct) // self.distinct for i in range(out.numel())]
        given = tree_map_only(torch.Tensor, self._given_back, out)
        if name not in _ALLOCATIONS and not func.is_view:
            self.trace.launches[name] += _launches_of(name, args)
            self.note(name, args, kwargs, given)
        return given

    def _as_fake(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self._fake.from_tensor(tensor)

    def _given_back(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor) and tensor.device.type == "cpu":
            with _disable_current_modes():
                return torch.zeros(tensor.shape, dtype=tensor.dtype)
        if tensor.device.type == "cuda":
            self._hold(tensor)
        return tensor

    # ---- synchronisations and copies ----

    def _sync(self, what: str) -> None:
        self._refuse_in_capture(what)
        self.trace.synchronisations[f"{what} at {where()}"] += 1

    def _refuse_in_capture(self, what: str) -> None:
        if self.capturing:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what} at {where()}")

    def _read(self, name: str, tensors: list[torch.Tensor]) -> Any:
        self._sync("item" if name == "_local_scalar_dense" else name)
        if name in ("equal", "allclose", "is_nonzero") or tensors[0].dtype == torch.bool:
            return True
        return 0.0 if tensors[0].is_floating_point() else 0

    def read_list(self, tensor: torch.Tensor) -> Any:
        """What `tolist` gives: zeros, or the values of `unique`."""
        if tensor.device.type == "cuda":
            self._sync("tolist")
        known = getattr(tensor, "known", None)
        if known is not None:
            return list(known)
        value: Any = 0.0 if tensor.is_floating_point() else tensor.dtype == torch.bool or 0

        def nested(shape: tuple[int, ...]) -> Any:
            return [nested(shape[1:]) for _ in range(shape[0])] if shape else value

        return nested(tuple(tensor.shape))

    def _shaped_by_values(self, name: str, tensor: torch.Tensor) -> Any:
        self._sync(name)
        self.trace.launches[name] += 1
        with self._fake:
            if name == "nonzero":
                count = -(-tensor.numel() // self.distinct)
                return self._given_back(torch.empty(count, tensor.ndim, dtype=torch.int64, device=tensor.device))
            found = torch.empty(self.distinct, dtype=tensor.dtype, device=tensor.device)
            found.known = range(self.distinct)  # pyright: ignore[reportAttributeAccessIssue]
            none = torch.empty(0, dtype=torch.int64, device=tensor.device)
        self._hold(found)
        return (found, none, none) if name == "_unique2" else (found, none) if name == "_unique" else found

    def _note_copy(self, name: str, tensors: list[torch.Tensor], to: str | None, kwargs: dict[str, Any]) -> None:
        if name == "_to_copy" and to is not None and to != tensors[0].device.type:
            source, target, non_blocking = tensors[0], to, bool(kwargs.get("non_blocking"))
        elif name == "copy_" and len(tensors) == 2 and tensors[0].device.type != tensors[1].device.type:
            source, target, non_blocking = tensors[1], tensors[0].device.type, False
        else:
            return
        if "meta" in (source.device.type, target):
            return
        self._refuse_in_capture("a copy from or to the host")
        host = source if target == "cuda" else tensors[0]
        pinned = _is_pinned(host) if target == "cuda" or name == "copy_" else non_blocking
        kind = "pinned" if pinned else "pageable"
        self.trace.copies[f"to {'card' if target == 'cuda' else 'host'}, {kind} at {where()}"] += 1

    def _note_indices(self, name: str, args: Any, tensors: list[torch.Tensor]) -> None:
        """Indices on the host are copied to the card, and a mask is counted before it can be used."""
        if name not in _INDEXED or args[0].device.type != "cuda":
            return
        for index in tree_leaves(args[1]):
            if not isinstance(index, torch.Tensor):
                continue
            if index.device.type == "cpu" and index.ndim:
                self.trace.copies[f"to card, pageable at {where()}"] += 1
            if index.dtype == torch.bool and not (name != "index" and tensors[-1].numel() == 1):
                self._sync("mask")

    # ---- memory ----

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        size = -(-storage.nbytes() // 512) * 512  # as the caching allocator rounds
        self._held[key] = size
        self._allocated += 1
        self._numbers[key] = self._allocated
        self.bytes += size
        self.trace.peak_bytes = max(self.trace.peak_bytes, self.bytes)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self._numbers.pop(key, None)
        self.bytes -= self._held.pop(key, 0)


_entered: list[FakeCard] = []  # innermost last; there is one in a process at a time
_pinned_bytes: dict[int, int] = {}  # address -> bytes of host tensors that were asked for in pinned memory
_most_pinned = [0]


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    storage = tensor.untyped_storage()
    _pinned_bytes[storage.data_ptr()] = storage.nbytes()
    _most_pinned[0] = max(_most_pinned[0], sum(_pinned_bytes.values()))
    weakref.finalize(storage, _pinned_bytes.pop, storage.data_ptr(), None)
    return tensor


def most_pinned_bytes() -> int:
    """The most bytes of the host's memory that were pinned at once in this process."""
    return _most_pinned[0]


def _is_pinned(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, FakeTensor) and tensor.untyped_storage().data_ptr() in _pinned_bytes


def _launches_of(name: str, args: Any) -> int:
    """Kernels of an operation: of a multi-tensor one by PyTorch's limits (ATen/native/cuda/MultiTensorApply.cuh)."""
    if not name.startswith("_foreach_"):
        return 1
    lists = [x for x in args if isinstance(x, list | tuple) and x and isinstance(x[0], torch.Tensor)]
    depth = len(lists) + (not name.endswith("_"))  # the results are a list too
    return -(-len(lists[0]) // {1: 110, 2: 64, 3: 48, 4: 36}[depth])


def where() -> str:
    """The innermost line of the package, behind those of transformers that it was called through."""
    frame, found = sys._getframe(1), list[str]()
    while frame is not None and not (found and found[-1].startswith("graftlm/")):
        parts = Path(frame.f_code.co_filename).parts
        package = next((name for name in _PACKAGES if name in parts[:-1]), None)
        if package is not None:
            inner = "/".join(parts[len(parts) - 1 - parts[::-1].index(package) :])
            if not found or package == "graftlm" or found[-1].split("/")[0] != package:
                found.append(f"{inner}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(reversed(found)) or "outside of the package"


# ---- the process ---------------------------------------------------------------------------------------------------------


def install() -> None:
    """Make this process believe in a card: `torch.cuda`, PyTorch's ways around the dispatcher, and Triton's launches.

    It cannot be taken back. `inference_mode` becomes `no_grad`, which fake tensors need.
    """
    _install_cuda()
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else contextlib.nullcontext()  # type: ignore[assignment]
    _install_tensors()
    _install_indices()
    _install_attention()
    nn.Module._apply = _apply  # type: ignore[method-assign]
    with contextlib.suppress(ImportError):
        importlib.import_module("triton.runtime.jit").JITFunction.run = _launch
    trusted = importlib.import_module("graftlm.kernels.self_check").SelfCheck
    allows = trusted.allows
    trusted.allows = lambda self, op, device: device.type == "cuda" or allows(self, op, device)
    importlib.import_module("graftlm.base.fused")._agree = _both_run  # as it finds where all reads are 0


def _both_run(own: Callable[[], Any], ours: Callable[[], Any], inputs: Any) -> bool:
    """In place of a comparison of values: whether a module's own code and ours run at all."""
    try:
        ours(), own()
    except Exception:
        return False
    return True


def _install_cuda() -> None:
    exchange = fake_card_guard.exchange_device

    def index_of(device: Any = None) -> int:
        found = None if device is None else device if isinstance(device, int) else torch.device(device).index
        return exchange(-1) if found is None else found

    def held() -> int:
        return _entered[-1].bytes if _entered else 0

    def peak() -> int:
        return _entered[-1].trace.peak_bytes if _entered else 0

    def reset_peak(device: Any = None) -> None:
        if _entered:
            _entered[-1].trace.peak_bytes = held()

    given: dict[str, Any] = {
        "is_available": lambda: True, "is_initialized": lambda: True, "_lazy_init": lambda: None, "device_count": lambda: 2,
        "current_device": lambda: exchange(-1), "set_device": lambda device: exchange(index_of(device)),
        "_exchange_device": exchange, "_maybe_exchange_device": exchange, "synchronize": lambda device=None: None,
        "get_device_capability": lambda device=None: (9, 0), "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_name": lambda device=None: PROPERTIES.name, "is_bf16_supported": lambda *a, **k: True,
        "empty_cache": lambda: None, "reset_peak_memory_stats": reset_peak, "memory_allocated": lambda device=None: held(),
        "memory_reserved": lambda device=None: held(), "max_memory_allocated": lambda device=None: peak(),
        "max_memory_reserved": lambda device=None: peak(),
        "mem_get_info": lambda device=None: (PROPERTIES.total_memory - held(), PROPERTIES.total_memory),
        "get_rng_state": lambda device=None: torch.empty(0), "set_rng_state": lambda *a, **k: None,
        "manual_seed": lambda seed: None, "manual_seed_all": lambda seed: None,
        "set_sync_debug_mode": lambda mode: None,
        "CUDAGraph": _Graph, "graph": _capturing, "graph_pool_handle": lambda: (0, 1),
        "Stream": _Stream, "current_stream": _Stream, "set_stream": lambda stream: None,
        "stream": lambda stream: contextlib.nullcontext(),
    }  # fmt: skip
    for name, stand_in in given.items():
        assert hasattr(torch.cuda, name), f"torch.cuda.{name} is gone"
        setattr(torch.cuda, name, stand_in)


class _Graph:
    """A captured sequence of launches, which is one launch; nothing is computed in any case."""

    def replay(self) -> None:
        _entered[-1].trace.launches["graph"] += 1


@contextlib.contextmanager
def _capturing(
    graph: _Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
) -> Iterator[None]:
    """What is launched in here is not counted, and what waits for the card or copies from or to the host is refused."""
    card = _entered[-1]
    before, card.capturing = card.trace, True
    card.trace = Trace(peak_bytes=before.peak_bytes)
    try:
        yield
    finally:
        before.peak_bytes = card.trace.peak_bytes
        card.trace, card.capturing = before, False


class _Stream:
    """A stream of launches; here they all have happened at once."""

    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self) -> object:
        return object()


def _install_tensors() -> None:
    real_list, real_pointer, real_tensor = torch.Tensor.tolist, torch.Tensor.data_ptr, torch.tensor

    def tolist(self: torch.Tensor) -> Any:
        return _entered[-1].read_list(self) if isinstance(self, FakeTensor) else real_list(self)

    def data_ptr(self: torch.Tensor) -> int:
        return self.untyped_storage()._cdata if isinstance(self, FakeTensor) else real_pointer(self)

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        """Built on the host and copied, as PyTorch does it inside."""
        made = real_tensor(data, *args, **kwargs)
        return made if device is None else made.to(device)

    for kind in (torch.Tensor, FakeTensor):
        kind.tolist, kind.data_ptr = tolist, data_ptr  # type: ignore[assignment]
    FakeTensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]
    torch.tensor = tensor  # type: ignore[assignment]


def _install_indices() -> None:
    """Lists as indices become tensors on the host, which PyTorch does inside: their copies are seen."""
    get, put = torch.Tensor.__getitem__, torch.Tensor.__setitem__

    def shown(index: Any) -> Any:
        if isinstance(index, tuple):
            return tuple(shown(part) for part in index)
        return torch.tensor(index) if isinstance(index, list) else index

    FakeTensor.__getitem__ = lambda self, index: get(self, shown(index))  # type: ignore[method-assign]
    FakeTensor.__setitem__ = lambda self, index, value: put(self, shown(index), value)  # type: ignore[method-assign]


def _install_attention() -> None:
    """Fused attention, which a CPU build never chooses for a card: flash where nothing is masked, in 16 bits; else the
    memory-efficient kernel, which has no shared heads. What only the composition takes, whose scores are made, is refused."""
    functional: Any = torch.nn.functional
    real, aten = functional.scaled_dot_product_attention, torch.ops.aten

    def attention(q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, *,
                  scale: float | None = None, enable_gqa: bool = False) -> Any:  # fmt: skip
        if not q.is_cuda:
            return real(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is None and q.dtype != torch.float32:
            return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
        if enable_gqa:
            raise NotImplementedError(
                "only the composition shares heads with a mask or in float32, and it makes all scores"
            )
        bias = None
        if attn_mask is not None:
            bias = torch.where(attn_mask, 0.0, -torch.inf).to(q.dtype)
            bias = bias.expand(*q.shape[:3], k.shape[2])
        log_sum = torch.is_grad_enabled() and q.requires_grad
        return aten._scaled_dot_product_efficient_attention(q, k, v, bias, log_sum, 0.0, is_causal, scale=scale)[0]

    functional.scaled_dot_product_attention = attention


_applying = threading.local()


def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
    """`nn.Module._apply` with new Parameters, since a real one cannot become fake in place; what is shared stays shared."""
    outermost = not hasattr(_applying, "made")
    made: dict[int, Any] = _applying.__dict__.setdefault("made", {})
    try:
        for child in self.children() if recurse else ():
            child._apply(fn)
        for tensors in (self._parameters, self._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    with torch.no_grad():
                        new = fn(tensor)
                    if new is not tensor and isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, tensor.requires_grad)
                    made[id(tensor)] = (new, tensor)  # the old one is kept, so that its id is nobody else's
                tensors[name] = made[id(tensor)][0]
    finally:
        if outermost:
            del _applying.made
    return self


def _launch(self: Any, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> None:
    """A Triton program: counted, and its tensors' card compared with the current one, on which Triton would launch it."""
    card = _entered[-1]
    name = f"triton {self.__name__}"
    card.trace.launches[name] += 1
    card.note(name, args, grid, kwargs)
    for tensor in (*args, *kwargs.values()):
        if isinstance(tensor, torch.Tensor):
            if tensor.device.type != "cuda":
                raise RuntimeError(f"{name} at {where()} was given a tensor on {tensor.device}")
            if tensor.device.index != fake_card_guard.exchange_device(-1):
                card.trace.astray[f"{name} at {where()}"] += 1
                return


@contextlib.contextmanager
def hidden(*modules: str) -> Iterator[None]:
    """Modules that cannot be imported meanwhile."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(dict.fromkeys(modules))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
