"""Decoding on a GPU by CUDA graphs: a step of up to 8, 16, ... sequences is captured once and launched as one from then on.

    decoder, reason = graph_decoder_of(base, cache, most=128)
    states = decoder.hidden(ids, lengths, pasts, batch_slots, slots)     # None: this step needs the model's own code

A step of decoding is hundreds of short kernels, and launching them takes the host longer than the GPU needs to run them. What
a step launches depends here on the number of its rows, rounded up, on the largest rank of its adapters, rounded up, on which
layers have adapters, and on whether its adapters are more than usual: tokens, positions, blocks, lengths and adapters are read
on the GPU from memory that does not move (`base/decode_inputs.py`, `adapters/factor_tables.py`). The first step of a kind runs
launch by launch, which loads its kernels and makes their checks; the second is captured; later ones fill in their numbers, one
copy from the host, and are replayed. Where a first run or a capture fails, `why_eager` says why, in the log too: what is
captured by then is replayed as before, and the model's own code runs all other steps.

Steps with prompts in them are not decoding, more than MOST_ROWS rows are not captured, and adapters of other kinds (DoRA, whole
layers, rows of the embedding, experts) are not in tables: those steps run as everywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from graftlm import kernels
from graftlm.adapters.factor_tables import FactorTables
from graftlm.base.context import ForwardContext
from graftlm.base.decode_inputs import DecodeInputs
from graftlm.base.kv_cache import PagedKVCache
from graftlm.base.loading import Base
from graftlm.base.modules import StoredStack
from graftlm.segments import Segments
from graftlm.serving.engine.native_decoder import SPLIT

_log = logging.getLogger("graft.serve")

RANKS = (0, 16, 32, 64, 128)  # those of a step's adapters are rounded up to one of these
MOST_ROWS = 512  # of a captured step: with more, kernels take longer than their launches
_TILES = 16  # of rows with one adapter, beside one for each TABLE_TOKENS rows; where more are needed, one for each row

assert RANKS[-1] == kernels.MOST_TABLE_RANK


class Capturing(Protocol):
    """What captures a region: `kernels.Graphs`."""

    def capture(self, region: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]: ...


def row_counts(most: int) -> list[int]:
    """The numbers of rows that steps are captured for: the smaller, the closer, up to `most` or MOST_ROWS."""
    most = min(most, MOST_ROWS)
    counts = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most, 64)]
    return [n for n in counts if n < most] + [most]


@dataclass(eq=False)
class CapturedStep:
    """Steps of one number of rows and of tiles and one largest rank: their inputs, and the graph once there is one."""

    inputs: DecodeInputs
    rank: int
    tables: FactorTables
    runs: int = 0
    replay: Callable[[], None] | None = None
    out: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        return self.inputs.positions

    def add_adapters(self, module: Any, y: Tensor, x: Tensor) -> None:
        table = self.tables.of(module) if self.rank else None
        if table is not None:
            x = x.to(self.tables.dtype).contiguous()  # a mixture's router multiplies in float32
            kernels.add_by_table(y, x, table, self.inputs.tiles, self.rank)

    def run(self, base: Base) -> Tensor:
        """The forward pass of all rows, (rows, width): what is captured."""
        rows = self.inputs.rows
        segments = Segments(lengths=(1,) * rows, slots=(0,) * rows, kv_cache=self.inputs.attention(), on_device=self)
        return base.hidden(self.inputs.ids, ForwardContext(segments))


class GraphDecoder:
    """Steps of decoding of one base over one KV cache, of up to `most` sequences."""

    def __init__(self, base: Base, cache: PagedKVCache, most: int, graphs: Capturing) -> None:
        self.base, self.cache, self.graphs = base, cache, graphs
        self.why_eager = ""
        """Why no further step is captured, if one could not be; the model's own code runs those that are not."""
        self._counts = row_counts(most)
        self._tables = FactorTables(base, entries=self._counts[-1] + 1)
        self._blocks = torch.zeros(self._counts[-1], cache.tables.shape[1], dtype=torch.int64, device=cache.device)
        self._inputs: dict[tuple[int, int], DecodeInputs] = {}  # by rows and tiles
        self._steps: dict[tuple[int, int, int, tuple[int, ...]], CapturedStep] = {}

    def hidden(
        self,
        ids: Tensor,
        lengths: Sequence[int],
        pasts: Sequence[int],
        batch_slots: Sequence[int],
        slots: Sequence[int],
    ) -> Tensor | None:
        """ids (n,) on the host, of sequences in the order of their slots -> their states behind the last norm (n, width).

        As `NativeDecoder.hidden`; the states are overwritten by the next step. None where a segment has several tokens, there
        are more than this was made for, an adapter is not in tables, or the step failed: its keys and values are written anew.
        """
        n = len(lengths)
        if max(lengths) > 1 or n > self._counts[-1]:
            return None
        found = self._tables.entries_of(set(slots))
        if found is None:
            return None
        entries, largest = found
        ranges = Segments(lengths=tuple(lengths), slots=tuple(slots)).slot_ranges if largest else ()
        tiles = kernels.tiles_of([(entries[slot], a, b) for slot, a, b in ranges if slot], kernels.TABLE_TOKENS)
        step = self._step(n, largest, len(tiles))
        if self.why_eager and step.replay is None:
            return None
        step.inputs.fill(ids, pasts, batch_slots, tiles)
        states = self._run(step)
        return None if states is None else states[:n]

    def capture_all(self) -> None:
        """Capture the steps of the bare base before the first request, so that none waits for it; the largest first, whose
        memory the others use too."""
        for rows in reversed(self._counts):
            step = self._step(rows, 0, 0)
            step.inputs.fill(torch.empty(0, dtype=torch.int64), (), (), ())
            while step.runs < 2:
                if self._run(step) is None:
                    return

    def _step(self, n: int, largest: int, tiles: int) -> CapturedStep:
        rows = next(count for count in self._counts if count >= n)
        rank = next(rank for rank in RANKS if rank >= largest)
        layers = self._tables.layers if rank else ()  # those that have adapters run other kernels
        usual = min(rows, -(-rows // kernels.TABLE_TOKENS) + _TILES)
        room = usual if tiles <= usual else rows
        key = rows, room, rank, layers
        if key not in self._steps:
            self._steps = {k: s for k, s in self._steps.items() if not k[2] or k[3] == self._tables.layers}
            if (rows, room) not in self._inputs:
                self._inputs[rows, room] = DecodeInputs(self.cache, self._blocks, rows=rows, tiles=room)
            self._steps[key] = CapturedStep(self._inputs[rows, room], rank, self._tables)
        return self._steps[key]

    def _run(self, step: CapturedStep) -> Tensor | None:
        """The states of all rows; None, and `why_eager` is set, where the step's first run or its capture failed."""
        if step.replay is not None and step.out is not None:
            step.replay()
            return step.out
        step.runs += 1
        try:
            if step.runs == 1:
                return step.run(self.base)
            step.replay, step.out = self.graphs.capture(lambda: step.run(self.base))
            step.replay()
            return step.out
        except Exception as error:  # of PyTorch, Triton or memory: the model's own code may do without what failed
            step.replay = step.out = None
            what = "run" if step.runs == 1 else "captured"
            said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            self.why_eager = f"a step could not be {what} ({said})"
            _log.warning("decoding goes on without CUDA graphs: %s", self.why_eager)
            return None


def graph_decoder_of(base: Base, cache: PagedKVCache, most: int) -> tuple[GraphDecoder | None, str]:
    """Decoding by graphs of a base over `cache`, for up to `most` sequences; or None, and why its kernels are launched one by
    one."""
    if base.device.type != "cuda":
        return None, f"CUDA graphs are for GPUs; this is {base.device}"
    if base.structure.weights is not None:
        return None, SPLIT
    if base.keeps_state:
        return None, "a forward pass changes something in this model's modules"
    for layer, keys in cache.keys.items():
        if not kernels.reads_blocks(keys, cache.values[layer]):
            return None, f"the kernels of decoding do not run here, or not with the heads of layer {layer}"
    like = torch.empty(0, dtype=base.activation_dtype, device=base.device)
    for name, module in base.stored().items():
        if isinstance(module, StoredStack) and not (
            module.dense is not None
            and module.dense.dtype == like.dtype
            and kernels.has_grouped_matmul(like, module.in_features, module.out_features)
        ):
            return (
                None,
                f"the experts of {name} are taken one by one, and how many rows each gets decides what is launched",
            )
    return GraphDecoder(base, cache, most, kernels.Graphs(base.device)), ""
