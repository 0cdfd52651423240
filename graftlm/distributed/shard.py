"""A model whose weights are split over the ranks by PyTorch's FSDP2: each rank keeps some rows of every matrix.

    weights = SplitWeights(model, units, rest, ranks, device)   once, when a base is loaded
    weights.run(call)                   a pass: every unit gathers its weights when it runs, and frees them behind it
    with weights.gathered(module): ...  the weights of a unit that is not run, whole: the head's, for the loss

    local(tensor), offset(tensor)       this rank's rows of a split tensor, and the place of the first value
    whole(tensor)                       all rows, on every rank; every rank calls it

Outside of a pass a split parameter is a DTensor, and nothing but this package handles one. Inside, modules have the whole
weight, a plain Parameter. Of n ranks each has ceil(rows / n) rows, the last ones fewer or none: so FSDP2 splits.

The n ranks are all, or those of a node (`Ranks.node_ranks`): then every node has all rows, weights are gathered within it, and
gradients that are summed within it are summed over the nodes too.

Rows of a unit may wait in the host's memory (`Piece.on_host`), trained ones with their gradients and moments: FSDP2 copies them
to the GPU for each gather, and the summed rows of a gradient back.
"""

# fully_shard gives a module another class, which the types do not follow.
# pyright: reportPrivateUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from graftlm.distributed.group import ALONE, Ranks

if TYPE_CHECKING:  # a run of one rank does not load them
    from torch.distributed.device_mesh import DeviceMesh

_T = TypeVar("_T")
_ranks_of: WeakKeyDictionary[DeviceMesh, Ranks] = WeakKeyDictionary()
"""The ranks that were given for a mesh of processes."""


SPLITS = (2, 13)
"""The first PyTorch whose FSDP2 splits frozen whole numbers, as int8 and NF4 weights are."""


def can_split() -> bool:
    """Whether this PyTorch can split a model."""
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= SPLITS


def rows_of(count: int, ranks: Ranks) -> tuple[int, int]:
    """(first, last + 1) of `count` rows: those that this rank keeps."""
    each = -(-count // ranks.parts)
    return min(ranks.part * each, count), min((ranks.part + 1) * each, count)


def is_split(tensor: object) -> bool:
    """Whether each rank has some rows of this tensor."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a split tensor, sharing its memory, without its history; any other tensor itself."""
    found: Any = tensor.detach() if is_split(tensor) else tensor
    return found.to_local() if is_split(tensor) else tensor


def offset(tensor: Tensor) -> int:
    """The place of this rank's first value among the values of the whole tensor."""
    if not is_split(tensor):
        return 0
    first, _ = rows_of(tensor.shape[0], sharing(tensor))
    return first * math.prod(tensor.shape[1:])


def sharing(tensor: Tensor) -> Ranks:
    """The ranks that share a tensor: over which it is split, once or on each node."""
    if not is_split(tensor):
        return ALONE
    mesh: DeviceMesh = tensor.device_mesh
    return _ranks_of.get(mesh) or Ranks(mesh.get_local_rank(), mesh.size())


def gathered_on(tensor: Tensor) -> torch.device:
    """Where a tensor is when it is computed with: rows that wait in the host's memory are gathered on their rank's GPU."""
    if not is_split(tensor):
        return tensor.device
    mesh: DeviceMesh = tensor.device_mesh
    here = tensor.device.type == mesh.device_type
    return tensor.device if here else torch.device(mesh.device_type, torch.cuda.current_device())


def add_up_rows(tensors: Sequence[Tensor], values: Sequence[float]) -> list[float]:
    """What each rank found in its rows of each tensor, added up over the parts; of one that is not split, as it is.

    The copies of other nodes do not count, and every rank gets the same bits.
    """
    split = [is_split(tensor) for tensor in tensors]
    if not any(split):
        return list(values)
    ranks = sharing(tensors[split.index(True)])
    own = [value if ranks.counted else 0.0 for value, is_part in zip(values, split) if is_part]
    sums = iter(ranks.total(own))
    return [next(sums) if is_part else value for value, is_part in zip(values, split)]


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All rows of a split tensor, which every rank asks for; any other tensor itself."""
    if not is_split(tensor):
        return tensor
    found: Any = tensor
    if found.device.type != found.device_mesh.device_type:  # rows on the host are gathered where all others are
        found = _rows(local(tensor), found, found.device_mesh)
    with sharing(tensor).pulse.waiting():
        gathered: Tensor = found.full_tensor()
        if gathered.is_cuda:  # else the wait comes later, wherever the values are read
            torch.cuda.current_stream(gathered.device).synchronize()
    return gathered


def everywhere(tensor: Tensor, test: Callable[[Tensor], bool]) -> bool:
    """Whether the rows of every rank pass a test, which all make; of a tensor that is not split, whether it passes."""
    passed = test(local(tensor))
    return not any(sharing(tensor).total([float(not passed)]))


@dataclass(eq=False)
class Piece:
    """This rank's rows of one parameter, which is `name` in each of `modules` (of tied ones there are several)."""

    modules: Sequence[nn.Module]
    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    own: Tensor | None
    """Until FSDP2's parameter has them."""
    on_host: bool = False
    """Whether they wait in the host's memory."""

    @classmethod
    def of(
        cls, modules: Sequence[nn.Module], name: str, tensor: Tensor, ranks: Ranks, *, on_host: bool = False
    ) -> Piece:
        """The piece of a whole tensor. The parameter has its shape and no values until the model is split."""
        first, last = rows_of(len(tensor), ranks)
        own = tensor.detach()[first:last]
        own = own.cpu() if on_host and tensor.device.type != "cpu" else own.clone()
        piece = cls(modules, name, tuple(tensor.shape), own, on_host)
        piece._put(nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False))
        return piece

    def train(self) -> None:
        """Say that the parameter is trained, which FSDP2 has to know before the first pass."""
        self.parameter.requires_grad_()

    def fill(self, mesh: DeviceMesh) -> None:
        """Give FSDP2's parameter its values."""
        parameter = self.parameter
        assert self.own is not None
        if self.own.device.type == mesh.device_type:
            rows = _rows(self.own, parameter, mesh)
        else:  # else they would be moved to the mesh's devices
            rows = torch.empty_like(parameter, device=self.own.device)
            local(rows).copy_(self.own)
        self.own = None  # it pads those of a rank with fewer rows, in a copy; those on the host were copied
        self._put(nn.Parameter(rows, requires_grad=parameter.requires_grad))

    @property
    def parameter(self) -> nn.Parameter:
        found = self.modules[0]._parameters[self.name]
        assert found is not None
        return found

    def _put(self, parameter: nn.Parameter) -> None:
        for module in self.modules:
            module._parameters[self.name] = parameter


class _SplitPass(nn.Module):
    """What a pass runs in: FSDP2 begins and ends a pass with the module that is called first."""

    through: Sequence[Any]

    def __init__(self, model: nn.Module, units: Sequence[nn.Module], through: Sequence[Any]) -> None:
        super().__init__()
        self.add_module("model", model)
        self.units = nn.ModuleList(units)
        self.__dict__["through"] = through

    def forward(self, call: Callable[[], Any]) -> Any:
        for unit in self.through:
            unit.unshard()
        found = call()
        for unit in self.through:
            unit.reshard()
        return found


class _Beside(nn.Module):
    """A unit that is gathered otherwise than by FSDP2's own hooks; these are on this module, which nobody calls."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.modules_of_unit = nn.ModuleList(modules)


@dataclass(frozen=True, eq=False)
class Unit:
    """Modules whose weights are gathered together, and their pieces."""

    modules: Sequence[nn.Module]
    pieces: Sequence[Piece]
    when: Literal["called", "forward", "by hand", "pass"] = "called"
    """When it is gathered: when its module is called, and again for the backward pass; when it is called alone; when the
    caller says so (`SplitWeights.gathered`); from the begin of a pass to its end."""

    @property
    def on_host(self) -> bool:
        """Whether its rows wait in the host's memory: all of them, or none."""
        return any(piece.on_host for piece in self.pieces)


class SplitWeights:
    """The weights of one model, split over the ranks."""

    def __init__(
        self, model: nn.Module, units: Sequence[Unit], rest: Sequence[Piece], ranks: Ranks, device: torch.device
    ) -> None:
        """`units` are the innermost first; `rest` are pieces of no unit, gathered for a whole pass. What is in no piece
        stays whole on every rank."""
        self.ranks = ranks
        self._running = False
        self._by_hand: dict[nn.Module, Any] = {}
        self._open: set[nn.Module] = set()
        mesh = _mesh(ranks, device)
        pieces = [*(piece for unit in units for piece in unit.pieces), *rest]
        split = {piece.parameter for piece in pieces}
        kept = {parameter for parameter in model.parameters() if parameter not in split}
        through: list[nn.Module] = []
        beside: list[nn.Module] = []
        for unit in units:
            module: Any = unit.modules[0]
            if unit.when != "called":
                module = _Beside(unit.modules)
                beside.append(module)
            if unit.when == "by hand":
                self._by_hand.update(dict.fromkeys(unit.modules, module))
            elif unit.when == "pass":
                through.append(module)
            if unit.when == "called":
                module.register_forward_hook(_without_views)
            _split(module, mesh, kept, on_host=unit.on_host)
            if unit.when == "forward":
                unit.modules[0].register_forward_pre_hook(partial(_gather, module))
                unit.modules[0].register_forward_hook(partial(_free, module), always_call=True)
            for piece in unit.pieces:
                piece.fill(mesh)
            kept |= {piece.parameter for piece in unit.pieces}  # not the root's
        self._root: Any = _SplitPass(model, beside, through)
        _split(self._root, mesh, kept)
        for piece in rest:
            piece.fill(mesh)
        self._root.set_reduce_scatter_unused_params(True)
        with torch.no_grad():
            self.run(lambda: None)  # FSDP2 takes over the values that were filled in

    def run(self, call: Callable[[], _T]) -> _T:
        """What `call` returns, run as one pass; a pass within a pass is a part of it. Every rank makes the same passes."""
        if self._running:
            return call()
        self._running = True
        self.ranks.pulse.passes += 1
        try:
            found = self._root(call)
            if not torch.is_grad_enabled():
                # No backward pass follows, in which FSDP2 would free the root's weights and forget the order of the units;
                # with this order left, the next backward pass would gather a unit that it does not need yet.
                self._root.reset_iter_state()
            return found
        except BaseException:
            self._root.reset_iter_state()
            raise
        finally:
            self._running = False
            self.ranks.pulse.passes += 1

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """The weights of a unit that is gathered by hand, within a pass; of any other module nothing is done."""
        unit = self._by_hand.get(module)
        if unit is None or module in self._open:
            yield
            return
        self._open.add(module)
        unit.unshard()
        try:
            yield
        finally:
            self._open.discard(module)
            unit.reshard()


def _rows(own: Tensor, like: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's rows as a tensor of the whole one's shape, split over a mesh; they are moved to its devices."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    lies = [Shard(0)] if mesh.ndim == 1 else [Replicate(), Shard(0)]
    return DTensor.from_local(own, mesh, lies, run_check=False, shape=like.shape, stride=like.stride())


def _mesh(ranks: Ranks, device: torch.device) -> DeviceMesh:
    """The ranks as FSDP2 takes them: (n,), or (nodes, ranks of a node), of which the second share the rows."""
    from torch.distributed.device_mesh import init_device_mesh

    if ranks.parts == ranks.size:
        mesh = init_device_mesh(device.type, (ranks.size,))
    else:
        sizes = (ranks.size // ranks.parts, ranks.parts)
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("nodes", "rows"))
    _ranks_of[mesh] = ranks
    return mesh


def _without_views(module: nn.Module, args: Any, output: Any) -> Any:
    """A unit's output as tensors of their own: FSDP2 hooks on to them, and code that writes into a view would lose its hook."""
    if isinstance(output, Tensor):
        return output.clone() if output.requires_grad and output._base is not None else output
    if type(output) is tuple:
        return tuple(_without_views(module, args, each) for each in output)
    return output


def _gather(unit: Any, *call: Any) -> None:
    unit.unshard()


def _free(unit: Any, *call: Any) -> None:
    unit.reshard()


def _split(module: Any, mesh: DeviceMesh, kept: set[nn.Parameter], *, on_host: bool = False) -> None:
    """Let FSDP2 split a unit, summing gradients in float32 and dividing by nothing."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    place = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if on_host else OffloadPolicy()
    fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=place, ignored_params=kept)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # else a multiplying sum, which gloo does not have
