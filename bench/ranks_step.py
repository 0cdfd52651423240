"""One rank's step on a fake card, its weights split by `graftlm.distributed.shard`: the process that `bench/ranks.py` starts.

    python ranks_step.py      {"config": {...}, "method": "lora", "precision": "nf4", "tokens": 1024, "ranks": 2, ...} a line

Prints a line for each: {"peak": bytes held at once in the second step, "within": bytes that the rank sends to ranks of its
node in it, "between": to those of other nodes}. With "--where", also what is held at the peak, largest first, and the lines
that made it. Each row runs in a fork, since a card cannot be taken out of a process again.

The step is the product's: its splitting, its passes, its sums, its optimizer. Stand-ins are the card's tensors, its streams
(`fake_fsdp.py`), the collectives, of which the bytes are counted as a ring sends them, and the storages that FSDP2
empties and fills again, whose bytes the fake card has to be told.
"""

# pyright: basic

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "gpu")]


def guard() -> str:
    """The folder of the fake card's guard, compiled by another process: PyTorch must not be loaded before it."""
    code = "from fixtures import compile_guard; print(compile_guard())"
    place = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'gpu'}"}
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **place}, capture_output=True, text=True, check=True
    ).stdout.strip()


sys.path[:0] = [guard()]
for name in ("peft", "bitsandbytes"):  # neither believes in the card
    sys.modules[name] = None  # type: ignore[assignment]
import fake_card  # noqa: E402

fake_card.install()

import fake_fsdp  # noqa: E402
import scenarios  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.fsdp._fully_shard import _fsdp_param  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

from graftlm.base.loading import Base  # noqa: E402
from graftlm.distributed.group import Ranks  # noqa: E402
from graftlm.kernels import reference  # noqa: E402
from graftlm.training import trainer  # noqa: E402


class Card(fake_card.FakeCard):
    """The fake card, which also counts storages that FSDP2 empties and fills again."""

    def __init__(self, *, where: bool = False) -> None:
        super().__init__()
        self.where = where
        self.made: dict[int, str] = {}
        self.at_peak: list[tuple[int, str]] = []

    def resize(self, tensor: torch.Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        if storage.size() == size:
            return
        storage.resize_(size)
        held = -(-size // 512) * 512
        self.bytes += held - self._held.get(storage._cdata, 0)
        self._held[storage._cdata] = held
        self._highest()

    def _hold(self, tensor: torch.Tensor) -> None:
        key = tensor.untyped_storage()._cdata
        if self.where and key not in self._held:
            self.made[key] = f"{tuple(tensor.shape)} {tensor.dtype} {lines()}"
        super()._hold(tensor)
        self._highest()

    def _highest(self) -> None:
        self.trace.peak_bytes = max(self.trace.peak_bytes, self.bytes)
        if self.where and self.bytes == self.trace.peak_bytes:
            held = [(size, self.made.get(key, "?")) for key, size in self._held.items() if size > 1 << 24]
            self.at_peak = [(self.bytes, f"in all, at {lines()}"), *sorted(held, reverse=True)]


def lines() -> str:
    """The lines that led here, the innermost first, without those of the stand-ins."""
    found = [f for f in traceback.extract_stack(limit=40) if Path(f.filename).name not in _OF_THE_CARD]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(found))


_OF_THE_CARD = {"ranks_step.py", "fake_card.py", "fake_fsdp.py", "_pytree.py", "eval_frame.py", "_compile.py"}


class Sending:
    """The collectives of one rank, of which only the bytes are counted: those that it sends in a ring.

    In a ring over ranks of several nodes one of a node's ranks sends to the next node, as often as the others to each other.
    """

    def __init__(self, on_node: int) -> None:
        self.on_node = on_node
        self.within = self.between = 0.0

    def install(self) -> None:
        dist.all_gather_single = self.gather  # type: ignore[assignment]
        dist.reduce_scatter_single = self.scatter  # type: ignore[assignment]
        dist.all_reduce = self.sum  # type: ignore[assignment]

    def gather(self, output: Any, input: Any, group: Any = None, async_op: bool = False) -> None:
        self._count(output.nbytes, group)

    def scatter(self, output: Any, input: Any, op: Any = None, group: Any = None, async_op: bool = False) -> None:
        self._count(input.nbytes, group)

    def sum(self, tensor: Any, op: Any = None, group: Any = None, async_op: bool = False) -> None:
        if tensor.is_cuda:
            self._count(2 * tensor.nbytes, group)

    def _count(self, size: int, group: Any) -> None:
        ranks = dist.get_process_group_ranks(group) if group is not None else list(range(dist.get_world_size()))
        nodes = len({rank // self.on_node for rank in ranks})
        sent = size * (len(ranks) - 1) / len(ranks)
        crossing = nodes / len(ranks) if nodes > 1 else 0.0
        self.between += sent * crossing
        self.within += sent * (1 - crossing)


def install(card: Card) -> None:
    """PyTorch's FSDP2 on the fake card, which counts what it empties and fills."""
    fake_fsdp.install()
    _fsdp_param.alloc_storage = lambda tensor: card.resize(tensor, tensor.numel() * tensor.itemsize)
    _fsdp_param.free_storage = lambda tensor: card.resize(tensor, 0)


def split_base(row: dict[str, Any]) -> Base:
    """A base of random weights that the row's ranks share."""
    size, nodes = row["ranks"], row["nodes"]
    hybrid = {"node_ranks": size // nodes} if row["layout"] == "hybrid" else {}
    ranks, config = Ranks(0, size, size // nodes, **hybrid), LlamaConfig(**row["config"])
    trained = row["method"] == "full"
    return fake_fsdp.split_base(config, row["precision"], ranks, trained=trained, host_layers=row["offloaded"])


def step(row: dict[str, Any], where: bool = False) -> dict[str, int]:
    """The second step of a rank."""
    reference.SLAB = 1 << 40  # each weight is stored in one piece: sooner traced, and loading is not counted
    sending = Sending(row["ranks"] // row["nodes"])
    sending.install()
    with Card(where=where) as card:
        install(card)
        base = split_base(row)
        options = {
            "activation_checkpointing": True, "optimizer": row["optimizer"], "optimizer_in_backward": row["in_backward"],
            "max_grad_norm": 0.0 if row["in_backward"] else 1.0,
        }  # fmt: skip
        trial = scenarios._trial(base, row["method"], [row["tokens"]] * row["ranks"], options)
        for _ in range(2):
            card.reset()
            sending.within = sending.between = 0.0
            trainer.optimizer_step(base, [trial], row["tokens"], ranks=base.structure.sharing)
        if where:
            sys.stderr.writelines(f"{size / 1e6:10.1f} MB {line}\n" for size, line in card.at_peak)
        return {"peak": card.trace.peak_bytes, "within": round(sending.within), "between": round(sending.between)}


def forked(row: dict[str, Any]) -> None:
    """Print a row's figures from a fork of this process."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit(f"the row {row} failed")
        return
    try:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=row["ranks"])
        sys.stdout.write(json.dumps(step(row, "--where" in sys.argv)) + "\n")
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    for line in sys.stdin:
        forked(json.loads(line))
