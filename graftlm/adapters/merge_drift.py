"""How far a merged model is from the live one (base and adapter, not merged), measured on eval rows before writing.

    relative difference   |z - z'| / |z|      logits z (n, V) of the live model and z' of the merged one, each row minus its
                                              mean, since softmax ignores it; n target tokens of all rows
    agreement             share of the n with the same most likely token

A merged model is measured as it would be loaded: its weights are rounded to the dtype they are written in, or quantized to 4
bits again, and put into a base in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.adapters.merge import Merger
from graftlm.base.context import ForwardContext
from graftlm.base.loading import Base
from graftlm.base.modules import Stored
from graftlm.progress import working
from graftlm.segments import Segments

_MOST_BYTES = 1 << 30
"""Most memory for the live model's logits; further rows are not measured."""


@dataclass(frozen=True)
class EvalRow:
    """An eval row: its ids (L,), and the positions before its target tokens (n,)."""

    ids: Tensor
    before: Tensor


@dataclass(frozen=True)
class LiveLogits:
    """The live model's logits of each row."""

    rows: tuple[EvalRow, ...]
    logits: tuple[Tensor, ...]  # each (n, V), float32, on the CPU
    loss: float
    """Mean over all target tokens."""

    @property
    def tokens(self) -> int:
        return sum(len(z) for z in self.logits)


@dataclass(frozen=True)
class Drift:
    """How far a merged model's logits of the same rows are from the live model's."""

    onto: str
    loss: float
    relative: float
    agreement: float

    def to_json(self) -> dict[str, Any]:
        return {"onto": self.onto, "loss": self.loss, "relative": self.relative, "agreement": self.agreement}


def limit_rows(rows: Sequence[EvalRow], vocabulary: int, most: int) -> list[EvalRow]:
    """The first rows whose logits fit in memory, at most `most`."""
    kept: list[EvalRow] = []
    held = 0
    for row in rows[:most]:
        held += len(row.before) * vocabulary * 4
        if kept and held > _MOST_BYTES:
            break
        kept.append(row)
    return kept


@torch.no_grad()
def logits_of(base: Base, slot: int, row: EvalRow) -> Tensor:
    """One row through a base and the adapter in `slot`: (n, V), float32, on the CPU."""
    segments = Segments(lengths=(len(row.ids),), slots=(slot,), stacked=not base.packs)
    hidden = base.hidden(row.ids.to(base.device), ForwardContext(segments))[row.before.to(base.device)]  # (n, width)
    return base.logits(hidden, ForwardContext(Segments(lengths=(len(hidden),), slots=(slot,)))).float().cpu()


def measure_live(base: Base, slot: int, rows: Sequence[EvalRow]) -> LiveLogits:
    """Compute the live model's logits of all rows."""
    with working("measuring the live model", len(rows), "rows") as task:
        logits: list[Tensor] = []
        for row in rows:
            logits.append(logits_of(base, slot, row))
            task.to(len(logits))
    return LiveLogits(tuple(rows), tuple(logits), _loss(rows, logits))


def _loss(rows: Sequence[EvalRow], logits: Sequence[Tensor]) -> float:
    total = sum(float(F.cross_entropy(z, r.ids[r.before + 1].long(), reduction="sum")) for r, z in zip(rows, logits))
    return total / sum(len(z) for z in logits)


def compare(base: Base, onto: str, live: LiveLogits) -> Drift:
    """Compare a merged model with the live one."""
    apart = size = 0.0
    same = 0
    found: list[Tensor] = []
    with working(f"measuring the model merged onto {onto}", len(live.rows), "rows") as task:
        for row, z in zip(live.rows, live.logits):
            w = logits_of(base, 0, row)
            centred = (z - z.mean(1, keepdim=True)).double()
            apart += float((centred - (w - w.mean(1, keepdim=True)).double()).square().sum())
            size += float(centred.square().sum())
            same += int((z.argmax(1) == w.argmax(1)).sum())
            found.append(w)
            task.to(len(found))
    return Drift(onto, _loss(live.rows, found), (apart / size) ** 0.5 if size else 0.0, same / live.tokens)


@torch.no_grad()
def load_merged_weights(base: Base, merger: Merger, dtype: torch.dtype) -> None:
    """Load the merged weights in `dtype` into a base in memory; its 4-bit layers quantize them again."""
    names = {"weight" if n == "" else n: m for n, m in base.model.named_modules()}
    for parameter in merger.base.forms:
        if parameter in (merger.embedding, merger.head) or not merger.touches(parameter):
            continue
        module: Any = names.get(parameter) or names.get(parameter.removesuffix(".weight"))
        module = module if isinstance(module, Stored) else module.stored
        exact = torch.float32 if module.precision in ("nf4", "int8") else dtype
        weight = merger.weight(parameter, exact).to(base.device)
        module.set_weight(weight.transpose(-1, -2) if module.transposed else weight)
    embedding: Any = base.structure.embedding
    head: Any = base.structure.head
    shared = head.weight is embedding.weight and not merger.unties
    kept = embedding.weight.dtype
    for module, parameter in ((embedding, merger.embedding), (head, merger.head)):
        if module is head and shared:
            head.weight = embedding.weight
        elif merger.touches(parameter) or (merger.unties and module is head):
            new = merger.weight(parameter, dtype).to(device=base.device, dtype=kept)
            module.weight = nn.Parameter(new, requires_grad=False)
