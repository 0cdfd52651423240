"""The processes of one training run: ranks that hold the same model, compute their shares of each step, and add up.

Every rank knows the whole step from the seed, so that nothing is sent but sums: of losses and flags (`total`, on the host,
in float64) and of gradients (`add_up`). With one rank, `ALONE`, every function gives back what it was given.

Errors: what every rank finds, each of them raises (`agreeing` makes that sure while a run is being set up). What one rank alone
meets later ends its process, and the launcher ends the others. One that hangs is found by `watch.py`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from graftlm import errors, progress
from graftlm.distributed.deal import deal
from graftlm.distributed.pulse import SECONDS, Pulse
from graftlm.distributed.watch import watched
from graftlm.errors import ConfigError, GraftError, RunError, Stopped
from graftlm.jsonfile import parse_json

TIMEOUT = timedelta(hours=6)
"""How long a rank waits for the others: longer than one may save, or generate answers. `watch.py` ends those that hang."""
_SEEN_WITHIN = 30.0  # seconds until a file that one node has written is seen by another
_BUFFER = 1 << 25  # values of gradients that are added up at once: 128 MB in float32
_SOON = 5.0  # seconds in which ranks that fail for the same reason have all failed
_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run."""

    rank: int = 0
    size: int = 1
    on_machine: int = 1
    """How many of them share this machine's processor and memory."""
    pulse: Pulse = field(default_factory=Pulse, compare=False, repr=False)
    """Its signs of progress."""
    node_ranks: int = 0
    """Where each node has all of the split weights: over how many ranks of a node they are split; 0: over all ranks."""

    @property
    def parts(self) -> int:
        """Over how many ranks a weight that is split is split."""
        return self.node_ranks or self.size

    @property
    def part(self) -> int:
        """Which of the parts this rank holds, as another rank of each other node does."""
        return self.rank % self.parts

    @property
    def counted(self) -> bool:
        """Whether this rank's rows of split weights are those that are counted and written; other nodes hold copies."""
        return self.rank < self.parts

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and speaks to the user."""
        return self.rank == 0

    def take_threads(self) -> None:
        """Take this rank's part of the processor's threads, which the ranks on this machine share."""
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.on_machine))

    def own(self, items: Sequence[_T], lengths: Sequence[int]) -> list[_T]:
        """The items that this rank computes, by their lengths in tokens."""
        if self.size == 1:
            return list(items)
        return [items[i] for i in deal(lengths, self.size)[self.rank]]

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all ranks, in float64. Every rank gives equally many."""
        if self.size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64)
        with self.pulse.waiting():
            dist.all_reduce(summed)
        return summed.tolist()

    def wait_for_all(self) -> None:
        """Go on once every rank has come here."""
        self.total([0.0])

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of each value that any rank gives. Every rank gives equally many."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.int64)
        with self.pulse.waiting():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def add_up(self, gradients: Sequence[Tensor]) -> None:
        """Replace each gradient by its sum over all ranks, summed in float32 and rounded once."""
        if self.size == 1:
            return
        waiting: list[Tensor] = []
        for piece in _pieces(gradients):
            if waiting and sum(t.numel() for t in waiting) + piece.numel() > _BUFFER:
                self._add_up(waiting)
                waiting = []
            waiting.append(piece)
        if waiting:
            self._add_up(waiting)

    def _add_up(self, pieces: Sequence[Tensor]) -> None:
        flat = torch.cat([piece.reshape(-1).float() for piece in pieces])
        with self.pulse.waiting():
            dist.all_reduce(flat)
        for piece, summed in zip(pieces, flat.split([p.numel() for p in pieces])):
            piece.copy_(summed.view_as(piece))

    def add_up_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Give every rank the sum of each parameter's gradient; what no rank has a gradient of keeps none."""
        if self.size == 1:
            return
        for parameter, having in zip(parameters, self.total([float(p.grad is not None) for p in parameters])):
            if having and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.add_up([p.grad for p in parameters if p.grad is not None])

    def from_first(self, call: Callable[[], Any]) -> Any:
        """What `call` returns on the first rank, as JSON values on all; a GraftError that it raises there, all raise."""
        if self.size == 1:
            return call()
        message: dict[str, Any] = {}
        if self.first:
            try:
                message = {"found": call()}
            except GraftError as error:
                message = {"kind": type(error).__name__, "error": str(error)}
        message = self._sent(message, sender=0)
        if "error" in message:
            raise _everywhere(message["kind"], message["error"])
        return message["found"]

    def of_first(self, values: Sequence[int]) -> list[int]:
        """The first rank's values, of which every rank gives equally many."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.int64)
        with self.pulse.waiting():
            dist.broadcast(found, 0)
        return found.tolist()

    def of_all(self, value: Any) -> list[Any]:
        """The value of every rank, JSON, by rank."""
        if self.size == 1:
            return [value]
        return [self._sent({"value": value}, sender)["value"] for sender in range(self.size)]

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Around the set-up of a run: a GraftError of any rank, every rank raises, once all have come to the end.

        It has the rank's number in front, unless all ranks met it.
        """
        own: GraftError | None = None
        try:
            yield
        except GraftError as error:
            if self.size == 1:
                raise
            own = error
        flags = [0.0] * self.size
        flags[self.rank] = float(own is not None)
        failed = [rank for rank, flag in enumerate(self.total(flags)) if flag]
        if not failed:
            return
        told = self._sent({} if own is None else {"kind": type(own).__name__, "error": str(own)}, sender=failed[0])
        where = "" if len(failed) == self.size else f"rank {failed[0]} of {self.size}: "
        raise _everywhere(told["kind"], where + told["error"]) from own

    @contextmanager
    def failing_alike(self) -> Iterator[None]:
        """Around a part of the set-up in which ranks make passes together: a GraftError that all meet, all raise as one.

        What one meets alone it raises, and its process ends: the others wait for it in a pass, and cannot come to an end.
        """
        try:
            yield
        except GraftError as error:
            if self.size == 1 or error.everywhere:
                raise
            told = self._of_all_soon({"kind": type(error).__name__, "error": str(error)})
            if told is not None:
                raise _everywhere(told["kind"], told["error"]) from error
            error.alone = True
            raise

    def _of_all_soon(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """The first rank's message, if every rank has one within seconds; in the store in which ranks met, where nobody has to
        wait for the others."""
        store: Any = distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
        names = [f"graft-failed-{rank}" for rank in range(self.size)]
        store.set(names[self.rank], json.dumps(message))
        until = time.monotonic() + _SOON
        while not store.check(names):
            if time.monotonic() > until:
                return None
            time.sleep(0.05)
        return parse_json(store.get(names[0]).decode())

    def check_alike(self, values: Mapping[str, Any]) -> None:
        """RunError, on every rank, where one has another value (JSON) than the first under the same name."""
        if self.size == 1:
            return
        own = parse_json(json.dumps(dict(values)))
        first = self.from_first(lambda: own)
        with self.agreeing():
            for name, value in first.items():
                if own[name] != value:
                    raise RunError(
                        f"{name} is {own[name]!r}, and on rank 0 {value!r}; every rank needs the same options, the same "
                        "files and the same version of Graft"
                    )

    def split_in_nodes(self) -> Ranks:
        """These ranks, of which those of a node share the weights, and every node has all of them.

        Raises ConfigError, on every rank, where there is one node, a rank alone on each, or not equally many on each.
        """
        own = int(os.environ.get("LOCAL_RANK", self.rank % self.on_machine)) == self.rank % self.on_machine
        found = self.of_all([self.on_machine, own])
        counts = [count for count, _ in found]
        with self.agreeing():
            check_nodes(counts, all(in_order for _, in_order in found))
        return replace(self, node_ranks=self.on_machine)

    def check_shared(self, folder: Path) -> None:
        """RunError, on every rank, where one does not see what the first writes into a folder."""
        if self.size == 1:
            return
        name: str = self.from_first(lambda: _token(folder))
        try:
            with self.agreeing():
                if not self.first and not _appears(folder / name):
                    raise RunError(
                        f"--out {folder} is not the folder that rank 0 writes to: its files do not appear here. Put it on "
                        "storage that all nodes share, under the same path"
                    )
        finally:
            if self.first:
                (folder / name).unlink(missing_ok=True)

    def _sent(self, message: dict[str, Any], sender: int) -> dict[str, Any]:
        """The sender's message on every rank."""
        data = json.dumps(message).encode() if self.rank == sender else b""
        length = torch.tensor([len(data)])
        with self.pulse.waiting():
            dist.broadcast(length, sender)
        sent = torch.zeros(int(length), dtype=torch.uint8)
        if self.rank == sender:
            sent = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(sent, sender)
        return parse_json(bytes(sent.tolist()).decode())


ALONE = Ranks()


def check_nodes(counts: Sequence[int], in_order: bool) -> None:
    """Raise ConfigError where a model that is split over each node makes no sense; `counts` are of the node of each rank."""
    each, size = counts[0], len(counts)
    if min(counts) != max(counts) or size % each or not in_order:
        order = "" if in_order else ", whose numbers do not follow one another"
        raise ConfigError(
            f"--layout hybrid needs equally many ranks on each node, with numbers in a row, found {min(counts)} on one node"
            f"{order}, on others {max(counts)}, {size} in all; start them with torchrun --nproc-per-node N on every node, or "
            "take --layout shard"
        )
    if each == size:
        raise ConfigError(
            f"--layout hybrid has the model once on each node, and all {size} ranks are on one; take --layout shard, or start "
            "ranks on several nodes (torchrun --nnodes)"
        )
    if each == 1:
        raise ConfigError(
            f"--layout hybrid splits the model over the ranks of a node, and each of {size} nodes has one; take --layout "
            "replicate, or --layout shard to split it over all nodes"
        )


def _token(folder: Path) -> str:
    name = f".shared-{uuid.uuid4().hex}"
    (folder / name).touch()
    return name


def _appears(file: Path) -> bool:
    until = time.monotonic() + _SEEN_WITHIN
    while not file.exists():
        if time.monotonic() > until:
            return False
        with contextlib.suppress(OSError):
            os.listdir(file.parent)  # network file systems read the folder anew
        time.sleep(0.2)
    return True


def _everywhere(kind: str, message: str) -> GraftError:
    error: GraftError = getattr(errors, kind)(message)
    error.everywhere = True
    return error


def _pieces(gradients: Sequence[Tensor]) -> Iterator[Tensor]:
    """Views of all gradients, none larger than a buffer where its memory can be cut."""
    for gradient in gradients:
        yield from gradient.detach().view(-1).split(_BUFFER) if gradient.is_contiguous() else (gradient.detach(),)


@contextmanager
def joined(tell: Callable[[str], None], seconds: float = SECONDS) -> Iterator[Ranks]:
    """This process as one of the ranks that a launcher started: torchrun's environment variables say which.

    Sums of numbers go through gloo, those of a GPU's gradients through NCCL. A rank that shows no progress for about `seconds`
    is named to `tell`, on one rank, and all of them end with status 2.
    """
    pulse = Pulse(seconds)
    with _process_group():
        rank, size = dist.get_rank(), dist.get_world_size()
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.PrefixStore("graft", dist.TCPStore(host, port))  # pyright: ignore[reportPrivateImportUsage]
        with progress.heard(pulse.beat), watched(pulse, rank, size, store, tell):
            yield Ranks(rank, size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), pulse)


@contextmanager
def _process_group() -> Iterator[None]:
    """torch's process group, taken apart where all ranks leave the block.

    NCCL takes it apart with all ranks together. One that leaves by itself would wait there for the others, its error unsaid; so
    it leaves the group as it is, and its process ends with status 2 once its error was said.
    """
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    failed = threading.Event()
    atexit.register(_end_if, failed)  # what is registered first is called last
    try:
        yield
    except BaseException as error:
        together = isinstance(error, Stopped) or (isinstance(error, GraftError) and error.everywhere)
        if together and not (isinstance(error, GraftError) and error.lost):
            dist.destroy_process_group()
        elif not together:
            failed.set()
        raise
    dist.destroy_process_group()


def _end_if(failed: threading.Event) -> None:
    """End this process without the destructors of its process group, which may wait for other ranks."""
    if not failed.is_set():
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(2)


def lost_others(error: RuntimeError) -> bool:
    """Whether an error says that another rank, or the network, is gone: what that one ended with is the reason."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def launched() -> int:
    """How many ranks a launcher such as torchrun has started, this process being one of them; 1 where none has."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


_LAUNCHERS = {
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip
"""Environment variables by which torchrun tells a process that it is a rank; others of its own begin with TORCHELASTIC_."""


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a process that is no rank, although this one may be."""
    return {n: v for n, v in environment.items() if n not in _LAUNCHERS and not n.startswith("TORCHELASTIC_")}
